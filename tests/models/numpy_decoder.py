"""A decoder in float64 NumPy that reads a preset's files itself.

One token and one expert at a time; see `numpy_model`.
"""

import math

import numpy as np

from tests.models.numpy_model import NumpyModel, log_bucket, softmax


class NumpyDecoder(NumpyModel):
    """The language model in a preset's folder; arguments as for `NumpyModel`."""

    def logits(self, token_ids):
        """Logits `[S, V]` of one sequence of token ids `[S]`."""
        embeddings = self.weights["layers/reversible_embedding/vars/0"]
        x = embeddings[np.asarray(token_ids)]
        for index in range(self.settings["num_layers"]):
            prefix = "layers/decoder_block" + (f"_{index}" if index else "")
            x = x + self._attention(self._norm(x, f"{prefix}/attention_norm"), prefix)
            hidden = self._norm(x, f"{prefix}/feed_forward_norm")
            x = x + self._feed_forward(hidden, f"{prefix}/feed_forward")
        x = self._norm(x, "layers/rms_normalization")
        if self.settings["tied_embeddings"]:
            return x @ embeddings.T
        return x @ self.weights["layers/reversible_embedding/vars/1"]

    def greedy(self, token_ids, length):
        """`token_ids` continued to `length` by the likeliest token each time."""
        token_ids = list(token_ids)
        while len(token_ids) < length:
            token_ids.append(int(np.argmax(self.logits(token_ids)[-1])))
        return token_ids

    def _attention(self, x, prefix):
        def project(name):
            kernel = self.weights[f"{prefix}/attention/{name}/vars/0"]
            return np.einsum("td,dhk->htk", x, kernel)

        query, key, value = project("query"), project("key"), project("value")
        if self.settings["positions"] == "rotary":
            query, key = self._rotate(query), self._rotate(key)
        group = len(query) // len(key)
        output = self.weights[f"{prefix}/attention/output_dense/vars/0"]
        total = np.zeros_like(x)
        for head in range(len(query)):
            scores = query[head] @ key[head // group].T / math.sqrt(query.shape[-1])
            if self.settings["positions"] == "relative_bias":
                scores = scores + self._bias(len(x), prefix)[head]
            scores = np.where(np.tri(len(x)) > 0, scores, -np.inf)
            total += softmax(scores) @ value[head // group] @ output[head]
        return total

    def _rotate(self, x):
        # RoFormer, eq. 34, the two halves of a head being the pairs.
        half = x.shape[-1] // 2
        frequency = self.settings["rope_theta"] ** (-np.arange(half) / half)
        angle = np.arange(x.shape[1])[:, None] * frequency
        first, second = x[..., :half], x[..., half:]
        return np.concatenate(
            [
                first * np.cos(angle) - second * np.sin(angle),
                second * np.cos(angle) + first * np.sin(angle),
            ],
            axis=-1,
        )

    def _bias(self, length, prefix):
        table = self.weights[f"{prefix}/attention/relative_bias/vars/0"]
        buckets = self.settings["relative_buckets"]
        max_distance = self.settings["relative_max_distance"]
        bias = np.zeros((table.shape[1], length, length))
        for i in range(length):
            for j in range(i + 1):
                bucket = log_bucket(i - j, buckets // 2, buckets, max_distance)
                bias[:, i, j] = table[bucket]
        return bias

    def _feed_forward(self, x, name):
        if f"{name}/router/vars/0" not in self.weights:
            return self._dense(x, name, self._dense_gated())
        output = np.stack([self._mixture(token, name) for token in x])
        if self.settings["num_shared_experts"]:
            gated = self.settings["expert_gated"]
            output = output + self._dense(x, f"{name}/shared_experts", gated)
        return output

    def _dense_gated(self):
        gated = self.settings["dense_gated"]
        return self.settings["expert_gated"] if gated is None else gated

    def _mixture(self, token, name):
        scores = softmax(token @ self.weights[f"{name}/router/vars/0"])
        chosen = np.argsort(-scores, kind="stable")[: self.settings["top_k"]]
        gates = scores[chosen]
        if self.settings["normalize_gates"] in (None, True):
            gates = gates / gates.sum()
        return sum(
            gate * self._expert(token, name, expert)
            for expert, gate in zip(chosen, gates, strict=True)
        )
