"""All measurements, on every backend, as a table, a JSON file and a plot.

    python benchmarks/run.py

Needs `pip install keras-moe[jax,torch,tensorflow,benchmark]`. A backend runs in a
process of its own, where what is compared takes turns (see `timing.py`), so run it
when nothing else runs. With a GPU, `--size gpu` takes larger sizes and bfloat16.
"""

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
SUITES = ("layer", "model", "generate", "memory")
# TensorFlow twice: Keras turns XLA on only where there is a GPU.
BACKENDS = ("jax", "torch", "tensorflow", "tensorflow-xla")
OURS = "keras_moe"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--suites", nargs="+", choices=SUITES, default=SUITES)
    parser.add_argument("--size", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument(
        "--output", type=Path, default=Path("benchmark-results"), help="a folder"
    )
    parser.add_argument("--here", metavar="FILE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        _run_here(arguments)
        return
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = {"machine": _machine(arguments), "records": []}
    for backend in arguments.backends:
        for suite in arguments.suites:
            records, versions = _run_apart(backend, suite, arguments)
            results["records"] += records
            results["machine"][backend] = versions
            print("\n".join(table(records)), flush=True)
            (arguments.output / "results.json").write_text(
                json.dumps(results, indent=1)
            )
    (arguments.output / "table.md").write_text(
        "\n".join(["```", json.dumps(results["machine"], indent=1), "```", ""])
        + "\n".join(table(results["records"]))
        + "\n"
    )
    plot(results["records"], arguments.output / "plot.svg")


def _run_apart(backend, suite, arguments):
    """One suite on one backend, in a process of its own."""
    threads = str(arguments.threads)
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend.removesuffix("-xla"),
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    if arguments.size == "cpu":
        environment |= {
            "CUDA_VISIBLE_DEVICES": "-1",
            "JAX_PLATFORMS": "cpu",
            "KERAS_TORCH_DEVICE": "cpu",
            "OMP_NUM_THREADS": threads,
            "PJRT_NPROC": threads,
            "TF_NUM_INTRAOP_THREADS": threads,
            "TF_NUM_INTEROP_THREADS": threads,
        }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "records.json"
        options = ["--backends", backend, "--suites", suite, "--here", str(file)]
        options += ["--size", arguments.size, "--repeats", str(arguments.repeats)]
        command = [sys.executable, __file__, *options]
        subprocess.run(command, check=True, env=environment)
        found = json.loads(file.read_text())
    return found["records"], found["versions"]


def _run_here(arguments):
    import keras

    (backend,), (suite,) = arguments.backends, arguments.suites
    module = importlib.import_module(f"benchmarks.{suite}")
    xla = True if backend.endswith("-xla") else None
    records = module.measure(arguments.size, arguments.repeats, xla)
    for record in records:
        record["backend"] = backend
        if "seconds" in record:
            low, median, high = np.percentile(record.pop("seconds"), (10, 50, 90))
            record |= {"median": median, "p10": low, "p90": high}
    library = importlib.import_module(backend.removesuffix("-xla"))
    names = {"keras": keras, "keras_hub": importlib.import_module("keras_hub")}
    versions = {
        name: m.__version__ for name, m in {**names, "backend": library}.items()
    }
    Path(arguments.here).write_text(
        json.dumps({"records": records, "versions": versions})
    )


def table(records):
    """Lines of a Markdown table: a case a row, ours and its ratio to each peer."""
    lines = [
        "| backend | case | keras_moe (10% to 90%) | compared with | keras_moe / it |",
        "|---|---|---|---|---|",
    ]
    cases = {}
    for record in records:
        key = record["backend"], record["case"]
        cases.setdefault(key, {})[record["candidate"]] = record
    for (backend, case), candidates in cases.items():
        ours = candidates[OURS]
        for name, record in candidates.items():
            if name == OURS:
                continue
            ratio = _value(ours) / _value(record)
            text = f"{ratio:.2f}"
            if name == "matmul":  # of as many operations
                name, text = "rate of a matmul", f"{1 / ratio:.2f} of it"
            lines.append(f"| {backend} | {case} | {_text(ours)} | {name} | {text} |")
    return lines


def _value(record):
    return record["median"] if "median" in record else record["bytes"]


def _text(record):
    if "bytes" in record:
        return f"{record['bytes'] / 2**20:.0f} MiB"
    low, median, high = (1e3 * record[name] for name in ("p10", "median", "p90"))
    return f"{median:.3g} ms ({low:.3g} to {high:.3g})"


def plot(records, path):
    """Ours and its peers relative to the dense limit, a panel a case."""
    import matplotlib

    matplotlib.use("agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # letters, not their outlines
    import matplotlib.pyplot as plt

    cases = [r["case"] for r in records if r["candidate"] == "dense"]
    cases = list(dict.fromkeys(cases))  # one of each, on however many backends
    if not cases:
        return
    figure, axes = plt.subplots(
        len(cases), figsize=(8, 1.9 * len(cases)), squeeze=False, layout="constrained"
    )
    for axis, case in zip(axes[:, 0], cases, strict=True):
        chosen = [r for r in records if r["case"] == case]
        dense = {r["backend"]: r for r in chosen if r["candidate"] == "dense"}
        chosen = [r for r in chosen if r["candidate"] not in ("dense", "matmul")]
        labels = [f"{r['backend']}: {r['candidate']}" for r in chosen]
        ratios = [_value(r) / _value(dense[r["backend"]]) for r in chosen]
        colors = ["tab:blue" if r["candidate"] == OURS else "0.7" for r in chosen]
        axis.barh(labels, ratios, color=colors)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.set_title(f"{case}: times the dense limit", fontsize=9, loc="left")
        axis.tick_params(labelsize=7)
    figure.savefig(path)


def _machine(arguments):
    found = {
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "size": arguments.size,
        "threads": arguments.threads if arguments.size == "cpu" else None,
    }
    if arguments.size == "gpu":
        query = [
            "nvidia-smi",
            "--query-gpu=name,driver_version",
            "--format=csv,noheader",
        ]
        found["gpu"] = subprocess.run(
            query, check=False, capture_output=True, text=True
        ).stdout.strip()
    return found


if __name__ == "__main__":
    main()
