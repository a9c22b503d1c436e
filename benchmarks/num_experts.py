"""What more experts cost, at the same number of tokens and choices.

    KERAS_BACKEND=jax python benchmarks/num_experts.py

Times `MixtureOfExperts` forward as `predict` would run it (compiled on JAX and
TensorFlow, eager on torch), with 8 to 128 experts, and the dense layer of equal
active size. The layers take turns, so that a machine whose speed drifts slows all
alike; medians and their ratios are printed. Run it when nothing else runs.
"""

import argparse
import time

import keras
import numpy as np

from keras_moe.layers import FeedForward, MixtureOfExperts

EXPERTS = (8, 16, 32, 64, 128)


def compiled(layer, inputs):
    """A function of no arguments that runs `layer` on `inputs` to the end."""
    backend = keras.config.backend()
    if backend == "jax":
        import jax

        trainable = [v.value for v in layer.trainable_variables]
        others = [v.value for v in layer.non_trainable_variables]
        run = jax.jit(lambda t, n, x: layer.stateless_call(t, n, x)[0])
        inputs = jax.numpy.asarray(inputs)
        return lambda: jax.block_until_ready(run(trainable, others, inputs))
    inputs = keras.ops.convert_to_tensor(inputs)
    if backend == "tensorflow":
        import tensorflow as tf

        run = tf.function(layer, jit_compile=True)
        return lambda: run(inputs).numpy()
    import torch

    def run():
        with torch.no_grad():
            return layer(inputs)

    return run


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden-dim", type=int, default=128)
    parser.add_argument("--expert-dim", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=25)
    arguments = parser.parse_args()
    keras.utils.set_random_seed(0)
    inputs = np.random.default_rng(0).normal(
        size=(arguments.tokens, arguments.hidden_dim)
    )
    layers = {
        f"{count} experts": MixtureOfExperts(
            count, arguments.expert_dim, top_k=arguments.top_k
        )
        for count in EXPERTS
    }
    layers["dense"] = FeedForward(arguments.top_k * arguments.expert_dim)
    runs = {}
    for name, layer in layers.items():
        layer.build((None, arguments.hidden_dim))
        runs[name] = compiled(layer, inputs.astype("float32"))
        for _ in range(2):
            runs[name]()
    times = {name: [] for name in runs}
    for _ in range(arguments.repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    median = {name: np.median(t) for name, t in times.items()}
    print(f"{keras.config.backend()}, forward, {vars(arguments)}")
    for name, value in median.items():
        ratio = value / median["8 experts"]
        print(f"{name:12} {1e3 * value:8.2f} ms  {ratio:5.2f} times 8 experts")


if __name__ == "__main__":
    main()
