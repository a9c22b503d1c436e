"""A checkpoint of Transformers becomes a backbone, a weight at a time."""

import dataclasses
import math
import pathlib

import ml_dtypes
import numpy as np
from tqdm import tqdm

from keras_moe import architecture
from keras_moe.checkpoints import memory, tables
from keras_moe.checkpoints.families import find_family
from keras_moe.checkpoints.shards import DTYPES, Shards, read_json
from keras_moe.layers.initializers import skipped
from keras_moe.ops import assign_parts

_STACK = ".mlp.experts.gate_up_proj"
# What tied embeddings are one of: those of the encoder, the decoder and the output.
_TABLES = (
    "token_embedding.embeddings",
    "decoder_embedding.embeddings",
    "token_embedding.reverse_embeddings",
)
_ROWS = 4096  # compared at once
_SCALE = "_scale_inv"  # of weights in float8, next to them


def is_checkpoint(folder):
    """Whether a folder's `config.json` is one of Transformers, and not of Keras."""
    path = pathlib.Path(folder) / "config.json"
    if not path.is_file():
        return False
    config = read_json(path)
    return "model_type" in config and "registered_name" not in config


def read_settings(folder):
    """The family of a checkpoint and the settings of its backbone.

    Args:
        folder: path of a folder with a `config.json` of Transformers.

    Returns:
        `(Family, settings)`.

    Raises:
        ValueError: for broken JSON, an unknown `model_type`, and for a key whose
            value is not implemented.
    """
    config = read_json(pathlib.Path(folder) / "config.json")
    family = find_family(config)
    read = family.reader(config)
    _check_quantization(read)
    settings = family.settings(read)
    read.finish()
    return family, settings


def load_backbone(
    backbone_cls, folder, load_weights=True, dtype=None, verbose=None, **kwargs
):
    """Builds a backbone from a checkpoint and fills in its weights.

    All files' headers are checked against the settings before anything is built.
    Then one weight after another is read, laid out and assigned, so that memory
    holds the model and little more.

    Args:
        backbone_cls: `MoEBackbone` or `MoESeq2SeqBackbone`.
        folder: path of the checkpoint.
        load_weights: bool, False for the settings alone, with random weights.
        dtype: dtype policy of the backbone, whatever the checkpoint's dtype is.
        verbose: bool or None, whether a progress bar is shown on stderr; None for
            in a terminal only.
        **kwargs: settings that override what `config.json` says, `name`,
            `trainable`.

    Returns:
        A backbone.

    Raises:
        ValueError: for tensors that are missing, left over, or of another shape or
            dtype than can be read, and for what `Shards` and `read_settings`
            refuse.
        FileNotFoundError: where shards are missing.
        MemoryError: for a model that memory cannot hold.
    """
    family, settings = read_settings(folder)
    if family.has_encoder != architecture.has_encoder(architecture.names(backbone_cls)):
        kind, other = "a decoder", "MoEBackbone or MoECausalLM"
        if family.has_encoder:
            kind, other = "an encoder-decoder", "MoESeq2SeqBackbone or MoESeq2SeqLM"
        raise ValueError(
            f"A checkpoint of type {family.model_type!r} is {kind}: load it by {other}."
            f" Received: {str(folder)!r} for {backbone_cls.__name__}"
        )
    settings.update(kwargs)
    if not load_weights:
        return backbone_cls(**settings, dtype=dtype)
    complete = architecture.complete(settings, backbone_cls)
    architecture.check(complete)
    with Shards(folder) as shards:
        tabulate = family.entries
        if family.stacked is not None and _has_stacks(shards):
            tabulate = family.stacked
        stand_ins = family.stand_ins
        if complete["tied_embeddings"]:
            stand_ins = {**stand_ins, **dict.fromkeys(family.tied, family.tied)}
            if "tied_embeddings" not in kwargs:
                untied = _untied(shards, stand_ins, family, complete)
                settings, complete = {**settings, **untied}, {**complete, **untied}
        entries = [
            dataclasses.replace(entry, name=_present(entry.name, stand_ins, shards))
            for entry in tabulate(complete)
        ]
        _check_tensors(shards, entries, family, complete)
        memory.check_room(settings, dtype)
        with skipped():
            backbone = backbone_cls(**settings, dtype=dtype)
        _assign_all(backbone, shards, entries, _block_size(folder), verbose)
    return backbone


def _has_stacks(shards):
    """Whether the experts of a layer are in one tensor."""
    return any(name.endswith(_STACK) for name in shards.names())


def _untied(shards, stand_ins, family, settings):
    """The settings of what is said to be tied, where the checkpoint holds other values.

    As in Transformers, what a checkpoint holds goes before what it says. How logits
    are scaled stays as it is said.
    """
    apart = {**settings, "tied_embeddings": False, "shared_embeddings": False}
    named = {entry.path: entry.name for entry in family.entries(apart)}
    encoder, *others = (
        _present(named[path], stand_ins, shards) for path in _TABLES if path in named
    )
    same = [_are_equal(shards, encoder, other) for other in others]
    if all(same):
        return {}
    untied = {
        "tied_embeddings": False,
        "output_multiplier": architecture.output_multiplier(settings),
    }
    if family.has_encoder:
        untied["shared_embeddings"] = same[0]
    return untied


def _are_equal(shards, one, other):
    """Whether two tensors hold the same; so does one that is not there at all."""
    if one == other or one not in shards or other not in shards:
        return True
    if shards.shape(one) != shards.shape(other):
        return False
    rows, columns = shards.shape(one)

    def read(name, row):
        return shards.read(name, row, (min(_ROWS, rows - row), columns))

    return all(
        np.array_equal(read(one, row), read(other, row))
        for row in range(0, rows, _ROWS)
    )


