"""Plans against the collectives in compiled programs.

A program's bytes are counted from the shapes and groups in its text, by the rings'
formulas. What stands in the body of a loop counts once: one round of an exchange.
"""

import math
import re

import keras
import numpy as np
import pytest

import keras_moe
from keras_moe.layers import MixtureOfExperts
from keras_moe.models import (
    MoEBackbone,
    MoECausalLM,
    MoESeq2SeqBackbone,
    MoESeq2SeqLM,
)
from tests.distribution.meshes import distribute
from tests.distribution.programs import compiled_step

LENGTH = 16
SETTINGS = {
    "vocabulary_size": 96,
    "num_layers": 2,
    "hidden_dim": 32,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "top_k": 2,
    "expert_dim": 24,
    "dense_dim": 40,
    "balance_loss": 0.1,
}
DENSE_TOO = {
    "dense_first_layers": 1,
    "num_shared_experts": 1,
    "dispatch": "capacity",
    "capacity_factor": 1.25,
    "capacity_group": "sequence",
}
LATENT = {
    "attention": "latent",
    "num_key_value_heads": None,
    "head_dim": 8,
    "rope_head_dim": 4,
    "value_head_dim": 8,
    "key_value_rank": 16,
    "query_rank": 24,
}
SEQ2SEQ = {
    "vocabulary_size": 96,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "hidden_dim": 32,
    "num_query_heads": 4,
    "num_experts": 8,
    "top_k": 1,
    "expert_dim": 24,
    "moe_every": 2,
    "moe_offset": 1,
    "dense_dim": 40,
    "tied_embeddings": False,
    "dispatch": "capacity",
    "capacity_factor": 2.0,
}


# --- Programs ---


def language_model_step(settings, batch):
    encoder = "encoder_layers" in settings
    if encoder:
        model = MoESeq2SeqLM(MoESeq2SeqBackbone(**settings), preprocessor=None)
    else:
        model = MoECausalLM(MoEBackbone(**settings), preprocessor=None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(), loss, weighted_metrics=[])
    ids = np.zeros((batch, LENGTH), "int32")
    names = ("token_ids", "padding_mask")
    if encoder:
        names = [f"{s}_{name}" for s in ("encoder", "decoder") for name in names]
    return compiled_step(model, {name: np.ones_like(ids) for name in names}, ids)


_COLLECTIVE = re.compile(
    r" = (?P<shapes>.*?) "
    r"(?P<kind>all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)"
    r"(?:-start)?\((?P<rest>.*)"
)
_SHAPE = re.compile(r"\b(pred|[suf]\d+|bf16)\[([\d,]*)\]")
_SIZES = {"pred": 1, "bf16": 2}


