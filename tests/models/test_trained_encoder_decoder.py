"""The small trained encoder-decoder: what it computes, fills in and learns."""

import json

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

import keras_moe
from keras_moe.models import (
    MoESeq2SeqBackbone,
    MoESeq2SeqLM,
    MoESeq2SeqLMPreprocessor,
    MoETokenizer,
    presets,
)
from keras_moe.sample_text import sample_text
from tests.models.numpy_encoder_decoder import NumpyEncoderDecoder

NAME = "switch_tiny_en"
FOLDER = presets.ROOT / NAME
TEXTS = [
    "The import statement <extra_id_0> a module.",
    "Return the <extra_id_0> of the file, or None if it <extra_id_1> not exist.",
]
LENGTH = 20


@pytest.fixture(scope="module")
def seq2seq_lm():
    seq2seq_lm = MoESeq2SeqLM.from_preset(NAME)
    seq2seq_lm.compile(sampler="greedy")
    return seq2seq_lm


def spans(seq2seq_lm, split):
    """A split of the text with spans taken out as for the card's figures."""
    preprocessor = seq2seq_lm.preprocessor
    return keras_moe.SpanCorruptionDataset(
        sample_text(split),
        keras_moe.SpanCorruption(
            preprocessor.encoder_sequence_length, preprocessor.tokenizer
        ),
        batch_size=16,
        shuffle=False,
        fresh_noise=False,
    )


def loss(model, batches):
    """Nats a token of the targets."""
    total = count = 0.0
    for x, y, weight in batches:
        losses = keras.losses.sparse_categorical_crossentropy(
            y, model.predict_on_batch(x), from_logits=True
        )
        total += (ops.convert_to_numpy(losses) * weight).sum()
        count += weight.sum()
    return total / count


@pytest.mark.parametrize("dropping", [False, True])
def test_logits_equal_the_float64_reference(seq2seq_lm, dropping):
    limits = {"capacity_group": 48, "eval_capacity_factor": 0.5} if dropping else {}
    backbone = seq2seq_lm.backbone
    if dropping:
        backbone = MoESeq2SeqBackbone.from_preset(NAME, **limits)
    reference = NumpyEncoderDecoder(FOLDER, **limits)
    x = keras.tree.map_structure(lambda a: a[:2], spans(seq2seq_lm, "test")[0][0])
    # The second source and target padded, too.
    for name, length in (("encoder_padding_mask", 90), ("decoder_padding_mask", 20)):
        x[name] = x[name] & (np.arange(x[name].shape[1]) < [[128], [length]])
    expected = reference.logits(x)
    assert (reference.dropped > 20) == dropping
    model = MoESeq2SeqLM(backbone)
    real = x["decoder_padding_mask"]
    # Half of 1e-4, so that any two backends agree to 1e-4.
    for logits in (ops.convert_to_numpy(model(x)), model.predict(x, verbose=0)):
        np.testing.assert_allclose(logits[real], expected[real], atol=5e-5)


def test_filled_spans_equal_the_float64_reference(seq2seq_lm):
    reference = NumpyEncoderDecoder(FOLDER)
    tokenizer = seq2seq_lm.preprocessor.tokenizer
    end = tokenizer.end_token_id
    expected = [
        reference.greedy([*tokenizer(text), end], tokenizer.pad_token_id, end, LENGTH)
        for text in TEXTS
    ]
    special = tokenizer.special_token_ids
    expected = [
        tokenizer.detokenize([i for i in ids if i not in special]) for ids in expected
    ]
    assert seq2seq_lm.generate(TEXTS, max_length=LENGTH) == expected
    assert seq2seq_lm.generate(TEXTS[0], max_length=LENGTH) == expected[0]
    assert all(text.startswith("<extra_id_0>") for text in expected)


