"""What the language models share: compiling, sampling, checks.

B  batch        T  tokens of a prompt and those generated       V  vocabulary
D  model features
"""

import warnings

import keras
import keras_hub
import numpy as np
from keras import ops

from keras_moe import checks
from keras_moe.models._keras_hub import any_equal
from keras_moe.models.compression import warn_experts_left
from keras_moe.models.pretrained import PretrainedTask
from keras_moe.models.py_datasets import TakesPyDatasets


class LanguageModel(TakesPyDatasets, PretrainedTask):
    """A task that trains on text and generates it; mixed into KerasHub's classes."""

    def compile(self, optimizer="auto", *args, **kwargs):
        """As `keras_hub.models.CausalLM.compile`, aware of half-precision weights.

        Adam divides by `1 - beta_2`; where weights, and so its state, are
        bfloat16 or float16, `beta_2 = 0.999` rounds to 1 and no weight moves, or
        all become NaN. There `"auto"` is `Lion(1e-4)`, and such an optimizer
        brings a warning. `mixed_bfloat16`, whose weights are float32, takes any.

        Args:
            optimizer: `"auto"`, a name, or a `keras.optimizers.Optimizer`.
            *args: as for KerasHub's `compile`.
            **kwargs: as for KerasHub's `compile`, `sampler` among them.
        """
        half = keras.backend.standardize_dtype(self.backbone.variable_dtype)
        if half in ("bfloat16", "float16"):
            if isinstance(optimizer, str) and optimizer == "auto":
                optimizer = keras.optimizers.Lion(1e-4)
            else:
                optimizer = keras.optimizers.get(optimizer)
                _warn_of_beta(optimizer, half)
        super().compile(optimizer, *args, **kwargs)

    def get_compile_config(self):
        return {
            **super().get_compile_config(),
            "sampler": keras_hub.samplers.serialize(self.sampler),
        }

    def compile_from_config(self, config):
        # Keras gives up on models with a `compile()` of their own, and with it on
        # the optimizer's state.
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def _stops(self, stop_token_ids):
        """What stops `generate`: `"auto"` stands for all that the tokenizer names."""
        automatic = isinstance(stop_token_ids, str) and stop_token_ids == "auto"
        if automatic and self.preprocessor is not None:
            return self.preprocessor.tokenizer.stop_token_ids
        return stop_token_ids

    def _sample(
        self, decode, prompt, padding_mask, cache, hidden_states, stop_token_ids
    ):
        """Continues prompts by the sampler.

        Args:
            decode: callable `(token_ids [B, 1], cache, index)` to hidden states
                `[B, 1, D]` and the cache.
            prompt: int tensor `[B, T]`.
            padding_mask: bool tensor `[B, T]`, padding at the right.
            cache: the cache after the prompt, a pair of what a step writes, every
                leaf `[B, T, ...]`, and of what stays.
            hidden_states: tensor `[B, T, D]`, those of the prompt.
            stop_token_ids: None or a tuple of ids.

        Returns:
            Token ids and padding mask, `[B, T]`.
        """
        prompt_lengths = ops.sum(ops.cast(padding_mask, "int32"), axis=-1)

        # Samplers start at the shortest prompt's last token, so that it and what is
        # left of others goes through `decode` again, alone: where capacity is
        # limited, not to the same experts.
        limited = any(m.dispatch == "capacity" for m in self.backbone.mixtures)
        if limited:
            ends = (prompt_lengths - 1)[:, None, None]
            last = ops.take_along_axis(hidden_states, ends, axis=1)
            cache = cache, (last, prompt_lengths)

        def next(prompt, cache, index):
            last = ops.slice(prompt, [0, index - 1], [ops.shape(prompt)[0], 1])
            if not limited:
                hidden_states, cache = decode(last, cache, index - 1)
            else:
                cache, of_prompt = cache
                hidden_states, new = decode(last, cache, index - 1)
                hidden_states, cache = _keep_prompt(
                    hidden_states, new, cache, index - 1, *of_prompt
                )
                cache = cache, of_prompt
            logits = self.backbone.logits(hidden_states)
            return logits[:, 0], hidden_states[:, 0], cache

        token_ids = self.sampler(
            next=next,
            prompt=prompt,
            cache=cache,
            index=ops.min(prompt_lengths),
            mask=padding_mask,
            stop_token_ids=stop_token_ids,
            hidden_states=hidden_states,
            model=self,
        )
        if stop_token_ids is None:
            return token_ids, ops.ones_like(token_ids, dtype="bool")
        # Padding begins after the first stop token that was generated.
        stops = any_equal(token_ids, stop_token_ids, ops.logical_not(padding_mask))
        stops = ops.cast(stops, "int32")
        return token_ids, ops.equal(ops.cumsum(stops, axis=-1) - stops, 0)

    def _check_length(self, max_length):
        """Refuses to generate, with a preprocessor, beyond the context."""
        context = self.backbone.context_length
        if max_length is not None:
            checks.at_least("max_length", max_length, 1)
        length = max_length or self.preprocessor.sequence_length
        if context is not None and length > context:
            raise ValueError(
                "`max_length` must not exceed the model's `context_length` "
                f"({context}). Received: max_length={max_length} and a "
                f"preprocessor of {self.preprocessor.sequence_length} tokens"
            )

    def quantize(self, mode=None, **kwargs):
        """As Keras's; experts and routers stay as they are, and a warning says so."""
        super().quantize(mode, **kwargs)
        warn_experts_left(self, "quantize")


