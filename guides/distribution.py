"""
Title: Training on several devices
Author: The keras_moe authors
Description: One model over many devices, on JAX, TensorFlow and torch.

## When to use what

A mixture of experts has many parameters and computes with few of them for each token.
So two things can be spread over devices: the *batch*, to be done sooner, and the
*experts*, because they do not fit one device.

| backend    | what spreads the batch          | what spreads the experts            |
|------------|---------------------------------|-------------------------------------|
| JAX        | `keras.distribution`            | the same: `keras_moe.distribution`  |
| TensorFlow | `tf.distribute.MirroredStrategy` | nothing: each device holds them all |
| torch      | `DistributedDataParallel`       | nothing: each device holds them all |

In short: where the model and its optimizer fit one device, any of the three will do;
take the backend you know. Where they do not, take JAX. A Keras distribution does
nothing on the other two, so there keras_moe refuses to run under one.

Whichever you take, the numbers are those of one device with the whole batch: losses,
weights, the balance of the experts. One exception: with `dispatch="capacity"`, what is
dropped of a `capacity_group="batch"` depends on the part of the batch that a device
has. Take `"sequence"` there.

Run this guide on each backend, on any machine: it makes do with its CPU.

    KERAS_BACKEND=jax python guides/distribution.py
    KERAS_BACKEND=tensorflow python guides/distribution.py
    KERAS_BACKEND=torch python guides/distribution.py

`--fast` trains for a few steps only.
"""

import os
import subprocess
import sys

# Four devices out of one CPU, for JAX; to be said before it starts. Accelerators are
# not touched by it.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
)

import keras
import numpy as np

import keras_moe

FAST = "--fast" in sys.argv
BACKEND = keras.config.backend()

"""
## A model and its data

A small model with the architecture of Mixtral, and rows of text as token ids. The
`balance_loss` keeps all experts at work.
"""


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


def make_model():
    keras.utils.set_random_seed(2024)  # the same weights in every process
    backbone = keras_moe.models.MoEBackbone(**SETTINGS)
    causal_lm = keras_moe.models.MoECausalLM(backbone, preprocessor=None)
    causal_lm.compile(
        optimizer=keras.optimizers.Adam(3e-3),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        sampler="greedy",
    )
    return causal_lm


