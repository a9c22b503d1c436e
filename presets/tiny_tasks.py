"""What the small presets learn: to go on with a text, or to fill its gaps.

A task makes the data, models and the preprocessor, and says how good a model is; the
training is the same for both.
"""

import keras
import numpy as np

from keras_moe import SpanCorruption, SpanCorruptionDataset
from keras_moe.models import (
    MoEBackbone,
    MoECausalLM,
    MoECausalLMPreprocessor,
    MoESeq2SeqBackbone,
    MoESeq2SeqLM,
    MoESeq2SeqLMPreprocessor,
)
from keras_moe.sample_text import sample_text

LENGTH = 128  # tokens of a training sequence, of an encoder's where there is one
BATCH = 16  # sequences a step


class _Task:
    """What both tasks have in common.

    Args:
        tokenizer: a `MoETokenizer`.
        settings: dict, of the model's backbone.
        seed: int.
    """

    def __init__(self, tokenizer, settings, seed):
        self.tokenizer = tokenizer
        self.settings = settings
        self.seed = seed

    def model(self, settings):
        """A model of some settings with the weights that the seed gives."""
        keras.utils.set_random_seed(self.seed)
        return self.model_cls(self.backbone_cls(**settings))


class NextToken(_Task):
    """The next token of documents laid end to end."""

    model_cls, backbone_cls = MoECausalLM, MoEBackbone
    training = ""  # what the card says besides the number of epochs
    score = "Cross-entropy in nats a token"
    baseline = "bigram"
    baseline_words = "bigram model, interpolated, its weights chosen on this very text"

    def __init__(self, tokenizer, settings, seed):
        super().__init__(tokenizer, settings, seed)
        self.train = self._sequences(sample_text("train"))
        self.validation = self._sequences(sample_text("validation"))
        self.train_tokens = self.train[1].size
        self.validation_tokens = self.validation[1].size
        self.steps_per_epoch = -(-len(self.train[0]) // BATCH)

    def _sequences(self, texts):
        """Documents end to end, cut into `(inputs, targets)`, both `[N, LENGTH]`."""
        tokenizer, stream = self.tokenizer, []
        for text in texts:
            ids = tokenizer(text)
            stream += [tokenizer.start_token_id, *ids, tokenizer.end_token_id]
        count = (len(stream) - 1) // LENGTH
        stream = np.array(stream[: count * LENGTH + 1], "int32")
        return stream[:-1].reshape(count, LENGTH), stream[1:].reshape(count, LENGTH)

    def preprocessor(self):
        return MoECausalLMPreprocessor(self.tokenizer, sequence_length=LENGTH)

    def fit_data(self):
        """The arguments of `fit` that are data."""
        inputs, targets = self.train
        return {"x": _token_inputs(inputs), "y": targets, "batch_size": BATCH}

    def loss(self, model):
        """Cross-entropy in nats a token of held-out text, without the balance loss."""
        inputs, targets = self.validation
        logits = model.predict(_token_inputs(inputs), batch_size=32, verbose=0)
        return float(_cross_entropy(logits, targets).mean())

    def baseline_loss(self):
        """Nats a token of a bigram model, interpolated with unigrams and uniform.

        The weights of the three are chosen on the validation text itself, in the
        bigram's favour.
        """
        size = self.settings["vocabulary_size"]
        counts = np.zeros((size, size))
        np.add.at(counts, tuple(part.ravel() for part in self.train), 1)
        unigram = counts.sum(0) / counts.sum()
        bigram = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        first, second = (part.ravel() for part in self.validation)
        best = np.inf
        for a in np.arange(0.05, 1.0, 0.05):
            for b in (1e-3, 1e-2, 5e-2):
                p = (1 - b) * (a * bigram[first, second] + (1 - a) * unigram[second])
                best = min(best, -np.log(p + b / size).mean())
        return float(best)


class FillSpans(_Task):
    """T5's span corruption of texts laid end to end."""

    model_cls, backbone_cls = MoESeq2SeqLM, MoESeq2SeqBackbone
    training = " of spans drawn anew"
    score = (
        "Cross-entropy in nats a token of the targets, the spans that were taken out "
        "and their sentinels,"
    )
    baseline = "untrained"
    baseline_words = "its untrained twin: the same weights before the first step"

    def __init__(self, tokenizer, settings, seed):
        super().__init__(tokenizer, settings, seed)
        self.corruption = SpanCorruption(LENGTH, tokenizer)
        # The same spans for every model.
        self.validation = SpanCorruptionDataset(
            sample_text("validation"),
            self.corruption,
            batch_size=BATCH,
            shuffle=False,
            fresh_noise=False,
        )
        train = self.fit_data()["x"]
        self.train_tokens = sum(map(len, train.examples))
        self.validation_tokens = sum(map(len, self.validation.examples))
        self.steps_per_epoch = len(train)

    def preprocessor(self):
        return MoESeq2SeqLMPreprocessor(
            self.tokenizer,
            encoder_sequence_length=LENGTH,
            decoder_sequence_length=self.corruption.targets_length,
        )

    def fit_data(self):
        data = SpanCorruptionDataset(
            sample_text("train"), self.corruption, batch_size=BATCH, seed=self.seed
        )
        return {"x": data, "shuffle": False}  # it shuffles the examples itself

    def loss(self, model):
        total = count = 0.0
        for index in range(len(self.validation)):
            x, y, weight = self.validation[index]
            total += (_cross_entropy(model.predict_on_batch(x), y) * weight).sum()
            count += weight.sum()
        return float(total / count)

    def baseline_loss(self):
        return self.loss(self.model(self.settings))


def _cross_entropy(logits, targets):
    """Nats of each target, in float64."""
    logits = np.asarray(logits).astype("float64")
    logits -= logits.max(-1, keepdims=True)
    log_partition = np.log(np.exp(logits).sum(-1))
    return log_partition - np.take_along_axis(logits, targets[..., None], -1)[..., 0]


def _token_inputs(token_ids):
    return {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}


TASKS = {"next_token": NextToken, "fill_spans": FillSpans}
