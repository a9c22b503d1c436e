"""Models that we write, loaded by Transformers."""

import json
import resource

import numpy as np
import pytest
import safetensors
import torch
import transformers

from keras_moe.checkpoints import export_to_transformers, exporting
from keras_moe.checkpoints.shards import ShardWriter
from keras_moe.models import MoEBackbone, MoECausalLM
from tests.checkpoints.small_checkpoints import (
    CONFIGS,
    assert_close,
    make_deepseek,
    make_model,
    our_logits,
    prompts,
    their_logits,
)
from tests.models.small_models import small_backbone


def _load(folder, **kwargs):
    model, information = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **kwargs
    )
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        assert not information[key], information
    return model.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_what_came_in_goes_out(name, tmp_path):
    theirs = make_model(name)
    theirs.save_pretrained(tmp_path / "in")
    ours = MoECausalLM.from_preset(str(tmp_path / "in"))
    ours.export_to_transformers(tmp_path / "out", max_shard_size=15000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again = _load(tmp_path / "out")
    assert type(again) is type(theirs)
    ids = prompts()
    assert_close(their_logits(again, ids), their_logits(theirs, ids), 1e-5)
    _assert_same_configuration(again.config, theirs.config)


_INCIDENTAL = (
    "_name_or_path",
    "architectures",
    "dtype",
    "head_dim",
    "layer_types",
    "max_window_layers",
    "n_group",
    "num_key_value_heads",
    "rope_interleave",
    "router_jitter_noise",
    "sliding_window",
    "topk_group",
    "transformers_version",
)


def _assert_same_configuration(found, expected):
    found, expected = ({**c.to_dict()} for c in (found, expected))
    for part in ("attn_config", "ffn_config"):  # of DBRX
        for config in (found, expected):
            config.update(config.pop(part, {}))
    different = {
        key: (found.get(key), expected[key])
        for key in expected
        if key not in _INCIDENTAL and found.get(key) != expected[key]
    }
    assert not different


def test_a_model_of_ones_own(tmp_path):
    backbone = MoEBackbone(
        vocabulary_size=48,
        num_layers=2,
        hidden_dim=24,
        num_query_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        top_k=2,
        expert_dim=12,
        initializer_stddev=0.2,
        balance_loss=0.01,
        dropout=0.1,
    )
    ours = MoECausalLM(backbone)
    export_to_transformers(ours, tmp_path / "out")
    theirs = _load(tmp_path / "out")
    assert isinstance(theirs, transformers.MixtralForCausalLM)
    ids = prompts()
    assert_close(our_logits(ours, ids), their_logits(theirs, ids))
    again = MoECausalLM.from_preset(str(tmp_path / "out"))
    np.testing.assert_array_equal(our_logits(again, ids), our_logits(ours, ids))


@pytest.mark.parametrize("ids", [{}, {"eos_token_id": [2, 3], "bos_token_id": None}])
def test_special_tokens_that_nobody_knows_are_not_written(tmp_path, ids):
    """Without a tokenizer, the ids are those that came with the checkpoint."""
    make_model("mixtral").save_pretrained(tmp_path / "in")
    (tmp_path / "in/generation_config.json").unlink()
    path = tmp_path / "in/config.json"
    config = json.loads(path.read_text())
    config = {k: v for k, v in config.items() if not k.endswith("_token_id")}
    path.write_text(json.dumps({**config, **ids}))
    ours = MoECausalLM.from_preset(str(tmp_path / "in"))
    ours.export_to_transformers(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {k: v for k, v in config.items() if k.endswith("_token_id")} == ids
    assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {}


def test_a_backbone_alone(tmp_path):
    make_model("mixtral").save_pretrained(tmp_path / "in")
    MoEBackbone.from_preset(str(tmp_path / "in")).export_to_transformers(
        str(tmp_path / "out")
    )
    _load(tmp_path / "out")
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "numpy") as f:
        assert f.metadata() == {"format": "pt"}


@pytest.mark.parametrize("policy", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16", "float16"])
def test_dtype_is_chosen(tmp_path, policy, dtype):
    theirs = make_model("deepseek_v3")
    theirs.save_pretrained(tmp_path / "in")
    ours = MoEBackbone.from_preset(str(tmp_path / "in"), dtype=policy)
    ours.export_to_transformers(tmp_path / "out", dtype=dtype)
    again = _load(tmp_path / "out", dtype="auto")
    wanted = getattr(torch, dtype or policy)
    assert again.dtype == wanted
    name = "model.layers.1.mlp.experts.down_proj"
    found, expected = (m.get_parameter(name).detach() for m in (again, theirs))
    if policy == "bfloat16":
        expected = expected.to(torch.bfloat16)
    torch.testing.assert_close(found, expected.to(wanted), rtol=0, atol=0)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert again.get_buffer(bias).dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"positions": "relative_bias", "num_shared_experts": 0}, "positions="),
        ({"attention_soft_cap": 30.0}, "attention_soft_cap=30.0"),
        ({"output_norms": True}, "output_norms=True"),
        ({"expert_gated": False, "num_shared_experts": 0}, "expert_gated=False"),
        (
            {"dispatch": "capacity", "capacity_factor": 1.0, "num_shared_experts": 0},
            "capacity_factor=1.0",
        ),
        ({"num_experts": 0}, "none of them"),
    ],
)
def test_refuses_what_transformers_does_not_compute(tmp_path, settings, named):
    backbone = small_backbone(**settings)
    with pytest.raises(ValueError, match=named):
        backbone.export_to_transformers(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_refuses_deepseek_moe(tmp_path):
    make_deepseek(tmp_path)
    backbone = MoEBackbone.from_preset(str(tmp_path))
    with pytest.raises(ValueError, match="'deepseek'.*no class"):
        backbone.export_to_transformers(tmp_path / "out")


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    make_model("mixtral").save_pretrained(folder)
    return MoEBackbone.from_preset(str(folder))


def test_nothing_is_overwritten_unasked(backbone, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="overwrite"):
        backbone.export_to_transformers(out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    backbone.export_to_transformers(out, overwrite=True)
    assert not (out / "mine.txt").exists()
    _load(out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_through_a_link(backbone, tmp_path):
    """The link stays, and what it leads to is replaced."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    with pytest.raises(FileExistsError, match="link|folder"):
        backbone.export_to_transformers(tmp_path / "link")
    backbone.export_to_transformers(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    _load(tmp_path / "folder")
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "link"}


def test_to_the_working_folder(backbone, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    backbone.export_to_transformers(".", overwrite=True)
    _load(tmp_path / "here")
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


@pytest.fixture(params=["nothing", "a folder"])
def target(request, tmp_path):
    """Where to export to, where nothing may have changed at the end."""
    folder = tmp_path / "out"
    if request.param == "a folder":
        folder.mkdir()
        (folder / "config.json").write_text("old")
    before = _contents(tmp_path)
    yield folder
    assert _contents(tmp_path) == before


def _contents(folder):
    return {
        path.relative_to(folder): path.is_file() and path.read_text()
        for path in folder.rglob("*")
    }


def test_a_full_disk_leaves_nothing(backbone, target):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OSError):
            backbone.export_to_transformers(target, overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_interruption_leaves_nothing(backbone, target, monkeypatch):
    class InterruptedWriter(ShardWriter):
        def write(self, array):
            if len(self._left) < 10:
                raise KeyboardInterrupt
            super().write(array)

    monkeypatch.setattr(exporting, "ShardWriter", InterruptedWriter)
    with pytest.raises(KeyboardInterrupt):
        backbone.export_to_transformers(target, overwrite=True)


@pytest.mark.parametrize("size", [0, -1, "5", "0GB", "lots", 1.5, True])
def test_refuses_a_shard_size(backbone, tmp_path, size):
    with pytest.raises(ValueError, match="max_shard_size"):
        backbone.export_to_transformers(tmp_path / "out", max_shard_size=size)


def test_refuses_a_dtype(backbone, tmp_path):
    with pytest.raises(ValueError, match="dtype.*'int8'"):
        backbone.export_to_transformers(tmp_path / "out", dtype="int8")


def test_shards_keep_to_their_size(backbone, tmp_path):
    backbone.export_to_transformers(tmp_path / "out", max_shard_size="10KB")
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    assert index["metadata"]["total_size"] == 4 * backbone.count_params()
    for file in files:
        with safetensors.safe_open(file, "numpy") as content:
            sizes = [content.get_tensor(name).nbytes for name in content.keys()]
        assert sum(sizes) <= 10_000 or len(sizes) == 1
