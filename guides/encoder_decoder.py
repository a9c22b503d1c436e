"""
Title: An encoder-decoder: from gaps to text-to-text
Author: The keras_moe authors
Description: Fill gaps in a text, go on with pre-training, fine-tune, save.

## What this is

A Switch Transformer reads a text with an *encoder* and writes another one with a
*decoder*, and layers of both have a mixture of experts: every second one in those of
the paper, and all of them in the small one of this guide. It learnt by
*span corruption*, T5's pre-training task: spans are taken out of a text, and the model
has to write them. From there it is fine-tuned to turn one text into another.

`keras_moe.models.MoESeq2SeqLM` is a KerasHub `Seq2SeqLM`. This guide fills gaps with a
small one, trains it further on a new text, and then on a task of its own.
[getting_started.py](getting_started.py) comes first, if you are new here: what it says
of backends, samplers and half precision holds for this model, too.

`--fast` trains for a few steps only, to see that all of it runs.
"""

import pathlib
import sys
import tempfile

import keras
import keras_hub
import numpy as np
from keras import ops

import keras_moe
from keras_moe.layers.routing_statistics import dropped_fraction, expert_load

FAST = "--fast" in sys.argv
print("Keras runs on", keras.config.backend())
keras.utils.set_random_seed(2024)

"""
## Loading a model
"""

seq2seq_lm = keras_moe.models.MoESeq2SeqLM.from_preset("switch_tiny_en")
backbone = seq2seq_lm.backbone
print(
    f"{backbone.encoder_layers} layers that read and {backbone.decoder_layers} that "
    f"write, {backbone.num_experts} experts in each, {backbone.top_k} for "
    f"a token; {backbone.count_params():,} parameters"
)

"""
## Filling gaps

A *sentinel*, `<extra_id_0>`, `<extra_id_1>` and so on, stands for each gap of the
source. The target has the same sentinels, and after each the words that belong there.
The model is small and has read nothing but Python's documentation for some minutes, so
it finds common words, and seldom the right ones.
"""


def filled(source, target):
    """`source` with its gaps filled by what `target` says of them."""
    for index in range(100):
        sentinel, following = f"<extra_id_{index}>", f"<extra_id_{index + 1}>"
        if sentinel not in source:
            return source
        words = target.partition(sentinel)[2].partition(following)[0].strip()
        source = source.replace(sentinel, f"[{words}]")


sources = [
    "If the file does <extra_id_0> exist, an error is raised.",
    "The return value <extra_id_0> a list <extra_id_1> strings.",
]
seq2seq_lm.compile(sampler="greedy")
targets = seq2seq_lm.generate(sources, max_length=16)
for source, target in zip(sources, targets, strict=True):
    print(target)
    print("   ", filled(source, target))

"""
## Seeing the routing

`routing_statistics` runs a batch and returns sums over its tokens for every mixture,
those of the encoder first. An expert here accepts a limited number of tokens, its
*capacity*. What exceeds it is dropped: the layer leaves such a token as it is.
"""


def show_load(inputs):
    found = backbone.routing_statistics(inputs)
    in_encoder = sum(b.is_mixture for b in backbone.encoder_transformer_layers)
    for index, statistics in enumerate(found):
        load = ops.convert_to_numpy(expert_load(statistics))
        dropped = float(ops.convert_to_numpy(dropped_fraction(statistics)))
        print(
            "encoder" if index < in_encoder else "decoder",
            " ".join(f"{100 * share:5.1f}" for share in load),
            f"  {100 * dropped:.1f}% dropped",
        )


"""
## Pre-training on your own text

`SpanCorruption` is the task: a function of token ids and a random generator, in NumPy
alone. `SpanCorruptionDataset` lays texts end to end, cuts them into examples that fill
the encoder's input, and takes new spans out of them in each epoch. For held-out text we
want the same spans each time, so that losses can be compared.
"""

tokenizer = seq2seq_lm.preprocessor.tokenizer
corruption = keras_moe.SpanCorruption(inputs_length=128, tokenizer=tokenizer)
documents = keras_moe.sample_text("test")  # which the preset was not trained on
held_out = keras_moe.SpanCorruptionDataset(
    documents[:2] if FAST else documents[:8],
    corruption,
    batch_size=16,
    fresh_noise=False,
    shuffle=False,
)
training = keras_moe.SpanCorruptionDataset(
    documents[2:4] if FAST else documents[8:], corruption, batch_size=16
)

