"""Greedy decoding of one sequence: tokens after the prompt, prefill left out."""

import keras
import numpy as np

from benchmarks import model
from benchmarks.timing import by_turns

PROMPT, NEW = 32, 64


def measure(size, repeats, xla=None):
    """The records of this suite, for the active backend: seconds a token.

    The time to decode 1 token is taken from that to decode `NEW` of them, which
    leaves the pass over the prompt out.
    """
    settings = model.SIZES[size]
    prompt = np.random.default_rng(0).integers(0, settings["vocabulary"], (1, PROMPT))
    programs = {}
    for name in model.MODELS:
        task = model.task(name, settings)
        task.compile(sampler="greedy", jit_compile="auto" if xla is None else xla)
        for new in (1, NEW):
            programs[name, new] = _program(task, prompt, PROMPT + new)
    if keras.config.backend() == "torch":
        from benchmarks import transformers_mixtral as peer

        for implementation in model.TRANSFORMERS:
            mixtral = peer.mixtral(settings, implementation)
            for new in (1, NEW):
                programs[f"transformers {implementation}", new] = peer.generate(
                    mixtral, prompt, PROMPT + new
                )
    seconds = by_turns(programs, repeats)
    return [
        dict(
            case=f"generate, {NEW} tokens after {PROMPT}, a token",
            candidate=name,
            seconds=(runs - seconds[name, 1]) / (NEW - 1),
        )
        for (name, new), runs in seconds.items()
        if new == NEW
    ]


def _program(task, prompt, length):
    token_ids, mask = np.zeros((2, 1, length), "int32")
    token_ids[:, : prompt.shape[1]] = prompt
    mask[:, : prompt.shape[1]] = 1
    inputs = {"token_ids": token_ids, "padding_mask": mask}
    return lambda: task.generate(inputs, stop_token_ids=None)
