import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

import keras_moe
from keras_moe.models import (
    MoESeq2SeqLM,
    MoESeq2SeqLMPreprocessor,
    MoETokenizer,
)
from tests import execution
from tests.models.small_models import (
    random_ids,
    small_seq2seq_lm,
    source_and_target,
)
from tests.models.test_moe_tokenizer import run_python

SOURCES = [random_ids(5, seed=1), random_ids(7, seed=2), random_ids(2, seed=3)]
BEGUN = [random_ids(2, seed=4), random_ids(3, seed=5), random_ids(1, seed=6)]
SAMPLERS = ("beam", "contrastive", "greedy", "random", "top_k", "top_p")
LENGTH = 9


def prompts(length=LENGTH):
    return source_and_target(SOURCES, BEGUN, length)


def logits_of(seq2seq_lm, sources, targets):
    return ops.convert_to_numpy(seq2seq_lm(source_and_target(sources, targets)))


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"positions": "rotary", "attention_scale": None, "num_key_value_heads": 2},
        {"positions": None, "extra_dense": True, "expert_gated": True, "top_k": 2},
        {"tied_embeddings": False, "shared_embeddings": False, "output_norms": True},
        {  # with room for all
            "dispatch": "capacity",
            "capacity": 8,
            "capacity_group": "sequence",
            "route_padding": True,
        },
    ],
    ids=["switch", "rotary", "st_moe", "separate", "capacity"],
)
def test_cached_generation_equals_uncached(overrides):
    seq2seq_lm = small_seq2seq_lm(**overrides)
    seq2seq_lm.compile(sampler="greedy")
    generated = seq2seq_lm.generate(prompts(), stop_token_ids=None)
    generated = generated["decoder_token_ids"]
    for source, begun, got in zip(SOURCES, BEGUN, generated, strict=True):
        np.testing.assert_array_equal(got[: len(begun)], begun)
        # One pass over the result tells every greedy step without a cache.
        greedy = logits_of(seq2seq_lm, [source], [got])[0].argmax(-1)
        np.testing.assert_array_equal(got[len(begun) :], greedy[len(begun) - 1 : -1])


def test_logits_with_a_cache_equal_those_without():
    seq2seq_lm = small_seq2seq_lm()
    batch = source_and_target(SOURCES, [random_ids(LENGTH, seed=i) for i in range(3)])
    expected = ops.convert_to_numpy(seq2seq_lm(batch))
    source = seq2seq_lm.backbone.encode(
        ops.convert_to_tensor(batch["encoder_token_ids"]),
        ops.convert_to_tensor(batch["encoder_padding_mask"]),
    )
    cache = seq2seq_lm.build_cache(source, batch["encoder_padding_mask"], LENGTH)
    assert all(leaf.shape[0] == 3 for leaf in keras.tree.flatten(cache))
    start = 0
    for end in (4, 5, LENGTH):
        ids = ops.convert_to_tensor(batch["decoder_token_ids"][:, start:end])
        logits, _, cache = seq2seq_lm.call_decoder_with_cache(ids, cache, start)
        np.testing.assert_allclose(
            ops.convert_to_numpy(logits), expected[:, start:end], atol=1e-4
        )
        start = end


