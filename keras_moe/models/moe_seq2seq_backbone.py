"""The encoder-decoder backbone: Switch, GShard and ST-MoE are settings of it.

B  batch        S  tokens of the source         T  tokens of the target
D  `hidden_dim`         V  `vocabulary_size`
"""

import keras
import numpy as np
from keras import ops

from keras_moe import architecture
from keras_moe.models import blocks
from keras_moe.models.base_backbone import BaseBackbone, check_tokens, walk


@keras.saving.register_keras_serializable(package="keras_moe")
class MoESeq2SeqBackbone(BaseBackbone):
    """A T5-like encoder-decoder whose feed-forward blocks are mixtures.

    One class for every encoder-decoder family; a published model is a preset of its
    settings: Switch Transformers
    ([Fedus et al., 2021](https://arxiv.org/abs/2101.03961)), GShard
    ([Lepikhin et al., 2020](https://arxiv.org/abs/2006.16668)), ST-MoE
    ([Zoph et al., 2022](https://arxiv.org/abs/2202.08906)). With `num_experts=0` it
    is T5 ([Raffel et al., 2019](https://arxiv.org/abs/1910.10683)). Defaults are
    those of Switch: RMS norms, attention that is not scaled, a relative bias that
    all layers of a stack share, plain experts of ReLU, of which a token takes one.

    Layer `i` of either stack, from 0, is a mixture where `i >= dense_first_layers`,
    `i % moe_every == moe_offset` and `i` is not in the stack's dense layers, and
    dense elsewhere. So with `moe_every=1` any pattern can be written down.

    Args:
        vocabulary_size: int, V.
        encoder_layers: int, encoder blocks.
        decoder_layers: int, decoder blocks.
        hidden_dim: int, D.
        num_query_heads: int.
        num_key_value_heads: see `MoEBackbone`, as for `head_dim`, `num_experts`,
            `top_k`, `expert_dim`, `num_shared_experts`, `moe_every`, `moe_offset`,
            `dense_first_layers`, `dense_dim`, `activation`, `expert_gated`,
            `dense_gated`, all settings of the mixture, `attention_bias`,
            `query_key_norm`, `clip_query_key_value`, `attention_soft_cap`,
            `output_norms`, `embedding_multiplier`, `output_multiplier`,
            `rope_theta`, `relative_buckets`, `relative_max_distance`, `norm`,
            `norm_epsilon`, `tied_embeddings`, `recompute`, `extra_dense`,
            `initializer_stddev`, and `initializer_scale`, which is 0.1 here, so that
            `initializer_stddev` needs `initializer_scale=None` to have an effect.
        encoder_dense_layers: None, or the indices of other encoder layers that are
            dense.
        decoder_dense_layers: None, or those of decoder layers.
        attention_scale: float or None for `1 / sqrt(head_dim)`: what the logits of
            attention are multiplied by.
        positions: `"relative_bias"`, one table a stack that all its layers share;
            `"rotary"`, in self-attention; or None. Cross-attention has none.
        shared_embeddings: bool: encoder and decoder embed tokens by one table. False
            gives the decoder a table of its own, and needs `tied_embeddings=False`.
        dropout: float in `[0, 1)`, as in T5: of embeddings, attention weights,
            hidden features, the outputs of sublayers and of the last norms.
        expert_dropout: float in `[0, 1)`, of the hidden features of experts, or
            None for `dropout`. Switch fine-tunes with more than the others have.
        context_length: int or None, the longest source and the longest target, in
            tokens; a longer one raises.
        dtype: dtype policy, by name or as an object. Routers compute in float32.
        **kwargs: `name`, `trainable`.

    Call arguments:
        inputs: dict of `encoder_token_ids`, int `[B, S]`, `decoder_token_ids`, int
            `[B, T]`, each at least 0 and below V, and `encoder_padding_mask` and
            `decoder_padding_mask`, bool or int of the same shapes, 0 for padding.

    Returns:
        A dict of `encoder_sequence_output`, `[B, S, D]`, and
        `decoder_sequence_output`, `[B, T, D]`: the hidden states after the last
        norms.

    Raises:
        ValueError: for settings outside the ranges above, sequences longer than
            `context_length`, batches of different sizes, and in NumPy arrays token
            ids out of range and a source of nothing but padding, whose states as a
            tensor are finite and mean nothing. Also for an input that is missing,
            masks of another shape than their ids, and sequences without a token.

    Example:

    ```python
    backbone = keras_moe.models.MoESeq2SeqBackbone(
        vocabulary_size=1000,
        encoder_layers=2,
        decoder_layers=2,
        hidden_dim=64,
        num_query_heads=4,
        num_experts=8,
        expert_dim=128,
    )
    outputs = backbone({
        "encoder_token_ids": np.ones((1, 12), "int32"),
        "encoder_padding_mask": np.ones((1, 12), "bool"),
        "decoder_token_ids": np.ones((1, 5), "int32"),
        "decoder_padding_mask": np.ones((1, 5), "bool"),
    })
    outputs["decoder_sequence_output"].shape  # (1, 5, 64)
    ```
    """

    def __init__(
        self,
        vocabulary_size,
        encoder_layers,
        decoder_layers,
        hidden_dim,
        num_query_heads,
        num_key_value_heads=None,
        head_dim=None,
        num_experts=0,
        top_k=1,
        expert_dim=None,
        num_shared_experts=0,
        moe_every=1,
        moe_offset=0,
        dense_first_layers=0,
        encoder_dense_layers=None,
        decoder_dense_layers=None,
        dense_dim=None,
        activation="relu",
        expert_gated=False,
        dense_gated=None,
        extra_dense=False,
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
        route_padding=False,
        balance_loss=0.0,
        z_loss=0.0,
        balance_choices="all",
        shared_expert_dim=None,
        shared_expert_gate=False,
        selection_bias=False,
        bias_update_rate=0.0,
        expert_groups=1,
        top_k_groups=1,
        group_scores="top_2",
        gate_scale=1.0,
        second_choice_threshold=None,
        attention_scale=1.0,
        attention_bias=None,
        query_key_norm=None,
        clip_query_key_value=None,
        attention_soft_cap=None,
        positions="relative_bias",
        rope_theta=10000.0,
        relative_buckets=32,
        relative_max_distance=128,
        norm="rms",
        norm_epsilon=1e-6,
        output_norms=False,
        tied_embeddings=True,
        shared_embeddings=True,
        embedding_multiplier=1.0,
        output_multiplier=None,
        dropout=0.0,
        expert_dropout=None,
        recompute=False,
        initializer_stddev=0.02,
        initializer_scale=0.1,
        context_length=None,
        dtype=None,
        **kwargs,
    ):
        settings = self._keep_settings(locals(), kwargs)
        encoder, decoder = architecture.stacks(settings)

        # === Layers ===
        self.token_embedding = blocks.token_embedding(settings, dtype)
        self.decoder_embedding = None
        if not shared_embeddings:
            self.decoder_embedding = blocks.decoder_embedding(settings, dtype)
        self.encoder_position_bias = blocks.shared_bias(
            encoder, dtype, "encoder_position_bias"
        )
        self.encoder_transformer_layers = [
            blocks.block(encoder, index, dtype, f"encoder_layer_{index}")
            for index in range(encoder_layers)
        ]
        self.encoder_layer_norm = blocks.final_norm(settings, dtype, "encoder_norm")
        self.decoder_position_bias = blocks.shared_bias(
            decoder, dtype, "decoder_position_bias"
        )
        self.decoder_transformer_layers = [
            blocks.block(decoder, index, dtype, f"decoder_layer_{index}")
            for index in range(decoder_layers)
        ]
        self.decoder_layer_norm = blocks.final_norm(settings, dtype, "decoder_norm")
        self.state_dropout = keras.layers.Dropout(
            dropout, dtype=dtype, name="state_dropout"
        )

        # === Functional model ===
        def tokens(name):
            return keras.Input((None,), dtype="int32", name=name)

        inputs = {name: tokens(name) for name in INPUTS}
        source = self.encode(
            inputs["encoder_token_ids"], inputs["encoder_padding_mask"]
        )
        target = self.decode(
            inputs["decoder_token_ids"],
            inputs["decoder_padding_mask"],
            source,
            inputs["encoder_padding_mask"],
        )
        super().__init__(
            inputs=inputs,
            outputs={
                "encoder_sequence_output": source,
                "decoder_sequence_output": target,
            },
            dtype=dtype,
            **kwargs,
        )

    def __call__(self, inputs, *args, **kwargs):
        check_inputs(inputs, self.vocabulary_size, self.context_length)
        return super().__call__(inputs, *args, **kwargs)

    @property
    def blocks(self):
        """The blocks of the encoder and then of the decoder, first to last."""
        return [*self.encoder_transformer_layers, *self.decoder_transformer_layers]

    def encode(self, token_ids, padding_mask, found=None, per_sequence=False):
        """The states of a source.

        Args:
            token_ids: int tensor `[B, S]`.
            padding_mask: bool or int tensor `[B, S]`.
            found: None, or a list to which the `RoutingStatistics` of each mixture
                are added.
            per_sequence: see `MixtureOfExperts`.

        Returns:
            A tensor `[B, S, D]`.
        """
        x = self._dropped(self.embed(token_ids))
        x = walk(
            self.encoder_transformer_layers,
            x,
            found,
            padding_mask=padding_mask,
            per_sequence=per_sequence,
            **_bias(self.encoder_position_bias, x),
        )
        return self._dropped(self.encoder_layer_norm(x))

    def decode(self, token_ids, padding_mask, source, source_mask, found=None):
        """The states of a target.

        Args:
            token_ids: int tensor `[B, T]`.
            padding_mask: bool or int tensor `[B, T]`.
            source: float tensor `[B, S, D]`, what `encode` returns.
            source_mask: bool or int tensor `[B, S]`.
            found: as for `encode`.

        Returns:
            A tensor `[B, T, D]`.
        """
        x = self._dropped(self.embed(token_ids, self.decoder_embedding))
        x = walk(
            self.decoder_transformer_layers,
            x,
            found,
            padding_mask=padding_mask,
            source=source,
            source_mask=source_mask,
            **_bias(self.decoder_position_bias, x),
        )
        return self._dropped(self.decoder_layer_norm(x))

    def _dropped(self, x):
        return self.state_dropout(x) if self.dropout else x

    def routing_statistics(self, inputs):
        """How each mixture routes a batch, as the `RoutingStatistics` of each.

        Args:
            inputs: as for a call of the backbone.

        Returns:
            A list of `RoutingStatistics`, one a mixture, those of the encoder
            first. They are sums: those of several batches add. See
            `keras_moe.layers.routing_statistics` for what to make of them.
        """
        check_inputs(inputs, self.vocabulary_size, self.context_length)
        source_ids, source_mask, ids, mask = (
            ops.convert_to_tensor(inputs[name]) for name in INPUTS
        )
        found = []
        source = self.encode(source_ids, source_mask, found)
        self.decode(ids, mask, source, source_mask, found)
        return found


