"""Span corruption: T5's pre-training task, made of any text, in NumPy alone.

L  tokens of an example     N  of them noise, the tokens that are to be filled in
M  spans of noise           S  `inputs_length`      T  `targets_length`
"""

import bisect

import keras
import numpy as np

from keras_moe import checks

SENTINEL = "<extra_id_{}>"  # as T5 numbers them, from 0


class SpanCorruption:
    """Takes spans out of a text, which a model then has to fill in.

    Of L tokens `N = round(noise_density * L)` are noise, in `M = round(N /
    mean_span_length)` spans, each at least a token long and at least a token apart.
    In the inputs a sentinel token stands for each span, another for each; the targets
    hold the spans, each after its sentinel. Both close with the end token
    ([Raffel et al., 2019](https://arxiv.org/abs/1910.10683), sections 3.1.4 and
    3.3.4):

        tokens    Thank you for inviting me to your party last week
        inputs    Thank you <extra_id_0> me to your party <extra_id_1> </s>
        targets   <extra_id_0> for inviting <extra_id_1> last week </s>

    N and M depend on L alone. Where the spans lie is random: the lengths of the spans
    are a uniformly random partition of N into M parts, those of what lies between
    them one of `L - N`. As in the authors' code, the text begins with a part that
    stays and ends with a span, so that the targets need no last sentinel, which the
    paper's figure 2 has, for what stays at its end.

    The transform needs no backend and no tokenizer library. It is a function of its
    arguments, `rng` among them, so any loader can map it. `SpanCorruptionDataset` feeds
    it to `fit`; so does grain, by `grain.MapDataset.source(corruption.pack(texts))`
    followed by `.seed(0).repeat(epochs).random_map(corruption).batch(32)`.

    Args:
        inputs_length: int, S, at least 4: the tokens of an encoder's input.
        tokenizer: None, or a tokenizer with the methods of
            `keras_moe.models.MoETokenizer`. It gives those of the ids below that are
            left out, and sentinels by their names, `<extra_id_0>` first.
        noise_density: float between 0 and 1: the share of the tokens that is noise.
        mean_span_length: float, at least 1: the mean length of a span, in tokens.
        sentinel_ids: sequence of int: the ids of the sentinels, first to last.
        end_id: int: what closes inputs and targets.
        pad_id: int: what fills both up.
        start_id: int: what a decoder starts from; None for the tokenizer's start
            token, and where it has none for `pad_id`, as T5 does.

    Call arguments:
        tokens: the ids of a text, int `[L]` with L from 2 to `tokens_length`; or a
            batch, as a list of such or int `[B, L]`.
        rng: a `numpy.random.Generator`, or a seed for one (an int or several).

    Returns:
        `(x, y, sample_weight)`: `x` is a dict of `encoder_token_ids` int32 `[S]`,
        `encoder_padding_mask` bool `[S]`, `decoder_token_ids` int32 `[T]` and
        `decoder_padding_mask` bool `[T]`; `y`, int32 `[T]`, the targets, and
        `decoder_token_ids` are they shifted right by one; `sample_weight`, float32
        `[T]`, is 0 at padding. A batch has B in front of each shape.

    Raises:
        ValueError: for settings outside the ranges above, for sentinels that are
            missing or not enough, and for tokens that are too few, too many, no
            integers, negative or sentinels.

    Example:

    ```python
    corruption = keras_moe.SpanCorruption(
        inputs_length=128, sentinel_ids=range(999, 899, -1), end_id=1, pad_id=0
    )
    x, y, sample_weight = corruption(np.arange(2, 102), rng=0)
    ```
    """

    def __init__(
        self,
        inputs_length,
        tokenizer=None,
        *,
        noise_density=0.15,
        mean_span_length=3.0,
        sentinel_ids=None,
        end_id=None,
        pad_id=None,
        start_id=None,
    ):
        checks.at_least("inputs_length", inputs_length, 4)
        checks.fraction("noise_density", noise_density)
        checks.positive("noise_density", noise_density)
        checks.positive("mean_span_length", mean_span_length)
        if mean_span_length < 1:
            raise ValueError(
                "`mean_span_length` must be at least 1. "
                f"Received: mean_span_length={mean_span_length!r}"
            )
        self.inputs_length = inputs_length
        self.tokenizer = tokenizer
        self.noise_density = noise_density
        self.mean_span_length = mean_span_length
        self.tokens_length = self._tokens_length()
        _, num_noise, self.num_spans = self._counts(self.tokens_length)
        self.targets_length = num_noise + self.num_spans + 1
        if tokenizer is not None:
            if sentinel_ids is None:
                sentinel_ids = _find_sentinels(tokenizer, self.num_spans)
            end_id = tokenizer.end_token_id if end_id is None else end_id
            pad_id = tokenizer.pad_token_id if pad_id is None else pad_id
            start_id = tokenizer.start_token_id if start_id is None else start_id
        for name, value in (
            ("sentinel_ids", sentinel_ids),
            ("end_id", end_id),
            ("pad_id", pad_id),
        ):
            if value is None:
                raise ValueError(
                    f"`{name}` must be given where there is no `tokenizer`. "
                    f"Received: {name}=None, tokenizer=None"
                )
        self.sentinel_ids = np.array(list(sentinel_ids), "int32")
        self.end_id = end_id
        self.pad_id = pad_id
        self.start_id = pad_id if start_id is None else start_id
        for name in ("end_id", "pad_id", "start_id"):
            checks.at_least(name, getattr(self, name), 0)
        self._check_sentinels()

    def _tokens_length(self):
        """The most tokens whose corrupted inputs fit: T5 fills them to the last.

        The inputs grow by one or none with each token.
        """
        too_many = 3 + int((self.inputs_length + 1) / (1 - self.noise_density))
        return -1 + bisect.bisect_right(
            range(too_many), self.inputs_length, lo=2, key=self._filled
        )

    def _filled(self, length):
        kept, _, spans = self._counts(length)
        return kept + spans + 1

    def _counts(self, length):
        """How many of `length` tokens stay, how many are noise, in how many spans."""
        noise = round(length * self.noise_density)
        noise = min(max(noise, 1), length - 1)
        spans = max(round(noise / self.mean_span_length), 1)
        return length - noise, noise, min(spans, length - noise)

    def _check_sentinels(self):
        ids = self.sentinel_ids
        if len(ids) < self.num_spans:
            raise ValueError(
                "`sentinel_ids` must be as many as there can be spans, "
                f"{self.num_spans} with inputs_length={self.inputs_length}, "
                f"noise_density={self.noise_density}, "
                f"mean_span_length={self.mean_span_length}. "
                f"Received: {len(ids)} sentinel ids"
            )
        others = {self.end_id, self.pad_id, self.start_id}
        if (
            len(set(ids.tolist())) < len(ids)
            or others & set(ids.tolist())
            or ids.min() < 0
        ):
            raise ValueError(
                "`sentinel_ids` must be different ids, 0 or more and none of them "
                "`end_id`, `pad_id` or `start_id`. Received: "
                f"sentinel_ids={ids.tolist()}, end_id={self.end_id}, "
                f"pad_id={self.pad_id}, start_id={self.start_id}"
            )

    def __call__(self, tokens, rng):
        if _is_batch(tokens):
            rng = np.random.default_rng(rng)
            return _stacked(self._corrupted(row, rng) for row in tokens)
        return self._corrupted(tokens, np.random.default_rng(rng))

    def _corrupted(self, tokens, rng):
        tokens = self._checked(tokens)
        noise = self.noise_mask(len(tokens), rng)
        inputs = self._filled_up(self._marked(tokens, noise), self.inputs_length)
        targets = self._filled_up(self._marked(tokens, ~noise), self.targets_length)
        (encoder_token_ids, encoder_padding_mask) = inputs
        (y, decoder_padding_mask) = targets
        x = {
            "encoder_token_ids": encoder_token_ids,
            "encoder_padding_mask": encoder_padding_mask,
            "decoder_token_ids": np.concatenate([[self.start_id], y[:-1]], dtype="i4"),
            "decoder_padding_mask": decoder_padding_mask,
        }
        return x, y, decoder_padding_mask.astype("float32")

    def noise_mask(self, length, rng):
        """Which of `length` tokens are noise, bool `[L]`, drawn from a generator."""
        kept, noise, spans = self._counts(length)
        kept, noise = (_random_partition(n, spans, rng) for n in (kept, noise))
        lengths = np.stack([kept, noise], axis=1)  # what stays comes first
        return np.repeat(np.tile([False, True], spans), lengths.ravel())

    def _marked(self, tokens, masked):
        """`tokens`, in the place of each run of `masked` ones its sentinel."""
        starts = masked & ~np.concatenate([[False], masked[:-1]])
        marked = tokens.copy()
        marked[starts] = self.sentinel_ids[: starts.sum()]
        return marked[starts | ~masked]

    def _filled_up(self, tokens, length):
        """`tokens` and the end token, padded, and where there is no padding."""
        filled = np.full(length, self.pad_id, "int32")
        filled[: len(tokens)] = tokens
        filled[len(tokens)] = self.end_id
        return filled, np.arange(length) <= len(tokens)

    def _checked(self, tokens):
        array = np.asarray(tokens)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(
                "`tokens` must be integers, [L], or a batch of such. "
                f"Received: tokens={tokens!r}"
            )
        if not 2 <= len(array) <= self.tokens_length:
            raise ValueError(
                "`tokens` must have a length from 2, a token to keep and one to fill "
                f"in, to {self.tokens_length}, whose corrupted inputs fill "
                f"inputs_length={self.inputs_length}. Received: {len(array)} tokens"
            )
        if array.min() < 0 or np.isin(array, self.sentinel_ids).any():
            raise ValueError(
                "`tokens` must be 0 or more, and no sentinels, which would be read as "
                f"spans. Received: tokens={array.tolist()}"
            )
        return array.astype("int32")

    def pack(self, texts):
        """Texts laid end to end and cut into examples.

        No token is lost: the last example is as long as what is left. Would that be a
        single token, the one before gives it another. Nothing marks where a text ends,
        as in T5's own packing.

        Args:
            texts: a sequence of str, which needs a `tokenizer`, or of sequences of
                token ids.

        Returns:
            A list of int32 arrays, `[tokens_length]` all but the last one or two.

        Raises:
            ValueError: if there are less than two tokens in all, or strings and no
                tokenizer.
        """
        texts = list(texts)
        if any(isinstance(text, (str, bytes)) for text in texts):
            if self.tokenizer is None:
                raise ValueError(
                    "`texts` must be token ids where there is no `tokenizer`. "
                    f"Received: texts={texts[:1]!r}"
                )
            texts = self.tokenizer(texts)
        rows = [np.asarray(text) for text in texts]
        tokens = np.concatenate([row for row in rows if row.size] or [[]])
        size = len(tokens)
        if size < 2:
            raise ValueError(
                f"`texts` must have two tokens or more in all. Received: {size}"
            )
        cuts = np.arange(self.tokens_length, size, self.tokens_length)
        if size % self.tokens_length == 1 and len(cuts):
            cuts[-1] -= 1
        if tokens.dtype.kind not in "iu":
            raise ValueError(
                "`texts` must be strings or integers. "
                f"Received: texts of dtype {tokens.dtype}"
            )
        return np.split(tokens.astype("int32"), cuts)


