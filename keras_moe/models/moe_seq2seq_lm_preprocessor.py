"""Pairs of strings to the padded batches that an encoder-decoder trains on."""

import keras
import keras_hub
import numpy as np

from keras_moe import checkpoints, checks
from keras_moe.models import presets
from keras_moe.models._keras_hub import (
    preprocessing_function,
    strip_to_ragged,
    strip_to_ragged_python,
)
from keras_moe.models.moe_seq2seq_backbone import MoESeq2SeqBackbone
from keras_moe.models.moe_tokenizer import MoETokenizer


@keras.saving.register_keras_serializable(package="keras_moe")
class MoESeq2SeqLMPreprocessor(keras_hub.models.Seq2SeqLMPreprocessor):
    """Tokenizes and packs sources and targets for training, and for generation.

    A source closes with the end token, as in T5; it has no start token. A target
    begins with the tokenizer's start token, and where that is None with the padding
    token, as in T5, and closes with the end token in training.

    What is longer than its length is cut at its end.

    Args:
        tokenizer: A `keras_moe.models.MoETokenizer`.
        encoder_sequence_length: int, at least 1. The length, in tokens, that every
            source is padded or cut to.
        decoder_sequence_length: int, at least 1. The same of every target.
        **kwargs: Further arguments of `keras_hub.models.Seq2SeqLMPreprocessor`.

    Call arguments:
        x: A dict of `encoder_text` and `decoder_text`, each a str, a list of str, or
            an array or tensor of strings; a tuple of the two; or `encoder_text`
            alone, with `decoder_text` as `y`.
        y: None, or `decoder_text` where `x` does not hold it: the labels come from
            the target.
        sample_weight: None: weights are the target's padding mask.
        encoder_sequence_length: int. Replaces the layer's own for this call.
        decoder_sequence_length: int, as above; `sequence_length` is an alias.

    Returns:
        `(x, y, sample_weight)`: `x` a dict of `encoder_token_ids`,
        `encoder_padding_mask`, `decoder_token_ids` and `decoder_padding_mask`, ids
        int and masks bool; `y` the next target token of every position. There is no
        batch axis for one str.

    Raises:
        ValueError: for texts of another form, no text, and as many sources as
            targets are not given.

    Example:
    ```python
    preprocessor = keras_moe.models.MoESeq2SeqLMPreprocessor(
        tokenizer, encoder_sequence_length=128, decoder_sequence_length=32
    )
    x, y, sample_weight = preprocessor({
        "encoder_text": ["The quick <extra_id_0> fox"],
        "decoder_text": ["<extra_id_0> brown <extra_id_1>"],
    })
    ```
    """

    backbone_cls = MoESeq2SeqBackbone
    tokenizer_cls = MoETokenizer

    @property
    def encoder_sequence_length(self):
        """The padded length of a source, in tokens."""
        return super().encoder_sequence_length

    @encoder_sequence_length.setter
    def encoder_sequence_length(self, value):
        checks.at_least("encoder_sequence_length", value, 1)
        _Base.encoder_sequence_length.fset(self, value)

    @property
    def decoder_sequence_length(self):
        """The padded length of a target, in tokens."""
        return super().decoder_sequence_length

    @decoder_sequence_length.setter
    def decoder_sequence_length(self, value):
        checks.at_least("decoder_sequence_length", value, 1)
        _Base.decoder_sequence_length.fset(self, value)

    @property
    def sequence_length(self):
        """As `decoder_sequence_length`."""
        return self.decoder_sequence_length

    @sequence_length.setter
    def sequence_length(self, value):
        self.decoder_sequence_length = value

    def build(self, input_shape):
        super().build(input_shape)
        self.encoder_packer.start_value = None
        if self.tokenizer.start_token_id is None:
            self.decoder_packer.start_value = [self.tokenizer.pad_token_id]

    def call(
        self,
        x,
        y=None,
        sample_weight=None,
        *,
        encoder_sequence_length=None,
        decoder_sequence_length=None,
        sequence_length=None,
    ):
        if sample_weight is not None:
            raise ValueError(
                "`sample_weight` must be None: weights are the target's padding mask. "
                f"Received: sample_weight={sample_weight!r}"
            )
        source, target = _pair(x, y)
        if target is None:
            raise ValueError(
                "`x` must hold `decoder_text`, or it must come as `y`. "
                f"Received: x={x!r}, y={y!r}"
            )
        pack = self._pack_in_graph if self._use_tf_workflow() else self._pack
        return pack(
            {"encoder_text": source, "decoder_text": target},
            lengths=(encoder_sequence_length, decoder_sequence_length, sequence_length),
        )

    @preprocessing_function
    def _pack_in_graph(self, x, lengths):
        return self._pack(x, lengths)

    def _pack(self, x, lengths):
        packed, target = self._inputs(x, lengths, generate=False)
        ids, mask = target
        # The last token has no next one.
        packed["decoder_token_ids"] = ids[..., :-1]
        packed["decoder_padding_mask"] = mask[..., :-1]
        return packed, ids[..., 1:], mask[..., 1:]

    def _inputs(self, x, lengths, generate):
        """The packed source, as a dict, and the packed target."""
        if not self.built:
            self.build(None)
        source_length, target_length, alias = lengths
        source_length = source_length or self.encoder_sequence_length
        target_length = target_length or alias or self.decoder_sequence_length
        source, source_mask = self.encoder_packer(
            self.tokenizer(x["encoder_text"]), sequence_length=source_length
        )
        target = self.decoder_packer(
            self.tokenizer(x["decoder_text"]),
            sequence_length=target_length if generate else target_length + 1,
            add_end_value=not generate,
        )
        packed = {"encoder_token_ids": source, "encoder_padding_mask": source_mask}
        return packed, target

    def generate_preprocess(
        self,
        x,
        *,
        encoder_sequence_length=None,
        decoder_sequence_length=None,
        sequence_length=None,
    ):
        """The dict of token ids and padding masks of sources, and targets begun.

        Args:
            x: as for a call. Without `decoder_text` a target is its start alone.
            encoder_sequence_length: int. Room for the source.
            decoder_sequence_length: int. Room for the target begun and what is
                generated.
            sequence_length: int. As `decoder_sequence_length`.

        Raises:
            ValueError: as for a call.
        """
        source, target = _pair(x)
        if target is None:
            target = self._empty_decoder_text(source)
        pack = self._prompt_in_graph if self._use_tf_workflow() else self._prompt
        return pack(
            {"encoder_text": source, "decoder_text": target},
            lengths=(encoder_sequence_length, decoder_sequence_length, sequence_length),
        )

    @preprocessing_function
    def _prompt_in_graph(self, x, lengths):
        return self._prompt(x, lengths)

    def _prompt(self, x, lengths):
        packed, (ids, mask) = self._inputs(x, lengths, generate=True)
        return {**packed, "decoder_token_ids": ids, "decoder_padding_mask": mask}

    def generate_postprocess(self, x):
        """The texts of targets, without padding, start and end.

        Args:
            x: a dict of `decoder_token_ids` and `decoder_padding_mask`.
        """
        if self._use_tf_workflow():
            return self._text_in_graph(x)
        mask = keras.ops.cast(x["decoder_padding_mask"], "bool")
        return self._text(x, mask, strip_to_ragged_python)

    @preprocessing_function
    def _text_in_graph(self, x):
        return self._text(x, x["decoder_padding_mask"], strip_to_ragged)

    def _text(self, x, mask, strip):
        special = [*self.tokenizer.special_token_ids, self.tokenizer.pad_token_id]
        return self.tokenizer.detokenize(strip(x["decoder_token_ids"], mask, special))

    def get_config(self):
        return {
            **super().get_config(),
            "encoder_sequence_length": self.encoder_sequence_length,
            "decoder_sequence_length": self.decoder_sequence_length,
        }

    @classmethod
    def from_preset(cls, preset, **kwargs):
        """Load the preprocessor of a preset.

        Args:
            preset: str. A preset's name, a local folder, or a handle such as
                `"hf://user/name"`. A checkpoint of Transformers will do as well.
            **kwargs: Arguments of the constructor that replace the preset's.
        """
        folder = presets.preset_folder(preset, tokenizer=True)
        if presets.is_checkpoint(folder):
            length = checkpoints.read_preprocessing(folder)["sequence_length"]
            lengths = dict.fromkeys(
                ("encoder_sequence_length", "decoder_sequence_length"), length
            )
            kwargs = {**lengths, **kwargs}
            if "tokenizer" not in kwargs:
                kwargs["tokenizer"] = cls.tokenizer_cls.from_preset(folder)
            return cls(**kwargs)
        return super().from_preset(folder, **kwargs)