INPUTS = (
    "encoder_token_ids",
    "encoder_padding_mask",
    "decoder_token_ids",
    "decoder_padding_mask",
)


def _shapes(inputs):
    """The shapes by name, where ids and masks are there and fit."""
    if not isinstance(inputs, dict) or not set(INPUTS) <= set(inputs):
        received = sorted(inputs) if isinstance(inputs, dict) else type(inputs).__name__
        raise ValueError(
            f"`inputs` must be a dict of {', '.join(map(repr, INPUTS))}. "
            f"Received: {received}"
        )
    shapes = {}
    for name in INPUTS:
        array = inputs[name]
        shapes[name] = tuple(
            array.shape if hasattr(array, "shape") else np.shape(array)
        )
    for part in ("encoder", "decoder"):
        ids, mask = f"{part}_token_ids", f"{part}_padding_mask"
        received = f"Received: {ids}.shape={shapes[ids]}, {mask}.shape={shapes[mask]}"
        if any(len(shapes[name]) != 2 or shapes[name][1] == 0 for name in (ids, mask)):
            raise ValueError(
                f"`{ids}` and `{mask}` must be of rank 2, with at least one token a "
                f"row. {received}"
            )
        pairs = zip(shapes[ids], shapes[mask], strict=True)
        if any(None not in pair and pair[0] != pair[1] for pair in pairs):
            raise ValueError(f"`{mask}` must have the shape of `{ids}`. {received}")
    return shapes


def _bias(layer, x):
    return {} if layer is None else {"position_bias": layer(x)}


def check_inputs(inputs, vocabulary_size, context_length):
    """Refuses inputs that do not fit one another, and what `check_tokens` does.

    Also sources of nothing but padding, where known: in NumPy arrays.
    """
    shapes = _shapes(inputs)
    for name in INPUTS:
        if name.endswith("token_ids"):
            check_tokens(inputs[name], vocabulary_size, context_length, name)
    if len({shape[0] for shape in shapes.values()} - {None}) > 1:
        raise ValueError(
            "`inputs` must hold as many sources as targets. Received: "
            f"{', '.join(f'{name}.shape={shape}' for name, shape in shapes.items())}"
        )
    mask = inputs["encoder_padding_mask"]
    if isinstance(mask, (np.ndarray, list)) and np.size(mask):
        if not np.any(mask, axis=-1).all():
            raise ValueError(
                "`encoder_padding_mask` must leave every source a token. Received: "
                "a row of nothing but padding"
            )