class SpanCorruptionDataset(keras.utils.PyDataset):
    """Text for `fit`, its spans taken out anew in each epoch.

    What batch `i` holds depends on `seed`, `epoch` and `i` alone, so that a run can be
    repeated, and taken up again by setting `epoch`. Each epoch has every token of the
    texts once, in another order of the examples. Keras, in turn, shuffles the batches
    of an epoch unless `fit` is told `shuffle=False`.

    `epoch` counts what Keras goes through: evaluations on the same object, too, so
    give those one of their own, with `fresh_noise=False` and `shuffle=False` to be
    comparable.

    Args:
        texts: a sequence of str or of sequences of token ids, see
            `SpanCorruption.pack`.
        corruption: a `SpanCorruption`.
        batch_size: int, examples a batch; the last batch may have less.
        seed: int, 0 or more.
        shuffle: bool: whether the examples are in another order in each epoch, or in
            that of the text in all.
        fresh_noise: bool: whether spans are drawn anew in each epoch.
        **kwargs: `workers`, `use_multiprocessing`, `max_queue_size`, as for
            `keras.utils.PyDataset`.

    Example:

    ```python
    dataset = keras_moe.SpanCorruptionDataset(
        keras_moe.sample_text("train"), corruption, batch_size=16
    )
    model.fit(dataset, epochs=3)
    ```
    """

    def __init__(
        self,
        texts,
        corruption,
        batch_size=32,
        seed=0,
        shuffle=True,
        fresh_noise=True,
        **kwargs,
    ):
        super().__init__(**kwargs)
        checks.at_least("batch_size", batch_size, 1)
        checks.at_least("seed", seed, 0)
        self.corruption = corruption
        self.examples = corruption.pack(texts)
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.fresh_noise = fresh_noise
        self.epoch = 0
        self._begun = False
        self._taken = self._taken_in_all = 0

    def __len__(self):
        return -(-len(self.examples) // self.batch_size)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"There are {len(self)} batches. Received: {index}")
        self._taken += 1
        self._taken_in_all += 1
        epoch = self.epoch if self.fresh_noise else 0
        first = index * self.batch_size
        return _stacked(
            self.corruption(self.examples[i], [self.seed, epoch, i])
            for i in self._order()[first : first + self.batch_size]
        )

    def _order(self):
        order = np.arange(len(self.examples))
        if self.shuffle:
            np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        return order

    def on_epoch_begin(self):
        self._begun = True
        self._taken = 0

    def on_epoch_end(self):
        # Keras also says so where nothing began, and, on JAX and torch, begins an
        # epoch of one batch to see what a model that is not built yet will get.
        looked = self._taken == 1 and self._taken_in_all < len(self)
        if self._begun and not looked:
            self.epoch += 1
            self._taken_in_all = 0
        self._begun = False


def _stacked(examples):
    return keras.tree.map_structure(lambda *rows: np.stack(rows), *examples)


def _is_batch(tokens):
    if hasattr(tokens, "shape"):
        return len(tokens.shape) == 2
    return isinstance(tokens, (list, tuple)) and any(np.ndim(t) for t in tokens)


def _random_partition(total, parts, rng):
    """The lengths of `parts` parts of `total`, each 1 or more, all as likely."""
    cuts = 1 + np.sort(rng.choice(total - 1, parts - 1, replace=False))
    return np.diff(np.concatenate([[0], cuts, [total]]).astype(int))


def _find_sentinels(tokenizer, count):
    ids = tokenizer.sentinel_token_ids
    wanted = [SENTINEL.format(i) for i in range(count)]
    missing = wanted[len(ids) :]
    if missing:
        raise ValueError(
            f"`tokenizer` must have a sentinel token for each of {count} spans, "
            f"{wanted[0]!r} to {wanted[-1]!r}. Received: a tokenizer without "
            f"{', '.join(map(repr, missing))}"
        )
    return ids[:count]
