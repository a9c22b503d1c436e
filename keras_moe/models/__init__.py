"""Models, their tokenizer and their presets, as subclasses of KerasHub's."""

from keras_moe.models import presets
from keras_moe.models._keras_hub import register_names
from keras_moe.models.moe_backbone import MoEBackbone
from keras_moe.models.moe_causal_lm import MoECausalLM
from keras_moe.models.moe_causal_lm_preprocessor import MoECausalLMPreprocessor
from keras_moe.models.moe_seq2seq_backbone import MoESeq2SeqBackbone
from keras_moe.models.moe_seq2seq_lm import MoESeq2SeqLM
from keras_moe.models.moe_seq2seq_lm_preprocessor import MoESeq2SeqLMPreprocessor
from keras_moe.models.moe_tokenizer import MoETokenizer

__all__ = [
    "MoEBackbone",
    "MoECausalLM",
    "MoECausalLMPreprocessor",
    "MoESeq2SeqBackbone",
    "MoESeq2SeqLM",
    "MoESeq2SeqLMPreprocessor",
    "MoETokenizer",
]

# Only presets that bring weights: KerasHub would allocate the others first and
# miss their weights afterwards.
for _backbone in (MoEBackbone, MoESeq2SeqBackbone):
    register_names(
        {
            name: (str(presets.ROOT / name), presets.describe(name)["description"])
            for name in presets.names(_backbone.__name__)
            if presets.has_weights(presets.ROOT / name)
        },
        _backbone,
    )
