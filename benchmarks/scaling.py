"""The table of docs/scaling.md: what plans say of large models on many devices.

    python benchmarks/scaling.py            print the table
    python benchmarks/scaling.py --write    put it into docs/scaling.md

It runs on any backend and allocates nothing.
"""

import pathlib
import sys
from typing import NamedTuple

import keras_moe
from keras_moe.distribution.meshes import choose_sizes
from keras_moe.models import presets
from keras_moe.planning import stacks_of

DOCUMENT = pathlib.Path(__file__).parent.parent / "docs" / "scaling.md"
START, END = "<!-- table -->\n", "<!-- end of table -->\n"

TOKENS = 8192  # of a device
# The name in the table, the preset, the length of its sequences.
MODELS = [
    ("Mixtral 8x7B", "mixtral_8x7b", 4096),
    ("DeepSeekMoE 145B", "deepseek_moe_145b", 4096),
    ("GLaM 64B/64E", "glam_64b_64e", 1024),
    ("Switch-C", "switch_c_2048", 512),
]
DEVICES = [8, 64, 512, 4096]


class Machine(NamedTuple):
    """Rates of a device, per second; see docs/scaling.md for where they are from."""

    flops: float
    bytes_in_node: float
    node_devices: int | None = None
    network_bytes: float | None = None


MACHINES = {
    "H100": Machine(989e12, 450e9, 8, 50e9),
    "TPU v5p": Machine(459e12, 600e9),
}


def device_plan(preset, sequence_length, devices):
    """The `DevicePlan` of a preset on so many devices."""
    settings = presets.settings(presets.preset_folder(preset)) | {"recompute": True}
    sizes, _ = choose_sizes(stacks_of(settings), devices)
    return keras_moe.plan(
        settings,
        batch_size=TOKENS // sequence_length * devices,
        sequence_length=sequence_length,
        dtype="mixed_bfloat16",
        mesh=sizes,
    ).device


def table():
    """The table, in Markdown."""
    head = ["model", "devices", "mesh", "memory", "sent", "weights", "rows", "compute"]
    lines = [[*head, *MACHINES], ["---"] * 3 + ["---:"] * (5 + len(MACHINES))]
    for name, preset, length in MODELS:
        for devices in DEVICES:
            lines.append([name, *_row(device_plan(preset, length, devices))])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _row(device):
    sent = device.sent_by("purpose")
    weights = sent.get("weights", 0) + sent.get("gradients", 0)
    mesh = " x ".join(f"{name} {size}" for name, size in device.mesh.items())
    bounds = [
        device.step_seconds(m.flops, m.bytes_in_node, m.node_devices, m.network_bytes)
        for m in MACHINES.values()
    ]
    compute = device.flops / MACHINES["H100"].flops
    return [
        str(device.devices),
        mesh,
        *(
            f"{number / 2**30:.1f}"
            for number in (
                device.training_bytes,
                device.sent_bytes,
                weights,
                sent["rows"],
            )
        ),
        *(f"{seconds:.2f}" for seconds in (compute, *bounds)),
    ]


def write():
    """Puts the table into the document."""
    text = DOCUMENT.read_text()
    before, rest = text.split(START)
    after = rest.split(END)[1]
    DOCUMENT.write_text(f"{before}{START}\n{table()}\n{END}{after}")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        write()
    else:
        print(table(), end="")