def test_it_is_as_small_and_as_good_as_its_card_says(seq2seq_lm):
    size = sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file())
    assert size <= 8e6
    figures = json.loads((FOLDER / "preset.json").read_text())["figures"]
    assert figures["loss"] < min(figures["twin_loss"], figures["untrained_loss"])
    assert figures["parameters"] == seq2seq_lm.backbone.count_params()
    card = (FOLDER / "README.md").read_text()
    for key in ("loss", "twin_loss", "untrained_loss"):
        assert f"{figures[key]:.4f}" in card
    # The same text and spans as the card's, on any CPython close to the one it names.
    dataset = spans(seq2seq_lm, "validation")
    bare = MoESeq2SeqLM(seq2seq_lm.backbone)
    found = loss(bare, [dataset[i] for i in range(len(dataset))])
    assert abs(found - figures["loss"]) < 0.05


def test_it_fills_spans_better_than_an_untrained_twin(seq2seq_lm):
    batches = [spans(seq2seq_lm, "test")[0]]
    keras.utils.set_random_seed(0)
    config = seq2seq_lm.backbone.get_config()
    untrained = MoESeq2SeqLM(MoESeq2SeqBackbone.from_config(config))
    trained = MoESeq2SeqLM(seq2seq_lm.backbone)
    assert loss(trained, batches) < loss(untrained, batches) - 2


def test_pre_training_goes_on_and_lowers_the_loss_of_new_text(seq2seq_lm):
    dataset = spans(seq2seq_lm, "test")
    model = MoESeq2SeqLM(MoESeq2SeqBackbone.from_preset(NAME))
    model.compile(optimizer=keras.optimizers.Adam(1e-3))
    train = keras_moe.SpanCorruptionDataset(
        sample_text("test")[1::2], dataset.corruption, batch_size=16
    )
    held_out = keras_moe.SpanCorruptionDataset(
        sample_text("test")[::2],
        dataset.corruption,
        batch_size=16,
        shuffle=False,
        fresh_noise=False,
    )
    batches = [held_out[i] for i in range(4)]
    before = loss(model, batches)
    model.fit(train, epochs=1, verbose=0)
    assert loss(model, batches) < before
    for mixture in model.backbone.mixtures:
        load = ops.convert_to_numpy(mixture.expert_load)
        np.testing.assert_allclose(load.sum(), 1, rtol=1e-5)


def test_every_way_of_loading_gives_the_same_model(seq2seq_lm):
    expected = seq2seq_lm.get_weights()
    for loaded in (
        MoESeq2SeqLM.from_preset(str(FOLDER)),
        keras_hub.models.Seq2SeqLM.from_preset(NAME),
        keras_hub.models.Seq2SeqLM.from_preset(str(FOLDER)),
    ):
        assert type(loaded) is MoESeq2SeqLM
        assert loaded.preprocessor.encoder_sequence_length == 128
        for got, value in zip(loaded.get_weights(), expected, strict=True):
            np.testing.assert_array_equal(got, value)
    backbone = keras_hub.models.Backbone.from_preset(NAME)
    assert type(backbone) is MoESeq2SeqBackbone
    for kind, cls in (
        (keras_hub.models.Tokenizer, MoETokenizer),
        (keras_hub.models.Seq2SeqLMPreprocessor, MoESeq2SeqLMPreprocessor),
    ):
        assert type(kind.from_preset(NAME)) is cls


def test_saved_and_reloaded_it_writes_the_same(seq2seq_lm, tmp_path):
    expected = seq2seq_lm.generate(TEXTS[0], max_length=LENGTH)
    seq2seq_lm.save_to_preset(str(tmp_path / "preset"))
    seq2seq_lm.save(str(tmp_path / "model.keras"))
    for loaded in (
        MoESeq2SeqLM.from_preset(str(tmp_path / "preset")),
        keras.saving.load_model(tmp_path / "model.keras"),
    ):
        loaded.compile(sampler="greedy")
        assert loaded.generate(TEXTS[0], max_length=LENGTH) == expected
