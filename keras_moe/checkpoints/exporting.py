"""A backbone becomes a checkpoint that Transformers loads."""

import json
import os
import pathlib
import re
import shutil
import tempfile

import keras
import numpy as np

from keras_moe import architecture
from keras_moe.checkpoints import tables
from keras_moe.checkpoints.families import FAMILIES
from keras_moe.checkpoints.loading import numpy_dtype
from keras_moe.checkpoints.shards import INDEX, SINGLE, ShardWriter
from keras_moe.checkpoints.tokenizer_files import write_json, write_tokenizer

_OF_TARGETS = ("decoder_start_token_id", "pad_token_id")
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def export_to_transformers(
    model, folder, dtype=None, max_shard_size="5GB", overwrite=False
):
    """Writes a model as a folder that Transformers loads.

    The folder holds `config.json`, `generation_config.json`, the weights as
    safetensors, and the tokenizer where `model` is a task that has one. What came
    with a task's checkpoint goes with it: its chat template, how it was meant to
    generate, the ids of its special tokens. It comes
    into being as a whole: until all is written, its files stand in a temporary
    folder next to it, which an error or an interrupt from the keyboard leaves no
    trace of; what a killed process leaves is hidden and ends in ".partial".

    Args:
        model: a backbone of this package, or a task over one.
        folder: path of the folder to make.
        dtype: `"float32"`, `"bfloat16"`, `"float16"`, or None for the dtype of the
            model's weights.
        max_shard_size: int, in bytes, or str such as `"5GB"`: the size of a file of
            weights, which a single larger tensor exceeds.
        overwrite: bool, whether a folder or a file that exists is replaced, with all
            that it holds. A link stays, and what it leads to is replaced.

    Raises:
        ValueError: for a model that no class of Transformers computes, naming the
            settings that none has, and for arguments out of range.
        FileExistsError: where the folder exists, without `overwrite`.
        OSError: where it cannot be written, such as for a full disk.

    Example:

    ```python
    causal_lm.export_to_transformers("exported", dtype="bfloat16")
    transformers.AutoModelForCausalLM.from_pretrained("exported")
    ```
    """
    backbone = getattr(model, "backbone", model)
    preprocessor = getattr(model, "preprocessor", None)
    folder = pathlib.Path(folder).expanduser().resolve()
    limit = _parse_size(max_shard_size)
    dtype = _export_dtype(dtype, backbone)
    settings = architecture.complete(backbone.get_config(), type(backbone))
    family, config = find_export(settings)
    if folder.exists() and not overwrite:
        raise FileExistsError(
            "`folder` must not exist, unless `overwrite=True` replaces it. "
            f"Received: folder={str(folder)!r}, overwrite={overwrite!r}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(
        tempfile.mkdtemp(
            prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent
        )
    )
    try:
        temporary.chmod(0o777 & ~_umask())
        extras = getattr(model, "checkpoint_extras", None) or {}
        ids, given = {}, {}
        if preprocessor is not None:
            ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
            carried = extras.get("tokenizer_config.json", {})
            given = write_tokenizer(temporary, preprocessor, carried)
        config = {**ids, **config, **extras.get("config.json", {}), **given}
        _write_config(temporary, family, config, dtype)
        generation = {}
        if family.has_encoder:  # generation looks for them there alone
            generation = {key: config[key] for key in _OF_TARGETS}
        generation.update(extras.get("generation_config.json", {}))
        write_json(temporary / "generation_config.json", {**generation, **given})
        entries, empty = family.entries(settings), family.empty(settings)
        _write_weights(temporary, backbone, entries, empty, dtype, limit)
        _put_in_place(temporary, folder)
    except BaseException:  # an interruption, too, must leave nothing behind
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def find_export(settings):
    """The family that a model of these settings belongs to, and its `config.json`.

    A family holds a model if its `config.json`, read again, gives the same settings.

    Args:
        settings: dict, all settings of a backbone.

    Returns:
        `(Family, dict)`.

    Raises:
        ValueError: where there is none, naming for the closest family what it lacks.
    """
    wanted = _canonical(settings)
    lacking = {}
    kinds = [
        family
        for family in FAMILIES.values()
        if family.has_encoder == architecture.has_encoder(settings)
    ]
    for family in kinds:
        try:
            # Through JSON, as it will be read.
            config = json.loads(json.dumps(family.config(settings)))
            found = _canonical({**_without_effect(settings), **_read(family, config)})
        except (ValueError, TypeError, KeyError, ZeroDivisionError):
            continue  # what the family cannot even write down
        different = [key for key in wanted if wanted[key] != found.get(key)]
        if not different and family.architecture is None:
            raise ValueError(
                "The model must be one that a class of Transformers computes. "
                f"Received: one of type {family.model_type!r}, for which Transformers "
                "has no class: the code comes with its checkpoint"
            )
        if not different:
            return family, config
        lacking[family.model_type] = different
    closest = min(lacking, key=lambda name: len(lacking[name]), default=None)
    detail = ""
    if closest is not None:
        what = ", ".join(f"{key}={wanted[key]!r}" for key in lacking[closest])
        detail = f". {closest!r} comes closest, without {what}"
    known = [family.model_type for family in kinds if family.architecture]
    raise ValueError(
        "The model must be one that a class of Transformers computes, such as "
        f"{', '.join(map(repr, known))}. Received: settings that none of them "
        f"has{detail}"
    )


