"""What a model cannot do where it lies over the devices of several processes."""

import keras


class OneProcess:
    """A model that refuses what would need the devices of other processes.

    There a process holds parts of variables and results alone, so that Keras fails
    half-way, or waits for ever.
    """

    def predict(self, *args, **kwargs):
        check_one_process("predict")
        return super().predict(*args, **kwargs)

    def save(self, *args, **kwargs):
        check_one_process("save")
        return super().save(*args, **kwargs)

    def save_weights(self, *args, **kwargs):
        check_one_process("save_weights")
        return super().save_weights(*args, **kwargs)

    def save_to_preset(self, *args, **kwargs):
        check_one_process("save_to_preset")
        return super().save_to_preset(*args, **kwargs)


def check_one_process(method):
    """Refuses a method where a distribution is over several processes."""
    distribution = keras.distribution.distribution()
    count = getattr(distribution, "num_processes", 1)
    if count > 1:
        raise RuntimeError(
            f"`{method}` works in one process, and this model lies over the devices "
            f"of {count}, each of which holds a part. `fit` and `evaluate` work; save "
            "with `keras.callbacks.OrbaxCheckpoint`, and in one process, under any "
            f"mesh, `load_weights` of its folder before `{method}`."
        )
