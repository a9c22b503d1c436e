import keras
import numpy as np
import pytest

from keras_moe.models import MoESeq2SeqLMPreprocessor, MoETokenizer
from tests.models.test_moe_seq2seq_lm import preprocessor

# Ids of the letters: a is 2.
CAT, DOG = [4, 2, 21], [5, 16, 8]


def arrays(packed):
    return {name: np.asarray(value).tolist() for name, value in packed.items()}


def test_packs_a_source_and_a_target_as_t5_does():
    layer = preprocessor(encoder_sequence_length=5, decoder_sequence_length=4)
    x, y, weight = layer({"encoder_text": ["cat", "a"], "decoder_text": ["dog", ""]})
    assert arrays(x) == {
        # No start, and an end.
        "encoder_token_ids": [[*CAT, 1, 0], [2, 1, 0, 0, 0]],
        "encoder_padding_mask": [[True] * 4 + [False], [True] * 2 + [False] * 3],
        # The padding token begins a target, and is none of its padding.
        "decoder_token_ids": [[0, *DOG], [0, 1, 0, 0]],
        "decoder_padding_mask": [[True] * 4, [True, True, False, False]],
    }
    assert np.asarray(y).tolist() == [[*DOG, 1], [1, 0, 0, 0]]
    assert np.asarray(weight).tolist() == [[True] * 4, [True] + [False] * 3]


def test_a_start_token_begins_a_target():
    tokenizer = preprocessor().tokenizer
    config = {**tokenizer.get_config(), "start_token": "z"}
    config["tokenizer_json"] = tokenizer._loaded_model().source.decode()
    del config["dtype"]
    layer = MoESeq2SeqLMPreprocessor(
        MoETokenizer(**config), encoder_sequence_length=4, decoder_sequence_length=4
    )
    x, *_ = layer({"encoder_text": "a", "decoder_text": "dog"})
    assert arrays(x)["encoder_token_ids"] == [2, 1, 0, 0]
    assert arrays(x)["decoder_token_ids"] == [27, *DOG]


@pytest.mark.parametrize(
    "arguments",
    [
        ({"encoder_text": ["cat"], "decoder_text": ["dog"]},),
        ((["cat"], ["dog"]),),
        (["cat"], ["dog"]),
        (np.array(["cat"]), np.array(["dog"])),
        ({"encoder_text": ["cat"]}, ["dog"]),
    ],
    ids=["dict", "tuple", "x and y", "arrays", "dict and y"],
)
def test_forms_of_the_texts(arguments):
    layer = preprocessor(encoder_sequence_length=4, decoder_sequence_length=3)
    x, y, _ = layer(*arguments)
    assert arrays(x)["encoder_token_ids"] == [[*CAT, 1]]
    assert arrays(x)["decoder_token_ids"] == [[0, *DOG[:2]]]
    # Cut at its end, which still closes it.
    assert np.asarray(y).tolist() == [[*DOG[:2], 1]]


def test_lengths_of_a_call():
    layer = preprocessor()
    texts = {"encoder_text": "cat", "decoder_text": "dog"}
    x, *_ = layer(texts, encoder_sequence_length=6, decoder_sequence_length=5)
    assert len(x["encoder_token_ids"]) == 6 and len(x["decoder_token_ids"]) == 5
    x, *_ = layer(texts, sequence_length=7)
    assert len(x["encoder_token_ids"]) == 12 and len(x["decoder_token_ids"]) == 7


def test_prompts_and_texts():
    layer = preprocessor(encoder_sequence_length=5, decoder_sequence_length=6)
    prompt = arrays(layer.generate_preprocess(["cat", "a"]))
    assert prompt["encoder_token_ids"] == [[*CAT, 1, 0], [2, 1, 0, 0, 0]]
    assert prompt["decoder_token_ids"] == [[0] * 6] * 2
    assert prompt["decoder_padding_mask"] == [[True] + [False] * 5] * 2
    begun = {"encoder_text": "cat", "decoder_text": "do"}
    prompt = layer.generate_preprocess(begun, sequence_length=4)
    assert arrays(prompt)["decoder_token_ids"] == [0, *DOG[:2], 0]
    texts = layer.generate_postprocess(
        {
            "decoder_token_ids": np.array([[0, *DOG, 1, 9], [0, 1, 0, 0, 0, 0]]),
            "decoder_padding_mask": np.array([[1] * 5 + [0], [1, 1, 0, 0, 0, 0]]),
        }
    )
    assert texts == ["dog", ""]


@pytest.mark.parametrize(
    "arguments, named",
    [
        ((["cat"],), "`decoder_text`"),
        (([], []), "`encoder_text` must hold at least one"),
        ((["cat", "dog"], ["a"]), "as many sources as targets.*2 and 1"),
        (({"decoder_text": ["a"]},), "`encoder_text`"),
        ((["a"], ["b"], [1.0]), "sample_weight"),
        (({"encoder_text": ["a"], "decoder_text": ["b"]}, ["c"]), "`y` must be None"),
        (((["a"], ["b"]), ["c"]), "`y` must be None"),
        ((np.array(["a", "b"]), ["c"]), "as many sources as targets.*2 and 1"),
        ((np.array(["a", "b"]), np.array(["c"])), "as many sources.*2 and 1"),
        (("a", ["b", "c"]), "as many sources as targets.*one str and 2"),
    ],
)
def test_bad_texts(arguments, named):
    with pytest.raises(ValueError, match=named):
        preprocessor()(*arguments)


@pytest.mark.parametrize(
    "name", ["encoder_sequence_length", "decoder_sequence_length", "sequence_length"]
)
def test_bad_lengths(name):
    layer = preprocessor()
    with pytest.raises(ValueError, match="sequence_length=0"):
        setattr(layer, name, 0)


def test_as_many_sources_as_targets_in_tensors():
    import tensorflow as tf

    with pytest.raises(ValueError, match="as many sources as targets.*2 and 1"):
        preprocessor()(tf.constant(["cat", "a"]), tf.constant(["dog"]))
    with pytest.raises(ValueError, match="as many sources as targets.*1 and 2"):
        preprocessor().generate_preprocess((tf.constant(["cat"]), ["a", "b"]))


def test_within_a_tensorflow_pipeline():
    import tensorflow as tf

    layer = preprocessor(encoder_sequence_length=5, decoder_sequence_length=4)
    texts = {"encoder_text": ["cat", "a"], "decoder_text": ["dog", ""]}
    dataset = tf.data.Dataset.from_tensor_slices(texts).batch(2).map(layer)
    ((x, y, weight),) = dataset
    expected = layer(texts)
    assert arrays(x) == arrays(expected[0])
    np.testing.assert_array_equal(y, expected[1])
    np.testing.assert_array_equal(weight, expected[2])


def test_config_round_trip():
    layer = preprocessor()
    copy = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(layer)
    )
    assert copy.encoder_sequence_length == 12 and copy.decoder_sequence_length == 8
    assert copy.tokenizer.get_config() == layer.tokenizer.get_config()
