"""KerasHub's mixtures, made to compute only the experts their router chose.

B  batch        S  sequence length      T = B S  tokens
D  features     H  hidden features of one expert
E  experts      K  choices a token      N = T K  rows

KerasHub computes all E experts for every token and gives those that were not chosen
the weight zero. Here a mixture's layer changes its class, to a subclass of
KerasHub's that has another `call`. So it is still the layer of which models, their
graphs and their lists of variables hold references, and everything else about it,
the variables first, is as it was.
"""

import dataclasses
from collections.abc import Callable

import keras
from keras import ops

from keras_moe.dispatch import combine, sort_by_expert
from keras_moe.distribution.support import check_supported
from keras_moe.layers.experts import project_all
from keras_moe.models._keras_hub import (
    as_stored,
    mixtral_decoder,
    qwen3_moe_decoder,
    qwen_moe_decoder,
)
from keras_moe.ops import Stage, grouped_apply
from keras_moe.ops._backend import backend

_FLOATS = ("bfloat16", "float16", "float32", "float64")
_COMPILED = ("train_function", "test_function", "predict_function")


def sparsify(model):
    """Makes a KerasHub model compute only the experts that its routers chose.

    The model is changed in place. Its weights stay the variables they were, and its
    results stay the same: outputs, losses in training and gradients, up to rounding.
    Only the time changes, which from then on follows `top_k` and not `num_experts`.

    It remains a KerasHub model for whatever comes next: `compile`, `fit`, `predict`,
    `generate`, `enable_lora`, `quantize` (which leaves experts as they are) and all
    ways of saving. A saved model, a copy or a clone is an ordinary KerasHub model,
    made from a configuration that knows nothing of this function: sparsify it, too.

    Functions that the model compiled before, to train or to generate, are dropped
    and compiled anew when needed; on JAX those of all models are, as it keeps them in
    one cache. Those of *other* models that share its layers are not known here: call
    this with the outermost model, the task and not its backbone, or compile the task
    again.

    To sparsify a model twice changes nothing.

    Args:
        model: a `keras_hub.models` backbone or task of the families Mixtral,
            QwenMoe and Qwen3Moe, such as a `MixtralBackbone` or a
            `Qwen3MoeCausalLM`, or a Keras model that has one among its layers.

    Returns:
        `model`.

    Raises:
        ValueError: if there is no such mixture in `model`, or one that is not as
            KerasHub made it, such as one with quantized experts; and where a Keras
            distribution is set on a backend on which it does nothing. Nothing has
            been changed then.

    Example:

    ```python
    model = keras_hub.models.MixtralCausalLM.from_preset("mixtral_8_7b_en")
    keras_moe.sparsify(model)
    model.generate("The statement")
    ```
    """
    check_supported(keras.distribution.distribution())
    layers = model._flatten_layers() if isinstance(model, keras.Model) else []
    blocks = [layer for layer in layers if isinstance(layer, tuple(_SPARSE))]
    if not blocks:
        raise ValueError(
            "`model` must be a KerasHub backbone or task with mixtures of the "
            "families Mixtral, QwenMoe or Qwen3Moe, or a Keras model with one "
            f"among its layers. Received: {_describe(model)}"
        )
    dense = [block for block in blocks if not isinstance(block, _SparseBlock)]
    for block in dense:
        _check(block)
    for block in dense:
        block.__class__ = _SPARSE[type(block)]
    if dense:
        for layer in layers:
            _forget_compiled(layer)
        backend.forget_traces()
    return model


def _describe(model):
    if not isinstance(model, keras.Model):
        return f"model={model!r}"
    return f"a {type(model).__name__} without any, model.name={model.name!r}"


def _check(block):
    """Raises for a mixture that is not as KerasHub makes them."""
    if type(block) not in _SPARSE:
        raise ValueError(
            "A mixture in `model` must be of a class of KerasHub's own: what a "
            "subclass does would be lost. Received: "
            f"{type(block).__module__}.{type(block).__qualname__} at {block.path!r}"
        )
    if not block.built:
        raise ValueError(
            "`model` must be built before it is made sparse. Received: a model whose "
            f"{block.path!r} is not"
        )
    sparse = _SPARSE[type(block)]
    bank = block.expert_bank
    names = sparse.kernels
    kernels = [getattr(bank, name, None) for name in names]
    as_made = (
        type(bank) is sparse.bank
        and {id(v) for v in bank.variables} == {id(kernel) for kernel in kernels}
        and all(kernel.dtype in _FLOATS for kernel in kernels)
    )
    if not as_made:
        found = [f"{v.path} ({v.dtype})" for v in bank.variables]
        raise ValueError(
            f"Experts in `model` must be a `{sparse.bank.__name__}` with weights "
            f"{', '.join(names)} of a float dtype, neither quantized nor adapted. "
            f"Received: a `{type(bank).__name__}` with weights {', '.join(found)}"
        )


def _forget_compiled(layer):
    """Drops what a model compiled, as its `compile` does."""
    if isinstance(layer, keras.Model):
        for name in _COMPILED:
            setattr(layer, name, None)
    if getattr(layer, "generate_function", None) is not None:
        layer.generate_function = None