def _read(family, config):
    read = family.reader({"model_type": family.model_type, **config})
    return family.settings(read)


def _without_effect(settings):
    """Values under which a setting that a family does not mention has no effect."""
    neutral = dict.fromkeys(settings)
    neutral.update(_NEUTRAL)
    return neutral


_NEUTRAL = {
    "attention": "grouped_query",
    "capacity_group": "batch",
    "dense_first_layers": 0,
    "dispatch": "dropless",
    "embedding_multiplier": 1.0,
    "expert_gated": True,
    "expert_groups": 1,
    "extra_dense": False,
    "gate_scale": 1.0,
    "gates_from": "all",
    "group_scores": "top_2",
    "moe_every": 1,
    "moe_offset": 0,
    "num_shared_experts": 0,
    "output_multiplier": 1.0,
    "output_norms": False,
    "positions": "rotary",
    "route_padding": False,
    "router": "top_k",
    "scores": "softmax",
    "selection_bias": False,
    "shared_expert_gate": False,
    "tied_embeddings": False,
    "top_k_groups": 1,
}


def _canonical(settings):
    """Settings that compute the same become the same; those of training go.

    Those of an encoder-decoder, where its stacks differ, go by names of their own.
    """
    stacks = [_canonical_stack(stack) for stack in architecture.stacks(settings)]
    found = {}
    for name, stack in zip(("encoder", "decoder"), stacks, strict=False):
        for key, value in stack.items():
            alike = all(key in s and s[key] == value for s in stacks)
            found[key if alike else f"{name}_{key}"] = value
    return found


def _canonical_stack(s):
    s = {key: value for key, value in s.items() if key not in architecture.TRAINING}
    s["shared_dim"] = architecture.shared_dim(s)
    s["mixtures"] = architecture.mixture_layers(s)
    s["sliding_layers"] = architecture.sliding_layers(s)
    s["normalize_gates"] = architecture.normalizes_gates(s)
    s["num_key_value_heads"] = architecture.num_key_value_heads(s)
    s["output_multiplier"] = architecture.output_multiplier(s)
    left = [
        "context_length",
        "shared_embeddings",  # two tables may hold the same
        *("num_shared_experts", "shared_expert_dim"),
        *("moe_every", "moe_offset", "dense_first_layers", "dense_layers"),
        *("encoder_layers", "decoder_layers"),  # `num_layers` of the stack
        *("encoder_dense_layers", "decoder_dense_layers"),
    ]
    if s["scores"] == "softmax":
        left += ["gates_from"]  # it comes to the same
    if s["dispatch"] == "dropless":
        # It says what padding gives, and how many of a group are dropped.
        left += ["capacity_group", "route_padding"]
    if len(s["mixtures"]) == s["num_layers"] and not s["extra_dense"]:
        left += ["dense_dim", "dense_gated"]
    else:
        s["dense_gated"] = architecture.dense_gated(s)
    if s["attention"] != "latent":
        s["head_dim"] = architecture.head_dim(s)
        left += ["query_rank", "key_value_rank", "rope_head_dim", "value_head_dim"]
    if s["positions"] != "relative_bias":
        left += ["relative_buckets", "relative_max_distance"]
    if s["positions"] != "rotary":
        left += ["rope_theta"]
    if s["expert_groups"] in (1, s["top_k_groups"]):  # all groups are searched
        left += ["expert_groups", "top_k_groups", "group_scores"]
    return {key: value for key, value in s.items() if key not in left}


