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
)
from tests import execution
from tests.models.small_models import (
    LATENT,
    SETTINGS,
    full,
    padded,
    random_ids,
    small_causal_lm,
)

ROWS = [random_ids(4, seed=1), random_ids(6, seed=2), random_ids(3, seed=3)]
SAMPLERS = ("beam", "contrastive", "greedy", "random", "top_k", "top_p")


def _generate(causal_lm, length=10, stop_token_ids=None):
    inputs = padded(ROWS, length, "right")
    return causal_lm.generate(inputs, stop_token_ids=stop_token_ids)


@pytest.mark.parametrize(
    "overrides",
    [
        {"positions": "rotary"},
        {"positions": "relative_bias", "tied_embeddings": True, "head_dim": 6},
        {"sliding_window": 3, "sliding_layers": [1], "query_key_norm": "full"},
        {"attention_soft_cap": 0.5, "output_norms": True, "output_multiplier": 3.0},
        {**LATENT, "query_rank": 8},
    ],
    ids=["rotary", "relative_bias", "window", "capped", "latent"],
)
def test_cached_generation_equals_uncached(overrides):
    causal_lm = small_causal_lm(**overrides)
    causal_lm.compile(sampler="greedy")
    generated = _generate(causal_lm)["token_ids"]
    for row, got in zip(ROWS, generated, strict=True):
        np.testing.assert_array_equal(got[: len(row)], row)
        # One pass over the result tells every greedy step without a cache.
        logits = ops.convert_to_numpy(causal_lm(full(np.asarray(got)[None])))[0]
        greedy = logits.argmax(-1)
        np.testing.assert_array_equal(got[len(row) :], greedy[len(row) - 1 : -1])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler(sampler):
    causal_lm = small_causal_lm(num_layers=1, dense_first_layers=0)
    causal_lm.compile(sampler=sampler)
    outputs = _generate(causal_lm)
    assert outputs["token_ids"].shape == (3, 10)
    assert outputs["padding_mask"].all()
    for row, got in zip(ROWS, outputs["token_ids"], strict=True):
        np.testing.assert_array_equal(got[: len(row)], row)
        assert ((got >= 0) & (got < 50)).all()


def test_a_wide_beam_finds_the_likeliest_continuation():
    causal_lm = small_causal_lm(vocabulary_size=7, num_layers=1, dense_first_layers=0)
    # Every beam of two steps over seven tokens: an exhaustive search.
    causal_lm.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=49))
    prompt = random_ids(1, 3) % 7
    got = causal_lm.generate(padded(list(prompt), 5, "right"), stop_token_ids=None)[
        "token_ids"
    ]
    pairs = np.stack(np.meshgrid(np.arange(7), np.arange(7)), -1).reshape(-1, 2)
    ids = np.concatenate([np.repeat(prompt, 49, 0), pairs], 1).astype("int32")
    logits = ops.convert_to_numpy(ops.log_softmax(causal_lm(full(ids))))
    first = logits[np.arange(49), 2, pairs[:, 0]]
    second = logits[np.arange(49), 3, pairs[:, 1]]
    np.testing.assert_array_equal(got[0, 3:], pairs[np.argmax(first + second)])


@pytest.mark.parametrize("overrides", [{}, LATENT], ids=["grouped_query", "latent"])
def test_a_row_does_not_depend_on_the_others(overrides):
    """Capacity is counted for each, and a longer prompt is not routed anew."""
    limit = {"dispatch": "capacity", "capacity_factor": 0.1}
    causal_lm = small_causal_lm(**limit, **overrides)
    causal_lm.compile(sampler="greedy")
    inputs = padded(ROWS, 10, "right")
    (statistics,) = causal_lm.backbone.routing_statistics(inputs)
    assert float(statistics.dropped)
    found = causal_lm.generate(inputs, stop_token_ids=None)["token_ids"]
    for row, wanted in zip(ROWS, found, strict=True):
        alone = causal_lm.generate(padded([row], 10, "right"), stop_token_ids=None)
        np.testing.assert_array_equal(alone["token_ids"][0], wanted)


