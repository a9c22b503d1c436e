"""Multi-head latent attention.

B  batch        T  queries      S  keys (S = T without a cache)
D  features     H  heads        R  rank of the latent of keys and values
n  features of a head without positions        r  features with rotary positions
v  features of a value
"""

import keras
from keras import ops

from keras_moe import checks
from keras_moe.layers.attention import SelfAttention, write_cache
from keras_moe.layers.rotary import logit_scale, rotate


@keras.saving.register_keras_serializable(package="keras_moe")
class LatentAttention(SelfAttention):
    """Attention whose keys and values are projected from a small latent.

    With `c = norm(x W_down)` `[R]` for each token, `k_h = [c W_uk_h ; k_r]`,
    `v_h = c W_uv_h`, `q_h = [q_h_n ; q_h_r]`, the parts `r` rotated and `k_r` one
    for all heads: `y = concat_h(softmax(q_h k_h^T / sqrt(n + r)) v_h) W_o`
    (DeepSeek-V2, [2024](https://arxiv.org/abs/2405.04434), eq. 9-19; DeepSeek-V3,
    [2024](https://arxiv.org/abs/2412.19437), eq. 1-11).

    The cache holds `c` and `k_r` alone, `R + r` numbers a token whatever H. A single
    new token attends to them as they are, `W_uk` applied to its query and `W_uv` to
    its result (DeepSeek-V2, section 2.1.2); several have keys and values expanded.

    Args:
        num_query_heads: int, H.
        head_dim: int, n.
        rope_head_dim: int, r, even.
        value_head_dim: int, v.
        key_value_rank: int, R.
        query_rank: int or None: the rank of the queries' own latent, or None to
            project them from the inputs.
        **kwargs: those of the rotary positions, `bias`, `soft_cap`, `window`,
            `dropout`, `norm_epsilon` and `kernel_initializer` as for
            `GroupedQueryAttention`; `name`, `trainable`, `dtype`. A bias is had by
            the projections to the latents and, with `"all"`, by the output's.

    Call arguments:
        inputs: float tensor `[B, T, D]`.
        mask: as for `GroupedQueryAttention`.
        cache: None, or the latents `[B, S, R]` and rotated keys `[B, S, r]` so far.
        cache_index: as for `GroupedQueryAttention`.
        training: bool.

    Returns:
        As `GroupedQueryAttention`.

    Raises:
        ValueError: for settings out of range.

    Example:

    ```python
    attention = keras_moe.layers.LatentAttention(
        8, head_dim=16, rope_head_dim=8, value_head_dim=16, key_value_rank=32
    )
    y = attention(keras.random.normal((2, 16, 64)))
    ```
    """

    def __init__(
        self,
        num_query_heads,
        head_dim,
        rope_head_dim,
        value_head_dim,
        key_value_rank,
        query_rank=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        for name, value in (
            ("num_query_heads", num_query_heads),
            ("head_dim", head_dim),
            ("rope_head_dim", rope_head_dim),
            ("value_head_dim", value_head_dim),
            ("key_value_rank", key_value_rank),
        ):
            checks.at_least(name, value, 1)
        if query_rank is not None:
            checks.at_least("query_rank", query_rank, 1)
        self.num_query_heads = num_query_heads
        self.head_dim = head_dim
        self.rope_head_dim = rope_head_dim
        self.value_head_dim = value_head_dim
        self.key_value_rank = key_value_rank
        self.query_rank = query_rank

    def build(self, input_shape):
        dim = input_shape[-1]
        self._build_rotary(self.rope_head_dim, "rope_head_dim")
        has_bias = self.bias is not None
        heads = (self.num_query_heads, self.head_dim + self.rope_head_dim)
        if self.query_rank is None:
            self.query = self._dense("query", "btd,dhk->bthk", heads, (dim,), 0)
        else:
            rank = (self.query_rank,)
            self.query_down = self._dense(
                "query_down", "btd,dr->btr", rank, (dim,), 0, bias=has_bias
            )
            self.query_down_norm = self._norm("query_down_norm", rank)
            self.query_up = self._dense("query_up", "btr,rhk->bthk", heads, rank, 1)
        rank = (self.key_value_rank,)
        self.key_value_down = self._dense(
            "key_value_down",
            "btd,dr->btr",
            (self.key_value_rank + self.rope_head_dim,),
            (dim,),
            2,
            bias=has_bias,
        )
        self.key_value_down_norm = self._norm("key_value_down_norm", rank)
        self.key_value_up = self._dense(
            "key_value_up",
            "btr,rhk->bthk",
            (self.num_query_heads, self.head_dim + self.value_head_dim),
            rank,
            3,
        )
        self._build_output((self.num_query_heads, self.value_head_dim), dim, 4)

    def empty_cache(self, batch_size, length):
        """Zeros in the shape of the cache of a call: `[B, S, R]`, `[B, S, r]`."""
        return tuple(
            ops.zeros((batch_size, length, size), dtype=self.compute_dtype)
            for size in (self.key_value_rank, self.rope_head_dim)
        )

    def call(self, inputs, mask=None, cache=None, cache_index=0, training=None):
        if self.query_rank is None:
            query = self.query(inputs)
        else:
            query = self.query_up(self.query_down_norm(self.query_down(inputs)))
        down = self.key_value_down(inputs)
        latent = self.key_value_down_norm(down[..., : self.key_value_rank])
        query_index = self._query_index(inputs, cache, cache_index)
        turns = self._rotations(query_index, mask)
        turned_key = rotate(down[..., None, self.key_value_rank :], *turns)[:, :, 0]
        query, turned_query = query[..., : self.head_dim], query[..., self.head_dim :]
        turned_query = rotate(turned_query, *turns)
        if cache is not None:
            cache = write_cache(cache, (latent, turned_key), cache_index)
            latent, turned_key = (ops.cast(t, self.compute_dtype) for t in cache)
        key_index = ops.arange(ops.shape(latent)[1], dtype="int32")
        visible = self._visible(query_index, key_index, mask)
        attend = self._attend_to_latents if inputs.shape[1] == 1 else self._attend
        outputs = attend(query, turned_query, latent, turned_key, visible, training)
        outputs = self._output(outputs, training)
        return outputs if cache is None else (outputs, cache)

    def _attend(self, query, turned_query, latent, turned_key, visible, training):
        expanded = self.key_value_up(latent)
        key, value = expanded[..., : self.head_dim], expanded[..., self.head_dim :]
        logits = ops.einsum("bthn,bshn->bhts", query, key)
        weights = self._weigh_both(logits, turned_query, turned_key, visible, training)
        return ops.einsum("bhts,bshv->bthv", weights, value)

    def _attend_to_latents(
        self, query, turned_query, latent, turned_key, visible, training
    ):
        up = ops.cast(self.key_value_up.kernel, self.compute_dtype)
        query = ops.einsum("bthn,rhn->bthr", query, up[..., : self.head_dim])
        logits = ops.einsum("bthr,bsr->bhts", query, latent)
        weights = self._weigh_both(logits, turned_query, turned_key, visible, training)
        found = ops.einsum("bhts,bsr->bthr", weights, latent)
        return ops.einsum("bthr,rhv->bthv", found, up[..., self.head_dim :])

    def _weigh_both(self, logits, turned_query, turned_key, visible, training):
        logits = logits + ops.einsum("bthr,bsr->bhts", turned_query, turned_key)
        size = self.head_dim + self.rope_head_dim
        scale = size**-0.5 * logit_scale(self.rope_scaling)
        return self._weigh(logits * scale, visible, training=training)

    def get_config(self):
        return {
            **super().get_config(),
            "num_query_heads": self.num_query_heads,
            "head_dim": self.head_dim,
            "rope_head_dim": self.rope_head_dim,
            "value_head_dim": self.value_head_dim,
            "key_value_rank": self.key_value_rank,
            "query_rank": self.query_rank,
        }
