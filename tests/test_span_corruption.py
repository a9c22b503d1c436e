import itertools
import json
import math

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_moe import SpanCorruption, SpanCorruptionDataset
from keras_moe.models import MoETokenizer
from presets import tiny_tokenizers

IDS = dict(sentinel_ids=range(999, 799, -1), end_id=1, pad_id=0)
SIZES = dict(
    inputs_length=st.integers(4, 200),
    noise_density=st.floats(0.02, 0.95),
    mean_span_length=st.floats(1, 8),
)


def make(inputs_length=64, **overrides):
    return SpanCorruption(inputs_length, **{**IDS, **overrides})


def text(length, seed=0):
    return np.random.default_rng(seed).integers(2, 800, length)


def restored(x, y, ids=IDS):
    """The text behind an example: spans put where their sentinels stand."""
    sentinels = list(ids["sentinel_ids"])
    inputs = x["encoder_token_ids"][x["encoder_padding_mask"]].tolist()
    targets = y[x["decoder_padding_mask"]].tolist()
    assert inputs.pop() == targets.pop() == ids["end_id"]
    spans, order = {}, []
    for token in targets:
        if token in sentinels:
            order.append(token)
            spans[token] = []
        else:
            spans[order[-1]].append(token)
    assert order == [t for t in inputs if t in sentinels] == sentinels[: len(order)]
    return [t for token in inputs for t in spans.get(token, [token])], spans


def counts(length, density, mean):
    """T5's `random_spans_noise_mask`: tokens that stay, noise, spans."""
    noise = min(max(int(np.round(length * density)), 1), length - 1)
    spans = max(int(np.round(noise / mean)), 1)
    return length - noise, noise, min(spans, length - noise)


class TestSizes:
    def test_those_that_t5_was_trained_on(self):
        # 512 tokens, of 568 of the text: the authors' code.
        corruption = make(512)
        assert corruption.tokens_length == 568
        assert corruption.targets_length == 114
        assert corruption.num_spans == 28

    @given(**SIZES)
    def test_texts_are_the_longest_that_fit(
        self, inputs_length, noise_density, mean_span_length
    ):
        corruption = make(
            inputs_length,
            noise_density=noise_density,
            mean_span_length=mean_span_length,
            sentinel_ids=range(9999, 999, -1),
        )

        def filled(length):
            kept, noise, spans = counts(length, noise_density, mean_span_length)
            return kept + spans + 1, noise + spans + 1

        length = corruption.tokens_length
        assert filled(length)[0] <= inputs_length < filled(length + 1)[0]
        assert corruption.targets_length == filled(length)[1]
        spans = counts(length, noise_density, mean_span_length)[2]
        assert corruption.num_spans == spans
        for shorter in range(2, length):
            inputs, targets = filled(shorter)
            assert inputs <= inputs_length and targets <= corruption.targets_length


