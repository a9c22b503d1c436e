"""
Title: Getting started with keras_moe
Author: The keras_moe authors
Description: Load a mixture-of-experts language model, use it, train it, save it.

## What this is

In a mixture-of-experts model some layers hold many small networks, the *experts*, and a
*router* that picks a few of them for every token. Such a model has many parameters, and
computes with few of them at a time.

`keras_moe.models.MoECausalLM` is such a model for text. It is a
[KerasHub](https://keras.io/keras_hub/) `CausalLM`, so that `compile`, `fit`, `generate`
and `save_to_preset` are those you know. This guide walks through them with a model
small enough for a laptop. Nothing is downloaded.

## Choosing a backend

Keras runs on JAX, torch or TensorFlow, and so does everything here. The choice is made
before Keras is imported, by the environment variable `KERAS_BACKEND`:

    KERAS_BACKEND=torch python guides/getting_started.py

or in Python, `os.environ["KERAS_BACKEND"] = "torch"`. A model saved on one backend
loads on the others. Without either, Keras takes what `~/.keras/keras.json` says, and at
first TensorFlow.

`--fast` trains for a few steps only, to see that all of it runs.
"""

import pathlib
import sys
import tempfile
import warnings

import keras
import keras_hub
import numpy as np
from keras import ops

import keras_moe
from keras_moe.layers.routing_statistics import expert_load

FAST = "--fast" in sys.argv
print("Keras runs on", keras.config.backend())
keras.utils.set_random_seed(2024)

"""
## Loading a model

A preset is a folder with a model's settings and, for the small ones in this package,
its tokenizer and trained weights. `from_preset` takes a preset's name, or the path of a
folder of your own.
"""

causal_lm = keras_moe.models.MoECausalLM.from_preset("mixtral_tiny_en")
backbone = causal_lm.backbone
print(
    f"{backbone.num_layers} layers with {backbone.num_experts} experts each, "
    f"{backbone.top_k} for a token; {backbone.count_params():,} parameters"
)

"""
This one has the architecture of Mixtral and was trained for some minutes on the English
of Python's documentation. It has the manner of that text, and no knowledge.

## Generating text

`generate` goes on from a prompt, up to `max_length` tokens, prompt included. Which
token comes next is the choice of a *sampler*, set by `compile`. `"greedy"` takes the
likeliest one and always writes the same; others draw at random from the better ones. A
list of prompts is generated as one batch, and `strip_prompt=True` leaves the prompt out
of the result.
"""

samplers = {
    "greedy": "greedy",
    "top_k": keras_hub.samplers.TopKSampler(k=20, temperature=0.8, seed=1),
    "top_p": keras_hub.samplers.TopPSampler(p=0.9, temperature=0.8, seed=1),
}
length = 24 if FAST else 64
for name in ["greedy"] if FAST else samplers:
    causal_lm.compile(sampler=samplers[name])
    texts = causal_lm.generate(
        ["The function returns", "If the file"], max_length=length, strip_prompt=True
    )
    for text in texts:
        print(f"{name}: {text!r}")

"""
## Seeing the routing

`backbone.routing_statistics` runs a batch and returns, for every mixture layer, sums
over its tokens: how many choices fell on each expert, how many were dropped, and what
the balance loss is made of. `expert_load` makes shares of them. Padding is left out.

Are experts chosen alike for different kinds of text? Below are the shares, in percent,
of the eight experts in the first layer.
"""

kinds = {
    "prose": "It is an error to use the name of a module before it has been imported.",
    "code": "def f(self, *args, **kwargs): return [x for x in self.items if x]",
    "numbers": "1, 22, 333, 4444, 55555, 3.14159, 2.71828, 0.5, 100, 2000, 30000",
}
for kind, text in kinds.items():
    inputs, _, _ = causal_lm.preprocessor([text])
    first_layer = backbone.routing_statistics(inputs)[0]
    load = ops.convert_to_numpy(expert_load(first_layer))
    print(f"{kind:8}", " ".join(f"{100 * share:5.1f}" for share in load))

"""
## Training on a text file

We write a file first, from text that the preset was not trained on, and read it back as
if it were yours. `fit` takes a list of strings. Three things to know of it:

- A string longer than the preprocessor's `sequence_length`, here 128 tokens, is cut at
  its end. So give it pieces of about that length; here, paragraphs.
- A shorter one is padded. Padding is masked: it takes no expert and counts in no
  metric. The `loss` that Keras shows is averaged over padding too, though, so that it
  looks smaller than it is. Perplexity, as a weighted metric, is not.
- KerasHub's tasks do not shuffle. We do it here.
"""

