import numpy as np
import pytest
from keras import ops

from keras_moe.layers.rotary import (
    check_scaling,
    logit_scale,
    rotary_frequencies,
    rotate,
    rotation_scale,
    rotations,
)
from tests.execution import numpy as to_numpy
from tests.references import attention as reference

YARN = {"type": "yarn", "factor": 4.0, "original_context": 32}
SCALINGS = {
    "none": None,
    "linear": {"type": "linear", "factor": 2.5},
    "yarn": YARN,
    "yarn_borders": {**YARN, "beta_fast": 8, "beta_slow": 2},
    "yarn_not_truncated": {**YARN, "beta_fast": 4, "truncate": False},
    "yarn_deepseek": {**YARN, "factor": 40, "mscale": 1.0, "mscale_all_dim": 0.7},
    "yarn_attention_factor": {**YARN, "attention_factor": 1.3},
    "yarn_no_stretch": {**YARN, "factor": 1.0},
    "llama3": {
        "type": "llama3",
        "factor": 8.0,
        "original_context": 64,
        "low_frequency_factor": 1.0,
        "high_frequency_factor": 4.0,
    },
}
THEIR_NAMES = {
    "type": "rope_type",
    "original_context": "original_max_position_embeddings",
    "low_frequency_factor": "low_freq_factor",
    "high_frequency_factor": "high_freq_factor",
}


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS)
@pytest.mark.parametrize("dim, theta", [(16, 10000.0), (10, 500.0)])
def test_equals_transformers(scaling, dim, theta):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {THEIR_NAMES.get(k, k): v for k, v in (scaling or {}).items()}
    config = LlamaConfig(
        hidden_size=dim,
        num_attention_heads=1,
        max_position_embeddings=256,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": theta,
            **parameters,
        },
    )
    theirs = LlamaRotaryEmbedding(config)
    np.testing.assert_allclose(
        rotary_frequencies(dim, theta, scaling), theirs.inv_freq.numpy(), rtol=1e-5
    )
    assert rotation_scale(scaling) == pytest.approx(theirs.attention_scaling)


def test_the_logits_of_deepseek():
    # ln 40 = 3.6888794541; its public code squares 0.1 mscale_all_dim ln 40 + 1.
    assert logit_scale(None) == logit_scale(YARN) == 1.0
    scaling = {**YARN, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}
    assert logit_scale(scaling) == pytest.approx((0.1 * 3.6888794541 + 1) ** 2)


@pytest.mark.parametrize("positions", [[0, 1, 2, 7, 1000], [3, 3, 3, 0, 1]], ids=str)
def test_rotation(positions):
    x = np.random.default_rng(0).normal(size=(2, 5, 3, 8)).astype("float32")
    turns = rotations(ops.array(positions), rotary_frequencies(8, 100.0), "float32")
    y = to_numpy(rotate(ops.convert_to_tensor(x), *turns))
    for got, sequence in zip(y, x, strict=True):
        np.testing.assert_allclose(
            got, reference.rotate(sequence, positions, 100.0), atol=2e-4
        )
    # A rotation keeps lengths.
    np.testing.assert_allclose((y**2).sum(-1), (x**2).sum(-1), rtol=1e-4)


@pytest.mark.parametrize(
    "scaling, message",
    [
        ("yarn", "`rope_scaling` must be None or a dict.*'yarn'"),
        ({"type": "dynamic"}, "'linear', 'yarn', 'llama3'.*'dynamic'"),
        ({"type": "yarn", "factor": 2.0}, r"original_context.*None"),
        ({"type": "linear", "factor": 0}, r"factor.*0"),
        ({**YARN, "betafast": 3}, "betafast"),
        (
            {
                "type": "llama3",
                "factor": 8.0,
                "original_context": 16,
                "low_frequency_factor": 4.0,
                "high_frequency_factor": 4.0,
            },
            "high_frequency_factor.*above.*4.0",
        ),
    ],
)
def test_bad_scaling(scaling, message):
    with pytest.raises(ValueError, match=message):
        check_scaling(scaling)
