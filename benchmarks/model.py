"""Whole models of one size: ours, the dense limit, KerasHub's and Transformers'.

KerasHub's comes twice, as it is and after `keras_moe.sparsify`.
"""

import keras
import keras_hub
import numpy as np

from benchmarks.programs import forward, training_step
from benchmarks.timing import by_turns
from keras_moe import sparsify
from keras_moe.models import MoEBackbone, MoECausalLM

SIZES = {
    "cpu": dict(
        vocabulary=8000,
        layers=4,
        dim=512,
        heads=8,
        key_value_heads=4,
        hidden=1024,
        experts=16,
        top_k=2,
        batch=4,
        length=256,
        dtype="float32",
    ),
    "gpu": dict(
        vocabulary=32000,
        layers=8,
        dim=2048,
        heads=16,
        key_value_heads=8,
        hidden=4096,
        experts=16,
        top_k=2,
        batch=4,
        length=2048,
        dtype="bfloat16",
    ),
}
SPARSIFIED = "keras_hub sparsified"
MODELS = ("keras_moe", "dense", "keras_hub", SPARSIFIED)
TRANSFORMERS = ("grouped_mm", "eager")


def measure(size, repeats, xla=None):
    """The records of this suite, for the active backend."""
    settings = SIZES[size]
    inputs, targets = batch(settings)
    forwards, steps = {}, {}
    for name in MODELS:
        model = task(name, settings)
        forwards[name] = forward(model, inputs, xla)
        steps[name] = training_step(model, inputs, targets, xla)
    if keras.config.backend() == "torch":
        from benchmarks import transformers_mixtral as peer

        for implementation in TRANSFORMERS:
            name = f"transformers {implementation}"
            model = peer.mixtral(settings, implementation)
            forwards[name] = peer.forward(model, inputs)
            steps[name] = peer.training_step(model, inputs, targets)
    return [
        dict(case=f"model, {case}", candidate=name, seconds=seconds)
        for case, programs in (("forward", forwards), ("training step", steps))
        for name, seconds in by_turns(programs, repeats).items()
    ]


def batch(settings):
    """`(inputs, targets)` of random tokens."""
    rng = np.random.default_rng(0)
    shape = settings["batch"], settings["length"]
    tokens = rng.integers(0, settings["vocabulary"], (2, *shape)).astype("int32")
    return {"token_ids": tokens[0], "padding_mask": np.ones(shape, "int32")}, tokens[1]


def task(name, settings):
    """A causal language model with random weights, by the name of a candidate."""
    common = dict(
        vocabulary_size=settings["vocabulary"],
        num_layers=settings["layers"],
        hidden_dim=settings["dim"],
        num_query_heads=settings["heads"],
        num_key_value_heads=settings["key_value_heads"],
        dtype=settings["dtype"],
    )
    hidden, experts, top_k = (settings[n] for n in ("hidden", "experts", "top_k"))
    models = keras_hub.models
    if name == "keras_moe":
        backbone = MoEBackbone(
            **common,
            num_experts=experts,
            top_k=top_k,
            expert_dim=hidden,
            gates_from="top_k",
        )
        return MoECausalLM(backbone, preprocessor=None)
    if name == "dense":
        backbone = models.MistralBackbone(
            **common, intermediate_dim=top_k * hidden, sliding_window=None
        )
        return models.MistralCausalLM(backbone, preprocessor=None)
    backbone = models.MixtralBackbone(
        **common,
        intermediate_dim=hidden,
        num_experts=experts,
        top_k=top_k,
        sliding_window=None,
    )
    mixtral = models.MixtralCausalLM(backbone, preprocessor=None)
    return sparsify(mixtral) if name == SPARSIFIED else mixtral
