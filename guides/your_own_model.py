"""
Title: A mixture of experts in your own model
Author: The keras_moe authors
Description: `MixtureOfExperts` in a classifier, between LSTMs and in a recurrent cell.

## A layer in the place of a feed-forward block

`keras_moe.layers.MixtureOfExperts` takes `[..., D]` and returns `[..., D]`. A router
gives each token, that is each vector of `D` features, to `top_k` of `num_experts` small
networks and adds up what they return. The layer needs no other part of this package:
it stands wherever a block of dense layers could.

This guide puts it

1. into a classifier, where one sees what the experts are for,
2. between two LSTMs, with padding, a balance loss and a capacity limit,
3. into the cell of a recurrent network.

Run it on any backend: `KERAS_BACKEND=torch python guides/your_own_model.py`. With
`--fast` it trains for a few steps only, and the figures mean nothing.
"""

import re
import sys

import keras
import numpy as np
from keras import ops

import keras_moe
from keras_moe.layers import FeedForward, MixtureOfExperts
from keras_moe.layers.routing_statistics import dropped_fraction, expert_load

FAST = "--fast" in sys.argv

"""
## A task with regimes

Many problems are several simple problems side by side: a sensor behaves otherwise below
and above freezing, a customer otherwise at the weekend. Here a point lies near one of
eight places in the plane. Each place has a rule of its own, a random linear one, that
tells which of four classes the point's other eight features make. The network sees the
ten numbers and is not told that there are eight rules.
"""

REGIMES, CLASSES = 8, 4


def make_points(count, seed):
    rules = np.random.default_rng(7).normal(size=(REGIMES, 8, CLASSES))
    angles = 2 * np.pi * np.arange(REGIMES) / REGIMES
    centres = 3 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    random = np.random.default_rng(seed)
    regime = random.integers(0, REGIMES, count)
    place = centres[regime] + 0.5 * random.normal(size=(count, 2))
    features = random.normal(size=(count, 8))
    scores = np.einsum("nf,nfc->nc", features, rules[regime])
    points = np.concatenate([place, features], axis=1).astype("float32")
    return points, scores.argmax(axis=-1), regime


training_points, training_classes, _ = make_points(500 if FAST else 8000, seed=0)
test_points, test_classes, test_regimes = make_points(500 if FAST else 2000, seed=1)

"""
The model is a residual block between two dense layers. Only the block differs between
the three that we compare:

- a dense block as wide as the one expert a point takes: equal work;
- a dense block as wide as all experts together: equal number of parameters, eight times
  the work;
- a mixture of eight experts with `top_k=1`.

All train for the same number of steps, from the same seed.
"""


