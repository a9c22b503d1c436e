"""Peak memory of training steps, each model in a process of its own.

    bound = our weights and gradients + the dense model's activations

SGD keeps no state. What the dense model takes beyond its weights and gradients
counts as its activations.
"""

import json
import subprocess
import sys

STEPS = 3


def measure(size, repeats, xla=None):
    """The records of this suite, for the active backend, in bytes."""
    from benchmarks.model import MODELS

    found = {}
    for name in MODELS:
        command = [sys.executable, "-m", "benchmarks.memory", name, size]
        command.append(json.dumps(xla))
        output = subprocess.run(command, check=True, capture_output=True, text=True)
        found[name] = json.loads(output.stdout.splitlines()[-1])
    activations = found["dense"]["peak"] - 2 * found["dense"]["weights"]
    found["bound"] = {"peak": 2 * found["keras_moe"]["weights"] + activations}
    return [
        dict(case="model, peak memory of a step", candidate=name, bytes=one["peak"])
        for name, one in found.items()
    ]


def _measure_here(name, size, xla):
    import keras
    import numpy as np

    from benchmarks import model
    from benchmarks.programs import training_step

    settings = model.SIZES[size]
    # What libraries and compilers take is not the model's.
    small = {**settings, "layers": 1, "dim": 64, "hidden": 64, "vocabulary": 64}
    training_step(model.task(name, small), *model.batch(small), xla)()
    before = _status("VmRSS")
    task = model.task(name, settings)
    step = training_step(task, *model.batch(settings), xla)
    for _ in range(STEPS):
        step()
    peak = _status("VmHWM") - before
    if keras.config.backend() == "torch":
        import torch

        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
    item = {"float32": 4, "bfloat16": 2}
    weights = sum(
        item[w.dtype] * int(np.prod(w.shape)) for w in task.weights if w.shape
    )
    print(json.dumps({"peak": peak, "weights": weights}))


def _status(key):
    with open("/proc/self/status") as status:
        lines = dict(line.split(":", 1) for line in status)
    return 1024 * int(lines[key].split()[0])


if __name__ == "__main__":
    _measure_here(*sys.argv[1:3], json.loads(sys.argv[3]))