class _SparseBlock:
    """What the mixtures of the families have in common.

    A subclass goes by the name of KerasHub's class, so that its instances are
    summarised, saved and copied as KerasHub's.

    Attributes:
        bank: the class of the experts.
        kernels: names of their weights, `[E, D, ...]` first and `[E, H, D]` last.
        balance_loss: KerasHub's, which it calls as KerasHub does. What its mask
            means is left to it: Mixtral's leaves padding out; the others' leaves
            out only tokens that attend to none, so that with padding at the right
            every token counts.
    """

    bank = None
    kernels = ()
    balance_loss = None

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        *_, dense = cls.__bases__
        if not issubclass(dense, keras.layers.Layer):
            return  # what several families share
        for name in ("__name__", "__qualname__", "__module__"):
            setattr(cls, name, getattr(dense, name))

    def call(self, hidden_states, attention_mask=None, training=None):
        batch_size, length, _ = ops.shape(hidden_states)
        tokens = ops.reshape(hidden_states, (-1, self.hidden_dim))
        logits = self._sparse_feedforward_gate_dense(tokens)
        outputs = self._mix(tokens, *self._choose(logits))
        outputs = self._add_shared(tokens, outputs)
        if training:
            loss = type(self).balance_loss(
                router_logits=logits,
                num_experts=self.num_experts,
                top_k=self.top_k,
                attention_mask=attention_mask,
            )
            self.add_loss(self._loss_coefficient() * loss)
        shape = (batch_size, length, self.hidden_dim)
        return ops.reshape(outputs, shape), logits

    def _choose(self, logits):
        """`(gates, expert_ids)`, both `[T, K]`, of the dtype of the logits."""
        # Keras's own top_k and not ours: its ties are KerasHub's.
        gates, ids = ops.top_k(ops.softmax(logits, axis=-1), k=self.top_k)
        if self._normalizes_gates():
            gates = gates / ops.sum(gates, axis=-1, keepdims=True)
        return gates, ids

    def _mix(self, tokens, gates, expert_ids):
        order = sort_by_expert(ops.cast(expert_ids, "int32"), self.num_experts)
        rows = ops.take(tokens, order.tokens, axis=0)
        rows = grouped_apply(self._stages(), rows, order.group_sizes)
        # Rounded first, as KerasHub does, and then summed in float32.
        gates = ops.cast(ops.cast(gates, tokens.dtype), "float32")
        return combine(rows, order, gates)

    def _stages(self):
        bank = self.expert_bank
        *inner, down = as_stored(getattr(bank, name) for name in self.kernels)
        return [
            Stage(project_all, tuple(inner)),
            Stage(self._narrow(bank.activation), (down,)),
        ]

    def _add_shared(self, tokens, outputs):
        return outputs


class _SparseMixtral(_SparseBlock, mixtral_decoder.MixtralSparseMoeBlock):
    bank = mixtral_decoder.MixtralMoeExperts
    kernels = (
        "_expert_feedforward_gate_dense",
        "_expert_feedforward_intermediate_dense",
        "_expert_feedforward_output_dense",
    )
    balance_loss = staticmethod(mixtral_decoder.compute_load_balancing_loss)

    def call(self, hidden_states, attention_mask=None, training=False):
        if training and self.router_jitter_noise > 0:
            # KerasHub 0.32 fails here, too, for want of `keras.ops.random`.
            raise NotImplementedError(
                "A sparsified Mixtral trains without router jitter. Received: "
                f"router_jitter_noise={self.router_jitter_noise}"
            )
        return super().call(hidden_states, attention_mask, training)

    def _normalizes_gates(self):
        return True

    def _loss_coefficient(self):
        return self.router_aux_loss_coef

    def _narrow(self, activation):
        return _NarrowPair(activation)


class _SparseQwen(_SparseBlock):
    kernels = ("_expert_feedforward_gate_dense", "_expert_feedforward_output_dense")

    def _normalizes_gates(self):
        return self.norm_top_k_prob

    def _loss_coefficient(self):
        return self.router_aux_loss_coefficient

    def _narrow(self, activation):
        return _NarrowHalves(activation)


class _SparseQwen3Moe(_SparseQwen, qwen3_moe_decoder.Qwen3SparseMoeBlock):
    bank = qwen3_moe_decoder.Qwen3MoeExperts
    balance_loss = staticmethod(qwen3_moe_decoder.compute_load_balancing_loss)


class _SparseQwenMoe(_SparseQwen, qwen_moe_decoder.QwenSparseMoeBlock):
    bank = qwen_moe_decoder.QwenMoeExperts
    balance_loss = staticmethod(qwen_moe_decoder.compute_load_balancing_loss)

    def _add_shared(self, tokens, outputs):
        gate = ops.sigmoid(self.shared_expert_gate_dense(tokens))
        return outputs + self.shared_expert_dense(tokens) * gate


_SPARSE = {
    mixtral_decoder.MixtralSparseMoeBlock: _SparseMixtral,
    qwen_moe_decoder.QwenSparseMoeBlock: _SparseQwenMoe,
    qwen3_moe_decoder.Qwen3SparseMoeBlock: _SparseQwen3Moe,
}


# --- The experts, as stages of `grouped_apply`.


@dataclasses.dataclass(frozen=True)
class _NarrowPair:
    """`(a(gate) * up) W`, the activation in float32."""

    activation: Callable

    def __call__(self, matmul, inputs, kernels):
        gate, up = inputs
        gate = ops.cast(self.activation(ops.cast(gate, "float32")), up.dtype)
        return (matmul(up * gate, kernels[0]),)


@dataclasses.dataclass(frozen=True)
class _NarrowHalves:
    """The same of one input `[n, 2 H]`, gate and up side by side."""

    activation: Callable

    def __call__(self, matmul, inputs, kernels):
        gate, up = ops.split(inputs[0], 2, axis=-1)
        return (matmul(up * self.activation(gate), kernels[0]),)
