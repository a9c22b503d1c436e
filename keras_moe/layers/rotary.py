"""Positions as rotations of queries and keys, and their stretch to longer contexts.

B  batch     T  tokens     H  heads     d  head size
"""

import math

import numpy as np
from keras import ops

from keras_moe import checks

_NEEDED = {
    "linear": ("factor",),
    "yarn": ("factor", "original_context"),
    "llama3": (
        "factor",
        "original_context",
        "low_frequency_factor",
        "high_frequency_factor",
    ),
}
_OPTIONAL = {
    "yarn": (
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "attention_factor",
        "truncate",
    ),
}


def rotary_frequencies(dim, theta, scaling=None):
    """The angle a token of each pair of features, `theta ** (-2 i / d)`.

    [Su et al., 2021](https://arxiv.org/abs/2104.09864), eq. 15. `scaling` changes
    them for contexts longer than those of the training, by its `"type"`:

    - `"linear"`: all divided by `factor` ([Chen et al.,
      2023](https://arxiv.org/abs/2306.15595), eq. 4);
    - `"yarn"` ([Peng et al., 2023](https://arxiv.org/abs/2309.00071), eq. 22-24):
      pairs that turn fewer than `beta_slow` (1) times in `original_context` tokens
      are divided, those that turn more than `beta_fast` (32) times kept, others in
      between; `truncate` (True) rounds the borders to whole pairs;
    - `"llama3"`: likewise, the borders given as `low_frequency_factor` and
      `high_frequency_factor`, in turns, blended by the wavelength.

    Args:
        dim: int, d, even.
        theta: float, the longest wavelength over `2 pi`.
        scaling: None or a dict, see above.

    Returns:
        A float32 NumPy array `[d / 2]`.
    """
    pairs = np.arange(dim // 2)
    frequencies = float(theta) ** (-2.0 * pairs / dim)
    if scaling is None:
        return frequencies.astype("float32")
    factor = scaling["factor"]
    if scaling["type"] == "linear":
        slowed = np.ones(dim // 2)
    elif scaling["type"] == "yarn":

        def pair_turning(times):
            context = scaling["original_context"]
            return dim * math.log(context / (times * 2 * math.pi)) / 2 / math.log(theta)

        low = pair_turning(scaling.get("beta_fast") or 32)
        high = pair_turning(scaling.get("beta_slow") or 1)
        if scaling.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        slowed = np.clip((pairs - low) / max(high - low, 1e-3), 0, 1)
    else:
        turns = scaling["original_context"] * frequencies / (2 * math.pi)
        low, high = scaling["low_frequency_factor"], scaling["high_frequency_factor"]
        slowed = 1 - np.clip((turns - low) / (high - low), 0, 1)
    return (frequencies * (1 - slowed + slowed / factor)).astype("float32")


def rotation_scale(scaling):
    """What queries and keys are multiplied by as they are rotated.

    YaRN's `0.1 ln(factor) + 1` (Peng et al., 2023, eq. 25, its square root), or
    `attention_factor` in its place. DeepSeek-V2's `mscale` and `mscale_all_dim` make
    it a quotient of two such terms.
    """
    if scaling is None or scaling["type"] != "yarn":
        return 1.0
    if scaling.get("attention_factor") is not None:
        return float(scaling["attention_factor"])
    factor = scaling["factor"]
    mscale, all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
    if mscale and all_dim:
        return _temperature(factor, mscale) / _temperature(factor, all_dim)
    return _temperature(factor)


def logit_scale(scaling):
    """What DeepSeek-V2 multiplies attention logits by.

    The square of `0.1 mscale_all_dim ln(factor) + 1`, 1 without `mscale_all_dim`.
    """
    if scaling is None or not scaling.get("mscale_all_dim"):
        return 1.0
    return _temperature(scaling["factor"], scaling["mscale_all_dim"]) ** 2


def _temperature(factor, mscale=1.0):
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def check_scaling(scaling):
    """Refuses a `rope_scaling` that `rotary_frequencies` does not know."""
    if scaling is None:
        return
    if not isinstance(scaling, dict):
        raise ValueError(
            f"`rope_scaling` must be None or a dict. Received: rope_scaling={scaling!r}"
        )
    checks.one_of("rope_scaling['type']", scaling.get("type"), _NEEDED)
    needed = _NEEDED[scaling["type"]]
    for name in needed:
        checks.positive(f"rope_scaling[{name!r}]", scaling.get(name))
    if scaling["type"] == "llama3":
        low, high = scaling["low_frequency_factor"], scaling["high_frequency_factor"]
        if low >= high:
            raise ValueError(
                "`rope_scaling['high_frequency_factor']` must be above "
                f"`low_frequency_factor`. Received: high_frequency_factor={high!r}, "
                f"low_frequency_factor={low!r}"
            )
    known = ("type", *needed, *_OPTIONAL.get(scaling["type"], ()))
    for name in scaling:
        checks.one_of("rope_scaling's key", name, known)


def rotations(positions, frequencies, dtype, scale=1.0):
    """Cosines and sines of every position's angles, for `rotate`.

    Args:
        positions: int tensor `[T]` or `[B, T]`.
        frequencies: float32 array `[d / 2]`.
        dtype: str, that of the result; the angles are float32.
        scale: float, see `rotation_scale`.

    Returns:
        Two tensors `[1 or B, T, 1, d]`.
    """
    if len(positions.shape) == 1:
        positions = positions[None]
    positions = ops.cast(positions, "float32")[:, :, None, None]
    angles = ops.multiply(positions, frequencies)
    angles = ops.concatenate([angles, angles], axis=-1)
    cosines, sines = ops.cos(angles), ops.sin(angles)
    if scale != 1.0:
        cosines, sines = cosines * scale, sines * scale
    return ops.cast(cosines, dtype), ops.cast(sines, dtype)


def rotate(x, cosines, sines):
    """Turns the pairs `(x[i], x[i + d / 2])` by their angles.

    Su et al., 2021, eq. 34, with the pairs laid out in two halves as in GPT-NeoX.

    Args:
        x: float tensor `[B, T, H, d]`.
        cosines: tensor `[1 or B, T, 1, d]`.
        sines: tensor `[1 or B, T, 1, d]`.

    Returns:
        A tensor like `x`.
    """
    half = x.shape[-1] // 2
    turned = ops.concatenate([-x[..., half:], x[..., :half]], axis=-1)
    return x * cosines + turned * sines
