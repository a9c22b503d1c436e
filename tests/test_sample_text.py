import importlib
import json
import os
import re
import subprocess
import sys
from pydoc_data.topics import topics

import pytest

# The function has the module's name, and may hide it.
module = importlib.import_module("keras_moe.sample_text")
sample_text = module.sample_text

SPLITS = ("train", "validation", "test")


def test_sizes():
    sizes = {split: sum(map(len, sample_text(split))) for split in SPLITS}
    assert sum(sizes.values()) > 1_500_000
    assert sizes["train"] > 0.8 * sum(sizes.values())
    assert min(sizes.values()) > 0.02 * sum(sizes.values())


def test_no_paragraph_occurs_twice():
    paragraphs = [
        paragraph
        for split in SPLITS
        for text in sample_text(split)
        for paragraph in text.split("\n\n")
    ]
    assert len(paragraphs) == len(set(paragraphs))


def test_it_reads_as_english():
    text = "\n\n".join(sample_text("validation"))
    letters_and_spaces = sum(c.isalpha() or c.isspace() for c in text)
    assert letters_and_spaces > 0.9 * len(text)
    assert ">>>" not in text
    assert "  " not in text
    assert "``" not in text
    for word in ("the", "is", "of", "and", "to"):
        assert len(re.findall(rf"\b{word}\b", text)) > len(text) / 2000


def test_help_topics_and_docstrings_are_in_it():
    corpus = "\n\n".join(text for split in SPLITS for text in sample_text(split))
    assert "Lambda expressions (sometimes called lambda forms)" in topics["lambda"]
    assert "Lambda expressions (sometimes called lambda forms)" in corpus
    assert "Text wrapping and filling." not in corpus  # too short to be a sentence
    assert "Wrap a single paragraph of text, returning a list of wrapped" in corpus


def test_every_process_gives_the_same_text():
    code = (
        "import json, runpy; "
        f"sample_text = runpy.run_path({module.__file__!r})['sample_text']; "
        "print(json.dumps(sample_text('test')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == sample_text("test")


def test_markup_is_dropped():
    source = b'''
"""Title of the module
===================

Use :func:`tokenize.open` and ``readline``, which *never* returns `None` here.

    >>> this is(an, example)
    and its output, which is not a part of the text

.. note:: nothing of a directive is kept, whatever it may say here.
"""

# A comment of several lines says why
# the code does what it does, and it is
# kept as one paragraph.
x = {"a": 1}
#  y = x[0] + f(x)
#  z = [i for i in y if i]
#  return z, x, y == 0
'''
    paragraphs = list(module._paragraphs(module._prose_of_source(source)))
    assert paragraphs == [
        "Use tokenize.open and readline, which never returns None here.",
        "A comment of several lines says why the code does what it does, and it is "
        "kept as one paragraph.",
    ]


def test_source_that_cannot_be_parsed_is_left_out():
    assert module._prose_of_source(b"print 'a'") == []
    assert module._prose_of_source(b"\0") == []


def test_unknown_split():
    with pytest.raises(ValueError, match="`split` must be .* Received: split='dev'"):
        sample_text("dev")
