"""Presets: where a name leads, and what a preset's folder must hold.

A preset is a folder of data, as KerasHub reads it: `config.json` (the settings of
a backbone), and where they exist `model.weights.h5`, `preprocessor.json`,
`tokenizer.json` and `assets/`. `preset.json` and `README.md` describe it.
"""

import difflib
import functools
import pathlib

import h5py

from keras_moe import architecture
from keras_moe.checkpoints import hub, memory, tokenizer_files
from keras_moe.checkpoints.loading import is_checkpoint, read_settings
from keras_moe.checkpoints.shards import read_json
from keras_moe.models._keras_hub import preset_file, preset_has_file

__all__ = ["is_checkpoint"]

ROOT = pathlib.Path(__file__).parent.parent / "presets"
WEIGHTS = "model.weights.h5"
SHARDED_WEIGHTS = "model.weights.json"
_JSON_FILES = (
    "config.json",
    "task.json",
    "preprocessor.json",
    "tokenizer.json",
    SHARDED_WEIGHTS,
)


@functools.cache
def names(*backbones):
    """The names of the presets that come with the package, sorted.

    Those of classes of backbones, by their names, or all.
    """
    found = sorted(ROOT.glob("*/config.json"))
    if backbones:
        found = [p for p in found if read_json(p)["class_name"] in backbones]
    return tuple(path.parent.name for path in found)


def describe(name):
    """What `preset.json` says of a preset: a dict."""
    return read_json(ROOT / name / "preset.json")


def settings(folder):
    """The settings of the backbone in a folder, of Keras or Transformers: a dict.

    Raises:
        ValueError: for broken JSON, and for one of another class.
    """
    if is_checkpoint(folder):
        return read_settings(folder)[1]
    path = pathlib.Path(folder) / "config.json"
    return settings_of(read_json(path), path)


def settings_of(content, source):
    """The settings in what Keras writes of a backbone: a dict.

    Args:
        content: dict, as `config.json` holds it.
        source: what it came from, for the error.

    Raises:
        ValueError: if it describes something else.
    """
    name, config = content.get("class_name"), content.get("config")
    if name not in _BACKBONES or not isinstance(config, dict):
        raise ValueError(
            f"{str(source)!r} must describe a `{'` or a `'.join(_BACKBONES)}`, as "
            f"`save_to_preset` writes it. Received: class_name={name!r} and "
            f"{'no ' if config is None else ''}config"
        )
    return config


_BACKBONES = ("MoEBackbone", "MoESeq2SeqBackbone")


def has_weights(folder):
    """Whether a local folder holds weights."""
    return any((pathlib.Path(folder) / f).exists() for f in (WEIGHTS, SHARDED_WEIGHTS))


