"""What the float64 models that read a preset's files themselves have in common.

Written from the papers' equations and from the layout of the weights file; nothing of
`keras_moe` or Keras takes part. What a backend computes is compared with them, so that
the backends agree with each other and a released weights file keeps its meaning.
"""

import json
import math
import pathlib

import h5py
import numpy as np


class NumpyModel:
    """The settings and weights of a preset, and the sublayers that all models have.

    Args:
        folder: path of a folder with `config.json` and `model.weights.h5`.
        **overrides: settings that go before the folder's.
    """

    def __init__(self, folder, **overrides):
        folder = pathlib.Path(folder)
        settings = json.loads((folder / "config.json").read_text())["config"]
        self.settings = {**settings, **overrides}
        self.weights = {}
        with h5py.File(folder / "model.weights.h5") as file:
            file.visititems(self._keep)

    def _keep(self, name, item):
        if isinstance(item, h5py.Dataset):
            self.weights[name] = item[()].astype("float64")

    def _norm(self, x, name):
        mean_square = (x**2).mean(-1, keepdims=True)
        scale = self.weights[f"{name}/vars/0"]
        return x / np.sqrt(mean_square + self.settings["norm_epsilon"]) * scale

    def _dense(self, x, name, gated):
        def kernel(part):
            return self.weights[f"{name}/{part}/vars/0"]

        hidden = x @ kernel("up")
        if gated:
            hidden = self._activate(x @ kernel("gate")) * hidden
        else:
            hidden = self._activate(hidden)
        return hidden @ kernel("down")

    def _expert(self, x, name, index):
        gated = self.settings["expert_gated"]
        *inner, down = (
            self.weights[f"{name}/experts/vars/{i}"][index]
            for i in range(3 if gated else 2)
        )
        hidden = self._activate(x @ inner[0])
        return (hidden * (x @ inner[1]) if gated else hidden) @ down

    def _activate(self, x):
        if self.settings["activation"] == "silu":
            return x / (1 + np.exp(-x))
        if self.settings["activation"] == "relu":
            return np.maximum(x, 0)
        assert self.settings["activation"] == "gelu"
        return x / 2 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_bucket(distance, exact, buckets, max_distance):
    """T5's bucket of a distance in one direction: exact ones, then ranges by powers."""
    if distance < exact:
        return distance
    share = math.log(distance / exact) / math.log(max_distance / exact)
    return min(exact + int(share * (buckets - exact)), buckets - 1)