@pytest.mark.parametrize("sampler", ["greedy", "beam"])
@pytest.mark.parametrize(
    "limit",
    [
        {"capacity": 1},
        {"capacity_factor": 0.1},
        {"capacity_factor": 0.1, "capacity_group": 20},
        {"capacity": 1, "capacity_group": "sequence", "route_padding": True},
    ],
    ids=["capacity", "factor", "group", "sequence"],
)
def test_a_row_does_not_depend_on_the_others(limit, sampler):
    """Nor a beam: where capacity is limited, generation counts it for each."""
    limit = {"dispatch": "capacity", "capacity_group": "batch", **limit}
    seq2seq_lm = small_seq2seq_lm(top_k=2, moe_every=1, moe_offset=0, **limit)
    seq2seq_lm.compile(sampler=sampler)
    # KerasHub's beams count what is given of the longer targets as if chosen.
    begun = BEGUN if sampler == "greedy" else [row[:1] for row in BEGUN]
    together = source_and_target(SOURCES, begun, LENGTH)
    statistics = seq2seq_lm.backbone.routing_statistics(together)
    assert any(float(s.dropped) for s in statistics)
    found = seq2seq_lm.generate(together, stop_token_ids=None)["decoder_token_ids"]
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in together.items()}
        alone = seq2seq_lm.generate(alone, stop_token_ids=None)["decoder_token_ids"]
        np.testing.assert_array_equal(found[row], alone[0])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler(sampler):
    seq2seq_lm = small_seq2seq_lm(encoder_layers=1, decoder_layers=1, moe_offset=0)
    seq2seq_lm.compile(sampler=sampler)
    outputs = seq2seq_lm.generate(prompts(), stop_token_ids=None)
    assert set(outputs) == {"decoder_token_ids", "decoder_padding_mask"}
    assert outputs["decoder_token_ids"].shape == (3, LENGTH)
    for begun, got in zip(BEGUN, outputs["decoder_token_ids"], strict=True):
        np.testing.assert_array_equal(got[: len(begun)], begun)
        assert ((got >= 0) & (got < 50)).all()


def test_a_wide_beam_finds_the_likeliest_target():
    seq2seq_lm = small_seq2seq_lm(
        vocabulary_size=7, encoder_layers=1, decoder_layers=1, moe_offset=0
    )
    # Every beam of two steps over seven tokens: an exhaustive search.
    seq2seq_lm.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=49))
    sources = [source % 7 for source in SOURCES]
    begun = [row[:1] % 7 for row in BEGUN]
    got = seq2seq_lm.generate(source_and_target(sources, begun, 3), stop_token_ids=None)
    pairs = np.stack(np.meshgrid(np.arange(7), np.arange(7)), -1).reshape(-1, 2)
    for source, first, ids in zip(
        sources, begun, got["decoder_token_ids"], strict=True
    ):
        targets = np.concatenate([np.repeat(first[None], 49, 0), pairs], 1)
        logits = logits_of(seq2seq_lm, [source] * 49, list(targets)).astype("float64")
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        total = log_p[np.arange(49), 0, pairs[:, 0]]
        total += log_p[np.arange(49), 1, pairs[:, 1]]
        np.testing.assert_array_equal(ids[1:], pairs[np.argmax(total)])


def _beams(log_p, begun, length, beams, stop):
    """A beam search in NumPy: all continuations of all beams, the best of which stay.

    As KerasHub's it goes on until every beam has a stop token.
    """
    found = [(0.0, list(begun))]
    while len(found[0][1]) < length and not all(
        stop in r[len(begun) :] for _, r in found
    ):
        candidates = [
            (score + value, [*row, token])
            for score, row in found
            for token, value in enumerate(log_p(row))
        ]
        found = sorted(candidates, reverse=True)[:beams]
    return max(found)[1]


def test_beams_under_capacity_with_a_stop_token():
    """The source loses tokens; a target begun with one token loses none."""
    limited = {"dispatch": "capacity", "capacity": 1, "capacity_group": "sequence"}
    settings = {"vocabulary_size": 20, "moe_every": 1, "moe_offset": 0}
    seq2seq_lm = small_seq2seq_lm(**settings, **limited)
    dropless = small_seq2seq_lm(**settings)
    dropless.set_weights(seq2seq_lm.get_weights())
    seq2seq_lm.compile(sampler=keras_hub.samplers.BeamSampler(num_beams=3))
    lengths = []
    for source in SOURCES[:2]:
        inputs = source_and_target([source % 20], [BEGUN[0][:1] % 20], LENGTH)
        statistics = seq2seq_lm.backbone.routing_statistics(inputs)
        assert float(statistics[0].dropped)
        ids, mask = (
            ops.convert_to_tensor(inputs[f"encoder_{name}"])
            for name in ("token_ids", "padding_mask")
        )
        states = seq2seq_lm.backbone.encode(ids, mask)

        def log_p(row, states=states, mask=mask):
            backbone = dropless.backbone
            row = ops.convert_to_tensor(np.array([row], "int32"))
            hidden = backbone.decode(row, ops.ones_like(row), states, mask)
            logits = ops.convert_to_numpy(backbone.logits(hidden))[0, -1]
            logits = logits.astype("float64")
            return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()

        begun = [int(BEGUN[0][0]) % 20]
        # A token that the search without one takes midway.
        free = _beams(log_p, begun, LENGTH, 3, None)
        for stop in (None, free[4]):
            expected = _beams(log_p, begun, LENGTH, 3, stop)
            got = seq2seq_lm.generate(
                inputs, stop_token_ids=None if stop is None else (stop,)
            )
            ids, kept = got["decoder_token_ids"][0], got["decoder_padding_mask"][0]
            np.testing.assert_array_equal(ids[: len(expected)], expected)
            end = LENGTH
            if stop in expected[1:]:
                end = expected.index(stop, 1) + 1
            np.testing.assert_array_equal(kept, np.arange(LENGTH) < end)
            lengths.append(end)
    assert min(lengths) < LENGTH


