"""Small language models, trained on one device or by two replicas of the backend.

On JAX two devices of a `keras.distribution`, on TensorFlow two devices of a
`MirroredStrategy`, on torch two processes of `DistributedDataParallel`.
"""

import pathlib
import pickle
import tempfile

import keras
import numpy as np
from keras import ops

from keras_moe.distribution import for_preset
from keras_moe.ops import sum_over_replicas
from tests.execution import differentiated, numpy
from tests.models.small_models import SETTINGS, padded, small_causal_lm

LOSSES = {"balance_loss": 0.5, "z_loss": 0.1}
BALANCED = {"selection_bias": True, "bias_update_rate": 0.05, "scores": "sigmoid"}
CAPACITY = {"dispatch": "capacity", "num_shared_experts": 0}
CASES = {
    "dropless": {"dense_first_layers": 0, **LOSSES},  # two mixtures
    "recomputed": {"recompute": True, **LOSSES, **BALANCED},
    # As many as there are tokens.
    "capacity": {**CAPACITY, "capacity_factor": 2.0, **LOSSES},
    "sequences": {
        **CAPACITY,
        "capacity_factor": 1.0,
        "capacity_group": "sequence",
        **LOSSES,
    },
}
STEPS, BATCH, LENGTH = 10, 8, 12


def data():
    """`(inputs, targets)` of all steps; a batch's last rows are the shortest."""
    generator = np.random.default_rng(11)
    lengths = [12, 12, 11, 12, 5, 3, 4, 2] * STEPS
    rows = [generator.integers(0, 50, length) for length in lengths]
    targets = generator.integers(0, 50, (len(rows), LENGTH)).astype("int32")
    return padded(rows, LENGTH, "right"), targets


def make(case):
    """A compiled model with the weights every device starts from."""
    keras.utils.set_random_seed(5)
    model = small_causal_lm(**CASES[case])
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    return model


def fit(model):
    """The loss of each step."""
    means = []  # of all steps so far, which is what Keras tells
    note = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda step, logs: means.append(logs["loss"])
    )
    settings = {"shuffle": False, "verbose": 0, "callbacks": [note]}
    model.fit(*data(), batch_size=BATCH, **settings)
    return np.diff(np.arange(1, STEPS + 1) * means, prepend=0)


def state(model, read=numpy):
    """All that training changed, by name; `read` takes a variable's value."""
    variables = [*model.weights]
    for mixture in model.backbone.mixtures:
        variables += [mixture.expert_load, mixture.dropped_fraction]
    # By place: a model's name counts the models before it.
    return {f"{i} {v.name}": read(v.value) for i, v in enumerate(variables)}


def on_one(case):
    """`(losses, state)` after training on one device."""
    model = make(case)
    return fit(model), state(model)


def _product_of_sums(x, y):
    x, y = sum_over_replicas([x, y])
    return x * y


def gradients_of_sums(rank):
    """`_product_of_sums`, and its gradients by a cotangent that ranks differ in."""
    x, y = ops.arange(3, dtype="float32") + rank, ops.ones(()) + rank
    return differentiated(_product_of_sums)([x, y], (1.0 + rank) * ops.ones(3))


def on_two(cases):
    """What two replicas give; one, of all devices, on JAX.

    Returns:
        `(trained, sums)`: `(losses, state of each replica)` for each case, and each
        replica's `gradients_of_sums`.
    """
    return {"jax": _jax, "tensorflow": _tensorflow, "torch": _torch}[
        keras.config.backend()
    ](cases)


def _jax(cases):
    trained = []
    for case in cases:
        settings = {**SETTINGS, **CASES[case]}
        keras.distribution.set_distribution(for_preset(settings, devices=2))
        model = make(case)
        trained.append((fit(model), [state(model)]))
    keras.distribution.set_distribution(None)
    return trained, [numpy(gradients_of_sums(0.0))]


def _tensorflow(cases):
    import tensorflow as tf

    # The two that tests/conftest.py makes.
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    trained = []
    for case in cases:
        with strategy.scope():
            model = make(case)
        losses = fit(model)
        trained.append(
            (losses, [_state_of_replica(strategy, model, i) for i in (0, 1)])
        )

    def of_replica():
        rank = tf.distribute.get_replica_context().replica_id_in_sync_group
        return gradients_of_sums(tf.cast(rank, "float32"))

    sums = strategy.run(of_replica)
    return trained, [
        numpy(tf.nest.map_structure(lambda t, i=i: t.values[i], sums)) for i in (0, 1)
    ]


def _state_of_replica(strategy, model, rank):
    local = strategy.experimental_local_results
    return state(model, lambda value: numpy(local(value)[rank]))


def _torch(cases):
    import torch

    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_replica, (folder, cases), nprocs=2)
        files = [pathlib.Path(folder, f"{rank}.pickle") for rank in (0, 1)]
        (first, sums_0), (second, sums_1) = (
            pickle.loads(file.read_bytes()) for file in files
        )
    trained = [
        (np.mean([a, b], axis=0), [of_a, of_b])
        for (a, of_a), (b, of_b) in zip(first, second, strict=True)
    ]
    return trained, [sums_0, sums_1]


def _replica(rank, folder, cases):
    """What one process does: writes a file."""
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    try:
        results = _train_replica(rank, cases), numpy(gradients_of_sums(float(rank)))
        pathlib.Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(results))
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def _train_replica(rank, cases):
    """Half of each batch, in a loop as torch's users write it."""
    import torch

    results = []
    inputs, targets = data()
    for case in cases:
        model = make(case)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        losses = []
        for step in range(STEPS):
            start = step * BATCH + rank * BATCH // 2
            mine = slice(start, start + BATCH // 2)
            x = {name: torch.tensor(value[mine]) for name, value in inputs.items()}
            logits = parallel(x, training=True)
            loss = model.loss(torch.tensor(targets[mine]), logits) + sum(model.losses)
            model.zero_grad()
            loss.backward()
            gradients = [w.value.grad for w in model.trainable_weights]
            with torch.no_grad():
                model.optimizer.apply(gradients, model.trainable_weights)
            losses.append(float(loss))
        results.append((losses, state(model)))
    return results
