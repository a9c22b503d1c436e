"""The sequence-to-sequence language model over the encoder-decoder backbone.

B  batch        S  tokens of the source         T  tokens of the target
D  model features           V  vocabulary
"""

import keras
import keras_hub
from keras import ops

from keras_moe.distribution.expert_parallel import any_batch
from keras_moe.models.language_model import (
    LanguageModel,
    check_right_padding,
    check_vocabulary,
)
from keras_moe.models.moe_seq2seq_backbone import (
    INPUTS,
    MoESeq2SeqBackbone,
    check_inputs,
)
from keras_moe.models.moe_seq2seq_lm_preprocessor import MoESeq2SeqLMPreprocessor
from keras_moe.models.one_process import check_one_process


@keras.saving.register_keras_serializable(package="keras_moe")
class MoESeq2SeqLM(LanguageModel, keras_hub.models.Seq2SeqLM):
    """A mixture-of-experts model that trains on pairs of texts and generates.

    All that KerasHub's users do with a `Seq2SeqLM` works: `fit`, `evaluate` and
    `predict` on strings, `generate` with every sampler, saving in every format.
    With `preprocessor=None` the first three take a `keras.utils.PyDataset`, such as
    `keras_moe.SpanCorruptionDataset`. Balance and router z-losses of the mixtures are
    part of the training loss.

    Where capacity is limited, generation counts it for each sequence, source and
    target, whatever `capacity_group` is: what the model makes of one does not depend
    on the others of its batch, nor on other beams. A token that is generated is
    alone and so never dropped, though it may be in a pass over the whole target: as
    in Transformers, the two then differ. (KerasHub's beam search itself goes on until
    every target of a batch has ended, and counts what is given of the longer ones as
    if chosen, so that its rows depend on each other still.)

    Args:
        backbone: a `MoESeq2SeqBackbone`.
        preprocessor: a `MoESeq2SeqLMPreprocessor`, or None to work on token ids.
        **kwargs: as for `keras_hub.models.Seq2SeqLM`.

    Call arguments:
        inputs: as for `MoESeq2SeqBackbone`.

    Returns:
        Logits of the target, `[B, T, V]`.

    Raises:
        ValueError: if the tokenizer has more tokens than the backbone.

    Example:

    ```python
    seq2seq_lm = keras_moe.models.MoESeq2SeqLM.from_preset("switch_tiny_en")
    seq2seq_lm.generate("The <extra_id_0> statement", max_length=16)
    seq2seq_lm.compile(optimizer=keras.optimizers.AdamW(1e-3), sampler="greedy")
    seq2seq_lm.fit({
        "encoder_text": ["The <extra_id_0> statement"],
        "decoder_text": ["<extra_id_0> import <extra_id_1>"],
    })
    ```
    """

    backbone_cls = MoESeq2SeqBackbone
    preprocessor_cls = MoESeq2SeqLMPreprocessor

    def __init__(self, backbone, preprocessor=None, **kwargs):
        check_vocabulary(preprocessor, backbone)
        # === Layers ===
        self.backbone = backbone
        self.preprocessor = preprocessor

        # === Functional model ===
        inputs = backbone.input
        outputs = backbone.logits(backbone(inputs)["decoder_sequence_output"])
        super().__init__(inputs=inputs, outputs=outputs, **kwargs)

    def __call__(self, inputs, *args, **kwargs):
        backbone = self.backbone
        check_inputs(inputs, backbone.vocabulary_size, backbone.context_length)
        return super().__call__(inputs, *args, **kwargs)

    def call_decoder_with_cache(
        self, token_ids, cache, cache_update_index, padding_mask=None
    ):
        """A pass of the decoder over new tokens that reads and extends a cache.

        Args:
            token_ids: int tensor `[B, T]`, the tokens to process.
            cache: as `build_cache` makes it; every leaf has the batch first.
            cache_update_index: int or scalar int tensor, the position of the
                first of them.
            padding_mask: bool tensor `[B, T]` or None. Padding at the right.

        Returns:
            `(logits [B, T, V], hidden_states [B, T, D], cache)`.
        """
        hidden_states, cache = self._decode(
            token_ids, cache, cache_update_index, padding_mask
        )
        return self.backbone.logits(hidden_states), hidden_states, cache

    def _decode(self, token_ids, cache, index, padding_mask=None):
        """`call_decoder_with_cache` without logits."""
        written, (sources, source_mask) = cache
        backbone = self.backbone
        x = backbone.embed(token_ids, backbone.decoder_embedding)
        arguments = {}
        if backbone.decoder_position_bias is not None:
            # Of the new tokens to all that the cache has room for.
            new = ops.arange(ops.shape(token_ids)[1], dtype="int32")
            own_keys = written[0][0]
            arguments["position_bias"] = backbone.decoder_position_bias(
                new + ops.cast(index, "int32"),
                ops.arange(ops.shape(own_keys)[1], dtype="int32"),
            )
        updated = []
        for layer, own, of_source in zip(
            backbone.decoder_transformer_layers, written, sources, strict=True
        ):
            x, (own, _) = layer(
                x,
                padding_mask=padding_mask,
                cache=(own, of_source),
                cache_index=index,
                source_mask=source_mask,
                **arguments,
            )
            updated.append(own)
        cache = tuple(updated), (sources, source_mask)
        return backbone.decoder_layer_norm(x), cache

    def build_cache(self, source, source_mask, length):
        """A cache for targets of a length, nothing of which is there yet.

        Args:
            source: float tensor `[B, S, D]`, the encoder's states.
            source_mask: bool or int tensor `[B, S]`.
            length: int, T.

        Returns:
            A pair: what the attention of each layer keeps, zeros so far, and what
            stays, the source's keys and values in each layer and its mask.
        """
        layers = self.backbone.decoder_transformer_layers
        batch_size = ops.shape(source)[0]
        written = tuple(x.attention.empty_cache(batch_size, length) for x in layers)
        sources = tuple(x.cross_attention.project_source(source) for x in layers)
        return written, (sources, ops.cast(source_mask, "int32"))

    def generate(self, inputs, max_length=None, stop_token_ids="auto", **kwargs):
        """As `keras_hub.models.Seq2SeqLM.generate`, with its input checked.

        Args:
            inputs: strings, the sources, or a dict of `encoder_text` and
                `decoder_text`, targets begun; without a preprocessor a dict of
                `encoder_token_ids` and `encoder_padding_mask`, both `[B, S]`, and
                `decoder_token_ids` and `decoder_padding_mask`, both `[B, T]`, of
                at least one token and padded at the right.
            max_length: int, T, at most the backbone's `context_length`.
            stop_token_ids: `"auto"`, None or a tuple of ids.
            **kwargs: `strip_prompt`, which must be False.

        Returns:
            The targets: strings, or a dict of `decoder_token_ids` and
            `decoder_padding_mask`.

        Raises:
            ValueError: for an empty batch or target, a target padded at the left,
                ids out of range, batches of different sizes, a source of nothing
                but padding, and lengths beyond the context.
        """
        check_one_process("generate")
        if kwargs.get("strip_prompt"):
            raise ValueError(
                "`strip_prompt` must be False: the source is no part of what is "
                "generated. Received: strip_prompt=True"
            )
        if isinstance(inputs, dict):
            inputs = dict(inputs)  # KerasHub changes it
        self._check_generate_inputs(inputs, max_length)
        with any_batch():  # of prompts, which KerasHub distributes
            return super().generate(
                inputs,
                max_length=max_length,
                stop_token_ids=self._stops(stop_token_ids),
                **kwargs,
            )

    def _check_generate_inputs(self, inputs, max_length):
        context = self.backbone.context_length
        if self.preprocessor is not None:
            self._check_length(max_length)
            length = self.preprocessor.encoder_sequence_length
            if context is not None and length > context:
                raise ValueError(
                    "The preprocessor's `encoder_sequence_length` must not exceed the "
                    f"model's `context_length` ({context}). Received: "
                    f"encoder_sequence_length={length}"
                )
        elif isinstance(inputs, dict):
            arrays = {
                name: ops.convert_to_numpy(inputs[name])
                for name in INPUTS
                if name in inputs
            }
            check_inputs(arrays, self.backbone.vocabulary_size, context)
            check_right_padding(
                arrays["decoder_padding_mask"].astype(bool), "decoder_padding_mask"
            )

    def generate_step(self, inputs, stop_token_ids=None):
        """Generates for one batch of token ids; compiled by `generate()`.

        Args:
            inputs: dict as for a call, targets begun padded at the right to the
                length wanted.
            stop_token_ids: None or a tuple of ids: generation ends once every
                sequence has produced one.

        Returns:
            A dict of `decoder_token_ids` and `decoder_padding_mask`, filled in.
        """
        source_ids, source_mask, token_ids, padding_mask = (
            inputs[name] for name in INPUTS
        )
        padding_mask = ops.cast(padding_mask, "bool")
        source = self.backbone.encode(source_ids, source_mask, per_sequence=True)
        cache = self.build_cache(source, source_mask, ops.shape(token_ids)[1])
        # The whole target begun at once; what lies beyond it is overwritten before
        # anything attends to it.
        hidden_states, cache = self._decode(token_ids, cache, 0, padding_mask)
        token_ids, padding_mask = self._sample(
            self._decode,
            token_ids,
            padding_mask,
            cache,
            hidden_states,
            stop_token_ids,
        )
        return {
            "decoder_token_ids": token_ids,
            "decoder_padding_mask": padding_mask,
        }

    def preprocess_samples(self, x, y=None, sample_weight=None):
        if self.preprocessor is None and isinstance(x, dict):
            check_inputs(x, self.backbone.vocabulary_size, self.backbone.context_length)
        return super().preprocess_samples(x, y, sample_weight)
