"""The presets that come with the package, as records."""

import dataclasses

from keras_moe.models import presets
from keras_moe.planning import count_parameters

PACKAGED = "packaged"


@dataclasses.dataclass(frozen=True)
class PresetRecord:
    """What there is to know of a preset before loading it.

    Attributes:
        name: str, what `from_preset` takes.
        family: str, such as `"mixtral"`.
        description: str.
        total_parameters: int, counted from the settings.
        active_parameters: int, of them those that one token uses (see `plan`).
        paper: str, a URL, or None.
        licence: str, of the trained weights, or None where there are none.
        weights: where trained weights are: `"packaged"` with keras_moe, else the name
            under which they are published, such as `"mistralai/Mixtral-8x7B-v0.1"` on
            the Hugging Face Hub, else None: none are public.
    """

    name: str
    family: str
    description: str
    total_parameters: int
    active_parameters: int
    paper: str | None
    licence: str | None
    weights: str | None

    @property
    def has_weights(self):
        """Whether trained weights exist, here or elsewhere."""
        return self.weights is not None


def list_presets():
    """The presets that `from_preset` and `plan` know by name.

    Returns:
        A list of `PresetRecord`, sorted by name.

    Example:

    ```python
    for preset in keras_moe.list_presets():
        if preset.weights == "packaged":
            print(preset.name, preset.total_parameters)
    ```
    """
    return [_record(name) for name in presets.names()]


def _record(name):
    described = presets.describe(name)
    total, active = count_parameters(name)
    weights = described.get("checkpoint")
    if presets.has_weights(presets.ROOT / name):
        weights = PACKAGED
    return PresetRecord(
        name=name,
        family=described["family"],
        description=described["description"],
        total_parameters=total,
        active_parameters=active,
        paper=described.get("paper"),
        licence=described.get("licence"),
        weights=weights,
    )
