"""Trains the small presets: tokenizer, model, dense twin, bigram model and card.

    python presets/train_tiny.py mixtral_tiny_en deepseek_moe_tiny_en glam_tiny_en

Everything comes from `keras_moe.sample_text`, the English that CPython carries, so
nothing is downloaded. The backend is KERAS_BACKEND's; the presets in the
repository were made with torch. A preset's folder is written when all its figures
are known.
"""

import argparse
import json
import pathlib
import platform
import textwrap
import time

import keras
import numpy as np
import tiny_tokenizers

from keras_moe.models import (
    MoEBackbone,
    MoECausalLM,
    MoECausalLMPreprocessor,
    MoETokenizer,
)
from keras_moe.sample_text import sample_text

ROOT = pathlib.Path(__file__).parent
VOCABULARY = 1024
CONTEXT = 256  # tokens the model is meant for
LENGTH = 128  # tokens of a training sequence
BATCH = 16  # sequences a step
LEARNING_RATE = 3e-3
SEED = 2024

_COMMON = {
    "vocabulary_size": VOCABULARY,
    "hidden_dim": 128,
    "num_layers": 4,
    "num_query_heads": 4,
    "context_length": CONTEXT,
    "balance_loss": 0.01,
}

RECIPES = {
    "mixtral_tiny_en": {
        "family": "mixtral",
        "paper": "https://arxiv.org/abs/2401.04088",
        "about": "Mixtral's block: grouped-query attention with rotary positions, "
        "RMS norms, eight SwiGLU experts of which a token takes two, gates "
        "normalised over the two.",
        "tokenizer": "sentencepiece",
        "epochs": 3,
        "settings": {
            **_COMMON,
            "num_key_value_heads": 2,
            "rope_theta": 1e6,
            "num_experts": 8,
            "top_k": 2,
            "expert_dim": 112,
            "norm_epsilon": 1e-5,
        },
    },
    "deepseek_moe_tiny_en": {
        "family": "deepseek_moe",
        "paper": "https://arxiv.org/abs/2401.06066",
        "about": "DeepSeekMoE's block: a dense first layer, then fine-grained experts "
        "of which a token takes three of sixteen with gates as the softmax gives "
        "them, and one shared expert that every token takes.",
        "tokenizer": "byte_pair",
        "epochs": 3,
        "settings": {
            **_COMMON,
            "num_experts": 16,
            "top_k": 3,
            "expert_dim": 56,
            "num_shared_experts": 1,
            "normalize_gates": False,
            "dense_first_layers": 1,
            "dense_dim": 224,
        },
    },
    "glam_tiny_en": {
        "family": "glam",
        "paper": "https://arxiv.org/abs/2112.06905",
        "about": "GLaM's blocks: dense layers with gated GELU and mixtures by turns, "
        "eight experts of two matrices of which a token takes two, a relative "
        "position bias in each layer, tied embeddings.",
        "tokenizer": "sentencepiece",
        "epochs": 4,  # positions are learned, which takes longer
        "settings": {
            **_COMMON,
            "num_experts": 8,
            "top_k": 2,
            "expert_dim": 288,
            "expert_gated": False,
            "dense_gated": True,
            "dense_dim": 192,
            "activation": "gelu",
            "moe_every": 2,
            "moe_offset": 1,
            "positions": "relative_bias",
            "tied_embeddings": True,
            "balance_choices": "first",
        },
    },
}


def dense_twin(settings):
    """The settings with each mixture replaced by a dense layer of its active width.

    One expert that every token takes with gate 1 is that dense layer.
    """
    active = settings["top_k"] + settings.get("num_shared_experts", 0)
    return {
        **settings,
        "num_experts": 1,
        "top_k": 1,
        "num_shared_experts": 0,
        "expert_dim": active * settings["expert_dim"],
        "normalize_gates": True,
        "balance_loss": 0.0,
    }


def make_tokenizer(kind, texts):
    if kind == "sentencepiece":
        proto = tiny_tokenizers.train_sentencepiece(texts, VOCABULARY)
        return MoETokenizer(proto=proto)
    return MoETokenizer(
        tokenizer_json=json.loads(tiny_tokenizers.train_byte_pair(texts, VOCABULARY))
    )


def sequences(tokenizer, texts, length):
    """Documents end to end, cut into `(inputs, targets)`, both `[N, length]`."""
    stream = []
    for text in texts:
        stream += [tokenizer.start_token_id, *tokenizer(text), tokenizer.end_token_id]
    count = (len(stream) - 1) // length
    stream = np.array(stream[: count * length + 1], "int32")
    return stream[:-1].reshape(count, length), stream[1:].reshape(count, length)


def model_inputs(token_ids):
    return {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}


def bigram_loss(train, validation):
    """Nats a token of a bigram model, interpolated with unigrams and uniform.

    The weights of the three are chosen on the validation text itself, in the
    bigram's favour.
    """
    counts = np.zeros((VOCABULARY, VOCABULARY))
    np.add.at(counts, (train[0].ravel(), train[1].ravel()), 1)
    unigram = counts.sum(0) / counts.sum()
    bigram = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    first, second = validation[0].ravel(), validation[1].ravel()
    best = np.inf
    for a in np.arange(0.05, 1.0, 0.05):
        for b in (1e-3, 1e-2, 5e-2):
            uniform = b / VOCABULARY
            p = (1 - b) * (a * bigram[first, second] + (1 - a) * unigram[second])
            best = min(best, -np.log(p + uniform).mean())
    return float(best)