folder = pathlib.Path(tempfile.mkdtemp(prefix="keras_moe_guide_"))
path = folder / "text.txt"
path.write_text("\n\n".join(keras_moe.sample_text("test")), encoding="utf-8")

paragraphs = path.read_text(encoding="utf-8").split("\n\n")
np.random.default_rng(0).shuffle(paragraphs)
held_out = len(paragraphs) // 10
validation, training = paragraphs[:held_out], paragraphs[held_out:]
if FAST:
    validation, training = validation[:16], training[:32]
print(f"{len(training)} paragraphs to train on, {len(validation)} held out")

causal_lm.compile(
    optimizer=keras.optimizers.AdamW(5e-4, weight_decay=0.01),
    weighted_metrics=[keras_hub.metrics.Perplexity(from_logits=True)],
    sampler="greedy",
)
before = causal_lm.evaluate(validation, batch_size=16, return_dict=True, verbose=0)
causal_lm.fit(training, batch_size=16, epochs=1 if FAST else 2)
after = causal_lm.evaluate(validation, batch_size=16, return_dict=True, verbose=0)
print(f"perplexity on the part held out: {before['perplexity']:.1f} before training,")
print(f"{after['perplexity']:.1f} after it")

"""
The balance loss of each layer, which keeps experts from idling, was part of the loss
that `fit` showed. `evaluate` leaves it out. How the experts fared in the last training
step can be read off each layer:
"""

for index, mixture in enumerate(backbone.mixtures):
    load = ops.convert_to_numpy(mixture.expert_load)
    print(f"mixture {index}: least {load.min():.1%}, most {load.max():.1%}")

"""
## Saving and loading

`save_to_preset` writes a folder like the one the model came from: settings, tokenizer
and weights. It loads on every backend, and `keras_hub.models.CausalLM.from_preset`
finds the class by itself once keras_moe is imported.
"""

prompt = "The function returns"
text = causal_lm.generate(prompt, max_length=length)
causal_lm.save_to_preset(str(folder / "my_preset"))
reloaded = keras_moe.models.MoECausalLM.from_preset(str(folder / "my_preset"))
reloaded.compile(sampler="greedy")
assert reloaded.generate(prompt, max_length=length) == text
print(text)

"""
## Half precision

With the dtype policy `"mixed_bfloat16"` a model computes in bfloat16 and keeps its
weights in float32. The routers compute in float32 in any case: in half precision they
would choose other experts.
"""

mixed = keras_moe.models.MoEBackbone.from_preset(
    "mixtral_tiny_en", dtype="mixed_bfloat16"
)
experts = mixed.mixtures[0].experts
print("experts compute in", experts.compute_dtype, "on", experts.variable_dtype)

"""
With `"bfloat16"` the weights are bfloat16 as well, half the memory. Beware of Adam
there: its `beta_2` of 0.999 rounds to 1 in bfloat16, and not one weight moves, without
any error from Keras. `MoECausalLM` warns of it. Left to choose, it takes Lion, which is
not affected.
"""

half = keras_moe.models.MoECausalLM.from_preset("mixtral_tiny_en", dtype="bfloat16")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    half.compile(optimizer="adam")
print("Adam:", caught[0].message)
half.compile()
print("chosen instead:", type(half.optimizer).__name__)

"""
## An architecture without its weights

Published models come as settings: `load_weights=False` builds one with random weights,
to train it from scratch, and what you name is overridden. Such a model of the size that
was published rarely fits a laptop, but a model of its kind does.
"""

small = keras_moe.models.MoEBackbone.from_preset(
    "mixtral_8x7b",
    load_weights=False,
    num_layers=2,
    hidden_dim=64,
    num_query_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    expert_dim=128,
)
print(f"a Mixtral of {small.num_layers} layers, {small.count_params():,} parameters")

"""
A preset with weights allows only those overrides that leave its weights in place, such
as `dtype` or `dropout`. Where weights are public, as Mixtral's, the preset's name
fetches and converts them. Where none were published, asking for them is an error:
"""

try:
    keras_moe.models.MoECausalLM.from_preset("glam_8b_64e")
except ValueError as error:
    print(error)

"""
## Where to go next

- [encoder_decoder.py](encoder_decoder.py): a model that fills gaps, and turns one text
  into another.
- [your_own_model.py](your_own_model.py): the mixture layer in models of your own.
- [docs/architecture.md](../docs/architecture.md): how it is built inside.
- `keras_moe.models.MoEBackbone.presets`: what else there is to load.
"""
