"""Peak memory of loading a made-up checkpoint, in a process of its own.

    python benchmarks/load_memory.py            # 2.3 GB in bfloat16
    KERAS_BACKEND=jax python benchmarks/load_memory.py

The checkpoint is of the type `mixtral`, in shards of half a gigabyte. The limit is 1.1
times the converted model and a shard.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

os.environ.setdefault("KERAS_BACKEND", "torch")
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import numpy as np  # noqa: E402

CONFIG = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "num_hidden_layers": 16,
    "hidden_size": 1024,
    "intermediate_size": 2560,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 4096,
}
SHARD = 500 * 10**6


def make_checkpoint(folder, config):
    """Writes a checkpoint of random weights, tensor by tensor.

    Returns:
        The bytes of its largest file.
    """
    from keras_moe.checkpoints import tables
    from keras_moe.checkpoints.config_reader import ConfigReader
    from keras_moe.checkpoints.families import find_family
    from keras_moe.checkpoints.loading import complete_settings, numpy_dtype
    from keras_moe.checkpoints.shards import INDEX, ShardWriter
    from keras_moe.models import MoEBackbone

    (folder / "config.json").write_text(json.dumps(config))
    family = find_family(config)
    settings = complete_settings(MoEBackbone, family.settings(ConfigReader(config)))
    dtype = numpy_dtype("bfloat16")
    noise = np.random.default_rng(0).standard_normal(10**6).astype("float32")
    noise = (0.02 * noise).astype(dtype)
    shards, size = [[]], 0
    for name, (shape, _) in tables.tensors(family.entries(settings)).items():
        size += 2 * int(np.prod(shape))
        if size > SHARD and shards[-1]:
            shards.append([])
            size = 2 * int(np.prod(shape))
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
    sizes = {"float32": 4, "bfloat16": 2}
    held = sum(sizes[w.dtype] * int(np.prod(w.shape)) for w in backbone.weights)
    peak = _status("VmHWM") - before
    print(json.dumps({"peak": peak, "model": held, "seconds": seconds}))


def _status(name):
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{name} is not in /proc/self/status")


def main():
    """Makes the checkpoint and prints a row for each dtype."""
    with tempfile.TemporaryDirectory() as parent:
        folder, small = pathlib.Path(parent, "large"), pathlib.Path(parent, "small")
        folder.mkdir()
        small.mkdir()
        shard = make_checkpoint(folder, CONFIG)
        make_checkpoint(small, {**CONFIG, "vocab_size": 64, "num_hidden_layers": 1})
        print("dtype     model GB   peak GB   peak / model   limit GB   seconds")
        for dtype in ("bfloat16", "float32"):
            command = [sys.executable, __file__, str(small), str(folder), dtype]
            output = subprocess.run(command, check=True, capture_output=True, text=True)
            found = json.loads(output.stdout.splitlines()[-1])
            limit = 1.1 * found["model"] + shard
            print(
                f"{dtype:<10}{found['model'] / 1e9:8.2f}{found['peak'] / 1e9:10.2f}"
                f"{found['peak'] / found['model']:15.3f}{limit / 1e9:11.2f}"
                f"{found['seconds']:10.1f}"
            )


if __name__ == "__main__":
    if len(sys.argv) == 4:
        load_here(*sys.argv[1:])
    else:
        main()
