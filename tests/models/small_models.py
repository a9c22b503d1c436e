"""Models small enough to build in every test, and inputs for them."""

import numpy as np

from keras_moe.models import (
    MoEBackbone,
    MoECausalLM,
    MoESeq2SeqBackbone,
    MoESeq2SeqLM,
)

SETTINGS = {
    "vocabulary_size": 50,
    "num_layers": 2,
    "hidden_dim": 16,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "top_k": 2,
    "expert_dim": 24,
    "num_shared_experts": 1,
    "dense_first_layers": 1,
    "dense_dim": 32,
    "initializer_stddev": 0.2,  # so that routing and attention matter
}

LATENT = {
    "attention": "latent",
    "num_key_value_heads": None,
    "head_dim": 6,
    "rope_head_dim": 4,
    "value_head_dim": 5,
    "key_value_rank": 7,
}


def small_backbone(**overrides):
    """A `MoEBackbone` of `SETTINGS`: a dense layer, then a mixture."""
    return MoEBackbone(**{**SETTINGS, **overrides})


def small_causal_lm(preprocessor=None, **overrides):
    """A `MoECausalLM` over `small_backbone`."""
    return MoECausalLM(small_backbone(**overrides), preprocessor=preprocessor)


def random_ids(*shape, seed=0):
    """Random token ids of the small models, int32."""
    high = SETTINGS["vocabulary_size"]
    return np.random.default_rng(seed).integers(0, high, shape).astype("int32")


def padded(rows, length, side):
    """Model inputs of rows of token ids, padded at a side to a length."""
    token_ids = np.zeros((len(rows), length), "int32")
    padding_mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(-len(row), None)
        token_ids[i, where] = row
        padding_mask[i, where] = True
    return {"token_ids": token_ids, "padding_mask": padding_mask}


def full(token_ids):
    """Model inputs without padding."""
    return {"token_ids": token_ids, "padding_mask": np.ones(token_ids.shape, bool)}


SEQ2SEQ = {
    "vocabulary_size": 50,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "hidden_dim": 16,
    "num_query_heads": 4,
    "head_dim": 6,
    "num_experts": 4,
    "expert_dim": 24,
    "moe_every": 2,
    "moe_offset": 1,
    "dense_dim": 32,
    "initializer_scale": 1.0,  # so that routing and attention matter
}


def small_seq2seq_backbone(**overrides):
    """A `MoESeq2SeqBackbone` of `SEQ2SEQ`: dense, then a mixture, in both stacks."""
    return MoESeq2SeqBackbone(**{**SEQ2SEQ, **overrides})


def small_seq2seq_lm(preprocessor=None, **overrides):
    """A `MoESeq2SeqLM` over `small_seq2seq_backbone`."""
    return MoESeq2SeqLM(small_seq2seq_backbone(**overrides), preprocessor=preprocessor)


def source_and_target(sources, targets, target_length=None):
    """Inputs of an encoder-decoder from rows of token ids, padded at the right."""
    source = padded(sources, max(map(len, sources)), "right")
    length = target_length or max(map(len, targets))
    target = padded(targets, length, "right")
    return {
        **{f"encoder_{name}": value for name, value in source.items()},
        **{f"decoder_{name}": value for name, value in target.items()},
    }