def test_generation_ends_at_stop_tokens():
    causal_lm = small_causal_lm()
    causal_lm.compile(sampler="greedy")
    free = _generate(causal_lm)["token_ids"]
    stop = int(free[0, 5])
    outputs = _generate(causal_lm, stop_token_ids=(stop,))
    for row, ids, mask in zip(ROWS, free, outputs["padding_mask"], strict=True):
        new = np.asarray(ids)[len(row) :]
        end = 10
        if stop in new:
            end = len(row) + int(np.argmax(new == stop)) + 1
        np.testing.assert_array_equal(mask[:end], True)
        assert not mask[end:].any() or stop not in new


@pytest.mark.parametrize(
    ("inputs", "named"),
    [
        (padded(ROWS, 10, "left"), "padding"),
        (full(random_ids(0, 5)), "at least one prompt"),
        (padded([ROWS[0], []], 10, "right"), "at least one token"),
        (full(np.full((1, 4), 99)), "vocabulary_size"),
        (full(random_ids(1, 33)), "context_length"),
    ],
)
def test_prompts_that_cannot_work_are_refused(inputs, named):
    causal_lm = small_causal_lm(context_length=32)
    with pytest.raises(ValueError, match=named):
        causal_lm.generate(inputs, stop_token_ids=None)


def test_score():
    causal_lm = small_causal_lm()
    ids, targets = random_ids(2, 6), random_ids(2, 6, seed=9)
    logits = ops.convert_to_numpy(causal_lm(full(ids)))
    np.testing.assert_allclose(
        ops.convert_to_numpy(causal_lm.score(ids)), logits, atol=1e-5
    )
    loss = causal_lm.score(ids, scoring_mode="loss", target_ids=targets)
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    expected = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    np.testing.assert_allclose(ops.convert_to_numpy(loss), expected, atol=1e-5)
    seen = []
    causal_lm.score(ids, layer_intercept_fn=lambda x, i: (seen.append(i), x)[1])
    assert seen == [-1, 0, 1]
    with pytest.raises(ValueError, match="scoring_mode"):
        causal_lm.score(ids, scoring_mode="probability")
    with pytest.raises(ValueError, match="target_ids"):
        causal_lm.score(ids, scoring_mode="loss")


def test_training_is_the_same_eager_and_compiled():
    x, y = full(random_ids(4, 6)), random_ids(4, 6, seed=7)
    results = {}
    for mode, arguments in execution.TRAINING.items():
        keras.utils.set_random_seed(3)
        causal_lm = small_causal_lm(balance_loss=0.01, z_loss=1e-3)
        causal_lm.compile(optimizer=keras.optimizers.SGD(0.1), **arguments)
        history = causal_lm.fit(x, y, batch_size=2, epochs=2, shuffle=False, verbose=0)
        logits = causal_lm.predict(x, verbose=0)
        results[mode] = (history.history["loss"], logits)
    loss, logits = results.pop("eager")
    assert loss[1] < loss[0]
    for other_loss, other_logits in results.values():
        np.testing.assert_allclose(other_loss, loss, rtol=1e-4)
        np.testing.assert_allclose(other_logits, logits, atol=1e-3)