class TestOneText:
    def test_the_figure_of_the_paper(self):
        """Raffel et al., figure 2, but that the text ends with its second span."""
        words = "Thank you for inviting me to your party last week".split()

        class Fixed(SpanCorruption):
            def noise_mask(self, length, rng):
                return np.isin(words, ["for", "inviting", "last", "week"])

        corruption = Fixed(
            9,
            noise_density=0.4,
            mean_span_length=2,
            sentinel_ids=[90, 89],
            end_id=91,
            pad_id=92,
        )
        assert corruption.tokens_length == len(words)
        names = dict(enumerate(words)) | {90: "<X>", 89: "<Y>", 91: "</s>", 92: "_"}
        x, y, weight = corruption(np.arange(10), rng=0)
        inputs, starts, targets = (
            " ".join(names[i] for i in ids)
            for ids in (x["encoder_token_ids"], x["decoder_token_ids"], y)
        )
        assert inputs == "Thank you <X> me to your party <Y> </s>"
        assert targets == "<X> for inviting <Y> last week </s>"
        assert starts == "_ <X> for inviting <Y> last week"
        assert weight.tolist() == [1.0] * 7

    @settings(max_examples=60)
    @given(**SIZES, data=st.data())
    def test_nothing_is_lost_and_counts_are_exact(
        self, inputs_length, noise_density, mean_span_length, data
    ):
        ids = {**IDS, "sentinel_ids": range(9999, 999, -1)}
        corruption = SpanCorruption(
            inputs_length,
            noise_density=noise_density,
            mean_span_length=mean_span_length,
            **ids,
        )
        length = data.draw(st.integers(2, corruption.tokens_length))
        seed = data.draw(st.integers(0, 9))
        tokens = text(length, seed)
        x, y, weight = corruption(tokens, rng=seed)
        found, spans = restored(x, y, ids)
        assert found == tokens.tolist()
        kept, noise, number = counts(length, noise_density, mean_span_length)
        assert len(spans) == number
        assert sum(map(len, spans.values())) == noise
        assert min(map(len, spans.values())) >= 1
        assert x["encoder_padding_mask"].sum() == kept + number + 1
        assert x["decoder_padding_mask"].sum() == noise + number + 1
        # Shapes, types and what is padding.
        shapes = {k: (v.shape, v.dtype.name) for k, v in x.items()}
        assert shapes == {
            "encoder_token_ids": ((inputs_length,), "int32"),
            "encoder_padding_mask": ((inputs_length,), "bool"),
            "decoder_token_ids": (y.shape, "int32"),
            "decoder_padding_mask": (y.shape, "bool"),
        }
        assert y.shape == (corruption.targets_length,) and y.dtype == "int32"
        np.testing.assert_array_equal(weight, x["decoder_padding_mask"])
        assert weight.dtype == "float32"
        np.testing.assert_array_equal(x["decoder_token_ids"][1:], y[:-1])
        assert x["decoder_token_ids"][0] == 0
        for ids_, mask in ((y, weight), list(x.values())[:2]):
            assert not ids_[mask == 0].any()

    def test_a_decoder_may_start_elsewhere(self):
        x, _, _ = make(start_id=7)(text(20), rng=0)
        assert x["decoder_token_ids"][0] == 7

    def test_ids_that_are_no_arrays(self):
        corruption = make()
        for tokens in (
            list(range(2, 22)),
            tuple(range(2, 22)),
            np.arange(2, 22, 1, "u1"),
        ):
            x, y, _ = corruption(tokens, rng=3)
            expected = corruption(np.arange(2, 22), rng=3)
            np.testing.assert_array_equal(y, expected[1])


