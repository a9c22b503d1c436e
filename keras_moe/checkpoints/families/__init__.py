"""One table a family: its settings and its weights, Transformers' and ours."""

from keras_moe.checkpoints.families.dbrx import DBRX
from keras_moe.checkpoints.families.deepseek import DEEPSEEK, DEEPSEEK_V2, DEEPSEEK_V3
from keras_moe.checkpoints.families.mixtral import MIXTRAL
from keras_moe.checkpoints.families.olmoe import OLMOE
from keras_moe.checkpoints.families.qwen import QWEN2_MOE, QWEN3_MOE
from keras_moe.checkpoints.families.switch import SWITCH

FAMILIES = {
    family.model_type: family
    for family in (
        MIXTRAL,
        QWEN2_MOE,
        QWEN3_MOE,
        OLMOE,
        DBRX,
        DEEPSEEK,
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        SWITCH,
    )
}
# Known, and why our layers do not hold them.
_UNSUPPORTED = {
    "gpt_oss": "attention sinks, and biases of experts and router",
    "nllb-moe": "biases of experts and dense layers, and sinusoidal positions",
}


def find_family(config):
    """The `Family` of a `config.json`.

    Raises:
        ValueError: for a model type that is missing or not supported.
    """
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in _UNSUPPORTED:
        raise ValueError(
            f"Models of type {model_type!r} cannot be loaded: the layers lack "
            f"{_UNSUPPORTED[model_type]}. Received: model_type={model_type!r}"
        )
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            "`config.json` must have a `model_type` of "
            f"{', '.join(map(repr, FAMILIES))}. Received: model_type={model_type!r}"
        )
    family = FAMILIES[model_type]
    return family if family.variant is None else family.variant(config)