def test_steps_of_training_are_those_of_a_plain_keras_model():
    # torch adds a step's gradients to the last one's where it finds no parameters.
    x, y = full(random_ids(8, 6)), random_ids(8, 6, seed=7)
    causal_lm, twin = small_causal_lm(), small_causal_lm()
    twin.set_weights(causal_lm.get_weights())
    plain = keras.Model(twin.input, twin.output)
    for model in (causal_lm, plain):
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer=keras.optimizers.SGD(0.1), loss=loss)
        model.fit(x, y, batch_size=2, epochs=2, shuffle=False, verbose=0)
    for a, b in zip(causal_lm.get_weights(), twin.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_router_losses_count_in_training_and_not_in_evaluation():
    x, y = full(random_ids(4, 6)), random_ids(4, 6, seed=7)
    losses = {}
    for coefficient in (0.0, 0.5):
        keras.utils.set_random_seed(3)
        causal_lm = small_causal_lm(balance_loss=coefficient)
        causal_lm.compile(optimizer=keras.optimizers.SGD(0.0))
        evaluated = causal_lm.evaluate(x, y, verbose=0)[0]
        fitted = causal_lm.fit(x, y, verbose=0).history["loss"][0]
        losses[coefficient] = (evaluated, fitted)
    assert losses[0.5][0] == pytest.approx(losses[0.0][0], abs=1e-5)
    # From the definition: E sum_e f_e P_e, summed over the mixtures.
    expected = 0.0
    for layer in causal_lm.backbone.routing_statistics(x):
        counts = ops.convert_to_numpy(layer.assignments)
        mean = ops.convert_to_numpy(layer.probabilities) / 24
        expected += 4 * (counts / counts.sum() * mean).sum()
    assert losses[0.5][1] - losses[0.0][1] == pytest.approx(0.5 * expected, abs=1e-4)


def test_bfloat16_weights_train_or_say_that_they_do_not():
    x, y = full(random_ids(4, 6)), random_ids(4, 6, seed=7)
    causal_lm = small_causal_lm(dtype="bfloat16")
    with pytest.warns(UserWarning, match="Adam does not train bfloat16"):
        causal_lm.compile(optimizer="adam")
    causal_lm.compile()  # chooses one that does
    before = causal_lm.evaluate(x, y, verbose=0)[0]
    causal_lm.fit(x, y, epochs=10, verbose=0)
    assert causal_lm.evaluate(x, y, verbose=0)[0] < before


def test_mixed_bfloat16_trains_with_adam():
    x, y = full(random_ids(4, 6)), random_ids(4, 6, seed=7)
    causal_lm = small_causal_lm(dtype="mixed_bfloat16")
    causal_lm.compile(optimizer=keras.optimizers.Adam(1e-2))
    loss = causal_lm.fit(x, y, epochs=8, verbose=0).history["loss"]
    assert loss[-1] < loss[0] - 0.1


def _preprocessor(sequence_length=16):
    letters = "abcdefghijklmnopqrstuvwxyz ."
    vocabulary = {"<s>": 0, "</s>": 1}
    vocabulary |= {letter: i + 2 for i, letter in enumerate(letters)}
    tokenizer_json = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    tokenizer = MoETokenizer(tokenizer_json=tokenizer_json)
    return MoECausalLMPreprocessor(tokenizer, sequence_length=sequence_length)


def test_strings_in_and_out():
    causal_lm = small_causal_lm(_preprocessor(), vocabulary_size=30)
    texts = ["the cat sat.", "a dog ran.", "birds.", "the end of it."]
    causal_lm.compile(optimizer=keras.optimizers.Adam(1e-2), sampler="greedy")
    loss = causal_lm.fit(texts, batch_size=2, epochs=6, verbose=0).history["loss"]
    assert loss[-1] < loss[0]
    assert np.isfinite(causal_lm.evaluate(texts, batch_size=2, verbose=0)).all()
    assert causal_lm.predict(texts, batch_size=2, verbose=0).shape == (4, 16, 30)
    one = causal_lm.generate("the ", max_length=12)
    assert isinstance(one, str) and one.startswith("the ")
    several = causal_lm.generate(["the ", "a"], max_length=12)
    assert several[0] == one and several[1].startswith("a")
    assert causal_lm.generate("the ", max_length=12, strip_prompt=True) == one[4:]
    with pytest.raises(ValueError, match="at least one"):
        causal_lm.generate([])
    with pytest.raises(ValueError, match="max_length"):
        causal_lm.generate("the ", max_length=0)


def test_context_is_a_limit_of_generation():
    causal_lm = small_causal_lm(_preprocessor(8), vocabulary_size=30, context_length=12)
    causal_lm.generate("the ", max_length=12)
    with pytest.raises(ValueError, match=r"context_length.*12.*13"):
        causal_lm.generate("the ", max_length=13)


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    with pytest.raises(ValueError, match="vocabulary_size"):
        small_causal_lm(_preprocessor(), vocabulary_size=29)


def test_saving_in_every_format(tmp_path):
    causal_lm = small_causal_lm(_preprocessor(), vocabulary_size=30)
    inputs = full(random_ids(2, 6) % 30)
    expected = ops.convert_to_numpy(causal_lm(inputs))
    causal_lm.save_to_preset(str(tmp_path / "preset"))
    causal_lm.save(tmp_path / "task.keras")
    causal_lm.save_weights(tmp_path / "task.weights.h5")
    other = small_causal_lm(_preprocessor(), vocabulary_size=30)
    other.load_weights(tmp_path / "task.weights.h5")
    loaded = {
        "preset": MoECausalLM.from_preset(str(tmp_path / "preset")),
        "kerashub": keras_hub.models.CausalLM.from_preset(str(tmp_path / "preset")),
        "keras": keras.saving.load_model(tmp_path / "task.keras"),
        "weights": other,
    }
    for model in loaded.values():
        np.testing.assert_array_equal(ops.convert_to_numpy(model(inputs)), expected)
        assert model.preprocessor.tokenizer("cat").tolist() == [4, 2, 21]


def test_training_goes_on_from_a_saved_model(tmp_path):
    x, y = full(random_ids(4, 6)), random_ids(4, 6, seed=7)
    causal_lm = small_causal_lm()
    causal_lm.compile(
        optimizer=keras.optimizers.SGD(0.1, momentum=0.9), sampler="greedy"
    )
    causal_lm.fit(x, y, shuffle=False, verbose=0)
    causal_lm.save(tmp_path / "task.keras")
    loaded = keras.saving.load_model(tmp_path / "task.keras")
    assert isinstance(loaded.sampler, keras_hub.samplers.GreedySampler)
    for model in (causal_lm, loaded):
        model.fit(x, y, shuffle=False, verbose=0)
    for got, expected in zip(
        loaded.get_weights(), causal_lm.get_weights(), strict=True
    ):
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_from_preset_overrides_settings(tmp_path):
    folder = str(tmp_path / "preset")
    small_causal_lm().save_to_preset(folder)
    smaller = MoECausalLM.from_preset(folder, load_weights=False, num_layers=1)
    assert smaller.backbone.num_layers == 1 and smaller.preprocessor is None
    half = MoECausalLM.from_preset(folder, dtype="bfloat16", balance_loss=0.1)
    assert half.backbone.variable_dtype == "bfloat16"
    assert half.backbone.mixtures[0].balance_loss == 0.1
    with pytest.raises(ValueError, match="variables"):
        MoECausalLM.from_preset(folder, num_layers=1)
    with pytest.raises(ValueError, match="backbone"):
        MoECausalLM.from_preset(folder, backbone=smaller.backbone, num_layers=1)


def test_a_mixture_without_experts_to_choose_is_the_dense_model():
    # One expert that every token takes with gate 1 computes what a dense layer does.
    one = {"dense_first_layers": 0, "num_shared_experts": 0, "top_k": 1}
    sparse = MoEBackbone(
        **{
            **SETTINGS,
            **one,
            "num_experts": 1,
            "dense_dim": None,
            "normalize_gates": True,
        }
    )
    dense = MoEBackbone(**{**SETTINGS, **one, "num_experts": 0, "dense_dim": 24})
    for target, source in zip(
        dense.transformer_layers, sparse.transformer_layers, strict=True
    ):
        for name in ("attention", "attention_norm", "feed_forward_norm"):
            getattr(target, name).set_weights(getattr(source, name).get_weights())
        gate, up, down = (w[0] for w in source.feed_forward.experts.get_weights())
        target.feed_forward.gate.set_weights([gate])
        target.feed_forward.up.set_weights([up])
        target.feed_forward.down.set_weights([down])
    dense.token_embedding.set_weights(sparse.token_embedding.get_weights())
    dense.layer_norm.set_weights(sparse.layer_norm.get_weights())
    inputs = full(random_ids(2, 6))
    np.testing.assert_allclose(
        ops.convert_to_numpy(sparse(inputs)),
        ops.convert_to_numpy(dense(inputs)),
        atol=1e-5,
    )
