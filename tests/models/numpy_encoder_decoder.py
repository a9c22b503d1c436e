"""An encoder-decoder in float64 NumPy that reads a preset's files itself.

Switch's ([Fedus et al., 2021](https://arxiv.org/abs/2101.03961)) on T5's attention
([Raffel et al., 2019](https://arxiv.org/abs/1910.10683)); see `numpy_model`.

B  batch        S  tokens of a source       T  tokens of a target       V  vocabulary
"""

import math
from collections import Counter
from fractions import Fraction

import numpy as np

from tests.models.numpy_model import NumpyModel, log_bucket, softmax

EMBEDDING = "layers/reversible_embedding/vars/0"


class NumpyEncoderDecoder(NumpyModel):
    """The model in a preset's folder; arguments as for `NumpyModel`.

    `dropped` counts the tokens that found no room in their expert.
    """

    def __init__(self, folder, **overrides):
        super().__init__(folder, **overrides)
        assert self.settings["top_k"] == 1 and not self.settings["normalize_gates"]
        self.dropped = 0

    def logits(self, inputs):
        """Logits `[B, T, V]` of a batch, as the models take one."""
        source_mask = np.asarray(inputs["encoder_padding_mask"], bool)
        mask = np.asarray(inputs["decoder_padding_mask"], bool)
        states = self._encode(inputs["encoder_token_ids"], source_mask)
        return self._decode(inputs["decoder_token_ids"], mask, states, source_mask)

    def greedy(self, source_ids, start, end, length):
        """The likeliest token each time after `start`, to `length` tokens or `end`.

        One source `[S]`. A capacity there is of this sequence, and what is generated
        is alone in each step, and so never dropped.
        """
        source_mask = np.ones((1, len(source_ids)), bool)
        states = self._encode([source_ids], source_mask, alone=True)
        token_ids = [start]
        while len(token_ids) < length and token_ids[-1] != end:
            mask = np.ones((1, len(token_ids)), bool)
            logits = self._decode([token_ids], mask, states, source_mask, limited=False)
            token_ids.append(int(np.argmax(logits[0, -1])))
        return token_ids

    def _encode(self, token_ids, mask, alone=False):
        x = self.weights[EMBEDDING][np.asarray(token_ids)]
        bias = self._bias("layers/relative_bias", x.shape[1], both_ways=True)
        for index in range(self.settings["encoder_layers"]):
            block = "layers/encoder_block" + (f"_{index}" if index else "")
            seen = np.repeat(mask[:, None], x.shape[1], axis=1)
            hidden = self._norm(x, f"{block}/attention_norm")
            x = x + self._attention(hidden, hidden, f"{block}/attention", seen, bias)
            group = self._group(x.shape[1], alone)
            x = x + self._feed_forward(x, mask, block, group)
        return self._norm(x, "layers/rms_normalization")

    def _decode(self, token_ids, mask, states, source_mask, limited=True):
        x = self.weights[EMBEDDING][np.asarray(token_ids)]
        length = x.shape[1]
        bias = self._bias("layers/relative_bias_1", length, both_ways=False)
        for index in range(self.settings["decoder_layers"]):
            block = "layers/decoder_block" + (f"_{index}" if index else "")
            hidden = self._norm(x, f"{block}/attention_norm")
            seen = mask[:, None] & np.tri(length, dtype=bool)
            x = x + self._attention(hidden, hidden, f"{block}/attention", seen, bias)
            hidden = self._norm(x, f"{block}/cross_attention_norm")
            seen = np.repeat(source_mask[:, None], length, axis=1)
            x = x + self._attention(hidden, states, f"{block}/cross_attention", seen)
            group = self._group(length) if limited else None
            x = x + self._feed_forward(x, mask, block, group)
        x = self._norm(x, "layers/rms_normalization_1")
        return x @ self.weights[EMBEDDING].T / math.sqrt(x.shape[-1])

    def _attention(self, x, source, name, seen, bias=0.0):
        """T5's: neither scaled nor biased but by distance. `seen` is `[B, T, S]`."""
        query, key, value, output = (
            self.weights[f"{name}/{part}/vars/0"]
            for part in ("query", "key", "value", "output_dense")
        )
        y = np.zeros_like(x)
        for row in range(len(x)):
            for head in range(query.shape[1]):
                scores = (x[row] @ query[:, head]) @ (source[row] @ key[:, head]).T
                scores = scores + (bias[head] if np.ndim(bias) else bias)
                weights = softmax(np.where(seen[row], scores, -1e30))
                y[row] += weights @ (source[row] @ value[:, head]) @ output[head]
        return y

    def _bias(self, name, length, both_ways):
        table = self.weights[f"{name}/vars/0"]
        buckets = len(table) // 2 if both_ways else len(table)
        max_distance = self.settings["relative_max_distance"]
        bias = np.zeros((table.shape[1], length, length))
        for i in range(length):
            for j in range(length if both_ways else i + 1):
                distance = abs(i - j)
                bucket = log_bucket(distance, buckets // 2, buckets, max_distance)
                bias[:, i, j] = table[bucket + (buckets if j > i else 0)]
        return bias

    def _group(self, length, alone=False):
        """Tokens of a group, and how many of them an expert takes: eq. 3 of Switch.

        In generation the groups are sequences, with no less room than elsewhere.
        """
        size = self.settings["capacity_group"]
        counted = max(size, length) if alone else size
        share = Fraction(counted, self.settings["num_experts"])
        factor = Fraction(str(self.settings["eval_capacity_factor"]))
        return (length if alone else size), math.ceil(factor * share)

    def _feed_forward(self, x, mask, block, group):
        x = self._norm(x, f"{block}/feed_forward_norm")
        name = f"{block}/feed_forward"
        if f"{name}/router/vars/0" not in self.weights:
            return self._dense(x, name, gated=False)
        tokens = x.reshape(-1, x.shape[-1])
        return self._mixture(tokens, mask.ravel(), name, group).reshape(x.shape)

    def _mixture(self, tokens, mask, name, group):
        """Section 2.1 and 2.2 of Switch: the first in a group come first."""
        y = np.zeros_like(tokens)
        probabilities = softmax(tokens @ self.weights[f"{name}/router/vars/0"])
        taken = Counter()
        for t in np.flatnonzero(mask):
            expert = int(np.argmax(probabilities[t]))
            if group is not None:
                size, capacity = group
                taken[t // size, expert] += 1
                if taken[t // size, expert] > capacity:
                    self.dropped += 1
                    continue
            y[t] = probabilities[t, expert] * self._expert(tokens[t], name, expert)
        return y
