"""English text that every CPython carries, for small trainings and examples."""

import ast
import functools
import pathlib
import re
import sys
import sysconfig
import zlib

SPLITS = ("train", "validation", "test")

# A document shorter than this, in characters, says too little to learn from.
_SHORTEST_DOCUMENT = 200
# Folders of tests hold code and data for code, hardly any prose.
_SKIPPED_FOLDERS = {"__pycache__", "test", "tests", "idle_test", "site-packages"}

_ROLE = re.compile(r":[\w:+.-]+:`([^`]*)`")
_QUOTED = re.compile(r"`+([^`]+)`+")
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}(?=\w)([^*\n]*\w)\*{1,2}(?![\w*])")
_RULE = re.compile(r"^[\W_]{3,}$")
_PLAIN_WORD = re.compile(r"[(\"']*[A-Za-z][a-z'-]*[.,;:!?)\"']*")
_COMMENT_BLOCK = re.compile(r"(?:^[ \t]*#[^\n]*\n){3,}", re.MULTILINE)


def sample_text(split="train"):
    """English documents from the running Python's own documentation.

    The text is what every CPython installation carries: the topics that `help()`
    shows (`pydoc_data`), and, one document per source file of the standard
    library, its docstrings and explanatory comments. Source files are parsed, never
    imported. Markup, code and tables are dropped; what remains is prose, one
    paragraph a line, paragraphs parted by an empty line.

    A document goes to one split as a whole, chosen by the CRC-32 of its name, and
    no paragraph of the corpus occurs twice, so nothing in "validation" or "test"
    is also in "train".

    The text is the same at every call of one Python release, and differs a little
    between releases and between distributions that leave modules out: state the
    Python version next to a figure measured on it. Python 3.10 to 3.13 give 2.0 to
    2.2 million characters in all, nine tenths of them in `"train"`. Python's
    documentation and source are under the PSF licence.

    Args:
        split: str. `"train"` (nine documents in ten), `"validation"` or `"test"`
            (one in twenty each).

    Returns:
        A list of str, ordered by document name.

    Raises:
        ValueError: If `split` is none of the three names.

    Example:
    ```python
    texts = keras_moe.sample_text("train")
    tokenizer = train_sentencepiece(texts, vocabulary_size=1024)
    ```
    """
    if split not in SPLITS:
        raise ValueError(
            '`split` must be one of "train", "validation" and "test". '
            f"Received: split={split!r}"
        )
    return [text for name, text in _documents() if _split_of(name) == split]


def _split_of(name):
    # CRC-32 rather than hash(): it is the same in every process.
    bucket = zlib.crc32(name.encode("utf-8")) % 20
    return {0: "validation", 1: "test"}.get(bucket, "train")


@functools.cache
def _documents():
    """All documents as a tuple of (name, text), ordered by name."""
    seen = set()
    documents = []
    for name, parts in sorted([*_topics(), *_standard_library()]):
        paragraphs = []
        for paragraph in _paragraphs(parts):
            if paragraph not in seen:
                seen.add(paragraph)
                paragraphs.append(paragraph)
        text = "\n\n".join(paragraphs)
        if len(text) >= _SHORTEST_DOCUMENT:
            documents.append((name, text))
    return tuple(documents)


def _topics():
    from pydoc_data.topics import topics

    for name, text in topics.items():
        yield f"topics/{name}", [text]


def _standard_library():
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    for module in sorted(sys.stdlib_module_names):
        for path in [root / f"{module}.py", *(root / module).rglob("*.py")]:
            parts = path.relative_to(root).parts
            if path.is_file() and not _SKIPPED_FOLDERS.intersection(parts):
                # pydoc_data is itself generated from the topics.
                if parts[0] != "pydoc_data":
                    yield "/".join(parts), _prose_of_source(path.read_bytes())


def _prose_of_source(source):
    """Docstrings and blocks of comments of Python source, in order of the file."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, documented):
            docstring = ast.get_docstring(node)
            if docstring:
                found.append((node.body[0].lineno, docstring))
    code = source.decode("utf-8", errors="replace").replace("\r\n", "\n")
    for block in _COMMENT_BLOCK.finditer(code):
        lines = [line.strip().lstrip("#") for line in block.group().splitlines()]
        found.append((code.count("\n", 0, block.start()) + 1, "\n".join(lines)))
    return [text for _, text in sorted(found)]


def _paragraphs(parts):
    for part in parts:
        for paragraph in re.split(r"\n[ \t]*\n", part):
            lines = [line.strip() for line in paragraph.splitlines()]
            if any(line.startswith((">>>", "...", ".. ")) for line in lines):
                continue
            text = " ".join(line for line in lines if not _RULE.match(line))
            text = _EMPHASIS.sub(r"\1", _QUOTED.sub(r"\1", _ROLE.sub(r"\1", text)))
            text = re.sub(r"\s+", " ", text).strip()
            if _is_prose(text):
                yield text


def _is_prose(text):
    """Whether `text` reads as sentences rather than as code, a table or a list."""
    words = text.split()
    if len(words) < 6:
        return False
    plain = sum(_PLAIN_WORD.fullmatch(word) is not None for word in words)
    return plain >= 0.7 * len(words) and "\N{REPLACEMENT CHARACTER}" not in text