def test_generation_ends_at_stop_tokens():
    seq2seq_lm = small_seq2seq_lm()
    seq2seq_lm.compile(sampler="greedy")
    free = seq2seq_lm.generate(prompts(), stop_token_ids=None)["decoder_token_ids"]
    stop = int(free[0, 5])
    outputs = seq2seq_lm.generate(prompts(), stop_token_ids=(stop,))
    for row, ids, mask in zip(
        BEGUN, free, outputs["decoder_padding_mask"], strict=True
    ):
        new = np.asarray(ids)[len(row) :]
        end = LENGTH
        if stop in new:
            end = len(row) + int(np.argmax(new == stop)) + 1
        np.testing.assert_array_equal(mask[:end], True)
        assert not mask[end:].any() or stop not in new


def _changed(name, value):
    return {**prompts(), name: value}


@pytest.mark.parametrize(
    "inputs, named",
    [
        (source_and_target(SOURCES, BEGUN[:2], 6), "as many sources as targets"),
        (source_and_target([random_ids(11)], BEGUN[:1]), "`encoder_token_ids`.*10"),
        (prompts(11), "`decoder_token_ids`.*10"),
        (_changed("decoder_padding_mask", np.eye(3, LENGTH)), "at the right"),
        (_changed("decoder_padding_mask", np.zeros((3, LENGTH))), "at least one token"),
        (_changed("encoder_padding_mask", np.zeros((3, 7))), "nothing but padding"),
        (_changed("encoder_token_ids", np.full((3, 7), 99)), "vocabulary_size"),
    ],
)
def test_inputs_that_cannot_work_are_refused(inputs, named):
    seq2seq_lm = small_seq2seq_lm(context_length=10)
    with pytest.raises(ValueError, match=named):
        seq2seq_lm.generate(inputs, stop_token_ids=None)


LETTERS = "abcdefghijklmnopqrstuvwxyz ."


def preprocessor(**arguments):
    vocabulary = {"<pad>": 0, "</s>": 1}
    vocabulary |= {letter: i + 2 for i, letter in enumerate(LETTERS)}
    tokenizer = MoETokenizer(
        tokenizer_json={
            "version": "1.0",
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        },
        start_token=None,
    )
    lengths = {"encoder_sequence_length": 12, "decoder_sequence_length": 8}
    return MoESeq2SeqLMPreprocessor(tokenizer, **{**lengths, **arguments})


TEXTS = {
    "encoder_text": ["the cat sat.", "a dog ran.", "birds.", "the end."],
    "decoder_text": ["cat", "dog", "bird", "end"],
}