def train(settings, data, validation, epochs):
    """Trains from a fixed seed; returns the model and its validation loss in nats."""
    keras.utils.set_random_seed(SEED)
    causal_lm = MoECausalLM(MoEBackbone(**settings))
    steps = epochs * -(-len(data[0]) // BATCH)
    causal_lm.compile(
        optimizer=keras.optimizers.AdamW(
            keras.optimizers.schedules.CosineDecay(
                LEARNING_RATE / 20,
                steps - steps // 20,
                alpha=0.05,
                warmup_target=LEARNING_RATE,
                warmup_steps=steps // 20,
            ),
            weight_decay=0.1,
            beta_2=0.95,
            global_clipnorm=1.0,
        ),
        sampler="greedy",
    )
    causal_lm.fit(
        model_inputs(data[0]),
        data[1],
        batch_size=BATCH,
        epochs=epochs,
        verbose=2,
    )
    return causal_lm, validation_loss(causal_lm, validation)


def validation_loss(causal_lm, validation):
    """Cross-entropy in nats a token, without the balance loss."""
    logits = causal_lm.predict(model_inputs(validation[0]), batch_size=32, verbose=0)
    logits = logits.astype("float64")
    logits -= logits.max(-1, keepdims=True)
    log_partition = np.log(np.exp(logits).sum(-1))
    chosen = np.take_along_axis(logits, validation[1][..., None], -1)[..., 0]
    return float((log_partition - chosen).mean())


def active_parameters(backbone):
    """Weights that one token uses: all but the experts it does not take."""
    idle = sum(
        layer.experts.count_params() * (1 - layer.top_k / layer.num_experts)
        for layer in backbone.mixtures
    )
    return round(backbone.count_params() - idle)


def card(name, recipe, figures):
    """The README of a preset's folder, written from its figures."""
    twin = (
        "its dense twin: each mixture replaced by a dense layer as wide as the "
        "experts a token takes, trained alike"
    )
    bigram = "bigram model, interpolated, its weights chosen on this very text"
    about = textwrap.fill(
        f"{recipe['about']} A small model for trying things out, for tests and for "
        "guides; it knows little but the manner of Python's documentation.",
        88,
    )
    made = textwrap.fill(
        'on the "train" split of `keras_moe.sample_text`, the English of the '
        f"documentation that CPython {figures['python']} carries "
        f"({figures['train_tokens']:,} tokens, {figures['epochs']} epochs, "
        f"{figures['seconds'] / 60:.0f} minutes on two shared cores; the text is under "
        f"the PSF licence and no part of this preset). Keras {figures['keras']}, "
        f"{figures['backend']} backend, AdamW, {BATCH} sequences of {LENGTH} tokens a "
        f"step, seed {SEED}.",
        88,
    )
    return f"""# {name}

{about}

- Paper: <{recipe["paper"]}>
- Parameters: {figures["parameters"]:,}, of which a token uses {figures["active"]:,}
- Context: {CONTEXT} tokens, trained on {LENGTH}
- Tokenizer: its own ({recipe["tokenizer"]}, {VOCABULARY} tokens), trained on the same
  text
- Licence: Apache-2.0

## How it was made

    KERAS_BACKEND={figures["backend"]} python presets/train_tiny.py {name}

{made}

## How good it is

Cross-entropy in nats a token on the "validation" split, documents that no training
saw ({figures["validation_tokens"]:,} tokens):

| model | active parameters | validation loss |
|---|---|---|
| **{name}** | {figures["active"]:,} | **{figures["loss"]:.4f}** |
| {twin} | {figures["twin_active"]:,} | {figures["twin_loss"]:.4f} |
| {bigram} | | {figures["bigram_loss"]:.4f} |
"""


def make(name, output, epochs=None):
    recipe = RECIPES[name]
    epochs = epochs or recipe["epochs"]
    texts = sample_text("train")
    tokenizer = make_tokenizer(recipe["tokenizer"], texts)
    data = sequences(tokenizer, texts, LENGTH)
    validation = sequences(tokenizer, sample_text("validation"), LENGTH)
    started = time.time()
    causal_lm, loss = train(recipe["settings"], data, validation, epochs)
    seconds = time.time() - started
    twin, twin_loss = train(dense_twin(recipe["settings"]), data, validation, epochs)
    figures = {
        "loss": loss,
        "twin_loss": twin_loss,
        "bigram_loss": bigram_loss(data, validation),
        "parameters": causal_lm.backbone.count_params(),
        "active": active_parameters(causal_lm.backbone),
        "twin_active": active_parameters(twin.backbone),
        "train_tokens": data[1].size,
        "validation_tokens": validation[1].size,
        "epochs": epochs,
        "seconds": seconds,
        "backend": keras.config.backend(),
        "keras": keras.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(figures, indent=2))
    if loss >= min(twin_loss, figures["bigram_loss"]):
        raise SystemExit(f"{name} does not beat both baselines: nothing written.")
    causal_lm.preprocessor = MoECausalLMPreprocessor(tokenizer, sequence_length=LENGTH)
    folder = output / name
    causal_lm.save_to_preset(str(folder))
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
    (folder / "README.md").write_text(card(name, recipe, figures))


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