class TestChance:
    def test_every_partition_is_as_likely(self):
        """Of 7 noise tokens in 3 spans and 7 others in 3 parts, 15 ways each."""
        corruption = make(32, noise_density=0.5, mean_span_length=2.4)
        found = {}
        rng = np.random.default_rng(0)
        count = 9000
        for _ in range(count):
            mask = corruption.noise_mask(14, rng)
            assert not mask[0] and mask[-1] and mask.sum() == 7
            runs = tuple(len(list(run)) for _, run in itertools.groupby(mask))
            assert len(runs) == 6
            found[runs] = found.get(runs, 0) + 1
        ways = math.comb(6, 2) ** 2
        assert len(found) == ways
        # Chi-squared of 224 degrees of freedom: five standard deviations above.
        expected = count / ways
        chi = sum((n - expected) ** 2 / expected for n in found.values())
        assert chi < ways - 1 + 5 * math.sqrt(2 * (ways - 1))

    def test_every_token_is_noise_as_often(self):
        """But for the ends, where the text begins with what stays."""
        corruption = make(64)
        rng = np.random.default_rng(0)
        length, count = corruption.tokens_length, 4000
        share = np.mean(
            [corruption.noise_mask(length, rng) for _ in range(count)], axis=0
        )
        _, noise, _ = counts(length, 0.15, 3.0)
        assert abs(share.mean() - noise / length) < 1e-9
        middle = share[length // 4 : 3 * length // 4]
        deviation = np.sqrt(0.15 * 0.85 / count)
        assert np.abs(middle - middle.mean()).max() < 5 * deviation

    def test_seeds(self):
        corruption = make()
        tokens = text(60)
        first, again, other = (corruption(tokens, rng=seed)[1] for seed in (4, 4, 5))
        np.testing.assert_array_equal(first, again)
        assert (first != other).any()
        np.testing.assert_array_equal(
            corruption(tokens, rng=np.random.default_rng(4))[1], first
        )
        generator = np.random.default_rng(4)
        runs = [corruption(tokens, generator)[1] for _ in range(2)]
        np.testing.assert_array_equal(runs[0], first)
        assert (runs[1] != first).any()


class TestBatches:
    @pytest.mark.parametrize("form", [np.asarray, list], ids=["array", "list"])
    def test_a_batch_is_its_rows(self, form):
        corruption = make()
        rows = np.stack([text(40, seed) for seed in range(3)])
        x, y, weight = corruption(form(rows), rng=2)
        rng = np.random.default_rng(2)
        for i, row in enumerate(rows):
            expected = corruption(row, rng)
            got = ({k: v[i] for k, v in x.items()}, y[i], weight[i])
            keras.tree.map_structure(np.testing.assert_array_equal, got, expected)

    def test_rows_of_any_length(self):
        corruption = make()
        rows = [text(length).tolist() for length in (2, 40, corruption.tokens_length)]
        x, y, _ = corruption(rows, rng=0)
        for i, row in enumerate(rows):
            assert restored({k: v[i] for k, v in x.items()}, y[i])[0] == row

    def test_maps_over_tf_data_and_torch(self):
        import tensorflow as tf
        import torch

        corruption = make()
        rows = np.stack([text(40, seed) for seed in range(4)])
        _, expected, _ = corruption(rows[:2], rng=0)

        def corrupted(batch):
            def run(batch):
                return corruption(batch, 0)[1]

            return tf.numpy_function(run, [batch], "int32")

        batches = tf.data.Dataset.from_tensor_slices(rows).batch(2).map(corrupted)
        np.testing.assert_array_equal(next(iter(batches)), expected)
        loader = torch.utils.data.DataLoader(
            rows, batch_size=2, collate_fn=lambda batch: corruption(batch, 0)
        )
        np.testing.assert_array_equal(next(iter(loader))[1], expected)


class TestPacking:
    @given(st.lists(st.integers(0, 150), min_size=1, max_size=6), st.integers(4, 40))
    def test_no_token_is_lost(self, lengths, inputs_length):
        corruption = make(inputs_length)
        texts = [text(length, seed) for seed, length in enumerate(lengths)]
        if sum(lengths) < 2:
            with pytest.raises(ValueError, match="two tokens or more.*Received: [01]"):
                corruption.pack(texts)
            return
        examples = corruption.pack(texts)
        np.testing.assert_array_equal(np.concatenate(examples), np.concatenate(texts))
        sizes = [len(example) for example in examples]
        longest = corruption.tokens_length
        assert all(size == longest for size in sizes[:-2])
        assert 2 <= sizes[-1] <= longest and sizes[0] <= longest
        assert len(sizes) == -(-sum(lengths) // longest)
        for example in examples:
            corruption(example, rng=0)

    def test_errors(self):
        with pytest.raises(ValueError, match="`texts`.*no `tokenizer`.*'a text'"):
            make().pack(["a text"])
        with pytest.raises(ValueError, match="`texts`.*dtype float64"):
            make().pack([[0.5, 1.5]])


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-pair tokenizer with sentinels, the first of the highest id."""
    texts = ["the quick brown fox jumps over the lazy dog"] * 4
    content = json.loads(tiny_tokenizers.train_byte_pair(texts, 300))
    size = len(content["model"]["vocab"])
    for i in range(12):
        content["added_tokens"].append(
            {
                **content["added_tokens"][0],
                "id": size + i,
                "content": f"<extra_id_{11 - i}>",
            }
        )
    return MoETokenizer(tokenizer_json=content)


class TestTokenizers:
    def test_ids_come_from_it(self, tokenizer):
        corruption = SpanCorruption(32, tokenizer)
        highest = tokenizer.vocabulary_size() - 1
        spans = corruption.num_spans
        assert corruption.sentinel_ids.tolist() == [highest - i for i in range(spans)]
        assert corruption.end_id == tokenizer.end_token_id
        assert corruption.pad_id == tokenizer.pad_token_id
        assert corruption.start_id == tokenizer.start_token_id
        config = {**tokenizer.get_config(), "start_token": None}
        source = json.loads(tokenizer._model.source)
        without = MoETokenizer(**{**config, "tokenizer_json": source})
        assert SpanCorruption(32, without).start_id == corruption.pad_id
        own = SpanCorruption(32, tokenizer, end_id=17, start_id=18)
        assert (own.end_id, own.start_id, own.pad_id) == (17, 18, corruption.pad_id)

    def test_strings(self, tokenizer):
        sentences = ["the quick brown fox jumps over", "the lazy dog"]
        corruption = SpanCorruption(32, tokenizer)
        ids = np.concatenate([tokenizer(sentence) for sentence in sentences])
        np.testing.assert_array_equal(np.concatenate(corruption.pack(sentences)), ids)
        x, y, _ = corruption(ids, rng=0)
        read = tokenizer.detokenize(y[x["decoder_padding_mask"]])
        assert read.startswith("<extra_id_0>") and read.endswith("</s>")

    def test_sentinels_that_are_missing(self, tokenizer):
        with pytest.raises(ValueError, match="'<extra_id_0>' to '<extra_id_13>'") as e:
            SpanCorruption(256, tokenizer)
        assert "without '<extra_id_12>', '<extra_id_13>'" in str(e.value)


class TestDataset:
    def make(self, count=230, **settings):
        texts = [text(count - 30), text(30, 1)]
        settings = {"batch_size": 2, **settings}
        return SpanCorruptionDataset(texts, make(32), **settings), np.concatenate(texts)

    def read(self, dataset):
        """All examples of an epoch, as texts and as targets."""
        dataset.on_epoch_begin()
        examples = [
            ({k: v[i] for k, v in x.items()}, y[i])
            for x, y, _ in (dataset[b] for b in range(len(dataset)))
            for i in range(len(y))
        ]
        dataset.on_epoch_end()
        texts = [restored(x, y)[0] for x, y in examples]
        return texts, [y.tolist() for _, y in examples]

    def test_every_epoch_has_every_token_once(self):
        dataset, tokens = self.make()
        size = dataset.corruption.tokens_length
        expected = sorted(tokens[i : i + size].tolist() for i in range(0, 230, size))
        orders = []
        for _ in range(3):
            texts, _ = self.read(dataset)
            assert sorted(texts) == expected
            orders.append(texts)
        assert orders[0] != orders[1] != orders[2]
        assert len(dataset) == -(-len(expected) // 2)

    def test_noise_is_new_in_each_epoch(self):
        dataset, _ = self.make(shuffle=False)
        (texts, first), (again, second) = self.read(dataset), self.read(dataset)
        assert texts == again
        # Of short texts some may fall out alike.
        assert sum(a != b for a, b in zip(first, second, strict=True)) > len(first) / 2

    def test_noise_can_stay(self):
        dataset, _ = self.make(fresh_noise=False)
        first, second = self.read(dataset), self.read(dataset)
        assert first != second  # shuffled
        assert sorted(first[1]) == sorted(second[1])
        still, _ = self.make(fresh_noise=False, shuffle=False)
        assert self.read(still) == self.read(still)

    def test_seed_and_epoch_repeat_it(self):
        dataset, twin, other = (self.make(seed=s)[0] for s in (1, 1, 2))
        epochs = [self.read(dataset) for _ in range(3)]
        assert self.read(twin) == epochs[0] != self.read(other)
        twin.epoch = 2
        assert self.read(twin) == epochs[2]

    def test_batches_in_any_order(self):
        dataset, twin = (self.make()[0] for _ in range(2))
        for i in (3, 0, 3, 1):
            keras.tree.map_structure(np.testing.assert_array_equal, dataset[i], twin[i])
        with pytest.raises(IndexError, match=f"{len(dataset)} batches"):
            dataset[len(dataset)]

    @pytest.mark.parametrize("examples", [1, 5])
    def test_fit(self, examples):
        """Each epoch of `fit` has its own noise, from epoch 0 on."""
        corruption = make(16)
        length = corruption.tokens_length
        dataset = SpanCorruptionDataset([text(examples * length)], corruption, 1)
        validation = SpanCorruptionDataset(
            [text(3 * length, 5)], corruption, 2, shuffle=False, fresh_noise=False
        )
        seen = []

        class Noted(SpanCorruptionDataset):
            def __getitem__(self, index):
                batch = super().__getitem__(index)
                seen.append((self.epoch, index))
                return batch

        dataset.__class__ = Noted
        inputs = {
            name: keras.Input((None,), dtype="int32", name=name)
            for name in corruption(text(length), 0)[0]
        }
        embedding = keras.layers.Embedding(1000, 4)
        source = keras.layers.GlobalAveragePooling1D(keepdims=True)(
            embedding(inputs["encoder_token_ids"])
        )
        target = embedding(inputs["decoder_token_ids"]) + source
        model = keras.Model(inputs, keras.layers.Dense(1000)(target))
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.Adam(0.02), loss, weighted_metrics=["accuracy"])
        history = model.fit(
            dataset, validation_data=validation, epochs=4, verbose=0
        ).history
        assert history["loss"][-1] < history["loss"][0]
        assert dataset.epoch >= 4
        if examples > 1:
            assert dataset.epoch == 4
            for epoch in range(4):
                assert {i for e, i in seen if e == epoch} == set(range(examples))
        values = [model.evaluate(validation, verbose=0)[0] for _ in range(2)]
        np.testing.assert_allclose(values, history["val_loss"][-1], rtol=1e-5)

    def test_bad_arguments(self):
        with pytest.raises(ValueError, match="`batch_size`.*batch_size=0"):
            self.make(batch_size=0)
        with pytest.raises(ValueError, match="`seed`.*seed=-1"):
            self.make(seed=-1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(inputs_length=3), "`inputs_length`.*at least 4.*inputs_length=3"),
        (dict(noise_density=0), "`noise_density`.*noise_density=0"),
        (dict(noise_density=1.0), "`noise_density`.*below 1.*noise_density=1.0"),
        (dict(noise_density=float("nan")), "`noise_density`.*noise_density=nan"),
        (dict(mean_span_length=0.5), "`mean_span_length` must be at least 1.*=0.5"),
        (dict(mean_span_length="3"), "`mean_span_length`.*mean_span_length='3'"),
        (dict(sentinel_ids=[9, 8]), "as many as there can be spans, 3 with.*: 2 sent"),
        (dict(sentinel_ids=[9, 8, 9, 7]), r"different ids.*sentinel_ids=\[9, 8, 9, 7"),
        (dict(sentinel_ids=[9, 8, 7, 1]), "none of them `end_id`.*end_id=1, pad_id=0"),
        (dict(sentinel_ids=[9, 8, 7, -1]), r"0 or more.*-1\]"),
        (dict(sentinel_ids=None), "`sentinel_ids` must be given.*tokenizer=None"),
        (dict(end_id=None), "`end_id` must be given.*end_id=None"),
        (dict(pad_id=None), "`pad_id` must be given.*pad_id=None"),
        (dict(end_id=-1), "`end_id`.*at least 0.*end_id=-1"),
        (dict(start_id="<s>"), "`start_id`.*start_id='<s>'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        make(**arguments)


@pytest.mark.parametrize(
    "tokens, message",
    [
        ([], "integers"),
        ([5], "a length from 2.*Received: 1 tokens"),
        (range(2, 200), "to 70, whose corrupted inputs fill.*=64. Received: 198"),
        ([1.0, 2.0], "integers"),
        ([True, False], "integers"),
        ("a text", "integers.*'a text'"),
        ([3, -2, 5], r"0 or more.*\[3, -2, 5\]"),
        ([3, 999, 5], r"no sentinels.*\[3, 999, 5\]"),
        (np.zeros((2, 2, 2), int), "integers"),
        ([[3, 4], [5]], "a length from 2.*Received: 1 tokens"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_tokens(tokens, message):
    tokens = list(tokens) if isinstance(tokens, range) else tokens
    with pytest.raises(ValueError, match=f"`tokens` must.*{message}"):
        make()(tokens, rng=0)
