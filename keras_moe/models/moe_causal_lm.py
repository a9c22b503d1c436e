"""The causal language model over the decoder backbone.

B  batch        S  sequence length, prompt and generated tokens together
D  model features           V  vocabulary
"""

import keras
import keras_hub
from keras import ops

from keras_moe import checks
from keras_moe.distribution.expert_parallel import any_batch
from keras_moe.models.language_model import (
    LanguageModel,
    check_right_padding,
    check_vocabulary,
)
from keras_moe.models.moe_backbone import MoEBackbone, check_inputs
from keras_moe.models.moe_causal_lm_preprocessor import MoECausalLMPreprocessor
from keras_moe.models.one_process import check_one_process


@keras.saving.register_keras_serializable(package="keras_moe")
class MoECausalLM(LanguageModel, keras_hub.models.CausalLM):
    """A mixture-of-experts language model that trains on text and generates it.

    All that KerasHub's users do with a `CausalLM` works: `fit`, `evaluate` and
    `predict` on strings, `generate` with every sampler, `score`, saving in every
    format. With `preprocessor=None` the first three take a `keras.utils.PyDataset`,
    too. Balance and router z-losses of the mixtures are part of the training loss.

    `generate()` takes prompts padded at the right; padded at the left they are
    refused. A call of the model accepts either.

    Args:
        backbone: a `MoEBackbone`.
        preprocessor: a `MoECausalLMPreprocessor`, or None to work on token ids.
        **kwargs: as for `keras_hub.models.CausalLM`.

    Call arguments:
        inputs: dict of `token_ids`, int `[B, S]`, and `padding_mask`,
            bool or int `[B, S]`.

    Returns:
        Logits, `[B, S, V]`.

    Raises:
        ValueError: if the tokenizer has more tokens than the backbone.

    Example:

    ```python
    causal_lm = keras_moe.models.MoECausalLM.from_preset("mixtral_tiny_en")
    causal_lm.generate("The import statement", max_length=64)
    causal_lm.compile(optimizer=keras.optimizers.AdamW(1e-3), sampler="greedy")
    causal_lm.fit(["Some text to learn.", "And more of it."], batch_size=2)
    ```
    """

    backbone_cls = MoEBackbone
    preprocessor_cls = MoECausalLMPreprocessor

    def __init__(self, backbone, preprocessor=None, **kwargs):
        check_vocabulary(preprocessor, backbone)
        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor

        # === Functional model ===
        inputs = backbone.input
        outputs = backbone.logits(backbone(inputs))
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)

    def call_with_cache(self, token_ids, cache, cache_update_index, padding_mask=None):
        """A forward pass over new tokens that reads and extends a cache.

        Args:
            token_ids: int tensor `[B, T]`, the tokens to process.
            cache: a tuple a layer, as `build_cache` makes it; every leaf has the
                batch first.
            cache_update_index: int or scalar int tensor, the position of the
                first of them.
            padding_mask: bool tensor `[B, T]` or None. Padding at the right,
                which takes no expert.

        Returns:
            `(logits [B, T, V], hidden_states [B, T, D], cache)`.
        """
        hidden_states, cache = self._decode(
            token_ids, cache, cache_update_index, padding_mask
        )
        return self.backbone.logits(hidden_states), hidden_states, cache

    def _decode(self, token_ids, cache, index, padding_mask=None):
        """`call_with_cache` without logits."""
        x = self.backbone.embed(token_ids)
        updated = []
        for layer, layer_cache in zip(
            self.backbone.transformer_layers, cache, strict=True
        ):
            x, layer_cache = layer(
                x,
                padding_mask=padding_mask,
                cache=layer_cache,
                cache_index=index,
            )
            updated.append(layer_cache)
        return self.backbone.layer_norm(x), tuple(updated)

    def build_cache(self, batch_size, length):
        """An empty cache: zeros, a tuple a layer, as its attention has it."""
        return tuple(
            layer.attention.empty_cache(batch_size, length)
            for layer in self.backbone.transformer_layers
        )

    def generate(self, inputs, max_length=None, stop_token_ids="auto", **kwargs):
        """As `keras_hub.models.CausalLM.generate`, with its input checked.

        Args:
            inputs: strings, or without a preprocessor a dict of `token_ids` and
                `padding_mask`, both `[B, S]`, padded at the right.
            max_length: int, S, at most the backbone's `context_length`.
            stop_token_ids: `"auto"`, None or a tuple of ids.
            **kwargs: `strip_prompt`.

        Raises:
            ValueError: for an empty batch or prompt, left padding, ids out of
                range, and S beyond the context.
        """
        check_one_process("generate")
        self._check_prompt(inputs, max_length)
        with any_batch():  # of prompts, which KerasHub distributes
            return super().generate(
                inputs,
                max_length=max_length,
                stop_token_ids=self._stops(stop_token_ids),
                **kwargs,
            )

    def _check_prompt(self, inputs, max_length):
        context = self.backbone.context_length
        if self.preprocessor is not None:
            self._check_length(max_length)
        elif isinstance(inputs, dict):
            inputs = {
                name: ops.convert_to_numpy(inputs[name])
                for name in ("token_ids", "padding_mask")
            }
            check_inputs(inputs, self.backbone.vocabulary_size, context)
            check_right_padding(inputs["padding_mask"].astype(bool))

    def generate_step(self, inputs, stop_token_ids=None):
        """Generates for one batch of token ids; compiled by `generate()`.

        Args:
            inputs: dict of `token_ids`, int `[B, S]`, and `padding_mask`,
                `[B, S]`, prompts padded at the right to the length wanted.
            stop_token_ids: None or a tuple of ids: generation ends once every
                sequence has produced one.

        Returns:
            The same dict, filled in.
        """
        token_ids, padding_mask = inputs["token_ids"], inputs["padding_mask"]
        padding_mask = ops.cast(padding_mask, "bool")
        batch_size, length = ops.shape(token_ids)
        # The whole prompt at once; what lies beyond each prompt is overwritten
        # before anything attends to it.
        hidden_states, cache = self._decode(
            token_ids, self.build_cache(batch_size, length), 0, padding_mask
        )

        def decode(token_ids, cache, index):
            hidden_states, written = self._decode(token_ids, cache[0], index)
            return hidden_states, (written, ())

        token_ids, padding_mask = self._sample(
            decode,
            token_ids,
            padding_mask,
            (cache, ()),
            hidden_states,
            stop_token_ids,
        )
        return {"token_ids": token_ids, "padding_mask": padding_mask}

    def score(
        self,
        token_ids,
        padding_mask=None,
        scoring_mode="logits",
        layer_intercept_fn=None,
        target_ids=None,
    ):
        """The logits of given tokens, or the loss of each, as KerasHub's `score`.

        Args:
            token_ids: int `[B, S]`.
            padding_mask: bool `[B, S]`, or None for no padding.
            scoring_mode: `"logits"` or `"loss"`.
            layer_intercept_fn: callable `(x [B, S, D], index) -> [B, S, D]` applied
                to the embeddings (index -1) and to every layer's output.
            target_ids: int `[B, S]`, needed by `"loss"`: the tokens to predict.

        Returns:
            Logits `[B, S, V]`, or the cross-entropy in nats, `[B, S]`.

        Raises:
            ValueError: for an unknown mode, missing targets, and ids out of range.
        """
        checks.one_of("scoring_mode", scoring_mode, ("logits", "loss"))
        if scoring_mode == "loss" and target_ids is None:
            raise ValueError(
                '`target_ids` is needed by `scoring_mode="loss"`. '
                "Received: target_ids=None"
            )
        check_inputs(
            {"token_ids": token_ids},
            self.backbone.vocabulary_size,
            self.backbone.context_length,
        )
        token_ids = ops.convert_to_tensor(token_ids)
        if padding_mask is None:
            padding_mask = ops.ones_like(token_ids, dtype="bool")
        intercept = layer_intercept_fn or (lambda x, index: x)
        x = intercept(self.backbone.embed(token_ids), -1)
        for index, layer in enumerate(self.backbone.transformer_layers):
            x = intercept(layer(x, padding_mask=padding_mask), index)
        x = self.backbone.layer_norm(x)
        logits = self.backbone.logits(x)
        if scoring_mode == "logits":
            return logits
        return keras.losses.sparse_categorical_crossentropy(
            target_ids, logits, from_logits=True
        )

    def preprocess_samples(self, x, y=None, sample_weight=None):
        if self.preprocessor is None and isinstance(x, dict):
            check_inputs(x, self.backbone.vocabulary_size, self.backbone.context_length)
        return super().preprocess_samples(x, y, sample_weight)