def make_classifier(block):
    inputs = keras.Input((10,))
    x = keras.layers.Dense(32)(inputs)
    x = x + block(keras.layers.LayerNormalization()(x))
    model = keras.Model(inputs, keras.layers.Dense(CLASSES)(x))
    model.compile(
        optimizer=keras.optimizers.Adam(3e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


width = 16  # of one expert
blocks = {
    "dense, equal work": FeedForward(width),
    "dense, equal parameters": FeedForward(8 * width),
    "mixture of 8 experts": MixtureOfExperts(8, width, top_k=1, balance_loss=0.01),
}
classifiers = {}
print(f"{'block':26}parameters  test accuracy")
for name, block in blocks.items():
    keras.utils.set_random_seed(2024)
    classifier = classifiers[name] = make_classifier(block)
    classifier.fit(
        training_points,
        training_classes,
        batch_size=64,
        epochs=1 if FAST else 10,
        verbose=0,
    )
    _, accuracy = classifier.evaluate(test_points, test_classes, verbose=0)
    print(f"{name:26}{classifier.count_params():>10,}  {accuracy:13.3f}")

"""
The mixture does better than both: about 0.87 against 0.73 and 0.75. More width alone
helps little here, because every rule disturbs the others in the same weights. That is
not always so. Where one rule fits all the data there is nothing to divide, and a dense
block of equal parameters is then as good or better; it only costs more to run.

## Who takes what

A router can be called by itself. `expert_ids` holds each point's experts, best first.
Here is the share of every regime's test points that went to each expert.
"""

mixture = blocks["mixture of 8 experts"]
before_mixture = keras.Model(classifiers["mixture of 8 experts"].input, mixture.input)
routing = mixture.router(before_mixture.predict(test_points, verbose=0))
chosen = ops.convert_to_numpy(routing.expert_ids)[:, 0]

counts = np.zeros((REGIMES, 8))
np.add.at(counts, (test_regimes, chosen), 1)
print("\npercent   " + "".join(f"expert {e}  " for e in range(8)))
for regime, row in enumerate(100 * counts / counts.sum(axis=1, keepdims=True)):
    print(f"regime {regime}  " + "".join(f"{share:8.0f}  " for share in row))

"""
Most rows have one or two large figures: the router found the regimes without being told
of them. Where two neighbouring regimes share an expert, that expert has learned both.

## Between two LSTMs

The layer that made mixtures of experts popular stood between two LSTMs
([Shazeer et al., 2017](https://arxiv.org/abs/1701.06538), section 5.1), applied to all
time steps at once. We rebuild that in small: a model that predicts the next character
of English.

Texts differ in length, so they are padded with zeros, and `mask_zero=True` makes Keras
pass a mask along. `MixtureOfExperts` uses it: padding takes no expert, no capacity, and
no part in the losses and in the load.
"""

CHARACTERS = [chr(c) for c in range(32, 127)]
LENGTH = 40


def make_texts(count):
    """Character ids `[count, LENGTH + 1]`, from 1, padded with 0."""
    ids = np.zeros((count, LENGTH + 1), "int32")
    phrases = (
        phrase.strip()
        for document in keras_moe.sample_text("validation")
        for phrase in re.split(r"[.,:;()\n]", document)
        if len(phrase) > 10 and phrase.isascii() and phrase.isprintable()
    )
    for row, phrase in zip(ids, phrases, strict=False):
        codes = [CHARACTERS.index(c) + 1 for c in phrase[: LENGTH + 1]]
        row[: len(codes)] = codes
    return ids


texts = make_texts(128 if FAST else 3200)
print(f"\n{len(texts):,} phrases, {(texts > 0).mean():.0%} of the array is text")


def make_recurrent(**settings):
    inputs = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(len(CHARACTERS) + 1, 64, mask_zero=True)(inputs)
    x = keras.layers.LSTM(64, return_sequences=True)(x)
    y = MixtureOfExperts(8, 64, top_k=2, name="mixture", **settings)(x)
    x = keras.layers.Add()([x, y])  # which passes the mask on, and `x + y` does not
    x = keras.layers.LSTM(64, return_sequences=True)(x)
    model = keras.Model(inputs, keras.layers.Dense(len(CHARACTERS) + 1)(x))
    model.compile(
        optimizer=keras.optimizers.Adam(5e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        # The loss includes the balance loss, this does not. Padding counts in neither.
        weighted_metrics=[
            keras.metrics.SparseCategoricalCrossentropy(
                from_logits=True, name="cross_entropy"
            )
        ],
    )
    return model


"""
## Balance and capacity

Left alone, a router tends to send most tokens to a few experts: those that are chosen
learn, and are chosen more. `balance_loss` adds a small loss, least when the load is
even, to the training loss.

With `dispatch="dropless"`, the default, an uneven load costs nothing but idle experts.
With `dispatch="capacity"` every expert takes at most `capacity_factor` times an even
share, as published models trained on many devices do, and tokens beyond it are dropped:
they pass by on the residual connection alone.

`expert_load` and `dropped_fraction` hold what the last training step did. For whole
data sets call the layer with `return_statistics=True`: it returns sums, changes no
state, and the sums of several batches add.
"""

variants = {
    "dropless": {},
    "dropless, balance loss": {"balance_loss": 0.02},
    "capacity": {"dispatch": "capacity", "capacity_factor": 1.25},
    "capacity, balance loss": {
        "dispatch": "capacity",
        "capacity_factor": 1.25,
        "balance_loss": 0.02,
    },
}
names = ["dropless", "capacity, balance loss"] if FAST else list(variants)
print(f"\n{'':24}cross-entropy  largest load  dropped   (even load: {1 / 8:.1%})")
for name in names:
    keras.utils.set_random_seed(2024)
    recurrent = make_recurrent(**variants[name])
    history = recurrent.fit(
        texts[:, :-1], texts[:, 1:], batch_size=32, epochs=1 if FAST else 2, verbose=0
    )
    layer = recurrent.get_layer("mixture")
    load = ops.convert_to_numpy(layer.expert_load)
    dropped = float(ops.convert_to_numpy(layer.dropped_fraction))
    print(
        f"{name:24}{history.history['cross_entropy'][-1]:13.3f}"
        f"  {load.max():12.1%}  {dropped:7.1%}"
    )

"""
Sums over the data that we choose, here sixteen phrases. The number of tokens is that
of the characters: padding is left out.
"""

before_mixture = keras.Model(recurrent.input, layer.input)  # its inputs and mask
sample = texts[:16, :-1]
hidden, mask = before_mixture.predict(sample, verbose=0)
outputs, statistics = layer(hidden, mask=mask, return_statistics=True)
print(f"\n{(sample > 0).sum()} characters, {int(statistics.tokens)} tokens counted")
print("load:", ops.convert_to_numpy(expert_load(statistics)).round(2))
print(f"dropped: {float(dropped_fraction(statistics)):.1%}")

"""
## In a recurrent cell

Inside a cell the mixture runs once a time step, within a loop that the backend
compiles. There a layer must not add losses nor assign variables, and with
`return_statistics=True` the mixture does neither. The statistics are sums over the
batch, while all that a cell returns has the batch as its first axis; so this cell drops
them. Instead it carries what its router saw in a second half of its state, and the
layer around it makes the balance loss of all time steps at once.
"""


class MixtureCell(keras.layers.Layer):
    """A simple recurrent cell with a mixture of experts in it."""

    def __init__(self, units, num_experts, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.state_size = 2 * units
        self.dense = keras.layers.Dense(units, activation="tanh")
        self.mixture = MixtureOfExperts(num_experts, units, balance_loss=0.02)

    def build(self, input_shape):
        self.dense.build((None, input_shape[-1] + self.units))
        self.mixture.build((None, self.units))

    def call(self, inputs, states, training=None):
        previous = states[0][:, : self.units]
        hidden = self.dense(ops.concatenate([inputs, previous], axis=-1))
        change, _ = self.mixture(hidden, training=training, return_statistics=True)
        state = ops.concatenate([ops.tanh(hidden + change), hidden], axis=-1)
        return state, [state]


class MixtureRNN(keras.layers.Layer):
    """Runs a `MixtureCell` over time and balances its experts."""

    def __init__(self, units, num_experts, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True
        self.cell = MixtureCell(units, num_experts)
        self.rnn = keras.layers.RNN(self.cell, return_sequences=True)

    def build(self, input_shape):
        self.rnn.build(input_shape)

    def call(self, inputs, mask=None, training=None):
        sequence = self.rnn(inputs, mask=mask, training=training)
        outputs, hidden = ops.split(sequence, 2, axis=-1)
        if training:
            mixture = self.cell.mixture
            _, statistics = mixture.mix(hidden, mask, training)
            mixture.record(statistics)
        return outputs

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.cell.units)


inputs = keras.Input((None,), dtype="int32")
x = keras.layers.Embedding(len(CHARACTERS) + 1, 32, mask_zero=True)(inputs)
x = MixtureRNN(32, num_experts=4, name="mixture_rnn")(x)
recurrent = keras.Model(inputs, keras.layers.Dense(len(CHARACTERS) + 1)(x))
recurrent.compile(
    optimizer=keras.optimizers.Adam(5e-3),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
)
sample = texts[: 64 if FAST else 640]
history = recurrent.fit(
    sample[:, :-1], sample[:, 1:], batch_size=32, epochs=1 if FAST else 3, verbose=0
)
load = recurrent.get_layer("mixture_rnn").cell.mixture.expert_load
print("\nrecurrent cell, loss by epoch:", np.round(history.history["loss"], 2))
print("load:", ops.convert_to_numpy(load).round(2))

"""
## Where to go next

- [getting_started.py](getting_started.py): whole language models.
- `help(keras_moe.layers.MixtureOfExperts)`: shared experts, sigmoid scores, groups of
  capacity, and the papers behind each.
- `keras_moe.layers.Router` is the class to start from for a router of your own.
"""
