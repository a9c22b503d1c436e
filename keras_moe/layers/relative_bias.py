"""Learned attention biases by distance.

H  heads        T  queries      S  keys
"""

import math

import keras
import numpy as np
from keras import ops

from keras_moe import checks
from keras_moe.layers.initializers import fresh


@keras.saving.register_keras_serializable(package="keras_moe")
class RelativeBias(keras.layers.Layer):
    """T5's relative position bias: one value a head and bucket of distances.

    The first half of the buckets holds one distance each, the rest
    logarithmically growing ranges up to `max_distance`, beyond which all share
    the last ([Raffel et al., 2019](https://arxiv.org/abs/1910.10683), section
    2.1). A decoder looks backwards only: a key after the query counts as distance
    0. An encoder looks both ways: the first half of the buckets are for keys up to
    the query, the second for those after it.

    Args:
        num_heads: int, H.
        num_buckets: int, at least 2, or 4 and even where bidirectional.
        max_distance: int, in tokens, above half of the buckets of a direction.
        bidirectional: bool.
        initializer: initializer of the table `[num_buckets, H]`.
        **kwargs: `name`, `trainable`, `dtype`.

    Call arguments:
        query_index: int tensor `[T]`, positions of the queries; without `key_index`
            a tensor `[B, T, ...]`, each of whose tokens is query and key.
        key_index: int tensor `[S]`, positions of the keys, or None.

    Returns:
        A tensor `[1, H, T, S]`, to be added to the attention logits.

    Raises:
        ValueError: for settings outside the ranges above.

    Example:

    ```python
    bias = keras_moe.layers.RelativeBias(num_heads=4)
    bias(keras.ops.arange(8), keras.ops.arange(8)).shape  # (1, 4, 8, 8)
    ```
    """

    def __init__(
        self,
        num_heads,
        num_buckets=32,
        max_distance=128,
        bidirectional=False,
        initializer=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        checks.at_least("num_heads", num_heads, 1)
        check_buckets(num_buckets, max_distance, bidirectional)
        self.num_heads = num_heads
        self.num_buckets = num_buckets
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        if initializer is None:
            initializer = keras.initializers.RandomNormal(stddev=0.02)
        self.initializer = keras.initializers.get(initializer)

    def build(self, input_shape):
        self.embeddings = self.add_weight(
            name="embeddings",
            shape=(self.num_buckets, self.num_heads),
            initializer=fresh(self.initializer),
        )

    def call(self, query_index, key_index=None):
        if key_index is None:
            query_index = ops.arange(ops.shape(query_index)[1], dtype="int32")
            key_index = query_index
        distance = query_index[:, None] - key_index[None, :]
        behind = ops.clip(distance, 0, self.max_distance)
        bucket = ops.take(self._buckets(), behind)
        if self.bidirectional:
            ahead = ops.clip(-distance, 0, self.max_distance)
            ahead = ops.take(self._buckets(), ahead) + self.num_buckets // 2
            bucket = ops.where(distance < 0, ahead, bucket)
        bias = ops.take(self.embeddings, bucket, axis=0)
        return ops.cast(ops.transpose(bias, (2, 0, 1))[None], self.compute_dtype)

    def _buckets(self):
        """The bucket of every distance `0 .. max_distance` in one direction."""
        # On the host: a logarithm at a range's edge rounds differently elsewhere.
        count = self.num_buckets // 2 if self.bidirectional else self.num_buckets
        exact = count // 2
        distance = np.arange(self.max_distance + 1)
        growth = np.log(np.maximum(distance, 1) / exact)
        growth = growth / math.log(self.max_distance / exact)
        large = exact + np.floor(growth * (count - exact)).astype(int)
        buckets = np.where(distance < exact, distance, large)
        return np.minimum(buckets, count - 1).astype("int32")

    def compute_output_spec(self, query_index, key_index=None):
        if key_index is None:
            lengths = (query_index.shape[1],) * 2
        else:
            lengths = query_index.shape[0], key_index.shape[0]
        shape = (1, self.num_heads, *lengths)
        return keras.KerasTensor(shape, dtype=self.compute_dtype)

    def get_config(self):
        return {
            **super().get_config(),
            "num_heads": self.num_heads,
            "num_buckets": self.num_buckets,
            "max_distance": self.max_distance,
            "bidirectional": self.bidirectional,
            "initializer": keras.initializers.serialize(self.initializer),
        }


def check_buckets(
    num_buckets, max_distance, bidirectional, names=("num_buckets", "max_distance")
):
    """Raises where there are too few buckets, or they reach beyond `max_distance`."""
    directions = 2 if bidirectional else 1
    checks.at_least(names[0], num_buckets, 2 * directions)
    if num_buckets % directions:
        raise ValueError(
            f"`{names[0]}` must be even where both directions share them. "
            f"Received: {names[0]}={num_buckets}"
        )
    checks.at_least(names[1], max_distance, num_buckets // directions // 2 + 1)