inputs, targets, weights = training[0]
print("source:", tokenizer.detokenize(inputs["encoder_token_ids"][0])[:150], "...")
print("target:", tokenizer.detokenize(targets[0])[:100], "...")
print("shares of the experts in percent, of the tokens of one batch:")
show_load(inputs)

"""
The batches are token ids already, so the model that trains on them has no preprocessor.
It shares the backbone, and so its weights, with the one above. `weighted_metrics` leave
out padding, as `sample_weight` in each batch says.
"""

pretrainer = keras_moe.models.MoESeq2SeqLM(backbone)
pretrainer.compile(
    optimizer=keras.optimizers.AdamW(5e-4, weight_decay=0.01),
    loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    weighted_metrics=[keras_hub.metrics.Perplexity(from_logits=True)],
)
before = pretrainer.evaluate(held_out, return_dict=True, verbose=0)
pretrainer.fit(training, epochs=1 if FAST else 3, verbose=2)
after = pretrainer.evaluate(held_out, return_dict=True, verbose=0)
print(f"perplexity of spans held out: {before['perplexity']:.1f} before training,")
print(f"{after['perplexity']:.1f} after it")

"""
## Fine-tuning on a task

Text-to-text means that the answer to any question is text. Ours is whether the words of
a sentence stand in their order. `fit` takes the two texts as a dict, and the
preprocessor makes token ids, padding and weights of them.
"""

random = np.random.default_rng(0)
sentences = [
    sentence
    for text in keras_moe.sample_text("train")[::4]
    for sentence in text.replace("\n", " ").split(". ")
    if 6 <= len(sentence.split()) <= 16
]
random.shuffle(sentences)


def examples(sentences):
    """Every second sentence with its words shuffled."""
    sources, answers = [], []
    for index, sentence in enumerate(sentences):
        words = sentence.split()
        if index % 2:
            random.shuffle(words)
        sources.append("in order? " + " ".join(words))
        answers.append("no" if index % 2 else "yes")
    return {"encoder_text": sources, "decoder_text": answers}


count = 64 if FAST else 1600
test = examples(sentences[:64])
train = examples(sentences[64 : 64 + count])

seq2seq_lm.preprocessor.encoder_sequence_length = 64
seq2seq_lm.preprocessor.decoder_sequence_length = 8
seq2seq_lm.compile(
    optimizer=keras.optimizers.AdamW(1e-3, weight_decay=0.01), sampler="greedy"
)
seq2seq_lm.fit(train, batch_size=32, epochs=1 if FAST else 4, verbose=2)
answers = seq2seq_lm.generate(test["encoder_text"], max_length=8)
right = np.mean([a == b for a, b in zip(answers, test["decoder_text"], strict=True)])
for index in range(2):
    print(f"{test['encoder_text'][index]!r}: {answers[index]!r}")
print(f"{right:.0%} of {len(answers)} answers are right")

"""
A training step also notes how the experts fared in it:
"""

for block in [
    *backbone.encoder_transformer_layers,
    *backbone.decoder_transformer_layers,
]:
    if block.is_mixture:
        load = ops.convert_to_numpy(block.feed_forward.expert_load)
        print(f"{block.name}: least {load.min():.1%}, most {load.max():.1%}")

"""
## Saving and loading

`save_to_preset` writes settings, tokenizer and weights, for every backend. Once
keras_moe is imported, KerasHub's own class finds what the folder holds.
"""

folder = pathlib.Path(tempfile.mkdtemp(prefix="keras_moe_guide_"))
seq2seq_lm.save_to_preset(str(folder / "my_preset"))
reloaded = keras_hub.models.Seq2SeqLM.from_preset(str(folder / "my_preset"))
reloaded.compile(sampler="greedy")
assert reloaded.generate(test["encoder_text"], max_length=8) == answers
print("saved and loaded:", type(reloaded).__name__)

"""
## Where to go next

- `keras_moe.models.MoESeq2SeqBackbone.presets`: Switch Transformers from Base-8 to
  C-2048, GShard and ST-MoE, as settings to build with random weights.
- `MoESeq2SeqLM.from_preset("hf://...")` reads Transformers' checkpoints of type
  `switch_transformers`, and `export_to_transformers` writes them.
- [your_own_model.py](your_own_model.py): the mixture layer in models of your own.
"""
