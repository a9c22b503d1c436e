"""One process of several that train a model together; see test_processes.py.

python -m tests.distribution.worker ADDRESS PROCESSES PROCESS_ID FOLDER [WHAT]
"""

import json
import os
import pathlib
import signal
import sys

DEVICES = 2  # of a process
EPOCHS, KILLED_IN = 5, 2
BATCH, LENGTH = 8, 6
SETTINGS = {
    "vocabulary_size": 50,
    "num_layers": 2,
    "hidden_dim": 16,
    "num_query_heads": 2,
    "num_key_value_heads": 1,
    "num_experts": 8,
    "top_k": 2,
    "expert_dim": 12,
    "balance_loss": 0.1,
}


def distribute(devices=None, **arguments):
    import keras

    from keras_moe.distribution import for_preset

    distribution = for_preset(
        SETTINGS, devices, expert_parallel=2, auto_shard_dataset=False, **arguments
    )
    keras.distribution.set_distribution(distribution)


def make():
    import keras

    from keras_moe.models import MoEBackbone, MoECausalLM

    keras.utils.set_random_seed(5)
    model = MoECausalLM(MoEBackbone(**SETTINGS), preprocessor=None)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, weighted_metrics=[])
    return model


def data(process_id=0, processes=1):
    """This process's part of each batch, inputs and targets."""
    import numpy as np

    ids = np.random.default_rng(3).integers(0, 50, (4 * BATCH, LENGTH + 1))
    ids = ids.reshape(4, processes, BATCH // processes, LENGTH + 1)
    ids = ids[:, process_id].reshape(-1, LENGTH + 1).astype("int32")
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((len(ids), LENGTH), bool)}
    return x, ids[:, 1:]


def fit(model, x, y, processes=1, **arguments):
    arguments = {"batch_size": BATCH // processes, "epochs": EPOCHS, **arguments}
    return model.fit(x, y, shuffle=False, verbose=0, **arguments).history["loss"]


def loads(model):
    import numpy as np

    return [np.asarray(m.expert_load.value).tolist() for m in model.backbone.mixtures]


def refusals(model, x, folder):
    """What is said to what one of several processes cannot do."""
    uses = {
        "predict": lambda: model.predict(x),
        "generate": lambda: model.generate(x),
        "save": lambda: model.save(folder / "model.keras"),
        "save_weights": lambda: model.save_weights(folder / "model.weights.h5"),
        "save_to_preset": lambda: model.save_to_preset(folder / "preset"),
        "export_to_transformers": lambda: model.export_to_transformers(folder / "hf"),
    }
    said = {}
    for name, use in uses.items():
        try:
            use()
        except RuntimeError as error:
            said[name] = str(error)
    return said


def main(address, processes, process_id, folder, what="train"):
    os.environ["KERAS_BACKEND"] = "jax"
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} "
        f"--xla_force_host_platform_device_count={DEVICES}"
    )
    import keras

    processes, process_id = int(processes), int(process_id)
    keras.distribution.initialize(address, processes, process_id)
    folder = pathlib.Path(folder)
    checkpoints = folder / "checkpoints"
    distribute()
    model = make()
    first = 0
    if what == "resume":
        model.load_weights(checkpoints)
        first = int(model.optimizer.iterations) // 4
    callbacks = [keras.callbacks.OrbaxCheckpoint(str(checkpoints))]
    if what == "killed" and process_id == processes - 1:

        def kill(epoch, logs=None):
            if epoch == KILLED_IN:
                os.kill(os.getpid(), signal.SIGKILL)

        callbacks.append(keras.callbacks.LambdaCallback(on_epoch_begin=kill))
    x, y = data(process_id, processes)
    arguments = {"processes": processes, "initial_epoch": first}
    result = {
        "losses": fit(model, x, y, callbacks=callbacks, **arguments),
        "evaluated": model.evaluate(x, y, BATCH // processes, verbose=0),
        "loads": loads(model),
        "refused": refusals(model, x, folder),
        "first": first,
    }
    (folder / f"{what}_{process_id}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