def _present(name, stand_ins, shards):
    """A tensor's name, or that of the first that stands for it and is there."""
    names = (name, *stand_ins.get(name, ()))
    return next((n for n in names if n in shards), name)


def _assign_all(backbone, shards, entries, block, verbose):
    parts = tables.weights(entries)
    variables = {path: tables.find_weight(backbone, path) for path in parts}
    _check_complete(backbone, variables)
    # As they lie in the files, so that each file is read once and in order.
    order = sorted(parts, key=lambda path: shards.position(parts[path][0].name))
    total = sum(math.prod(variable.shape) for variable in variables.values())
    disable = None if verbose is None else not verbose
    with tqdm(
        total=total, unit=" weights", unit_scale=True, disable=disable
    ) as progress:
        for path in order:
            _assign(variables[path], shards, parts[path], block)
            progress.update(math.prod(variables[path].shape))


def _assign(variable, shards, entries, block):
    shape = tables.weight_shape(entries)
    if shape != tuple(variable.shape):
        raise ValueError(
            f"The weight {variable.path!r} must have the shape {shape}. "
            f"Received: {tuple(variable.shape)}"
        )
    dtype = numpy_dtype(variable.dtype)
    assign_parts(
        variable,
        ((entry.index, _part(shards, entry, block, dtype)) for entry in entries),
    )


def _part(shards, entry, block, dtype):
    """The part of a weight that an entry stands for, as a NumPy array."""
    row, shape = entry.row or 0, entry.part_shape
    part = shards.read(entry.name, row, shape)
    if shards.dtype_name(entry.name) == "F8_E4M3":
        scales = shards.read(entry.name + _SCALE)
        if entry.stacked:  # each matrix has blocks of its own
            matrix, row = divmod(row, shards.shape(entry.name)[1])
            scales = scales[matrix]
        part = _dequantise(part, scales, block, row)
    return entry.to_weight(_cast(part, dtype))


def _cast(array, dtype):
    """`array` in another dtype, fast where NumPy is slow."""
    if array.dtype == dtype:
        return array
    if array.dtype == ml_dtypes.bfloat16 and dtype == np.float32:
        # A bfloat16 is the upper half of a float32.
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return array.astype(dtype)


def _dequantise(part, scales, block, row):
    """Rows of a matrix, from `row` on, times the scales of the blocks they lie in."""
    rows, columns = (
        np.minimum((first + np.arange(size)) // width, count - 1)
        for first, size, width, count in zip(
            (row, 0), part.shape, block, scales.shape, strict=True
        )
    )
    return part.astype(np.float32) * scales.astype(np.float32)[rows][:, columns]


def numpy_dtype(name):
    """The dtype of NumPy, bfloat16 among them, by its Keras name."""
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _check_complete(backbone, variables):
    """Every weight of the backbone gets its values, each once."""
    named = {id(variable) for variable in variables.values()}
    left = [v.path for v in backbone.weights if id(v) not in named]
    if left or len(named) != len(variables):
        raise ValueError(
            "The checkpoint's family must name every weight of the backbone once. "
            f"Received: settings that leave {', '.join(left) or 'none'} out"
        )


def _check_tensors(shards, entries, family, settings):
    wanted = tables.tensors(entries)
    missing = [name for name in wanted if name not in shards]
    if missing:
        raise ValueError(
            f"The checkpoint must hold every tensor of its model. Received: one "
            f"without {_some(missing)}"
        )
    scales = set()
    for name, (shape, _) in wanted.items():
        dtype = shards.dtype_name(name)
        if dtype not in DTYPES:
            raise ValueError(
                f"Tensors must have a dtype of {', '.join(DTYPES)}. Received: "
                f"{dtype} for {name!r} in {shards.file_name(name)!r}"
            )
        if shards.shape(name) != shape:
            raise ValueError(
                f"The tensor {name!r} must have the shape {shape}, by `config.json` "
                f"and the settings given. Received: {shards.shape(name)} in "
                f"{shards.file_name(name)!r}"
            )
        if dtype == "F8_E4M3":
            _check_scale(shards, name)
            scales.add(name + _SCALE)
    left = [
        name
        for name in shards.names()
        if name not in wanted
        and name not in scales
        and not family.ignored(name, settings)
        and math.prod(shards.shape(name))  # of no shared experts, for example
    ]
    if left:
        raise ValueError(
            "The checkpoint must hold no tensors but those of its model. Received: "
            f"{_some(sorted(left))} as well"
        )


def _check_scale(shards, name):
    scale = name + _SCALE
    if scale not in shards or len(shards.shape(scale)) != len(shards.shape(name)):
        raise ValueError(
            f"A tensor in float8 must come with its scales. Received: {name!r} "
            f"without a fitting {scale!r}"
        )


def _check_quantization(read):
    quantization = read.get("quantization_config", {})
    if not quantization:
        return
    if (
        not isinstance(quantization, dict)
        or quantization.get("quant_method") != "fp8"
        or quantization.get("fmt", "e4m3") != "e4m3"
        or not _is_block(quantization.get("weight_block_size"))
    ):
        read.refuse("quantization_config", "fp8 (e4m3) in blocks of weights")


def _is_block(value):
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(isinstance(size, int) and size > 0 for size in value)
    )


def _block_size(folder):
    config = read_json(pathlib.Path(folder) / "config.json")
    return (config.get("quantization_config") or {}).get("weight_block_size")


def _some(names):
    shown = ", ".join(map(repr, names[:3]))
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