_Base = keras_hub.models.Seq2SeqLMPreprocessor


def _pair(x, y=None):
    """The source and the target, None where there is none."""
    if isinstance(x, dict):
        if "encoder_text" not in x:
            raise ValueError(
                f"`x` must hold `encoder_text`. Received: keys {sorted(x)}"
            )
        source, target = x["encoder_text"], x.get("decoder_text", y)
        given_twice = "decoder_text" in x
    elif isinstance(x, tuple):
        if len(x) != 2:
            raise ValueError(
                "`x` must be a pair of sources and targets, where it is a tuple. "
                f"Received: {len(x)} entries"
            )
        source, target = x
        given_twice = True
    else:
        source, target = x, y
        given_twice = False
    if given_twice and y is not None:
        raise ValueError(
            "`y` must be None where `x` holds `decoder_text`. Received: both"
        )
    for name, texts in (("encoder_text", source), ("decoder_text", target)):
        if (isinstance(texts, np.ndarray) and not texts.size) or (
            isinstance(texts, (list, tuple)) and not texts
        ):
            raise ValueError(f"`{name}` must hold at least one text. Received: {texts}")
    if target is not None:
        counts = [_shape(source), _shape(target)]
        if len(counts[0]) != len(counts[1]) or (
            counts[0] != counts[1] and (None,) not in counts
        ):
            raise ValueError(
                "There must be as many sources as targets. Received: "
                f"{' and '.join(_named(shape) for shape in counts)}"
            )
    return source, target


def _shape(texts):
    return tuple(texts.shape if hasattr(texts, "shape") else np.shape(texts))


def _named(shape):
    return str(shape[0]) if shape else "one str"
