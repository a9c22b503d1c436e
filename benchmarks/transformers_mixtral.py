"""Transformers' Mixtral, for comparison on torch."""

import torch
import transformers

from benchmarks.programs import wait_for_torch


def mixtral(settings, implementation):
    """A model of random weights.

    Args:
        settings: one of `benchmarks.model.SIZES`.
        implementation: `"eager"` (a loop over experts) or `"grouped_mm"`.
    """
    config = transformers.MixtralConfig(
        vocab_size=settings["vocabulary"],
        num_hidden_layers=settings["layers"],
        hidden_size=settings["dim"],
        num_attention_heads=settings["heads"],
        num_key_value_heads=settings["key_value_heads"],
        intermediate_size=settings["hidden"],
        num_local_experts=settings["experts"],
        num_experts_per_tok=settings["top_k"],
        sliding_window=None,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        experts_implementation=implementation,
    )
    model = transformers.MixtralForCausalLM(config).to(
        getattr(torch, settings["dtype"])
    )
    return model.cuda() if torch.cuda.is_available() else model


def forward(model, inputs):
    """A function of no arguments that computes the logits."""
    tokens = torch.as_tensor(inputs["token_ids"], device=model.device)

    def run():
        with torch.no_grad():
            model(tokens, use_cache=False)
        wait_for_torch()

    return run


def training_step(model, inputs, targets):
    """A function of no arguments that takes a step of SGD on one batch."""
    tokens = torch.as_tensor(inputs["token_ids"], device=model.device)
    targets = torch.as_tensor(targets, device=model.device).long()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def run():
        optimizer.zero_grad()
        logits = model(tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten()
        )
        loss.backward()
        optimizer.step()
        wait_for_torch()

    return run


def generate(model, prompt, length):
    """A function of no arguments that decodes greedily to `length` tokens."""
    prompt = torch.as_tensor(prompt, device=model.device)

    def run():
        with torch.no_grad():
            model.generate(
                prompt, max_length=length, min_length=length, do_sample=False
            )
        wait_for_torch()

    return run