def make_data():
    """Inputs and targets of a language model: characters, and those that follow."""
    text = "".join(keras_moe.sample_text("test"))[: 16 * 33 * (4 if FAST else 60)]
    ids = np.minimum(np.frombuffer(text.encode(), "uint8"), 127).astype("int32")
    rows = ids[: len(ids) // 33 * 33].reshape(-1, 33)
    inputs = {"token_ids": rows[:, :-1], "padding_mask": np.ones((len(rows), 32), bool)}
    return inputs, rows[:, 1:]


def show_load(causal_lm):
    """The share of the last step's choices that each expert of a mixture got."""
    load = causal_lm.backbone.mixtures[0].expert_load
    load = keras.ops.convert_to_numpy(load)
    print("load of the experts:", " ".join(f"{share:.3f}" for share in load))


"""
## JAX: batch and experts

`for_preset` looks at a model and at the devices that there are, and makes a
distribution; its `reason` says why it is as it is. Set it *before* the model is built.
After that everything is as on one device: `fit`, `evaluate`, `predict` and `generate`
know nothing of it. The rows of every batch must divide by the devices they lie over,
those of an epoch's last batch, too; prompts of `generate` need not.

Experts lie over the mesh's axis `"expert"`, the batch over all devices. Each token
travels to the devices of its experts and back; weights of experts stay where they are,
and so does the optimizer's state.
"""


def on_jax():
    distribution = keras_moe.distribution.for_preset(SETTINGS, expert_parallel=2)
    print(distribution.reason)
    keras.distribution.set_distribution(distribution)

    causal_lm = make_model()
    inputs, targets = make_data()
    causal_lm.fit(inputs, targets, batch_size=16, epochs=1 if FAST else 3)
    show_load(causal_lm)

    prompt = {name: value[:4].copy() for name, value in inputs.items()}
    prompt["padding_mask"][:, 16:] = False  # 16 characters are there, 16 to come
    generated = causal_lm.generate(prompt, stop_token_ids=None)["token_ids"]
    print("generated:", repr("".join(map(chr, np.asarray(generated)[0]))))

    kernel = causal_lm.backbone.mixtures[0].experts.up_kernel.value
    for shard in kernel.addressable_shards:
        experts = shard.index[0]
        print(f"experts {experts.start} to {experts.stop - 1} lie on {shard.device}")


"""
The preset's name stands for the settings where a model comes from a preset, as in
`for_preset("mixtral_8x7b")`; without `expert_parallel` the experts lie over as many
devices as they can.

For a mesh of your own, `get_layout_map` says where each weight lies. It knows the axes
by their names: `"batch"`, `"expert"`, and `"model"`, which divides attention heads, the
vocabulary and the hidden features of each expert.
"""


def on_a_mesh_of_my_own():
    mesh = keras.distribution.DeviceMesh((2, 2), ["expert", "model"])
    layout_map = keras_moe.models.MoEBackbone.get_layout_map(mesh)
    distribution = keras_moe.distribution.ExpertParallel(layout_map=layout_map)
    keras.distribution.set_distribution(distribution)
    make_model().fit(*make_data(), batch_size=16)


"""
## TensorFlow: the batch

Build and compile the model in the scope of a `MirroredStrategy`, and `fit` it outside.
Each device has a copy of the model and its part of each batch, whose size you give for
all devices together.

Without `fit`, in `strategy.run` of your own, divide the loss by
`strategy.num_replicas_in_sync`, that of the data and `model.losses` alike.
"""


def on_tensorflow():
    import tensorflow as tf

    # Two devices out of one CPU. With GPUs, `MirroredStrategy()` takes them all.
    tf.config.set_logical_device_configuration(
        tf.config.list_physical_devices("CPU")[0],
        [tf.config.LogicalDeviceConfiguration()] * 2,
    )
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    with strategy.scope():
        causal_lm = make_model()
    inputs, targets = make_data()
    causal_lm.fit(inputs, targets, batch_size=16, epochs=1 if FAST else 3)
    show_load(causal_lm)


"""
## torch: the batch

torch wants a process for each device, which `torchrun` starts, and a loop of your own,
as `fit` knows nothing of other processes. `DistributedDataParallel` averages the
gradients. Three things to know:

- Call the wrapped model; `compute_loss` of the model within adds the mixtures' losses.
- A Keras optimizer is fine, and so is one of torch's on `model.parameters()`.
- All processes must train in step: mixtures sum their statistics over all of them, so
  a process that trains alone would wait for the others.
"""


def on_torch():
    import torch

    torch.distributed.init_process_group("gloo")  # "nccl" with GPUs
    rank = torch.distributed.get_rank()
    processes = torch.distributed.get_world_size()

    causal_lm = make_model()
    parallel = torch.nn.parallel.DistributedDataParallel(causal_lm)
    inputs, targets = make_data()
    for epoch in range(1 if FAST else 3):
        losses = []
        for start in range(0, len(targets) - 15, 16):
            mine = slice(start + rank, start + 16, processes)
            x = {name: torch.tensor(value[mine]) for name, value in inputs.items()}
            logits = parallel(x, training=True)
            loss = causal_lm.compute_loss(x, torch.tensor(targets[mine]), logits)

            causal_lm.zero_grad()
            loss.backward()
            weights = causal_lm.trainable_weights
            with torch.no_grad():
                causal_lm.optimizer.apply([w.value.grad for w in weights], weights)
            losses.append(float(loss))
        if rank == 0:
            print(f"epoch {epoch + 1}: loss {np.mean(losses):.4f}")
    if rank == 0:
        show_load(causal_lm)
    torch.distributed.destroy_process_group()


def in_two_processes():
    """As `torchrun --standalone --nproc-per-node=2 guides/distribution.py` does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run([*command, "--nproc-per-node=2", *sys.argv], check=True)


"""
## What is equal

Wherever the batch lies, a mixture's balance loss, its z-loss, `expert_load`,
`dropped_fraction` and the bias that `bias_update_rate` moves are made of the tokens of
*all* devices. Means of what each device found would be something else: two experts that
are busy on a device each are in balance, and each device alone looks as if they were
not.

## Running it
"""

if BACKEND == "jax":
    on_jax()
    on_a_mesh_of_my_own()
elif BACKEND == "tensorflow":
    on_tensorflow()
elif "RANK" in os.environ:  # which torchrun sets
    on_torch()
else:
    in_two_processes()

"""
## Where to go next

- [getting_started.py](getting_started.py): language models on one device.
- `help(keras_moe.distribution.for_preset)`: the axes, and what must divide what.
- `help(keras_moe.ops.sum_over_replicas)`: how replicas share their statistics.
"""
