"""
Title: Training on several machines
Author: The keras_moe authors
Description: One model over the devices of several processes, on JAX.

## How it works

On several machines each has a process, or one for each of its accelerators, and all
run the same script. `keras.distribution.initialize` makes them one JAX runtime:
`list_devices` then names the devices of all, and what follows is what
[distribution.py](distribution.py) does on one machine, with three differences.

- A process reads *its own part* of each batch.
- Checkpoints are written by all of them together, with Orbax.
- `predict`, `generate`, `save` and `export_to_transformers` raise: each process holds a
  part alone. Load the checkpoint in one process for those, as below.

Run this guide; it starts two processes with two devices each on this machine, stops,
and lets four devices of one process go on:

    KERAS_BACKEND=jax python guides/several_machines.py

TensorFlow and torch do not take part in `keras.distribution`: see distribution.py for
what they have. `--fast` trains for a few steps only. Needs `orbax-checkpoint`
(`pip install keras-moe[jax,checkpoints]`).

## How it is started

**By hand**, the same on each machine but for the last number:

```shell
export KERAS_BACKEND=jax
export KERAS_DISTRIBUTION_JOB_ADDRESSES=10.0.0.1:1234   # of process 0
export KERAS_DISTRIBUTION_NUM_PROCESSES=2
KERAS_DISTRIBUTION_PROCESS_ID=0 python train.py
```

**Slurm**, a process for each GPU, which is what JAX takes there; it finds address,
number and place by itself, so that the script says `keras.distribution.initialize()`:

```shell
#SBATCH --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --requeue
srun env KERAS_BACKEND=jax python train.py
```

**A TPU pod**, where it finds them, too:

```shell
gcloud compute tpus tpu-vm ssh NAME --zone ZONE --worker=all \
    --command "KERAS_BACKEND=jax python train.py"
```

Call `initialize` before anything else that touches JAX.
"""

import os
import pathlib
import socket
import subprocess
import sys
import tempfile

# Devices out of a CPU, to be said before JAX starts: four, or two of each process.
# Accelerators are not touched by it.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count="
    + str(4 // int(os.environ.get("KERAS_DISTRIBUTION_NUM_PROCESSES", 1)))
)

import keras
import numpy as np

import keras_moe

FAST = "--fast" in sys.argv
PROCESSES = 2
BATCH = 16  # of all processes together
EPOCHS = 2 if FAST else 6
SETTINGS = {
    "vocabulary_size": 128,
    "num_layers": 2,
    "hidden_dim": 64,
    "num_query_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "top_k": 2,
    "expert_dim": 128,
    "balance_loss": 0.02,
}

"""
## The model and the distribution

`auto_shard_dataset=False` says that what a process gives to `fit` is its own part. With
the default, `True`, Keras divides a `tf.data.Dataset` among the processes, and takes
nothing else.
"""


def make_model():
    distribution = keras_moe.distribution.for_preset(
        SETTINGS, expert_parallel=2, auto_shard_dataset=False
    )
    keras.distribution.set_distribution(distribution)
    keras.utils.set_random_seed(2024)  # the same weights in every process
    backbone = keras_moe.models.MoEBackbone(**SETTINGS)
    causal_lm = keras_moe.models.MoECausalLM(backbone, preprocessor=None)
    causal_lm.compile(
        optimizer=keras.optimizers.Adam(3e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        sampler="greedy",
    )
    return causal_lm


"""
## Data

Of each batch every process takes its rows. Here all of them read the whole text, which
is small. Of a large one let each read files of its own, all of equal length: where one
runs out of batches before the others they wait for it, and end with an error.
"""


def make_data(process_id, processes):
    """Inputs, targets and the size of a batch of one process."""
    text = "".join(keras_moe.sample_text("test"))[: BATCH * 33 * (4 if FAST else 30)]
    ids = np.minimum(np.frombuffer(text.encode(), "uint8"), 127).astype("int32")
    ids = ids[: len(ids) // (33 * BATCH) * (33 * BATCH)]
    batches = ids.reshape(-1, processes, BATCH // processes, 33)
    rows = batches[:, process_id].reshape(-1, 33)
    inputs = {"token_ids": rows[:, :-1], "padding_mask": np.ones((len(rows), 32), bool)}
    return inputs, rows[:, 1:], BATCH // processes


"""
## Training that can be cut off

`OrbaxCheckpoint` has all processes write what they hold, while training goes on. A
checkpoint that was not finished does not count. `load_weights` sets the weights, the
state of the optimizer and of random seeds; the number of steps says which epoch is
next. So one script starts and goes on, and may be started again whenever it was ended.
Make the callback first, in which processes wait for each other: one that looks for the
folder may find what another has just made.

When a process dies, the others end by themselves: at once where a connection breaks as
they wait ("Connection closed by peer"), or when JAX has not heard of it for up to a
hundred seconds ("Task 1 heartbeat timeout"). Start all of them again then, as Slurm
does for `--requeue`. They need not be as many as before.
"""


def train(folder, process_id=0, processes=1):
    causal_lm = make_model()
    inputs, targets, batch_size = make_data(process_id, processes)
    epoch = 0
    checkpoints = keras.callbacks.OrbaxCheckpoint(str(folder))
    if checkpoints.checkpointer.latest is not None:
        causal_lm.load_weights(folder)
        epoch = int(causal_lm.optimizer.iterations) // (len(targets) // batch_size)
    until = EPOCHS if processes == 1 else EPOCHS // 2  # the rest is for later
    history = causal_lm.fit(
        inputs,
        targets,
        batch_size=batch_size,
        initial_epoch=epoch,
        epochs=until,
        shuffle=False,  # or each process shuffles in its own way
        callbacks=[checkpoints],
        verbose=0,
    )
    if process_id == 0:
        for loss in history.history["loss"]:
            epoch += 1
            print(f"{processes} processes, epoch {epoch}: loss {loss:.4f}")
    return causal_lm


def in_processes(folder):
    """Starts this script once for each process, as on a machine each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, *sys.argv, f"--folder={folder}"],
            env=os.environ
            | {
                "KERAS_DISTRIBUTION_JOB_ADDRESSES": address,
                "KERAS_DISTRIBUTION_NUM_PROCESSES": str(PROCESSES),
                "KERAS_DISTRIBUTION_PROCESS_ID": str(process_id),
            },
        )
        for process_id in range(PROCESSES)
    ]
    if any([process.wait() for process in started]):
        raise SystemExit("A process failed.")


"""
## From many processes to one

The checkpoint fits any mesh: here four devices of one process go on, and generate.
"""


def main():
    folder = [a for a in sys.argv if a.startswith("--folder=")]
    if folder:  # one of several processes
        keras.distribution.initialize()
        process_id = int(os.environ["KERAS_DISTRIBUTION_PROCESS_ID"])
        train(pathlib.Path(folder[0].split("=", 1)[1]), process_id, PROCESSES)
        return
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder) / "checkpoints"
        in_processes(folder)
        causal_lm = train(folder)
        inputs, *_ = make_data(0, 1)
        prompt = {name: value[:4].copy() for name, value in inputs.items()}
        prompt["padding_mask"][:, 16:] = False
        generated = causal_lm.generate(prompt, stop_token_ids=None)["token_ids"]
        print("generated:", repr("".join(map(chr, np.asarray(generated)[0]))))


if keras.config.backend() == "jax":
    main()
else:
    print("keras.distribution distributes on JAX alone: see guides/distribution.py.")

"""
## Where to go next

- [distribution.py](distribution.py): several devices of one machine.
- [What large models take on many devices](../docs/scaling.md).
"""
