"""Continues the training of a small mixture of experts and shows what its experts do.

    python guides/demo.py                      # on text that comes with Python
    python guides/demo.py --text my_novel.txt  # on your own

Loads a trained preset, lets it write, trains it further on text it has never seen,
measures it on a part of that text held out, and draws which expert takes how much.
About a minute on two cores, on whichever backend KERAS_BACKEND names.
"""

import argparse
import os
import pathlib
import sys
import textwrap
import time

# TensorFlow, which KerasHub imports on any backend, logs as it starts and heeds no
# setting in this: off the screen with it.
_screen = os.dup(2)
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
try:
    import keras
    import keras_hub
    import matplotlib
    import numpy as np
    from keras import ops

    import keras_moe
    from keras_moe.layers.routing_statistics import expert_load
finally:
    os.dup2(_screen, 2)

matplotlib.use("agg")
from matplotlib import pyplot as plt  # noqa: E402

LENGTH = 128  # tokens of a sequence
BATCH = 16  # sequences of a step
HELD_OUT = 0.2  # of each document, at its end
MOST_CHARACTERS = 1_000_000  # of a document; the demo needs no more
FEWEST_TOKENS = 2000


def main():
    arguments = parse_arguments()
    sys.stdout.reconfigure(errors="replace")  # a model may write any character
    started = time.perf_counter()
    keras.utils.set_random_seed(2024)
    documents = read_documents(arguments.text)
    output = pathlib.Path(arguments.output)
    output.mkdir(parents=True, exist_ok=True)

    heading("A mixture of experts")
    try:
        causal_lm = keras_moe.models.MoECausalLM.from_preset(arguments.preset)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"--preset: {error}") from None
    backbone = causal_lm.backbone
    describe(arguments.preset_name, backbone)

    heading("The text")
    training, validation = split(documents, causal_lm.preprocessor.tokenizer)
    budget = 50  # steps
    if arguments.fast:
        budget = 3
        training = tuple(part[: 2 * BATCH] for part in training)
        validation = tuple(part[:BATCH] for part in validation)
    training = tuple(part[: budget * BATCH] for part in training)
    validation = tuple(part[: 4 * BATCH] for part in validation)
    source = arguments.text or "documentation that comes with Python, unseen so far"
    print(f"{source}: {sum(map(len, documents)):,} characters")
    print(f"{training[0].size:,} tokens to train on, {validation[0].size:,} held out")

    heading("What it writes before training")
    prompt = "The function returns" if arguments.text is None else opening(documents[0])
    length = len(causal_lm.preprocessor.tokenizer(prompt))
    length += 24 if arguments.fast else 80
    show_text(prompt, write(causal_lm, prompt, length))

    heading("Training")
    # The same layers as a plain Keras model: it takes token ids and shuffles them.
    trainer = keras.Model(causal_lm.input, causal_lm.output)
    steps_per_epoch = -(-len(training[0]) // BATCH)
    epochs = max(1, min(4, budget // steps_per_epoch))
    trainer.compile(
        optimizer=make_optimizer(epochs * steps_per_epoch),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    loss_before = validation_loss(trainer, validation)
    load_before = measure_load(backbone, validation[0])
    trainer.fit(model_inputs(training[0]), training[1], batch_size=BATCH, epochs=epochs)
    loss_after = validation_loss(trainer, validation)
    load_after = measure_load(backbone, validation[0])

    heading("What training changed, on the text held out")
    print("loss in nats a token   before  after")
    print(f"                       {loss_before:6.3f} {loss_after:6.3f}")

    heading("Which expert takes how much")
    show_load(load_after)
    picture = output / "expert_load.png"
    draw_load(picture, arguments.preset_name, load_before, load_after)

    heading("Which tokens an expert takes")
    show_specialities(causal_lm, validation[0])

    heading("What it writes now")
    text = write(causal_lm, prompt, length)
    show_text(prompt, text)

    heading("Saved and loaded again")
    folder = output / arguments.preset_name
    causal_lm.save_to_preset(str(folder))
    reloaded = keras_moe.models.MoECausalLM.from_preset(str(folder))
    if write(reloaded, prompt, length) != text:
        raise SystemExit(f"The model saved to {folder} does not write the same text.")
    print("The model, loaded from its folder, writes the same text.")
    print()
    print(f"  model    {folder}")
    print(f"  picture  {picture}")
    print()
    print(f"{time.perf_counter() - started:.0f} seconds on {keras.config.backend()}.")


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--preset",
        default="mixtral_tiny_en",
        help="a trained preset, by name or folder (default: %(default)s)",
    )
    parser.add_argument(
        "--text", metavar="FILE", help="a text file in UTF-8 to train on"
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        default="outputs/demo",
        help="folder for the model and the picture (default: %(default)s)",
    )
    parser.add_argument(
        "--fast", action="store_true", help="a few steps, to see that all works"
    )
    arguments = parser.parse_args()
    arguments.preset_name = pathlib.Path(arguments.preset).name
    return arguments


def read_documents(path):
    """The text to train on, a list of str: a file's, or what comes with Python."""
    if path is None:
        return keras_moe.sample_text("test")
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SystemExit(f"--text: cannot read {path!r}: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise SystemExit(
            f"--text: {path!r} must be text in UTF-8, and is not at byte {error.start}."
        ) from None
    if not text.strip():
        raise SystemExit(f"--text: {path!r} is empty.")
    return [text]


def write(causal_lm, prompt, length):
    """Goes on from a prompt; equal models write equal texts."""
    # A new sampler, so that it starts from its seed.
    sampler = keras_hub.samplers.TopPSampler(p=0.9, temperature=0.7, seed=2024)
    causal_lm.compile(sampler=sampler)
    return causal_lm.generate(prompt, max_length=length)


def split(documents, tokenizer):
    """Cuts documents into `(inputs, targets)` to train on and to measure with.

    The end of each document is held out, so no text is in both. Each of the four
    arrays is `[sequences, LENGTH]`; targets are the inputs one token later.
    """
    training, validation = [], []
    for document in documents:
        ids = tokenizer(document[:MOST_CHARACTERS]).tolist()
        cut = round(len(ids) * (1 - HELD_OUT))
        training += [tokenizer.start_token_id, *ids[:cut]]
        validation += ids[cut:]
    found = len(training) + len(validation)
    if found < FEWEST_TOKENS:
        raise SystemExit(
            f"--text: the file must hold at least {FEWEST_TOKENS:,} tokens, some "
            f"{2.5 * FEWEST_TOKENS:,.0f} characters. It holds {found:,} tokens."
        )

    def sequences(ids):
        count = (len(ids) - 1) // LENGTH
        ids = np.array(ids[: count * LENGTH + 1], "int32")
        return ids[:-1].reshape(-1, LENGTH), ids[1:].reshape(-1, LENGTH)

    # Documents stand in order of name: a part of them should be one of all sorts.
    order = np.random.default_rng(0).permutation
    shuffled = []
    for inputs, targets in (sequences(training), sequences(validation)):
        rows = order(len(inputs))
        shuffled.append((inputs[rows], targets[rows]))
    return shuffled


def model_inputs(token_ids):
    return {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}


def make_optimizer(steps):
    # A short warm-up, as Adam's first steps are as large as any.
    schedule = keras.optimizers.schedules.CosineDecay(
        1e-4,
        decay_steps=steps,
        alpha=0.1,
        warmup_target=1e-3,
        warmup_steps=steps // 10,
    )
    return keras.optimizers.AdamW(schedule, weight_decay=0.1, global_clipnorm=1.0)


def validation_loss(trainer, validation):
    """Cross-entropy in nats a token; the balance loss is one of training alone."""
    inputs, targets = validation
    return trainer.evaluate(model_inputs(inputs), targets, batch_size=BATCH, verbose=0)


def measure_load(backbone, token_ids):
    """`{layer: [E]}`: the share of the choices that each expert receives."""
    batches = [
        backbone.routing_statistics(model_inputs(token_ids[i : i + BATCH]))
        for i in range(0, len(token_ids), BATCH)
    ]
    load = {}
    for layer, *statistics in zip(mixture_indices(backbone), *batches, strict=True):
        # Statistics are sums, so those of several batches add.
        assignments = sum(ops.convert_to_numpy(s.assignments) for s in statistics)
        load[layer] = ops.convert_to_numpy(
            expert_load(statistics[0]._replace(assignments=assignments))
        )
    return load


def mixture_indices(backbone):
    return [i for i, x in enumerate(backbone.transformer_layers) if x.is_mixture]


def specialities(backbone, layer_index, token_ids):
    """`[E, V]`: how often each expert was the first choice of each token."""
    inputs = model_inputs(token_ids)
    mask = ops.convert_to_tensor(inputs["padding_mask"])
    x = backbone.token_embedding(ops.convert_to_tensor(token_ids))
    *before, block = backbone.transformer_layers[: layer_index + 1]
    for layer in before:
        x = layer(x, padding_mask=mask)
    # The first half of the block, up to what its mixture sees.
    x = x + block.attention(block.attention_norm(x), mask=mask)
    x = ops.reshape(block.feed_forward_norm(x), (-1, backbone.hidden_dim))
    chosen = ops.convert_to_numpy(block.feed_forward.router(x).expert_ids)
    counts = np.zeros((backbone.num_experts, backbone.vocabulary_size))
    np.add.at(counts, (chosen[:, 0], token_ids.reshape(-1)), 1)
    return counts


def heading(text):
    print(f"\n{text}\n{'-' * len(text)}")


def describe(name, backbone):
    experts = sum(layer.experts.count_params() for layer in backbone.mixtures)
    idle = experts * (1 - backbone.top_k / backbone.num_experts)
    total = backbone.count_params()
    print(f"{name}: {total:,} parameters, of which a token uses {total - idle:,.0f}.")
    print(
        f"Layers: {backbone.num_layers}; with experts: {len(backbone.mixtures)}, "
        f"{backbone.num_experts} each, of which a token takes {backbone.top_k}."
    )


def opening(document):
    """The first words of a document, for the model to go on from."""
    return " ".join(document.split()[:4])[:40]


def show_text(prompt, text):
    wrapped = textwrap.fill(f"[{prompt}]{text[len(prompt) :]}", 80)
    print(textwrap.indent(wrapped, "  "))


def show_load(load):
    experts = len(next(iter(load.values())))
    print(f"Share of the choices in percent; an even share is {100 / experts:.1f}.\n")
    print("expert  " + "".join(f"{e:5d}" for e in range(experts)))
    for layer, share in load.items():
        print(f"layer {layer:<2}" + "".join(f"{100 * s:5.1f}" for s in share))


def show_specialities(causal_lm, token_ids):
    backbone, tokenizer = causal_lm.backbone, causal_lm.preprocessor.tokenizer
    layer = mixture_indices(backbone)[0]
    counts = specialities(backbone, layer, token_ids)
    occurrences = counts.sum(0)
    share = counts / np.maximum(occurrences, 1)
    share[:, occurrences < 8] = 0  # too rare to tell
    print(f"Layer {layer}: tokens whose first choice the expert is, most often.\n")
    for expert, row in enumerate(share):
        best = [int(i) for i in np.argsort(-row)[:9] if row[i] > 0.6]
        tokens = " ".join(token_name(tokenizer, i) for i in best)
        print(f"expert {expert:<2} {tokens}")


def token_name(tokenizer, token_id):
    text = tokenizer.detokenize([token_id])
    # A part of a character has no text of its own.
    return tokenizer.id_to_token(token_id) if "\ufffd" in text else repr(text)


def draw_load(path, name, before, after):
    """One panel a layer: each expert's share, before and after training."""
    experts = len(next(iter(after.values())))
    figure, panels = plt.subplots(
        len(after),
        1,
        figsize=(7.5, 1.1 + 1.35 * len(after)),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    positions = np.arange(experts)
    for panel, layer in zip(panels[:, 0], after, strict=True):
        panel.bar(
            positions - 0.21, 100 * before[layer], 0.38, color="#b9c6d6", label="before"
        )
        panel.bar(
            positions + 0.21, 100 * after[layer], 0.38, color="#1f5a96", label="after"
        )
        panel.axhline(100 / experts, color="#444444", linewidth=0.8, linestyle="--")
        panel.set_ylabel(f"layer {layer}")
        panel.spines[["top", "right"]].set_visible(False)
        panel.yaxis.set_major_formatter("{x:.0f} %")
    panels[-1, 0].set_xticks(positions)
    panels[-1, 0].set_xlabel("expert (dashed: an even share)")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, frameon=False)
    figure.suptitle(
        f"{name}: share of the choices by expert", x=0.01, ha="left", fontsize=11
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    main()
