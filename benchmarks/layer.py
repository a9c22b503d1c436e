"""The mixture layer against the dense layer of equal active size.

T  tokens       D  features     H  hidden features of an expert
E  experts      K  choices a token
"""

import keras
import numpy as np

from benchmarks.programs import forward, forward_backward
from benchmarks.timing import by_turns
from keras_moe.layers import FeedForward, MixtureOfExperts

SIZES = {
    "cpu": dict(T=1024, D=512, H=1024, E=16, K=2, dtype="float32"),
    "gpu": dict(T=16384, D=2048, H=4096, E=16, K=2, dtype="bfloat16"),
}
PASSES = {"forward": forward, "forward and backward": forward_backward}
GROWTH = 8  # times as many experts, and tokens


def measure(size, repeats, xla=None):
    """The records of this suite, for the active backend.

    Args:
        size: `"cpu"` or `"gpu"`.
        repeats: int.
        xla: bool, or None for Keras's default.
    """
    settings = SIZES[size]
    records = []
    for load in ("even", "random", "zipf"):
        layers = _layers(settings, load)
        for name, make in PASSES.items():
            programs = {n: make(layer, x, xla) for n, (layer, x) in layers.items()}
            if make is forward:
                programs["matmul"] = _matmul(settings, xla)
            for candidate, seconds in by_turns(programs, repeats).items():
                case = f"layer, {load} load, {name}"
                records.append(dict(case=case, candidate=candidate, seconds=seconds))
    return records + _growth(settings, repeats, xla)


def _layers(settings, load):
    x, router = tokens_with_load(settings, load, np.random.default_rng(0))
    mixture = MixtureOfExperts(
        settings["E"], settings["H"], top_k=settings["K"], dtype=settings["dtype"]
    )
    dense = FeedForward(settings["K"] * settings["H"], dtype=settings["dtype"])
    for layer in (mixture, dense):
        layer.build((None, settings["D"]))
    mixture.router.kernel.assign(router)
    x = keras.ops.cast(x, mixture.compute_dtype)
    return {"keras_moe": (mixture, x), "dense": (dense, x)}


def _growth(settings, repeats, xla):
    """More experts, and as many more tokens: rows an expert stay what they are."""
    programs = {}
    for factor in (1, GROWTH):
        grown = {**settings, "E": settings["E"] * factor, "T": settings["T"] * factor}
        layer, x = _layers(grown, "even")["keras_moe"]
        programs[factor] = forward(layer, x, xla)
    few, many = settings["E"], settings["E"] * GROWTH
    return [
        dict(
            case=f"layer, {few} to {many} experts, forward, a token",
            candidate="keras_moe" if factor > 1 else "fewer experts",
            seconds=seconds / factor,
        )
        for factor, seconds in by_turns(programs, repeats).items()
    ]


def _matmul(settings, xla):
    """The layer's products as one: what the machine can do at best."""

    class Product(keras.layers.Layer):
        def build(self, shape):
            self.kernel = self.add_weight(shape=(settings["D"], 3 * settings["H"]))

        def call(self, x):
            return keras.ops.matmul(x, self.kernel)

    layer = Product(dtype=settings["dtype"])
    layer.build(None)
    shape = settings["T"] * settings["K"], settings["D"]
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    return forward(layer, keras.ops.cast(x, settings["dtype"]), xla)


def tokens_with_load(settings, load, rng):
    """Tokens and a router whose choices have a given load.

    Args:
        settings: dict of T, D, E and K.
        load: `"even"` (equal counts), `"random"` (each token's experts drawn alike)
            or `"zipf"` (drawn in proportion to 1, 1/2, 1/3, ...).
        rng: a NumPy generator.

    Returns:
        `(tokens [T, D], router weights [D, E])`, float32.
    """
    num_tokens, dim, experts, top_k = (settings[name] for name in "TDEK")
    if load == "even":
        first = rng.permutation(np.arange(num_tokens) % experts)
        ids = np.stack([(first + k) % experts for k in range(top_k)], axis=1)
    else:
        ranks = np.arange(1, experts + 1)
        log_weights = -np.log(ranks) if load == "zipf" else np.zeros(experts)
        # The largest of log weights plus Gumbel noise: a draw without replacement.
        noise = rng.gumbel(size=(num_tokens, experts)) + log_weights
        ids = np.argsort(-noise, axis=1)[:, :top_k]
    logits = np.zeros((num_tokens, experts))
    np.put_along_axis(logits, ids, 4.0 + np.arange(top_k), axis=1)
    router = rng.normal(size=(dim, experts)) / dim**0.5
    tokens = rng.normal(size=(num_tokens, dim))
    tokens += (logits - tokens @ router) @ np.linalg.pinv(router)
    return tokens.astype("float32"), router.astype("float32")
