import argparse
import pathlib

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf

from keras_moe.models import MoEBackbone, MoECausalLMPreprocessor, MoETokenizer
from presets.tiny_tokenizers import train_byte_pair, train_sentencepiece

TEXTS = ["The quick brown fox", "", "a b c d e f g h i j k l m n", "  two\n\nlines 中"]


@pytest.fixture(scope="module", params=["sentencepiece", "byte_pair"])
def tokenizer(request):
    corpus = [pathlib.Path(argparse.__file__).read_text()]
    if request.param == "sentencepiece":
        return MoETokenizer(proto=train_sentencepiece(corpus, vocabulary_size=512))
    return MoETokenizer(tokenizer_json=train_byte_pair(corpus, vocabulary_size=512))


def numpy(x):
    return keras.tree.map_structure(keras.ops.convert_to_numpy, x)


def packed(tokenizer, text, length, start=True, end=True):
    """Ids and mask of one text, by the definition: cut, wrapped, then padded."""
    room = length - start - end
    ids = tokenizer.tokenize(text).tolist()[:room]
    ids = [1] * start + ids + [2] * end
    return ids + [0] * (length - len(ids)), [i < len(ids) for i in range(length)]


@pytest.mark.parametrize("length", [3, 8, 64])
@pytest.mark.parametrize("start", [True, False])
@pytest.mark.parametrize("end", [True, False])
def test_training_batch(tokenizer, length, start, end):
    preprocessor = MoECausalLMPreprocessor(
        tokenizer, sequence_length=length, add_start_token=start, add_end_token=end
    )
    rows = [packed(tokenizer, text, length + 1, start, end) for text in TEXTS]
    ids, mask = (np.array(part) for part in zip(*rows, strict=True))
    x, y, sample_weight = numpy(preprocessor(TEXTS))
    np.testing.assert_array_equal(x["token_ids"], ids[:, :-1])
    np.testing.assert_array_equal(x["padding_mask"], mask[:, :-1])
    np.testing.assert_array_equal(y, ids[:, 1:])
    np.testing.assert_array_equal(sample_weight, mask[:, 1:])
    one, _, _ = numpy(preprocessor(TEXTS[0]))
    np.testing.assert_array_equal(one["token_ids"], ids[0, :-1])


def test_tf_data_gives_the_same_batch(tokenizer):
    preprocessor = MoECausalLMPreprocessor(tokenizer, sequence_length=8)
    expected = numpy(preprocessor(TEXTS))
    strings = tf.data.Dataset.from_tensor_slices(TEXTS)
    batches = [
        next(iter(strings.batch(4).map(preprocessor))),
        next(iter(strings.map(preprocessor).batch(4))),
    ]
    for batch in batches:
        found = keras.tree.map_structure(lambda x: x.numpy(), batch)
        keras.tree.map_structure(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("start", [True, False])
def test_prompts_and_generated_text(tokenizer, start):
    texts = [text for text in TEXTS if text]
    preprocessor = MoECausalLMPreprocessor(
        tokenizer, sequence_length=64, add_start_token=start
    )
    prompt = preprocessor.generate_preprocess(texts)
    rows = [packed(tokenizer, text, 64, start, end=False) for text in texts]
    ids, mask = (np.array(part) for part in zip(*rows, strict=True))
    np.testing.assert_array_equal(numpy(prompt["token_ids"]), ids)
    np.testing.assert_array_equal(numpy(prompt["padding_mask"]), mask)
    assert preprocessor.generate_postprocess(prompt) == texts
    one = preprocessor.generate_preprocess(texts[0], sequence_length=16)
    assert one["token_ids"].shape == (16,)
    assert preprocessor.generate_postprocess(one) == texts[0]


def test_a_prompt_that_is_too_long_is_cut_at_its_end(tokenizer):
    preprocessor = MoECausalLMPreprocessor(tokenizer, sequence_length=6)
    prompt = preprocessor.generate_preprocess(TEXTS[2])
    expected = [1, *tokenizer.tokenize(TEXTS[2])[:5]]
    assert numpy(prompt["token_ids"]).tolist() == expected
    assert numpy(prompt["padding_mask"]).all()
    assert TEXTS[2].startswith(preprocessor.generate_postprocess(prompt))


def test_an_empty_prompt_is_the_start_token(tokenizer):
    preprocessor = MoECausalLMPreprocessor(tokenizer, sequence_length=4)
    prompt = numpy(preprocessor.generate_preprocess(""))
    assert prompt["token_ids"].tolist() == [1, 0, 0, 0]
    assert prompt["padding_mask"].tolist() == [True, False, False, False]
    preprocessor = MoECausalLMPreprocessor(tokenizer, add_start_token=False)
    for empty in ("", ["a fox", ""]):
        with pytest.raises(ValueError, match="`x` must hold prompts of at least one"):
            preprocessor.generate_preprocess(empty)


def test_no_texts(tokenizer):
    preprocessor = MoECausalLMPreprocessor(tokenizer)
    for nothing in ([], (), np.array([], dtype=object)):
        for function in (preprocessor, preprocessor.generate_preprocess):
            with pytest.raises(ValueError, match="`x` must hold at least one text"):
                function(nothing)


@pytest.mark.parametrize("length", [0, -1, 1.5, "8", True])
def test_sequence_length(tokenizer, length):
    with pytest.raises(ValueError, match="`sequence_length` must be an integer"):
        MoECausalLMPreprocessor(tokenizer, sequence_length=length)
    preprocessor = MoECausalLMPreprocessor(tokenizer)
    assert preprocessor.sequence_length == 1024
    with pytest.raises(ValueError, match=f"sequence_length={length!r}"):
        preprocessor.sequence_length = length
    with pytest.raises(ValueError, match=f"sequence_length={length!r}"):
        preprocessor.generate_preprocess("a fox", sequence_length=length)
    with pytest.raises(ValueError, match=f"sequence_length={length!r}"):
        preprocessor("a fox", sequence_length=length)


def test_sequence_length_can_change(tokenizer):
    preprocessor = MoECausalLMPreprocessor(tokenizer, sequence_length=8)
    preprocessor(TEXTS)
    preprocessor.sequence_length = 12
    assert preprocessor(TEXTS)[1].shape == (4, 12)
    assert preprocessor(TEXTS, sequence_length=5)[1].shape == (4, 5)


@pytest.mark.parametrize(
    "cls", [MoECausalLMPreprocessor, keras_hub.models.CausalLMPreprocessor]
)
def test_preset_folder(cls, tokenizer, tmp_path):
    backbone = MoEBackbone(
        vocabulary_size=512, num_layers=1, hidden_dim=8, num_query_heads=2, dense_dim=8
    )
    backbone.save_to_preset(str(tmp_path))
    preprocessor = MoECausalLMPreprocessor(
        tokenizer, sequence_length=9, add_start_token=False, add_end_token=False
    )
    preprocessor.save_to_preset(str(tmp_path))
    restored = cls.from_preset(str(tmp_path))
    assert type(restored) is MoECausalLMPreprocessor
    expected, found = numpy(preprocessor(TEXTS)), numpy(restored(TEXTS))
    keras.tree.map_structure(np.testing.assert_array_equal, found, expected)
    assert cls.from_preset(str(tmp_path), sequence_length=7).sequence_length == 7
    # Without its own settings, the preprocessor is made around the tokenizer.
    (tmp_path / "preprocessor.json").unlink()
    assert cls.from_preset(str(tmp_path)).sequence_length == 1024