def preset_folder(
    preset,
    load_weights=False,
    revision=None,
    token=None,
    tokenizer=False,
    overrides=None,
):
    """The folder of a preset, checked as far as that costs little.

    Args:
        preset: str: a preset's name, a local folder, or a handle. A checkpoint of
            Transformers on the hub, `"hf://user/model"` or one that a preset names,
            is fetched; other handles are returned as they came.
        load_weights: bool, whether weights must be there.
        revision: str or None, a branch, tag or commit on the hub.
        token: str or None, for the hub.
        tokenizer: bool, whether a tokenizer must be there.
        overrides: dict or None, settings and `dtype` that go before the preset's:
            whether there is room for the weights is asked before they are fetched.

    Returns:
        str: a path or a handle.

    Raises:
        ValueError: for an unknown name, JSON that is broken or not an object, a
            shard outside the folder, and missing or broken weights.
        FileNotFoundError: for a folder without `config.json`, or without a shard.
        MemoryError: for a checkpoint on the hub that there is no room for.
    """
    if not isinstance(preset, (str, pathlib.Path)):
        raise ValueError(
            "`preset` must be a preset's name, a folder or a handle. "
            f"Received: preset={preset!r}"
        )
    if str(preset).startswith(hub.PREFIX):
        return _fetched(preset, load_weights, revision, token, overrides)
    if "://" in str(preset):
        _check_no_hub(revision, token, preset)
        return preset
    folder = ROOT / preset if str(preset) in names() else pathlib.Path(preset)
    if not folder.is_dir():
        close = difflib.get_close_matches(str(preset), names(), n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(
            f"`preset` must be one of {', '.join(names())}, an existing folder, or a "
            f"handle such as 'hf://user/model'.{hint} Received: preset={str(preset)!r}"
        )
    _check_files(folder)
    if is_checkpoint(folder):
        _check_no_hub(revision, token, preset)
        return str(folder)  # what its weights are like is seen as they are read
    checkpoint = None
    if (folder / "preset.json").exists() and str(preset) in names():
        checkpoint = read_json(folder / "preset.json").get("checkpoint")
    wanted = load_weights and not has_weights(folder)
    wanted = wanted or (tokenizer and not has_tokenizer(folder))
    if wanted and checkpoint:
        handle = hub.PREFIX + checkpoint
        return _fetched(handle, load_weights, revision, token, overrides)
    _check_no_hub(revision, token, preset)
    if load_weights:
        if not has_weights(folder):
            raise ValueError(_no_weights(preset, folder))
        _check_hdf5(folder)
    return str(folder)


def _fetched(handle, load_weights, revision, token, overrides):
    """The local folder of a checkpoint on the hub, or the handle of a Keras preset."""

    def check_room(folder):
        settings = {**read_settings(folder)[1], **(overrides or {})}
        memory.check_room(settings, settings.pop("dtype", None))

    folder = hub.fetch(str(handle), load_weights, revision, token, check_room)
    if is_checkpoint(folder):
        return str(folder)
    if hub.parse_handle(handle, revision)[1] or token:
        # KerasHub takes neither.
        return str(hub.fetch_all(handle, revision, token))
    return handle


def _check_no_hub(revision, token, preset):
    for name, value in (("revision", revision), ("token", token)):
        if value is not None:
            raise ValueError(
                f"`{name}` needs a preset on the Hugging Face hub. Received: "
                f"preset={str(preset)!r}, {name}={'...' if name == 'token' else value}"
            )


def has_tokenizer(folder):
    """Whether a preset's folder, or a handle, holds a tokenizer."""
    if is_checkpoint(folder):
        return tokenizer_files.has_tokenizer(folder)
    return preset_has_file(str(folder), "tokenizer.json")


def checkpoint_extras(preset, tokenizer):
    """What a preset says beyond model and tokenizer, see `PretrainedTask`; or None.

    Args:
        preset: str, a folder or a handle.
        tokenizer: bool, whether what is said of its tokenizer is wanted.
    """
    if is_checkpoint(preset):
        return tokenizer_files.read_extras(preset, tokenizer)
    path = preset_file(str(preset), "task.json")
    return None if path is None else read_json(path)["config"].get("checkpoint_extras")


def training_settings(preset):
    """How a preset by name teaches its routers: settings that no checkpoint states."""
    if str(preset) not in names():
        return {}
    config = read_json(ROOT / preset / "config.json")["config"]
    wanted = architecture.ROUTER_TRAINING
    return {name: config[name] for name in wanted if name in config}


def check_weights(folder, model):
    """Raises where weights files hold other variables than `model` has.

    Keras reports what is missing or of another shape; it passes over what the
    files have beyond that, such as the layers cut off by a smaller `num_layers`.
    """
    paths = _weight_files(pathlib.Path(folder))
    if not paths:
        return  # a handle
    found = sum(_count_variables(path) for path in paths)
    if found != len(model.weights):
        raise ValueError(
            f"The weights in {str(folder)!r} must fit the model's settings. Received: "
            f"{found} variables in the files for {len(model.weights)} in the model"
        )


def _weight_files(folder):
    """The files that hold the weights of a local folder, as KerasHub chooses them."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / SHARDED_WEIGHTS).is_file():
        return [folder / shard for shard in _shards(folder)]
    return []


def _count_variables(path):
    found = []

    def visit(name, item):
        if isinstance(item, h5py.Dataset) and "seed_generator" not in name:
            found.append(name)

    with h5py.File(path, "r") as file:
        file.visititems(visit)
    return len(found)


def _check_files(folder):
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            "`preset` must hold `config.json`. Received: "
            f"preset={str(folder)!r}, which does not."
        )
    if is_checkpoint(folder):
        return  # a model can do without the other files
    for name in _JSON_FILES:
        if (folder / name).exists():
            read_json(folder / name)
    if (folder / SHARDED_WEIGHTS).exists():
        _check_shards(folder)


def _check_shards(folder):
    for shard in _shards(folder):
        if pathlib.PurePath(shard).name != shard:
            raise ValueError(
                f"{SHARDED_WEIGHTS!r} must name files in the preset's folder. "
                f"Received: {shard!r} in {str(folder)!r}"
            )
        if not (folder / shard).is_file():
            raise FileNotFoundError(
                f"{SHARDED_WEIGHTS!r} names the file {shard!r}, which is missing "
                f"from {str(folder)!r}."
            )


def _check_hdf5(folder):
    for path in _weight_files(folder):
        if not h5py.is_hdf5(path):
            raise ValueError(
                f"{str(path)!r} must be an HDF5 file. Received: one that is broken, "
                "or a pointer to the real one"
            )


def _shards(folder):
    """The names of the files that the index of sharded weights lists, sorted."""
    weight_map = read_json(folder / SHARDED_WEIGHTS).get("weight_map")
    shards = weight_map.values() if isinstance(weight_map, dict) else [None]
    found = set()
    for shard in shards:  # a file name, or a list of them
        for name in shard if isinstance(shard, list) else [shard]:
            if not isinstance(name, str):
                raise ValueError(
                    f"{SHARDED_WEIGHTS!r} must hold a `weight_map` of file names. "
                    f"Received: weight_map={weight_map!r} in {str(folder)!r}"
                )
            found.add(name)
    return sorted(found)


def _no_weights(preset, folder):
    message = (
        f"The preset {str(preset)!r} holds no weights. For this architecture with "
        "random weights pass `load_weights=False`."
    )
    checkpoint = None
    if (folder / "preset.json").exists():
        checkpoint = read_json(folder / "preset.json").get("checkpoint")
    if checkpoint:
        message += (
            f" Trained weights are published as {checkpoint!r}, to be had by the "
            f"handle {hub.PREFIX + str(checkpoint)!r}."
        )
    elif str(preset) in names():
        message += " No trained weights of it have been published."
    trained = [name for name in names() if has_weights(ROOT / name)]
    if trained:
        message += f" Presets with weights: {', '.join(trained)}."
    return message