def test_strings_in_and_out():
    seq2seq_lm = small_seq2seq_lm(preprocessor(), vocabulary_size=30)
    seq2seq_lm.compile(optimizer=keras.optimizers.Adam(1e-2), sampler="greedy")
    history = seq2seq_lm.fit(TEXTS, batch_size=2, epochs=6, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert np.isfinite(seq2seq_lm.evaluate(TEXTS, batch_size=2, verbose=0)).all()
    assert seq2seq_lm.predict(TEXTS, batch_size=2, verbose=0).shape == (4, 8, 30)
    # The same pairs in other forms.
    pair = TEXTS["encoder_text"], TEXTS["decoder_text"]
    expected = seq2seq_lm.evaluate(TEXTS, verbose=0)
    np.testing.assert_allclose(
        seq2seq_lm.evaluate(x=pair[0], y=pair[1], verbose=0), expected, rtol=1e-5
    )
    one = seq2seq_lm.generate("the cat", max_length=7)
    assert isinstance(one, str)
    several = seq2seq_lm.generate(["the cat", "a dog"], max_length=7)
    assert several[0] == one and len(several) == 2
    asked = {"encoder_text": "the cat", "decoder_text": "ca"}
    begun = seq2seq_lm.generate(asked, max_length=7)
    assert begun.startswith("ca")
    assert asked == {"encoder_text": "the cat", "decoder_text": "ca"}
    with pytest.raises(ValueError, match="at least one"):
        seq2seq_lm.generate([])
    with pytest.raises(ValueError, match="max_length"):
        seq2seq_lm.generate("the ", max_length=0)
    with pytest.raises(ValueError, match="strip_prompt"):
        seq2seq_lm.generate("the ", strip_prompt=True)


def test_it_learns_to_copy():
    # What no decoder without cross-attention can do.
    keras.utils.set_random_seed(1)
    seq2seq_lm = small_seq2seq_lm(
        preprocessor(encoder_sequence_length=4, decoder_sequence_length=4),
        vocabulary_size=30,
        hidden_dim=32,
        balance_loss=0.01,
        num_experts=2,
    )
    seq2seq_lm.compile(optimizer=keras.optimizers.Adam(1e-2), sampler="greedy")
    words = [a + b for a in LETTERS[:6] for b in LETTERS[:6]]
    seq2seq_lm.fit(x=words, y=words, batch_size=36, epochs=80, verbose=0)
    found = seq2seq_lm.generate(words)
    assert np.mean([a == b for a, b in zip(found, words, strict=True)]) > 0.8


def test_context_is_a_limit_of_generation():
    seq2seq_lm = small_seq2seq_lm(preprocessor(), vocabulary_size=30, context_length=12)
    with pytest.raises(ValueError, match=r"context_length.*12.*13"):
        seq2seq_lm.generate("the ", max_length=13)
    long = preprocessor(encoder_sequence_length=13)
    seq2seq_lm = small_seq2seq_lm(long, vocabulary_size=30, context_length=12)
    with pytest.raises(ValueError, match=r"encoder_sequence_length.*12.*13"):
        seq2seq_lm.generate("the ", max_length=8)


def test_a_tokenizer_larger_than_the_embedding_is_refused():
    with pytest.raises(ValueError, match="vocabulary_size"):
        small_seq2seq_lm(preprocessor(), vocabulary_size=29)


def test_training_is_the_same_eager_and_compiled():
    batch = source_and_target(SOURCES, [random_ids(6, seed=i) for i in range(3)])
    y = random_ids(3, 6, seed=7)
    results = {}
    for mode, arguments in execution.TRAINING.items():
        keras.utils.set_random_seed(3)
        seq2seq_lm = small_seq2seq_lm(balance_loss=0.01, z_loss=1e-3, recompute=True)
        seq2seq_lm.compile(optimizer=keras.optimizers.SGD(0.1), **arguments)
        history = seq2seq_lm.fit(batch, y, epochs=2, shuffle=False, verbose=0)
        results[mode] = history.history["loss"]
    loss = results.pop("eager")
    assert loss[1] < loss[0]
    for other in results.values():
        np.testing.assert_allclose(other, loss, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_half_precision(dtype):
    exact, half = small_seq2seq_lm(), small_seq2seq_lm(dtype=dtype)
    half.set_weights(exact.get_weights())
    assert all(m.router.kernel.dtype == "float32" for m in half.backbone.mixtures)
    batch = source_and_target(SOURCES, [random_ids(6, seed=i) for i in range(3)])
    expected = ops.convert_to_numpy(exact(batch))
    found = ops.convert_to_numpy(ops.cast(half(batch), "float32"))
    # Roundings of 2**-8, over a few layers; a token near a tie may go elsewhere.
    close = np.isclose(found, expected, atol=0.1 * expected.std()).mean()
    assert close > 0.8
    half.compile(sampler="greedy")
    generated = half.generate(prompts(), stop_token_ids=None)["decoder_token_ids"]
    best = []
    for source, begun, row in zip(SOURCES, BEGUN, generated, strict=True):
        logits = logits_of(exact, [source], [np.asarray(row)])[0]
        taken = np.take_along_axis(logits[:-1], np.asarray(row)[1:, None], -1)[:, 0]
        best += list((logits[:-1].max(-1) - taken)[len(begun) - 1 :])
    assert np.mean(np.array(best) < 0.1 * expected.std()) > 0.8
    if dtype == "mixed_bfloat16":
        half.compile(optimizer=keras.optimizers.Adam(1e-2))
    else:
        half.compile()  # with an optimizer that trains such weights
    y = random_ids(3, 6, seed=7)
    before = half.evaluate(batch, y, verbose=0)[0]
    half.fit(batch, y, epochs=10, verbose=0)
    assert half.evaluate(batch, y, verbose=0)[0] < before


def test_fits_spans_that_are_taken_out():
    corruption = keras_moe.SpanCorruption(
        12, sentinel_ids=range(49, 39, -1), end_id=1, pad_id=0
    )
    # Words that follow each other: what is missing can be told.
    texts = [np.arange(2, 40)] * 4
    dataset = keras_moe.SpanCorruptionDataset(texts, corruption, batch_size=4)
    held_out = keras_moe.SpanCorruptionDataset(
        texts[:1], corruption, 4, seed=1, shuffle=False, fresh_noise=False
    )
    seq2seq_lm = small_seq2seq_lm(balance_loss=0.01, initializer_scale=0.1)
    seq2seq_lm.compile(optimizer=keras.optimizers.Adam(1e-2), sampler="greedy")
    before = seq2seq_lm.evaluate(held_out, verbose=0)[0]
    seq2seq_lm.fit(dataset, epochs=6, verbose=0)
    assert seq2seq_lm.evaluate(held_out, verbose=0)[0] < before - 0.5


def test_lora_and_quantisation():
    batch = source_and_target(SOURCES, [random_ids(6, seed=i) for i in range(3)])
    seq2seq_lm = small_seq2seq_lm()
    before = ops.convert_to_numpy(seq2seq_lm(batch))
    with pytest.warns(UserWarning, match=r"enable_lora.*expert.*experts"):
        seq2seq_lm.backbone.enable_lora(2)
    # It begins as an addition of nothing.
    np.testing.assert_allclose(
        ops.convert_to_numpy(seq2seq_lm(batch)), before, atol=1e-5
    )
    attention = seq2seq_lm.backbone.decoder_transformer_layers[1].cross_attention
    kernel = ops.convert_to_numpy(attention.query._kernel)
    experts = [m.experts.get_weights() for m in seq2seq_lm.backbone.mixtures]
    seq2seq_lm.compile(optimizer=keras.optimizers.Adam(0.1), sampler="greedy")
    seq2seq_lm.fit(batch, random_ids(3, 6, seed=7), epochs=2, verbose=0)
    assert np.abs(ops.convert_to_numpy(seq2seq_lm(batch)) - before).max() > 1e-3
    assert np.abs(ops.convert_to_numpy(attention.query.lora_kernel_b)).max() > 0
    np.testing.assert_array_equal(ops.convert_to_numpy(attention.query._kernel), kernel)
    for mixture, old in zip(seq2seq_lm.backbone.mixtures, experts, strict=True):
        keras.tree.map_structure(
            np.testing.assert_array_equal, mixture.experts.get_weights(), old
        )

    seq2seq_lm = small_seq2seq_lm()
    before = ops.convert_to_numpy(seq2seq_lm(batch))
    with pytest.warns(UserWarning, match=r"quantize.*expert"):
        seq2seq_lm.quantize("int8")
    after = ops.convert_to_numpy(seq2seq_lm(batch))
    assert 0 < np.abs(after - before).mean() < 0.2 * np.abs(before).mean()
    seq2seq_lm.compile(sampler="greedy")
    generated = seq2seq_lm.generate(prompts(), stop_token_ids=None)
    for source, begun, row in zip(
        SOURCES, BEGUN, generated["decoder_token_ids"], strict=True
    ):
        logits = logits_of(seq2seq_lm, [source], [np.asarray(row)])[0]
        best = logits[:-1].max(-1)
        taken = np.take_along_axis(logits[:-1], np.asarray(row)[1:, None], -1)[:, 0]
        # What lies beyond a token has a part in how its row is quantised.
        assert ((best - taken)[len(begun) - 1 :] < 0.2 * logits.std()).all()


def test_router_losses_of_both_stacks_count_in_training():
    batch = source_and_target(SOURCES, [random_ids(6, seed=i) for i in range(3)])
    y, losses = random_ids(3, 6, seed=7), {}
    for coefficient in (0.0, 0.5):
        keras.utils.set_random_seed(3)
        seq2seq_lm = small_seq2seq_lm(balance_loss=coefficient)
        seq2seq_lm.compile(optimizer=keras.optimizers.SGD(0.0))
        losses[coefficient] = seq2seq_lm.fit(batch, y, verbose=0).history["loss"][0]
    expected = 0.0
    for layer in seq2seq_lm.backbone.routing_statistics(batch):
        counts = ops.convert_to_numpy(layer.assignments)
        mean = ops.convert_to_numpy(layer.probabilities) / float(layer.tokens)
        expected += 4 * (counts / counts.sum() * mean).sum()
    assert losses[0.5] - losses[0.0] == pytest.approx(0.5 * expected, abs=1e-4)


def test_saving_in_every_format(tmp_path):
    seq2seq_lm = small_seq2seq_lm(preprocessor(), vocabulary_size=30)
    batch = source_and_target([s % 30 for s in SOURCES], [b % 30 for b in BEGUN])
    expected = ops.convert_to_numpy(seq2seq_lm(batch))
    folder = str(tmp_path / "preset")
    seq2seq_lm.save_to_preset(folder)
    seq2seq_lm.save(tmp_path / "task.keras")
    seq2seq_lm.save_weights(tmp_path / "task.weights.h5")
    other = small_seq2seq_lm(preprocessor(), vocabulary_size=30)
    other.load_weights(tmp_path / "task.weights.h5")
    loaded = {
        "preset": MoESeq2SeqLM.from_preset(folder),
        "kerashub": keras_hub.models.Seq2SeqLM.from_preset(folder),
        "keras": keras.saving.load_model(tmp_path / "task.keras"),
        "weights": other,
    }
    for model in loaded.values():
        np.testing.assert_array_equal(ops.convert_to_numpy(model(batch)), expected)
        assert model.preprocessor.tokenizer("cat").tolist() == [4, 2, 21]
        assert model.preprocessor.encoder_sequence_length == 12
        assert model.preprocessor.decoder_sequence_length == 8
    for cls in (keras_hub.tokenizers.Tokenizer, MoETokenizer):
        assert type(cls.from_preset(folder)) is MoETokenizer
    for cls in (keras_hub.models.Seq2SeqLMPreprocessor, MoESeq2SeqLMPreprocessor):
        assert type(cls.from_preset(folder)) is MoESeq2SeqLMPreprocessor


def test_tensorflow_is_not_needed(tmp_path):
    seq2seq_lm = small_seq2seq_lm(preprocessor(), vocabulary_size=30)
    seq2seq_lm.save_to_preset(str(tmp_path))
    seq2seq_lm.compile(sampler="greedy")
    expected = seq2seq_lm.generate(TEXTS["encoder_text"], max_length=6)
    backend = keras.config.backend()
    done = run_python(
        f"""
import sys
sys.modules["tensorflow"] = sys.modules["tensorflow_text"] = None
from keras_moe.models import MoESeq2SeqLM
seq2seq_lm = MoESeq2SeqLM.from_preset({str(tmp_path)!r})
seq2seq_lm.compile(sampler="greedy")
print(seq2seq_lm.generate({TEXTS["encoder_text"]!r}, max_length=6))
seq2seq_lm.fit({TEXTS!r}, batch_size=2, verbose=0)
""",
        KERAS_BACKEND="jax" if backend == "tensorflow" else backend,
    )
    assert done.stdout == f"{expected}\n", done.stderr
    assert done.returncode == 0, done.stderr
