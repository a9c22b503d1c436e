"""Keras layers of mixture-of-experts models, each usable alone."""

from keras_moe.layers.activations import gelu_tanh
from keras_moe.layers.attention import GroupedQueryAttention
from keras_moe.layers.cross_attention import CrossAttention
from keras_moe.layers.decoder_block import DecoderBlock
from keras_moe.layers.encoder_block import EncoderBlock
from keras_moe.layers.experts import Experts
from keras_moe.layers.feed_forward import FeedForward
from keras_moe.layers.latent_attention import LatentAttention
from keras_moe.layers.mixture_of_experts import MixtureOfExperts
from keras_moe.layers.relative_bias import RelativeBias
from keras_moe.layers.routers import Router, Routing, TopKRouter
from keras_moe.layers.routing_statistics import RoutingStatistics

__all__ = [
    "CrossAttention",
    "DecoderBlock",
    "EncoderBlock",
    "Experts",
    "FeedForward",
    "GroupedQueryAttention",
    "LatentAttention",
    "MixtureOfExperts",
    "RelativeBias",
    "Router",
    "Routing",
    "RoutingStatistics",
    "TopKRouter",
    "gelu_tanh",
]