def _write_config(folder, family, config, dtype):
    write_json(
        folder / "config.json",
        {
            "architectures": [family.architecture],
            "model_type": family.model_type,
            "dtype": dtype,
            "torch_dtype": dtype,
            **config,
        },
    )


def _write_weights(folder, backbone, entries, empty, dtype, limit):
    parts = {name: [] for name in empty}
    for entry in entries:
        parts.setdefault(entry.name, []).append(entry)
    specifications = [
        (name, numpy_dtype("float32" if exact else dtype), shape)
        for name, (shape, exact) in tables.tensors(entries).items()
    ] + [(name, numpy_dtype(dtype), shape) for name, shape in empty.items()]
    shards = _split(specifications, limit)
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        file = SINGLE
        if len(shards) > 1:
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        with ShardWriter(folder / file, shard) as writer:
            for name, tensor_dtype, shape in shard:
                weight_map[name] = file
                total += _bytes((name, tensor_dtype, shape))
                writer.write(_tensor(backbone, parts[name], tensor_dtype, shape))
    if len(shards) > 1:
        metadata = {"total_size": total}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": weight_map})


def _tensor(backbone, entries, dtype, shape):
    if len(entries) == 1 and entries[0].row is None:
        (entry,) = entries
        return entry.to_tensor(_part(backbone, entry, dtype))
    whole = np.empty(shape, dtype)
    for entry in entries:
        part = entry.to_tensor(_part(backbone, entry, dtype))
        whole[entry.row : entry.row + part.shape[0]] = part
    return whole


def _part(backbone, entry, dtype):
    value = tables.find_weight(backbone, entry.path).value
    if entry.index is not None:
        value = value[entry.index]
    return keras.ops.convert_to_numpy(value).astype(dtype, copy=False)


def _split(specifications, limit):
    """Lists of tensors, each list within a limit as far as that is possible."""
    shards, size = [[]], 0
    for specification in specifications:
        size += _bytes(specification)
        if shards[-1] and size > limit:
            shards.append([])
            size = _bytes(specification)
        shards[-1].append(specification)
    return shards


def _bytes(specification):
    _, dtype, shape = specification
    return int(np.prod(shape)) * dtype.itemsize


def _put_in_place(temporary, folder):
    """Renames the finished folder; what stands in its place goes only after that."""
    if not folder.exists():
        os.rename(temporary, folder)
        return
    old = temporary.with_suffix(".old")
    os.rename(folder, old)
    try:
        os.rename(temporary, folder)
    except BaseException:
        os.rename(old, folder)
        raise
    if old.is_dir():
        shutil.rmtree(old)
    else:
        old.unlink()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _export_dtype(dtype, backbone):
    if dtype is None:
        return keras.backend.standardize_dtype(backbone.variable_dtype)
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(
            "`dtype` must be 'float32', 'bfloat16', 'float16' or None. "
            f"Received: dtype={dtype!r}"
        )
    return dtype


def _parse_size(size):
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = None
    if isinstance(size, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]B)", size.upper())
    if match is None or not float(match[1]):
        raise ValueError(
            "`max_shard_size` must be a positive number of bytes, or a string such as "
            f"'5GB'. Received: max_shard_size={size!r}"
        )
    return int(float(match[1]) * _UNITS[match[2]])
