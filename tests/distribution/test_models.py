"""Whole models on meshes of eight devices, against the same on one."""

import functools
import itertools

import keras
import numpy as np
import pytest

from tests.distribution.meshes import MESHES, distribute
from tests.models.small_models import (
    random_ids,
    small_causal_lm,
    small_seq2seq_lm,
)

STEPS, BATCH, LENGTH = 20, 8, 6
EXPERTS = {
    "num_experts": 8,
    "expert_dim": 8,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "balance_loss": 0.1,
    "z_loss": 0.01,
}
MODELS = {
    "dropless": {**EXPERTS, "num_shared_experts": 1},
    # As many places as there are tokens.
    "capacity": {**EXPERTS, "dispatch": "capacity", "capacity_factor": 4.0},
    "seq2seq": {**EXPERTS, "num_key_value_heads": None},
}


def make(kind):
    keras.utils.set_random_seed(5)
    make_model = small_seq2seq_lm if kind == "seq2seq" else small_causal_lm
    model = make_model(**MODELS[kind])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    # Not Adam, whose first steps turn rounding of small gradients into whole steps.
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss, weighted_metrics=[])
    return model


def data(kind):
    """Inputs of two batches, some padded, and targets."""
    ids = random_ids(2 * BATCH, LENGTH + 1)
    mask = np.ones((len(ids), LENGTH), bool)
    mask[::3, 4:] = False
    x = {"token_ids": ids[:, :-1], "padding_mask": mask}
    if kind == "seq2seq":
        x = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in x.items()}
    return x, ids[:, 1:]


@functools.cache
def trained(kind, mesh):
    """Whatever can be seen of a model in use, on a mesh, or on one device."""
    keras.distribution.set_distribution(None)
    if mesh is not None:
        distribute(mesh)
    model = make(kind)
    x, y = data(kind)
    arguments = {"batch_size": BATCH, "verbose": 0}
    history = model.fit(x, y, epochs=STEPS // 2, shuffle=False, **arguments)
    # Three prompts, which no mesh here divides.
    prompts = {name: value[:3].copy() for name, value in x.items()}
    for name in prompts:
        if name in ("padding_mask", "decoder_padding_mask"):
            prompts[name][:, 2:] = False
    generated = model.generate(prompts, stop_token_ids=None)
    found = {
        "losses": history.history["loss"],
        "predicted": model.predict(x, **arguments),
        "evaluated": model.evaluate(x, y, **arguments),
        "weights": model.get_weights(),
        "loads": [np.asarray(m.expert_load) for m in model.backbone.mixtures],
    }
    keras.distribution.set_distribution(None)
    return found, keras.tree.map_structure(np.asarray, generated)


@pytest.mark.parametrize(
    "kind,mesh",
    [
        *itertools.product(("dropless", "capacity"), MESHES),
        ("seq2seq", "batch"),
        ("seq2seq", "batch_expert_model"),
    ],
)
def test_a_model_in_use_is_that_of_one_device(kind, mesh):
    (found, generated), (expected, alone) = trained(kind, mesh), trained(kind, None)
    for name, value in expected.items():
        for got, one in zip(
            keras.tree.flatten(found[name]), keras.tree.flatten(value), strict=True
        ):
            # What training rounded, layers multiply on the way to logits.
            atol = 1e-4 * np.abs(one).max() if name == "predicted" else 2e-5
            np.testing.assert_allclose(got, one, atol=atol, rtol=1e-4, err_msg=name)
    for name, ids in alone.items():
        np.testing.assert_array_equal(generated[name], ids)
    loads = np.stack(expected["loads"])
    np.testing.assert_allclose(loads.sum(-1), 1.0, rtol=1e-5)
    assert np.ptp(loads) > 0.01  # else there is little to see
