"""Small mixtures with random weights, and what they must give in float64."""

import numpy as np

from keras_moe.layers import MixtureOfExperts
from tests.execution import numpy as to_numpy
from tests.references import mixture as reference

DIM, HIDDEN, EXPERTS = 4, 3, 5


def make(shape=(2, 6, DIM), seed=0, scale=0.7, dtype=None, **settings):
    """A built layer with normal weights of a scale, and inputs `[*shape]`."""
    layer = MixtureOfExperts(EXPERTS, HIDDEN, dtype=dtype, **settings)
    layer.build(shape)
    rng = np.random.default_rng(seed)
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(size=variable.shape) * scale)
    return layer, rng.normal(size=shape).astype("float32")


def weights_of(layer):
    """The layer's weights in the order of `trainable_variables`, float32."""
    return [to_numpy(v.value).astype("float32") for v in layer.trainable_variables]


def reference_of(layer, training=False, mask=None):
    """`function(x, *weights)` -> outputs in float64, and its routing."""
    inside = f"{layer.name}/"
    names = [
        v.path.split(inside)[-1].replace("/", "_") for v in layer.trainable_variables
    ]
    short = {
        "router_kernel": "router",
        "experts_gate_kernel": "gate",
        "experts_up_kernel": "up",
        "experts_down_kernel": "down",
        "shared_experts_gate_kernel": "shared_gate",
        "shared_experts_up_kernel": "shared_up",
        "shared_experts_down_kernel": "shared_down",
    }
    names = [short[name] for name in names]
    activation = layer.activation.__name__
    settings = {
        "scores": layer.router.scores,
        "normalize": layer.router.normalize_gates,
        "gates_from": layer.router.gates_from,
    }
    flat_mask = None if mask is None else np.ravel(mask)

    def route(x, weights):
        tokens = np.reshape(x, (-1, x.shape[-1]))
        kernel = weights[names.index("router")]
        return reference.route(tokens, kernel, layer.top_k, mask=flat_mask, **settings)

    def keep(ids, shape):
        if layer.dispatch == "dropless":
            return ids < EXPERTS
        group = layer.capacity_group
        if isinstance(group, str):
            group = len(ids) if group == "batch" else shape[-2]
        factor = layer.capacity_factor
        if not training and layer.eval_capacity_factor is not None:
            factor = layer.eval_capacity_factor
        capacity = layer.capacity or reference.capacity(
            factor, group, EXPERTS, layer.top_k
        )
        return reference.kept_choices(ids, capacity, group, EXPERTS)

    def outputs(x, *weights):
        routing = route(x, weights)
        gates = np.where(keep(routing.ids, x.shape), routing.gates, 0)
        named = {
            n: np.asarray(w, "float64") for n, w in zip(names, weights, strict=True)
        }
        tokens = np.reshape(np.asarray(x, "float64"), (-1, x.shape[-1]))
        y = reference.mixture(tokens, named, routing.ids, gates, activation)
        return y.reshape(x.shape)

    def statistics(x, *weights):
        routing = route(x, weights)
        real = routing.ids < EXPERTS
        dropped = real.sum() - keep(routing.ids, x.shape).sum()
        return routing, dropped / max(real.sum(), 1)

    outputs.statistics = statistics
    return outputs