def sent_bytes(text):
    """The bytes that a device sends, by kind of collective."""
    found = {}
    for match in map(_COLLECTIVE.search, text.splitlines()):
        if match is None:
            continue
        kind = match["kind"].replace("-", "_")
        size = sum(
            math.prod(map(int, filter(None, dimensions.split(","))))
            * (_SIZES.get(dtype) or int(dtype[1:]) // 8)
            for dtype, dimensions in _SHAPE.findall(match["shapes"])
        )
        if kind == "collective_permute":
            parts = 1.0
        else:
            n = group_size(match["rest"])
            parts = {"all_reduce": 2 * (n - 1) / n, "reduce_scatter": n - 1.0}.get(
                kind, (n - 1) / n
            )
        found[kind] = found.get(kind, 0) + parts * size
    return found


def group_size(text):
    """The devices of a collective, in any of XLA's ways to write its groups."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
        return int(counted[1])
    mesh, axes = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", text).groups()
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh))
    named = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes)
    return math.prod(int(part or sizes[name]) for name, part in named)


def test_reading_of_programs():
    text = """
      %a = f32[4,2]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}
      %b = (f32[3]{0}, s32[]) all-reduce(%p, %q), replica_groups={{0,1},{2,3}}, to=%x
      %c = bf16[8]{0} all-reduce(%p), replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}, x
      %d = (f32[2]{0}, f32[2]{0}) all-to-all(%p, %p), replica_groups={{0,1}}
      %e = pred[5]{0} collective-permute(%p), source_target_pairs={{0,1},{1,0}}
    """
    assert sent_bytes(text) == {
        "all_gather": 32 * 3 / 4,
        "all_reduce": 16 + 16,
        "all_to_all": 16 / 2,
        "collective_permute": 5,
    }


# --- One mixture ---


@pytest.mark.parametrize("dispatch", ["dropless", "capacity"])
@pytest.mark.parametrize(
    "sizes", [{"expert": 2}, {"expert": 4}, {"batch": 2, "expert": 4}], ids=str
)
def test_the_rows_of_a_mixture(sizes, dispatch):
    distribute(sizes)
    batch = 2 * math.prod(sizes.values())  # weak scaling: 32 tokens a device
    settings = {"dispatch": dispatch}
    if dispatch == "capacity":
        settings["capacity_factor"] = 1.5
    D = SETTINGS["hidden_dim"]
    inputs = keras.Input((LENGTH, D))
    hidden = keras.layers.Dense(D)(inputs)
    mixture = MixtureOfExperts(8, 24, balance_loss=0.1, **settings)
    model = keras.Model(inputs, hidden + mixture(hidden))
    model.compile(keras.optimizers.Adam(), "mse")
    x = np.ones((batch, LENGTH, D), "float32")
    found = sent_bytes(compiled_step(model, x, x))

    settings |= {**SETTINGS, "num_layers": 1}
    device = keras_moe.plan(
        settings, batch, LENGTH, "float32", mesh=sizes, platform="cpu"
    ).device
    purposes = device.sent_by("purpose")
    assert found.pop("all_to_all") == pytest.approx(purposes["rows"], rel=0.05)
    # Over a batch axis e experts' kernels are gathered; all of a device, by hand.
    e, b = 8 // sizes["expert"], sizes.get("batch", 1)
    kernels = e * 3 * D * 24 * 4
    assert found.pop("all_gather", 0.0) == kernels * (b - 1) / b
    n = math.prod(sizes.values())
    whole = (D * 8 + D * D + D) * 4
    expected = 2 * kernels * (b - 1) / b + 2 * whole * (n - 1) / n
    expected += purposes["statistics"] + purposes["expert counts"]
    assert found.pop("all_reduce") == pytest.approx(expected, rel=0.05)
    assert not found


# --- Whole models ---


@pytest.mark.parametrize(
    "sizes,overrides",
    [
        ({"batch": 2}, {"vocabulary_size": 40}),
        ({"expert": 4}, {}),
        ({"expert": 8}, {"tied_embeddings": True}),
        ({"batch": 2, "expert": 4}, {"recompute": True}),
        ({"batch": 2, "expert": 2}, DENSE_TOO),
        ({"expert": 4, "model": 2}, {}),
        ({"batch": 4, "model": 2}, {}),
        ({"batch": 2, "model": 2}, {"vocabulary_size": 512}),
        ({"expert": 4, "model": 2}, {"vocabulary_size": 512, "tied_embeddings": True}),
        ({"batch": 2, "expert": 2, "model": 2}, DENSE_TOO),
        ({"batch": 2, "expert": 2, "model": 2}, {**LATENT, "recompute": True}),
        ({"batch": 2, "expert": 2, "model": 2}, SEQ2SEQ),
    ],
    ids=str,
)
def test_the_traffic_of_language_models(sizes, overrides):
    settings = overrides if overrides is SEQ2SEQ else {**SETTINGS, **overrides}
    distribution = distribute(sizes)
    batch = 4 * distribution.num_model_replicas  # weak scaling: 64 tokens a device
    found = sent_bytes(language_model_step(settings, batch))
    plan = keras_moe.plan(
        settings, batch, LENGTH, "float32", mesh=distribution, platform="cpu"
    )
    planned = plan.device.sent_by()
    for kind, sent in planned.items():
        assert sent == pytest.approx(found[kind], rel=0.05), kind
    assert plan.device.sent_bytes == pytest.approx(sum(found.values()), rel=0.05)
    for mesh in (sizes, distribution.device_mesh):
        again = keras_moe.plan(
            settings, batch, LENGTH, "float32", mesh=mesh, platform="cpu"
        )
        assert again == plan
