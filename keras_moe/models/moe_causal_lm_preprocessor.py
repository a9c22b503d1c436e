"""Strings to the padded batches that a causal language model trains on."""

import keras
import keras_hub
import numpy as np

from keras_moe import checkpoints, checks
from keras_moe.models import presets
from keras_moe.models.moe_backbone import MoEBackbone
from keras_moe.models.moe_tokenizer import MoETokenizer


@keras.saving.register_keras_serializable(package="keras_moe")
class MoECausalLMPreprocessor(keras_hub.models.CausalLMPreprocessor):
    """Tokenizes and packs text for training, and for generation.

    Called on strings, it returns `(x, y, sample_weight)` where `x` is a dict of
    `token_ids` and `padding_mask` and `y` holds the next token of every position.
    `generate_preprocess()` makes the prompt and `generate_postprocess()` the text
    that `MoECausalLM.generate()` takes and gives.

    Text longer than `sequence_length` is cut at its end, a prompt too: keep room
    for what is to be generated.

    Args:
        tokenizer: A `keras_moe.models.MoETokenizer`.
        sequence_length: int, at least 1. The length, in tokens, that every text is
            padded or cut to.
        add_start_token: bool. Whether a text begins with `tokenizer.start_token`, in
            training and in generation. Without effect on a tokenizer that has none.
        add_end_token: bool. Whether a training text closes with
            `tokenizer.end_token`.
        **kwargs: Further arguments of `keras_hub.models.CausalLMPreprocessor`.

    Call arguments:
        x: str, list of str, or an array or tensor of strings.
        y: `None`: the labels come from `x`.
        sample_weight: `None`: weights are the padding mask.
        sequence_length: int. Replaces the layer's own for this call.

    Returns:
        `token_ids` and `y` are int `(batch, sequence_length)`, `padding_mask` and
        `sample_weight` are bool of that shape; there is no batch axis for one str.

    Example:
    ```python
    preprocessor = keras_moe.models.MoECausalLMPreprocessor(
        tokenizer, sequence_length=128
    )
    x, y, sample_weight = preprocessor(["The quick brown fox", "jumped."])
    ```
    """

    backbone_cls = MoEBackbone
    tokenizer_cls = MoETokenizer

    @property
    def sequence_length(self):
        """The padded length of a text, in tokens."""
        return super().sequence_length

    @sequence_length.setter
    def sequence_length(self, value):
        checks.at_least("sequence_length", value, 1)
        keras_hub.models.CausalLMPreprocessor.sequence_length.fset(self, value)

    def build(self, input_shape):
        super().build(input_shape)
        if not self.add_start_token:
            # KerasHub asks this in training alone, and would start a prompt anyway.
            self.packer.start_value = None

    def call(self, x, y=None, sample_weight=None, sequence_length=None):
        _check_texts(x, sequence_length)
        return super().call(
            x, y=y, sample_weight=sample_weight, sequence_length=sequence_length
        )

    def generate_preprocess(self, x, sequence_length=None):
        """The dict of `token_ids` and `padding_mask` of one or more prompts.

        An empty prompt is the start token alone, and generation goes on from there.

        Args:
            x: str, list of str, or an array or tensor of strings.
            sequence_length: int. Room for the prompt and what is generated.

        Raises:
            ValueError: If `x` has no prompts, or a prompt has no tokens because it
                is empty and there is no start token.
        """
        _check_texts(x, sequence_length)
        prompt = super().generate_preprocess(x, sequence_length=sequence_length)
        if not self._use_tf_workflow() and self.packer.start_value is None:
            if not keras.ops.all(prompt["padding_mask"][..., 0]):
                raise ValueError(
                    "`x` must hold prompts of at least one token where no start "
                    f"token is added. Received: x={x!r}"
                )
        return prompt

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
            kwargs = {**checkpoints.read_preprocessing(folder), **kwargs}
            if "tokenizer" not in kwargs:
                kwargs["tokenizer"] = cls.tokenizer_cls.from_preset(folder)
            return cls(**kwargs)
        return super().from_preset(folder, **kwargs)


def _check_texts(x, sequence_length):
    if (isinstance(x, np.ndarray) and not x.size) or (
        isinstance(x, (list, tuple)) and not x
    ):
        raise ValueError(f"`x` must hold at least one text. Received: x={x!r}")
    if sequence_length is not None:
        checks.at_least("sequence_length", sequence_length, 1)
