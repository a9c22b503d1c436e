"""Peak memory of loading a made-up checkpoint, in a process of its own.

    python benchmarks/load_memory.py            # 2.3 GB in bfloat16
    KERAS_BACKEND=jax python benchmarks/load_memory.py --dtype float32
    python benchmarks/load_memory.py --layers 4 --shard-mb 100 --stored float32

The checkpoint is of the type `mixtral`: 66 million parameters a layer and 66 million
beside them. The limit is 1.1 times the converted model and a shard.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ.setdefault("KERAS_BACKEND", "torch")
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import numpy as np  # noqa: E402

_HERE = "load-here"  # the first argument of the process that is measured
CONFIG = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2560,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
}
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes


def make_checkpoint(folder, config, stored, limit):
    """Writes a checkpoint of random weights, tensor by tensor.

    Args:
        folder: path.
        config: dict, the `config.json`.
        stored: str, the dtype of its weights.
        limit: int, the bytes of a shard.

    Returns:
        The bytes of its largest file.
    """
    from keras_moe import architecture
    from keras_moe.checkpoints import tables
    from keras_moe.checkpoints.loading import numpy_dtype, read_settings
    from keras_moe.checkpoints.shards import INDEX, ShardWriter
    from keras_moe.models import MoEBackbone

    (folder / "config.json").write_text(json.dumps(config))
    family, settings = read_settings(folder)
    settings = architecture.complete(settings, MoEBackbone)
    dtype = numpy_dtype(stored)
    noise = np.random.default_rng(0).standard_normal(10**6).astype("float32")
    noise = (0.02 * noise).astype(dtype)
    shards, size = [[]], 0
    for name, (shape, _) in tables.tensors(family.entries(settings)).items():
        size += dtype.itemsize * int(np.prod(shape))
        if size > limit and shards[-1]:
            shards.append([])
            size = dtype.itemsize * int(np.prod(shape))
        shards[-1].append((name, dtype, shape))
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with ShardWriter(folder / file, shard) as writer:
            for name, _, shape in shard:
                weight_map[name] = file
                writer.write(np.resize(noise, shape))
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


def load_here(small, folder, dtype):
    """Loads one checkpoint and prints what the peak rose by, and the model's bytes."""
    import time

    from keras_moe.models import MoEBackbone

    # What libraries and compilers take is not the model's.
    MoEBackbone.from_preset(small, dtype=dtype)
    before = _status("VmRSS")
    start = time.perf_counter()
    backbone = MoEBackbone.from_preset(folder, dtype=dtype)
    seconds = time.perf_counter() - start
    held = sum(DTYPES[w.dtype] * int(np.prod(w.shape)) for w in backbone.weights)
    peak = _status("VmHWM") - before
    print(json.dumps({"peak": peak, "model": held, "seconds": seconds}))


def _status(name):
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{name} is not in /proc/self/status")


def main():
    """Makes the checkpoint and prints a row for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--shard-mb", type=int, default=500, help="10**6 bytes")
    parser.add_argument("--stored", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        nargs="+",
        default=["bfloat16", "float32"],
        help="what the model is loaded as",
    )
    arguments = parser.parse_args()
    config = {**CONFIG, "num_hidden_layers": arguments.layers}
    stored, limit = arguments.stored, arguments.shard_mb * 10**6
    with tempfile.TemporaryDirectory() as parent:
        folder, small = pathlib.Path(parent, "large"), pathlib.Path(parent, "small")
        folder.mkdir()
        small.mkdir()
        shard = make_checkpoint(folder, config, stored, limit)
        tiny = {**config, "vocab_size": 64, "num_hidden_layers": 1}
        make_checkpoint(small, tiny, stored, limit)
        print("dtype     model GB   peak GB   peak / model   limit GB   seconds")
        for dtype in arguments.dtype:
            command = [sys.executable, __file__, _HERE, str(small), str(folder), dtype]
            output = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(output.stdout.splitlines()[-1])
            limit = 1.1 * found["model"] + shard
            print(
                f"{dtype:<10}{found['model'] / 1e9:8.2f}{found['peak'] / 1e9:10.2f}"
                f"{found['peak'] / found['model']:15.3f}{limit / 1e9:11.2f}"
                f"{found['seconds']:10.1f}"
            )


if __name__ == "__main__":
    if sys.argv[1:2] == [_HERE]:
        load_here(*sys.argv[2:])
    else:
        main()