def _keep_prompt(hidden_states, cache, before, index, last, lengths):
    """What one step gives, but of rows still in their prompts what these gave.

    Args:
        hidden_states: tensor `[B, 1, D]`, of the step.
        cache: the cache after the step.
        before: that before it.
        index: scalar int tensor, the position of the step.
        last: tensor `[B, 1, D]`, the hidden states of the prompts' last tokens.
        lengths: int tensor `[B]`, those of the prompts.

    Returns:
        Hidden states `[B, 1, D]` and the cache.
    """

    def keep(new, old):
        start = (0, index) + (0,) * (len(new.shape) - 2)
        shape = (ops.shape(new)[0], 1, *new.shape[2:])
        new_slot, old_slot = ops.slice(new, start, shape), ops.slice(old, start, shape)
        inside = ops.reshape(index < lengths, (-1,) + (1,) * (len(new.shape) - 1))
        return ops.slice_update(new, start, ops.where(inside, old_slot, new_slot))

    (written, fixed), (written_before, _) = cache, before
    at_end = (lengths == index + 1)[:, None, None]
    hidden_states = ops.where(at_end, last, hidden_states)
    return hidden_states, (
        keras.tree.map_structure(keep, written, written_before),
        fixed,
    )


def check_vocabulary(preprocessor, backbone):
    """Refuses a tokenizer of more tokens than there are embeddings."""
    if preprocessor is None or not preprocessor.tokenizer.has_vocabulary:
        return  # a saved model may be being read: its vocabulary comes later
    size = preprocessor.tokenizer.vocabulary_size()
    if size > backbone.vocabulary_size:
        raise ValueError(
            "`preprocessor` must not have more tokens than the backbone's "
            f"`vocabulary_size` ({backbone.vocabulary_size}). Received: a tokenizer "
            f"with vocabulary_size={size}"
        )


def check_right_padding(mask, name="padding_mask"):
    """Refuses prompts that are empty, or padded elsewhere than at the right."""
    if mask.shape[0] == 0:
        raise ValueError(
            "`inputs` must hold at least one prompt. "
            f"Received: {name}.shape={mask.shape}"
        )
    if not mask[:, :1].all() or (np.diff(mask.astype(int), axis=1) > 0).any():
        raise ValueError(
            "`inputs` must hold prompts of at least one token, padded at the right. "
            f"Received: a `{name}` with padding before a token"
        )


def _warn_of_beta(optimizer, dtype):
    beta = getattr(optimizer, "beta_2", None)
    # float16 keeps 0.999; its epsilon, 1e-7 squared away, is what fails there.
    if beta is not None and (dtype == "float16" or beta > 1 - 2**-9):
        warnings.warn(
            f"{type(optimizer).__name__} does not train {dtype} weights: its beta_2="
            f"{beta} or epsilon is lost in that precision. Use the dtype policy "
            f"'mixed_{dtype}', or an optimizer such as keras.optimizers.Lion.",
            stacklevel=3,
        )
