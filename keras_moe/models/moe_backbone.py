"""The decoder backbone: every decoder family is a setting of it.

B  batch        S  sequence length      D  `hidden_dim`     V  `vocabulary_size`
"""

import keras

from keras_moe import architecture
from keras_moe.models import blocks
from keras_moe.models.base_backbone import BaseBackbone, check_tokens, walk


@keras.saving.register_keras_serializable(package="keras_moe")
class MoEBackbone(BaseBackbone):
    """A decoder-only Transformer whose feed-forward blocks are mixtures.

    One class for every decoder family; a published model is a preset of its
    settings: Mixtral ([Jiang et al., 2024](https://arxiv.org/abs/2401.04088)),
    DeepSeekMoE ([Dai et al., 2024](https://arxiv.org/abs/2401.06066)), GLaM
    ([Du et al., 2021](https://arxiv.org/abs/2112.06905)). With `num_experts=0` it
    is the dense Transformer to compare with.

    Layer `i`, from 0, is a mixture where `i >= dense_first_layers`,
    `i % moe_every == moe_offset` and `i` is not in `dense_layers`, and dense elsewhere.

    Args:
        vocabulary_size: int, V.
        num_layers: int, decoder blocks.
        hidden_dim: int, D.
        num_query_heads: int.
        num_key_value_heads: int or None for `num_query_heads`, which it divides.
        head_dim: int or None for `hidden_dim / num_query_heads`.
        num_experts: int, experts of a mixture; 0 makes every layer dense.
        top_k: int, experts a token takes, between 1 and `num_experts`.
        expert_dim: int, the hidden width of one expert.
        num_shared_experts: int, experts that every token takes.
        moe_every: int, every how many layers a mixture stands.
        moe_offset: int, below `moe_every`, at which of them.
        dense_first_layers: int, leading layers that are dense in any case.
        dense_layers: None, or the indices of other layers that are.
        dense_dim: int, the hidden width of dense layers; needed where there are
            any.
        activation: a Keras activation by name, of experts and dense layers.
        expert_gated: bool, gated experts.
        dense_gated: bool, gated dense layers; None for `expert_gated`.
        router: see `MixtureOfExperts`, as for `scores`, `normalize_gates`,
            `gates_from`, `router_jitter`, `dispatch`, `capacity_factor`,
            `eval_capacity_factor`, `capacity`, `capacity_group`, `balance_loss`,
            `z_loss` (both a layer, summed over layers), `balance_choices`,
            `shared_expert_dim`, `shared_expert_gate`, `selection_bias`,
            `bias_update_rate`, `expert_groups`, `top_k_groups`, `group_scores`,
            `gate_scale`, `second_choice_threshold`, `expert_dropout` and
            `route_padding`.
        extra_dense: bool: a dense feed-forward block, of width `dense_dim` and with
            a norm of its own, follows each mixture (ST-MoE).
        attention: `"grouped_query"`, or `"latent"` (see `LatentAttention`), which
            needs `head_dim`, `key_value_rank`, `rope_head_dim` and
            `value_head_dim`, and takes a `query_rank`.
        attention_bias: see `GroupedQueryAttention`'s `bias`, as for
            `query_key_norm`, `clip_query_key_value` (its `clip`),
            `attention_soft_cap` (its `soft_cap`), `attention_scale` (its `scale`),
            `sliding_window` (its `window`) and `rope_scaling`.
        sliding_layers: None, or the indices of the layers that have the window.
        output_norms: see `DecoderBlock`.
        embedding_multiplier: float: embeddings are multiplied by it (Grok-1).
        output_multiplier: float: logits are multiplied by it (Grok-1). None stands
            for `hidden_dim**-0.5` with `tied_embeddings`, as in T5, and 1 without.
        positions: `"rotary"` or `"relative_bias"` (T5's, its own in each layer).
        rope_theta: float, base of the rotary wavelengths.
        relative_buckets: int, buckets of the relative bias.
        relative_max_distance: int, in tokens, the last bucket's start.
        norm: `"rms"`, `"layer"` or `"layer_no_bias"`.
        norm_epsilon: float.
        tied_embeddings: bool, the output projection is the embedding transposed.
        dropout: float in `[0, 1)`, of both sublayers' outputs.
        recompute: bool: in training, keep only the inputs of each block for the
            gradient and compute the rest anew (see `DecoderBlock`).
        initializer_stddev: float, of the normal initializer of all matrices, where
            `initializer_scale` is None; otherwise it has no effect.
        initializer_scale: float or None: s in the standard deviation `sqrt(s / n)`
            that matrices of n inputs have instead, truncated at two of it (Switch
            Transformers, [Fedus et al., 2021](https://arxiv.org/abs/2101.03961),
            section 2.4, takes 0.1). Embeddings then have 1 where they are tied,
            and else `hidden_dim**-0.5`.
        context_length: int or None, the longest sequence in tokens; a longer one
            raises.
        dtype: dtype policy, by name or as an object.
        **kwargs: `name`, `trainable`.

    Call arguments:
        inputs: dict of `token_ids`, int `[B, S]`, each at least 0 and below V,
            and `padding_mask`, bool or int `[B, S]`, 0 for padding at either end.

    Returns:
        A tensor `[B, S, D]`: the hidden states after the last norm. An empty
        batch gives an empty result.

    Raises:
        ValueError: for settings outside the ranges above, sequences longer than
            `context_length`, and NumPy token ids out of range.

    Example:

    ```python
    backbone = keras_moe.models.MoEBackbone(
        vocabulary_size=1000,
        num_layers=2,
        hidden_dim=64,
        num_query_heads=4,
        num_experts=8,
        top_k=2,
        expert_dim=128,
    )
    hidden_states = backbone({
        "token_ids": np.ones((1, 12), "int32"),
        "padding_mask": np.ones((1, 12), "bool"),
    })

    # A published architecture with random weights, made smaller.
    backbone = keras_moe.models.MoEBackbone.from_preset(
        "mixtral_8x7b", load_weights=False, num_layers=2, hidden_dim=256
    )
    ```
    """

    def __init__(
        self,
        vocabulary_size,
        num_layers,
        hidden_dim,
        num_query_heads,
        num_key_value_heads=None,
        head_dim=None,
        num_experts=0,
        top_k=2,
        expert_dim=None,
        num_shared_experts=0,
        moe_every=1,
        moe_offset=0,
        dense_first_layers=0,
        dense_dim=None,
        activation="silu",
        expert_gated=True,
        dense_gated=None,
        router="top_k",
        scores="softmax",
        normalize_gates=None,
        gates_from="all",
        router_jitter=0.0,
        dispatch="dropless",
        capacity_factor=None,
        eval_capacity_factor=None,
        capacity=None,
        capacity_group="batch",
        balance_loss=0.0,
        z_loss=0.0,
        balance_choices="all",
        positions="rotary",
        rope_theta=10000.0,
        relative_buckets=32,
        relative_max_distance=128,
        norm="rms",
        norm_epsilon=1e-6,
        tied_embeddings=False,
        dropout=0.0,
        recompute=False,
        initializer_stddev=0.02,
        context_length=None,
        shared_expert_dim=None,
        shared_expert_gate=False,
        selection_bias=False,
        bias_update_rate=0.0,
        expert_groups=1,
        top_k_groups=1,
        group_scores="top_2",
        gate_scale=1.0,
        second_choice_threshold=None,
        attention="grouped_query",
        query_rank=None,
        key_value_rank=None,
        rope_head_dim=None,
        value_head_dim=None,
        attention_bias=None,
        query_key_norm=None,
        clip_query_key_value=None,
        attention_soft_cap=None,
        sliding_window=None,
        sliding_layers=None,
        rope_scaling=None,
        output_norms=False,
        embedding_multiplier=1.0,
        output_multiplier=1.0,
        dense_layers=None,
        attention_scale=None,
        expert_dropout=0.0,
        route_padding=False,
        extra_dense=False,
        initializer_scale=None,
        dtype=None,
        **kwargs,
    ):
        settings = self._keep_settings(locals(), kwargs)
        (stack,) = architecture.stacks(settings)

        # === Layers ===
        self.token_embedding = blocks.token_embedding(settings, dtype)
        self.transformer_layers = [
            blocks.block(stack, index, dtype, f"transformer_layer_{index}")
            for index in range(num_layers)
        ]
        self.layer_norm = blocks.final_norm(settings, dtype)

        # === Functional model ===
        token_ids = keras.Input((None,), dtype="int32", name="token_ids")
        padding_mask = keras.Input((None,), dtype="int32", name="padding_mask")
        x = walk(
            self.transformer_layers, self.embed(token_ids), padding_mask=padding_mask
        )
        super().__init__(
            inputs={"token_ids": token_ids, "padding_mask": padding_mask},
            outputs=self.layer_norm(x),
            dtype=dtype,
            **kwargs,
        )

    def __call__(self, inputs, *args, **kwargs):
        check_inputs(inputs, self.vocabulary_size, self.context_length)
        return super().__call__(inputs, *args, **kwargs)

    @property
    def blocks(self):
        """The blocks, first to last."""
        return self.transformer_layers

    def routing_statistics(self, inputs):
        """How each mixture routes a batch, as the `RoutingStatistics` of each.

        Args:
            inputs: as for a call of the backbone.

        Returns:
            A list of `RoutingStatistics`, one a mixture, first to last. They are
            sums: those of several batches add. See
            `keras_moe.layers.routing_statistics` for what to make of them.
        """
        check_inputs(inputs, self.vocabulary_size, self.context_length)
        x = self.embed(keras.ops.convert_to_tensor(inputs["token_ids"]))
        mask = keras.ops.convert_to_tensor(inputs["padding_mask"])
        found = []
        walk(self.transformer_layers, x, found, padding_mask=mask)
        return found


def check_inputs(inputs, vocabulary_size, context_length):
    """Refuses a sequence too long, and token ids out of range where known."""
    check_tokens(inputs["token_ids"], vocabulary_size, context_length)
