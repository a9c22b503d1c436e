"""The README of a small preset, written from its figures."""

import textwrap

from tiny_recipes import VOCABULARY
from tiny_tasks import BATCH, LENGTH

_TWIN = (
    "its dense twin: each mixture replaced by a dense layer as wide as the experts a "
    "token takes, trained alike"
)


def card(name, recipe, task, figures, seed):
    """The README of a preset's folder.

    Args:
        name: str, the preset's.
        recipe: dict, of `tiny_recipes.RECIPES`.
        task: what it learns, of `tiny_tasks.TASKS`.
        figures: dict, as `preset.json` holds them.
        seed: int.
    """
    settings = recipe["settings"]
    about = textwrap.fill(
        f"{recipe['about']} A small model for trying things out, for tests and for "
        "guides; it knows little but the manner of Python's documentation.",
        88,
    )
    made = textwrap.fill(
        'on the "train" split of `keras_moe.sample_text`, the English of the '
        f"documentation that CPython {figures['python']} carries "
        f"({figures['train_tokens']:,} tokens, {figures['epochs']} epochs"
        f"{task.training}, "
        f"{figures['seconds'] / 60:.0f} minutes on two shared cores; the text is under "
        f"the PSF licence and no part of this preset). Keras {figures['keras']}, "
        f"{figures['backend']} backend, {recipe['optimizer']}, {BATCH} sequences of "
        f"{LENGTH} tokens a step, seed {seed}.",
        88,
    )
    tokens = f"{VOCABULARY} tokens"
    if "sentinels" in recipe:
        tokens += f" and {recipe['sentinels']} sentinels"
    score = textwrap.fill(
        f'{task.score} on the "validation" split, documents that no training saw '
        f"({figures['validation_tokens']:,} tokens):",
        86,
    )
    return f"""# {name}

{about}

- Paper: <{recipe["paper"]}>
- Parameters: {figures["parameters"]:,}, of which a token uses {figures["active"]:,}
- Context: {settings["context_length"]} tokens, trained on {LENGTH}
- Tokenizer: its own ({recipe["tokenizer"]}, {tokens}), trained on the same
  text
- Licence: Apache-2.0

## How it was made

    KERAS_BACKEND={figures["backend"]} python presets/train_tiny.py {name}

{made}

## How good it is

{score}

| model | active parameters | validation loss |
|---|---|---|
| **{name}** | {figures["active"]:,} | **{figures["loss"]:.4f}** |
| {_TWIN} | {figures["twin_active"]:,} | {figures["twin_loss"]:.4f} |
| {task.baseline_words} | | {figures[f"{task.baseline}_loss"]:.4f} |
"""
