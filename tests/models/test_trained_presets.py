"""The small trained presets: what they compute, generate and learn."""

import json
import pathlib

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

from keras_moe.models import (
    MoEBackbone,
    MoECausalLM,
    MoECausalLMPreprocessor,
    MoETokenizer,
    presets,
)
from keras_moe.sample_text import sample_text
from tests.models.numpy_decoder import NumpyDecoder

TRAINED = ("mixtral_tiny_en", "deepseek_moe_tiny_en", "glam_tiny_en")
PROMPT = "The import statement"


@pytest.fixture(scope="module", params=TRAINED)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def causal_lm(name):
    return MoECausalLM.from_preset(name)


@pytest.fixture(scope="module")
def reference(name):
    return NumpyDecoder(presets.ROOT / name)


def _inputs(token_ids):
    token_ids = np.asarray(token_ids, "int32")
    return {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}


def test_logits_equal_the_float64_reference(causal_lm, reference):
    # Half of 1e-4, so that any two backends agree to 1e-4.
    text = sample_text("test")[0][:400]
    ids = causal_lm.preprocessor.tokenizer(text)[:96]
    expected = reference.logits(ids)
    eager = ops.convert_to_numpy(causal_lm(_inputs([ids])))[0]
    bare = MoECausalLM(causal_lm.backbone)  # works on token ids
    compiled = bare.predict(_inputs([ids]), verbose=0)[0]
    np.testing.assert_allclose(eager, expected, atol=5e-5)
    np.testing.assert_allclose(compiled, expected, atol=5e-5)


def test_greedy_text_equals_the_float64_reference(causal_lm, reference):
    causal_lm.compile(sampler="greedy")
    tokenizer = causal_lm.preprocessor.tokenizer
    prompt = [tokenizer.start_token_id, *tokenizer(PROMPT)]
    expected = reference.greedy(prompt, 32)
    text = causal_lm.generate(PROMPT, max_length=32, stop_token_ids=None)
    assert text == tokenizer.detokenize(
        [i for i in expected if i not in tokenizer.special_token_ids]
    )


def test_fine_tuning_lowers_the_loss_of_new_text(name):
    documents = "\n\n".join(sample_text("test"))
    texts = [documents[i : i + 400] for i in range(0, 40 * 400, 400)]
    train, validation = texts[:32], texts[32:]
    causal_lm = MoECausalLM.from_preset(name)
    causal_lm.compile(optimizer=keras.optimizers.Adam(1e-3))
    before = causal_lm.evaluate(validation, batch_size=8, verbose=0)[0]
    causal_lm.fit(train, batch_size=8, epochs=2, verbose=0)
    after = causal_lm.evaluate(validation, batch_size=8, verbose=0)[0]
    assert after < before - 0.02
    for mixture in causal_lm.backbone.mixtures:
        load = ops.convert_to_numpy(mixture.expert_load)
        np.testing.assert_allclose(load.sum(), 1, rtol=1e-5)


def test_every_way_of_loading_gives_the_same_model(name, causal_lm):
    expected = causal_lm.get_weights()
    folder = str(presets.ROOT / name)
    for loaded in (
        MoECausalLM.from_preset(folder),
        keras_hub.models.CausalLM.from_preset(name),
        keras_hub.models.CausalLM.from_preset(folder),
    ):
        assert type(loaded) is MoECausalLM
        assert loaded.preprocessor.sequence_length == 128
        for got, value in zip(loaded.get_weights(), expected, strict=True):
            np.testing.assert_array_equal(got, value)
    backbone = keras_hub.models.Backbone.from_preset(name)
    assert type(backbone) is MoEBackbone
    for kind, cls in (
        (keras_hub.models.Tokenizer, MoETokenizer),
        (keras_hub.models.CausalLMPreprocessor, MoECausalLMPreprocessor),
    ):
        assert type(kind.from_preset(name)) is cls


def test_saved_and_reloaded_it_writes_the_same(causal_lm, tmp_path):
    causal_lm.compile(sampler="greedy")
    expected = causal_lm.generate(PROMPT, max_length=24)
    causal_lm.save_to_preset(str(tmp_path / "preset"))
    causal_lm.save(str(tmp_path / "model.keras"))
    for loaded in (
        MoECausalLM.from_preset(str(tmp_path / "preset")),
        keras.saving.load_model(tmp_path / "model.keras"),
    ):
        loaded.compile(sampler="greedy")
        assert loaded.generate(PROMPT, max_length=24) == expected


def test_it_is_as_small_and_as_good_as_its_card_says(name, causal_lm):
    folder = pathlib.Path(presets.ROOT / name)
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
    assert size <= 8e6
    backbone = causal_lm.backbone
    assert backbone.num_experts >= 8 and backbone.vocabulary_size >= 512
    figures = json.loads((folder / "preset.json").read_text())["figures"]
    assert figures["loss"] < min(figures["twin_loss"], figures["bigram_loss"])
    assert figures["parameters"] == backbone.count_params()
    card = (folder / "README.md").read_text()
    for key in ("loss", "twin_loss", "bigram_loss"):
        assert f"{figures[key]:.4f}" in card
    # The same text as the card's, on any CPython close to the one it names.
    texts = sample_text("validation")
    ids = np.concatenate([_token_ids(causal_lm, text) for text in texts])
    ids = ids[: 64 * 129].reshape(64, 129)
    bare = MoECausalLM(causal_lm.backbone)
    logits = bare.predict(_inputs(ids[:, :-1]), batch_size=32, verbose=0)
    loss = keras.losses.sparse_categorical_crossentropy(
        ids[:, 1:], logits, from_logits=True
    )
    assert abs(float(ops.mean(loss)) - figures["loss"]) < 0.25


def _token_ids(causal_lm, text):
    tokenizer = causal_lm.preprocessor.tokenizer
    return [tokenizer.start_token_id, *tokenizer(text), tokenizer.end_token_id]
