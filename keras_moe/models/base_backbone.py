"""What the backbones share: embeddings, logits, settings, statistics.

B  batch        S  sequence length      D  `hidden_dim`     V  `vocabulary_size`
"""

import keras
import keras_hub
import numpy as np

from keras_moe import architecture
from keras_moe.distribution import layouts
from keras_moe.distribution.support import check_supported
from keras_moe.models.compression import warn_experts_left
from keras_moe.models.pretrained import PretrainedBackbone

_LATENT_PROJECTIONS = ("query_down", "query_up", "key_value_down", "key_value_up")


class BaseBackbone(PretrainedBackbone, keras_hub.models.Backbone):
    """A KerasHub backbone whose settings are the arguments of its class.

    A subclass defines `blocks` and `routing_statistics`.
    """

    def _keep_settings(self, arguments, others):
        """Checks the settings among a constructor's arguments, and keeps them.

        Args:
            arguments: dict, all arguments by name.
            others: dict, those that it knows no name for.

        Returns:
            The settings, a dict.
        """
        check_supported(keras.distribution.distribution())
        cls = type(self)
        settings = {name: arguments[name] for name in architecture.names(cls)}
        architecture.check_names(others, cls)
        architecture.check(settings)
        for name, value in settings.items():
            setattr(self, name, value)
        self._logit_multiplier = architecture.output_multiplier(settings)
        return settings

    def embed(self, token_ids, embedding=None):
        """Token ids, int `[B, S]`, as the first block gets them, `[B, S, D]`.

        `embedding` stands for `token_embedding` where it is not None.
        """
        if embedding is None:
            embedding = self.token_embedding
        return _scaled(embedding(token_ids), self.embedding_multiplier)

    def logits(self, hidden_states):
        """The logits `[B, S, V]` of hidden states `[B, S, D]`."""
        logits = self.token_embedding(hidden_states, reverse=True)
        return _scaled(logits, self._logit_multiplier)

    @staticmethod
    def get_layout_map(
        device_mesh,
        model_parallel_dim_name="model",
        data_parallel_dim_name="batch",
        expert_parallel_dim_name="expert",
    ):
        """Where the weights lie on a mesh, for `keras_moe.distribution.ExpertParallel`.

        Attention heads, the vocabulary and the hidden features of dense blocks and
        experts lie over the model axis, experts over the expert axis. Over the batch
        axis, and the expert axis where it is not taken, the features of all matrices
        lie: storage alone, gathered where a layer is computed, so that weights and
        the optimizer's state take less on each device. Axes that the mesh does not
        have are left out. A vocabulary that the model axis does not divide lies whole
        along it, as do features that theirs do not.

        Args:
            device_mesh: `keras.distribution.DeviceMesh`.
            model_parallel_dim_name: str, the model axis.
            data_parallel_dim_name: str or None, the batch axis; None leaves weights
                whole along it.
            expert_parallel_dim_name: str, the expert axis.

        Returns:
            A `keras.distribution.LayoutMap`.

        Raises:
            ValueError: if the mesh has none of the axes, or two are the same.

        Example:

        ```python
        mesh = keras.distribution.DeviceMesh((2, 4), ("batch", "model"))
        layout_map = keras_moe.models.MoEBackbone.get_layout_map(mesh)
        keras.distribution.set_distribution(
            keras_moe.distribution.ExpertParallel(layout_map=layout_map)
        )
        ```
        """
        return layouts.layout_map(
            device_mesh,
            model_parallel_dim_name,
            data_parallel_dim_name,
            expert_parallel_dim_name,
        )

    @property
    def mixtures(self):
        """The `MixtureOfExperts` layers, first to last."""
        return [layer.feed_forward for layer in self.blocks if layer.is_mixture]

    def default_lora_layer_names(self):
        """The projections of queries and values, those of latent attention too."""
        return [*super().default_lora_layer_names(), *_LATENT_PROJECTIONS]

    def enable_lora(self, rank, target_layer_names=None):
        """As KerasHub's; experts take no part yet, and a warning says so."""
        super().enable_lora(rank, target_layer_names)
        warn_experts_left(self, "enable_lora")

    def quantize(self, mode=None, **kwargs):
        """As Keras's; experts and routers stay as they are, and a warning says so."""
        super().quantize(mode, **kwargs)
        warn_experts_left(self, "quantize")

    def get_config(self):
        settings = {n: getattr(self, n) for n in architecture.names(type(self))}
        return {**super().get_config(), **settings}


def walk(blocks, x, found=None, **arguments):
    """The output of the last of several blocks.

    Args:
        blocks: the layers.
        x: tensor `[B, S, D]`.
        found: None, or a list to which the `RoutingStatistics` of each mixture are
            added.
        **arguments: of each call.
    """
    for layer in blocks:
        if found is None:
            x = layer(x, **arguments)
            continue
        x, statistics = layer(x, return_statistics=True, **arguments)
        if statistics is not None:
            found.append(statistics)
    return x


def _scaled(x, multiplier):
    return x if multiplier == 1.0 else x * multiplier


def check_tokens(token_ids, vocabulary_size, context_length, name="token_ids"):
    """Refuses a sequence too long, and token ids out of range where known.

    Ids are read only where that costs no transfer: in NumPy arrays.
    """
    shape = tuple(getattr(token_ids, "shape", np.shape(token_ids)))
    length = shape[-1]
    if context_length is not None and length is not None and length > context_length:
        raise ValueError(
            f"`{name}` must not be longer than the model's `context_length` "
            f"({context_length}). Received: {name}.shape={shape}"
        )
    if isinstance(token_ids, (np.ndarray, list)) and np.size(token_ids):
        low, high = np.min(token_ids), np.max(token_ids)
        if low < 0 or high >= vocabulary_size:
            raise ValueError(
                f"`{name}` must be at least 0 and below `vocabulary_size` "
                f"({vocabulary_size}). Received: ids from {low} to {high}"
            )
