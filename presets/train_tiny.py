"""Trains the small presets: tokenizer, model, dense twin, another baseline and card.

    python presets/train_tiny.py mixtral_tiny_en deepseek_moe_tiny_en glam_tiny_en
    python presets/train_tiny.py switch_tiny_en

Everything comes from `keras_moe.sample_text`, the English that CPython carries, so
nothing is downloaded. The backend is KERAS_BACKEND's; the presets in the
repository were made with torch. A preset's folder is written when all its figures
are known.

What each preset is stands in tiny_recipes.py, what it learns in tiny_tasks.py, and how
its folder reads in tiny_cards.py.
"""

import argparse
import json
import pathlib
import platform
import time

import keras
import tiny_tokenizers
from tiny_cards import card
from tiny_recipes import RECIPES, VOCABULARY, dense_twin
from tiny_tasks import TASKS

from keras_moe.models import MoETokenizer
from keras_moe.sample_text import sample_text

ROOT = pathlib.Path(__file__).parent
SEED = 2024


def make_tokenizer(kind, sentinels):
    """A tokenizer of the training text; with sentinels, one as T5's."""
    texts = sample_text("train")
    if kind == "byte_pair":
        source = tiny_tokenizers.train_byte_pair(texts, VOCABULARY)
        return MoETokenizer(tokenizer_json=json.loads(source))
    options = tiny_tokenizers.T5 if sentinels else {}
    proto = tiny_tokenizers.train_sentencepiece(texts, VOCABULARY, **options)
    if not sentinels:
        return MoETokenizer(proto=proto)
    return MoETokenizer(proto=proto, start_token=None, extra_ids=sentinels)


def adamw(steps):
    schedule = keras.optimizers.schedules.CosineDecay(
        3e-3 / 20,
        steps - steps // 20,
        alpha=0.05,
        warmup_target=3e-3,
        warmup_steps=steps // 20,
    )
    return keras.optimizers.AdamW(
        schedule, weight_decay=0.1, beta_2=0.95, global_clipnorm=1.0
    )


def adafactor(steps):
    # Rates are relative to the weights' size, and at most `1 / sqrt(step)`: Shazeer
    # and Stern 2018, algorithm 4. T5's embeddings are far larger than its kernels.
    schedule = keras.optimizers.schedules.CosineDecay(0.06, steps, alpha=0.05)
    return keras.optimizers.Adafactor(schedule)


OPTIMIZERS = {"AdamW": adamw, "Adafactor": adafactor}


def train(task, settings, optimizer, epochs):
    """Trains from a fixed seed; returns the model and its validation loss in nats."""
    model = task.model(settings)
    optimizer = OPTIMIZERS[optimizer](epochs * task.steps_per_epoch)
    model.compile(optimizer=optimizer, sampler="greedy")
    model.fit(**task.fit_data(), epochs=epochs, verbose=2)
    return model, task.loss(model)


def active_parameters(backbone):
    """Weights that one token uses: all but the experts it does not take."""
    idle = sum(
        layer.experts.count_params() * (1 - layer.top_k / layer.num_experts)
        for layer in backbone.mixtures
    )
    return round(backbone.count_params() - idle)


def make(name, output, epochs=None):
    recipe = RECIPES[name]
    settings, epochs = recipe["settings"], epochs or recipe["epochs"]
    tokenizer = make_tokenizer(recipe["tokenizer"], recipe.get("sentinels", 0))
    task = TASKS[recipe["task"]](tokenizer, settings, SEED)
    started = time.time()
    model, loss = train(task, settings, recipe["optimizer"], epochs)
    seconds = time.time() - started
    twin, twin_loss = train(task, dense_twin(settings), recipe["optimizer"], epochs)
    baseline_loss = task.baseline_loss()
    figures = {
        "loss": loss,
        "twin_loss": twin_loss,
        f"{task.baseline}_loss": baseline_loss,
        "parameters": model.backbone.count_params(),
        "active": active_parameters(model.backbone),
        "twin_active": active_parameters(twin.backbone),
        "train_tokens": task.train_tokens,
        "validation_tokens": task.validation_tokens,
        "epochs": epochs,
        "seconds": seconds,
        "backend": keras.config.backend(),
        "keras": keras.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(figures, indent=2))
    if loss >= min(twin_loss, baseline_loss):
        raise SystemExit(f"{name} does not beat both baselines: nothing written.")
    model.preprocessor = task.preprocessor()
    folder = output / name
    model.save_to_preset(str(folder))
    (folder / "task.json").unlink()  # says nothing that config.json does not
    description = {
        "description": recipe["about"],
        "family": recipe["family"],
        "paper": recipe["paper"],
        "licence": "Apache-2.0",
        "checkpoint": None,
        "figures": figures,
    }
    (folder / "preset.json").write_text(json.dumps(description, indent=2) + "\n")
    (folder / "README.md").write_text(card(name, recipe, task, figures, SEED))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=sorted(RECIPES))
    parser.add_argument("--epochs", type=int, help="in place of the recipe's")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT)
    arguments = parser.parse_args()
    for name in arguments.names:
        make(name, arguments.output, arguments.epochs)


if __name__ == "__main__":
    main()
