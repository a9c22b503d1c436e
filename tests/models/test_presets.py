"""What `from_preset` makes of a name or a folder, and what it refuses."""

import json
import pathlib
import re
import shutil

import keras
import numpy as np
import pytest

from keras_moe.models import MoEBackbone, MoECausalLM, presets

CLASSES = [MoEBackbone, MoECausalLM]
SETTINGS = {
    "vocabulary_size": 40,
    "num_layers": 2,
    "hidden_dim": 16,
    "num_query_heads": 4,
    "num_experts": 4,
    "top_k": 2,
    "expert_dim": 12,
}
INDEX = "model.weights.json"


@pytest.fixture(scope="module")
def backbone():
    return MoEBackbone(**SETTINGS)


@pytest.fixture(scope="module")
def saved(backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    backbone.save_to_preset(str(folder))
    return folder


@pytest.fixture(scope="module")
def saved_in_shards(backbone, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    backbone.save_to_preset(str(folder), max_shard_size=8e-6)
    assert len(list(folder.glob("*.h5"))) > 2
    return folder


@pytest.fixture
def whole(saved, tmp_path):
    """A copy of the preset to spoil."""
    return pathlib.Path(shutil.copytree(saved, tmp_path / "whole"))


@pytest.fixture
def shards(saved_in_shards, tmp_path):
    return pathlib.Path(shutil.copytree(saved_in_shards, tmp_path / "shards"))


def assert_same_weights(found, expected):
    for ours, theirs in zip(found.weights, expected.weights, strict=True):
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(ours), keras.ops.convert_to_numpy(theirs)
        )


def raises(error, *parts):
    """`pytest.raises` for a message that holds these parts, in order."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, parts)))


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_loads_a_folder(saved, backbone, kind):
    assert_same_weights(MoEBackbone.from_preset(kind(saved)), backbone)


def test_loads_a_causal_lm_from_a_backbone(saved, backbone):
    causal_lm = MoECausalLM.from_preset(str(saved))
    assert causal_lm.preprocessor is None
    assert_same_weights(causal_lm.backbone, backbone)


def test_loads_shards(saved_in_shards, backbone):
    assert_same_weights(MoEBackbone.from_preset(str(saved_in_shards)), backbone)


def test_overrides_a_setting_without_weights(saved, backbone):
    """Dropout and jitter add random seeds, which are no weights."""
    loaded = MoEBackbone.from_preset(str(saved), dropout=0.1, router_jitter=0.1)
    assert loaded.dropout == 0.1
    assert_same_weights(loaded, backbone)


@pytest.mark.parametrize("cls", CLASSES)
def test_random_weights(cls, whole):
    (whole / "model.weights.h5").unlink()
    model = cls.from_preset(str(whole), load_weights=False, num_layers=1)
    assert getattr(model, "backbone", model).num_layers == 1


@pytest.mark.parametrize("cls", CLASSES)
def test_unknown_name(cls):
    with raises(
        ValueError,
        "`preset` must be one of",
        "mixtral_8x22b",
        "an existing folder",
        "Did you mean",
        "'mixtral_8x7b'",
        "Received: preset='mixtrel_8x7b'",
    ):
        cls.from_preset("mixtrel_8x7b")


def test_unknown_name_close_to_none():
    with pytest.raises(ValueError, match="`preset` must be one of") as error:
        MoEBackbone.from_preset("1234")
    assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("preset", [None, 3, ["mixtral_8x7b"]])
def test_not_a_string(cls, preset):
    with raises(ValueError, "`preset` must be a preset's name", f"preset={preset!r}"):
        cls.from_preset(preset)


@pytest.mark.parametrize("cls", CLASSES)
def test_a_file_is_no_folder(cls, saved):
    with raises(ValueError, "an existing folder", "config.json"):
        cls.from_preset(str(saved / "config.json"))


def test_a_name_goes_before_a_folder(tmp_path, monkeypatch):
    """A folder of the same name needs a path, such as `./mixtral_8x7b`."""
    (tmp_path / "mixtral_8x7b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert presets.preset_folder("mixtral_8x7b") == str(presets.ROOT / "mixtral_8x7b")
    with raises(FileNotFoundError, "`preset` must hold `config.json`"):
        presets.preset_folder("./mixtral_8x7b")


def test_a_handle_passes():
    handle = "kaggle://user/model/keras/small"
    assert presets.preset_folder(handle, True) == handle


@pytest.mark.parametrize("cls", CLASSES)
def test_config_missing(cls, whole):
    (whole / "config.json").unlink()
    with raises(FileNotFoundError, "`preset` must hold `config.json`", str(whole)):
        cls.from_preset(str(whole))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", ["config.json", "task.json", "tokenizer.json"])
def test_json_broken(cls, whole, name):
    (whole / name).write_text('{"module": ')
    with raises(ValueError, name, "must be valid JSON", "line 1"):
        cls.from_preset(str(whole))


def test_json_is_not_text(whole):
    (whole / "config.json").write_bytes(b"\xff\xfe\x00")
    with raises(ValueError, "config.json", "must be valid JSON"):
        MoEBackbone.from_preset(str(whole))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("text,kind", [("[]", "list"), ("null", "NoneType")])
def test_json_is_not_an_object(cls, whole, text, kind):
    (whole / "config.json").write_text(text)
    with raises(ValueError, "config.json", "must hold a JSON object", kind):
        cls.from_preset(str(whole))


@pytest.mark.parametrize("cls", CLASSES)
def test_weights_missing(cls, whole):
    (whole / "model.weights.h5").unlink()
    with raises(ValueError, "holds no weights", "pass `load_weights=False`"):
        cls.from_preset(str(whole))


def test_weights_missing_names_the_checkpoint(whole):
    (whole / "model.weights.h5").unlink()
    (whole / "preset.json").write_text('{"checkpoint": "someone/model"}')
    with raises(ValueError, "holds no weights", "published as 'someone/model'"):
        MoEBackbone.from_preset(str(whole))


@pytest.mark.parametrize("cls", CLASSES)
def test_weights_are_no_hdf5(cls, whole):
    """As where large files were not fetched from a repository."""
    (whole / "model.weights.h5").write_text("version https://git-lfs.github.com/")
    with raises(ValueError, "model.weights.h5", "must be an HDF5 file"):
        cls.from_preset(str(whole))
    cls.from_preset(str(whole), load_weights=False)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize(
    "settings",
    [{"hidden_dim": 8}, {"num_experts": 5}, {"num_layers": 3}, {"expert_gated": False}],
    ids=str,
)
def test_weights_of_another_shape(cls, saved, settings):
    with pytest.raises(ValueError, match="could not be loaded"):
        cls.from_preset(str(saved), **settings)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("kind", ["whole", "shards"])
def test_weights_of_more_layers(cls, kind, request):
    folder = request.getfixturevalue(kind)
    with raises(
        ValueError, "must fit the model's settings", "23 variables", "13 in the model"
    ):
        cls.from_preset(str(folder), num_layers=1)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("outside", ["../whole/model.weights.h5", "/etc/hosts"])
def test_shard_outside_of_the_folder(cls, shards, outside):
    edit_index(shards, outside)
    with raises(ValueError, INDEX, "must name files in the preset's folder", outside):
        cls.from_preset(str(shards))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", ["model_00009.weights.h5", ".."])
def test_shard_missing(cls, shards, name):
    edit_index(shards, name)
    with raises(FileNotFoundError, INDEX, f"names the file {name!r}, which is missing"):
        cls.from_preset(str(shards))


@pytest.mark.parametrize("name", [3, None, {"file": "model_00000.weights.h5"}])
def test_shard_is_not_a_name(shards, name):
    edit_index(shards, name)
    with raises(ValueError, INDEX, "must hold a `weight_map` of file names"):
        MoEBackbone.from_preset(str(shards))


@pytest.mark.parametrize("index", [{}, {"weight_map": ["model_00000.weights.h5"]}])
def test_index_without_a_map(shards, index):
    (shards / INDEX).write_text(json.dumps(index))
    with raises(ValueError, INDEX, "must hold a `weight_map` of file names"):
        MoEBackbone.from_preset(str(shards))


def test_shard_broken(shards):
    (shards / "model_00001.weights.h5").write_bytes(b"")
    with raises(ValueError, "model_00001.weights.h5", "must be an HDF5 file"):
        MoEBackbone.from_preset(str(shards))


def edit_index(folder, shard):
    """Puts `shard` in the place of the last file the index names."""
    index = json.loads((folder / INDEX).read_text())
    last = list(index["weight_map"])[-1]
    index["weight_map"][last] = shard
    (folder / INDEX).write_text(json.dumps(index))
