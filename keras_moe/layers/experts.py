"""A bank of expert feed-forward networks.

N  rows, sorted by expert       E  experts
D  model features               H  hidden features of one expert
"""

import dataclasses
from collections.abc import Callable

import keras

from keras_moe import checks
from keras_moe.layers.initializers import fresh_per_expert
from keras_moe.ops import Stage, grouped_apply


@keras.saving.register_keras_serializable(package="keras_moe")
class Experts(keras.layers.Layer):
    """E feed-forward networks of one shape, called with rows grouped by expert.

    Expert `e` computes, with `a` the activation,

    - gated: `y = (a(x W_gate[e]) * (x W_up[e])) W_down[e]`
      (GLU variants, [Shazeer, 2020](https://arxiv.org/abs/2002.05202), eq. 6;
      SwiGLU with `activation="silu"`);
    - plain: `y = a(x W_up[e]) W_down[e]`.

    The cost follows the rows, not E, and an expert without rows is not read.

    Args:
        num_experts: int, E.
        intermediate_dim: int, H.
        activation: a Keras activation, by name or callable.
        gated: bool.
        kernel_initializer: initializer of each expert's matrices.
        dropout: float in `[0, 1)`, of the hidden features: expert dropout (Switch
            Transformers, [Fedus et al., 2021](https://arxiv.org/abs/2101.03961),
            section 2.4).
        **kwargs: `name`, `trainable`, `dtype`.

    Call arguments:
        inputs: float tensor `[N, D]`, rows sorted by expert.
        group_sizes: int32 tensor `[E]`: the rows of each expert; rows past their
            sum give zero.
        training: bool.

    Returns:
        A tensor `[N, D]`.

    Raises:
        ValueError: if a size is below 1 or the activation is unknown.

    Example:

    ```python
    experts = keras_moe.layers.Experts(num_experts=4, intermediate_dim=64)
    y = experts(keras.random.normal((10, 16)), keras.ops.array([4, 0, 5, 1]))
    ```
    """

    def __init__(
        self,
        num_experts,
        intermediate_dim,
        activation="silu",
        gated=True,
        kernel_initializer="glorot_uniform",
        dropout=0.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        checks.at_least("num_experts", num_experts, 1)
        checks.at_least("intermediate_dim", intermediate_dim, 1)
        self.num_experts = num_experts
        self.intermediate_dim = intermediate_dim
        self.activation = checks.activation("activation", activation)
        self.gated = gated
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        checks.fraction("dropout", dropout)
        self.dropout = dropout
        self.hidden_dropout = keras.layers.Dropout(
            dropout, dtype=self.dtype_policy, name="hidden_dropout"
        )

    def build(self, input_shape):
        dim, hidden = input_shape[-1], self.intermediate_dim
        if self.gated:
            self.gate_kernel = self._add_kernel("gate_kernel", dim, hidden, 2)
        self.up_kernel = self._add_kernel("up_kernel", dim, hidden, 0)
        self.down_kernel = self._add_kernel("down_kernel", hidden, dim, 1)

    def _add_kernel(self, name, fan_in, fan_out, index):
        return self.add_weight(
            name=name,
            shape=(self.num_experts, fan_in, fan_out),
            initializer=fresh_per_expert(
                self.kernel_initializer, self.num_experts, index
            ),
            # Under a mixed dtype policy all experts would be cast at each read; the
            # products cast those that they take.
            autocast=False,
        )

    @property
    def kernels(self):
        """The matrices of all experts, `[E, D, H]` each, the last `[E, H, D]`."""
        gate = (self.gate_kernel,) if self.gated else ()
        return (*gate, self.up_kernel, self.down_kernel)

    def call(self, inputs, group_sizes, training=None):
        return self.apply(inputs, group_sizes, self.kernels, training)

    def apply(self, inputs, group_sizes, kernels, training=None):
        """`call` with the matrices as arguments, of these experts or of a part.

        Args:
            inputs: float tensor `[N, D]`.
            group_sizes: int32 tensor, the rows of each expert in `kernels`.
            kernels: tuple of tensors in the order of `Experts.kernels`.
            training: bool.
        """
        *inner, down = kernels
        inner = tuple(inner)
        if self.dropout and training:
            # One mask for all rows: a stage sees some of them, and on the way back
            # sees them again.
            def product(rows, kernel):
                return grouped_apply([Stage(project_all, (kernel,))], rows, group_sizes)

            hidden = _activate(self.activation, [product(inputs, k) for k in inner])
            hidden = self.hidden_dropout(hidden, training=True)
            return product(hidden, down)
        stages = [
            Stage(project_all, inner),
            Stage(_Narrow(self.activation), (down,)),
        ]
        return grouped_apply(stages, inputs, group_sizes)

    def compute_output_spec(self, inputs, group_sizes, training=None):
        return keras.KerasTensor(inputs.shape, dtype=self.compute_dtype)

    def get_config(self):
        return {
            **super().get_config(),
            "num_experts": self.num_experts,
            "intermediate_dim": self.intermediate_dim,
            "activation": keras.activations.serialize(self.activation),
            "gated": self.gated,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "dropout": self.dropout,
        }


def project_all(matmul, inputs, kernels):
    """A stage of `grouped_apply`: its one input by each of the kernels."""
    (x,) = inputs
    return tuple(matmul(x, kernel) for kernel in kernels)


@dataclasses.dataclass(frozen=True)
class _Narrow:
    """The activation, gated where there are two inputs, and the way back to D."""

    activation: Callable

    def __call__(self, matmul, inputs, kernels):
        return (matmul(_activate(self.activation, inputs), kernels[0]),)


def _activate(activation, projected):
    """The hidden features of gate and up, or of up alone."""
    *gate, up = projected
    return activation(gate[0]) * up if gate else activation(up)
