"""Checkpoints fetched from the hub, played by a server on this machine."""

import json
import shutil

import huggingface_hub
import numpy as np
import pytest

from keras_moe.checkpoints import memory
from keras_moe.models import MoEBackbone, MoECausalLM, MoETokenizer, presets
from tests.checkpoints.hub_server import HubServer, commit_of
from tests.checkpoints.small_checkpoints import (
    CONFIGS,
    assert_close,
    make_model,
    our_logits,
    prompts,
    their_logits,
)
from tests.models.small_models import small_causal_lm

HANDLE = "hf://someone/small-mixtral"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model of Transformers, and its repository: shards, tokenizer, pickles."""
    folder = tmp_path_factory.mktemp("repository")
    model = make_model("mixtral")
    model.save_pretrained(folder, max_shard_size="15KB")
    (folder / "pytorch_model.bin").write_bytes(b"never fetched")
    (folder / "consolidated.safetensors").write_bytes(b"nor this")
    return model, folder


@pytest.fixture
def hub(checkpoint, tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # Read from HF_HOME when the library is imported, which has long happened.
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with HubServer() as server:
        server.repositories["someone/small-mixtral"] = {"main": checkpoint[1]}
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


def test_loads_a_handle(hub, checkpoint):
    theirs, _ = checkpoint
    ours = MoECausalLM.from_preset(HANDLE, dtype="float32")
    ids = prompts()
    assert_close(our_logits(ours, ids), their_logits(theirs, ids))
    fetched = hub.downloaded()
    assert "config.json" in fetched and "model.safetensors.index.json" in fetched
    assert sum(name.startswith("model-0") for name in fetched) > 1
    assert "pytorch_model.bin" not in fetched
    assert "consolidated.safetensors" not in fetched
    # The revision is asked for small files, for weights in one file, and in parts.
    assert sum(path.endswith("/revision/main") for _, path, _ in hub.requests) == 3


def test_what_is_here_is_not_fetched_again(hub):
    MoEBackbone.from_preset(HANDLE)
    hub.requests.clear()
    MoEBackbone.from_preset(HANDLE)
    assert not hub.downloaded()


def test_without_weights_none_are_fetched(hub):
    MoEBackbone.from_preset(HANDLE, load_weights=False)
    assert not [name for name in hub.downloaded() if name.endswith(".safetensors")]


def test_loads_a_preset_by_its_name(hub, checkpoint, tmp_path):
    """The preset's own settings of training stay; the rest is the checkpoint's."""
    theirs, folder = checkpoint
    tokenizer = presets.ROOT / "mixtral_tiny_en/assets/tokenizer/vocabulary.spm"
    with_tokenizer = shutil.copytree(folder, tmp_path / "repository")
    config = json.loads((with_tokenizer / "config.json").read_text())
    assert config["vocab_size"] == CONFIGS["mixtral"]["vocab_size"]
    hub.repositories["mistralai/Mixtral-8x7B-v0.1"] = {"main": with_tokenizer}
    ours = MoECausalLM.from_preset("mixtral_8x7b")
    assert ours.preprocessor is None
    ids = prompts()
    assert_close(our_logits(ours, ids), their_logits(theirs, ids))

    shutil.copy(tokenizer, with_tokenizer / "tokenizer.model")
    hub.repositories["mistralai/Mixtral-8x7B-v0.1"] = {
        "main": shutil.copytree(with_tokenizer, tmp_path / "next")
    }
    assert MoETokenizer.from_preset("mixtral_8x7b").vocabulary_size() == 1024


def test_asks_for_room_before_weights_are_fetched(hub, monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda: 10_000)
    for model_class in (MoEBackbone, MoECausalLM):
        with pytest.raises(MemoryError, match="take .* in float32, and 1e-05 GB"):
            model_class.from_preset(HANDLE, dtype="float32")
    assert not [name for name in hub.downloaded() if name.endswith(".safetensors")]


def test_settings_of_training_come_from_the_preset(hub, tmp_path):
    folder = tmp_path / "v3"
    make_model("deepseek_v3").save_pretrained(folder)
    hub.repositories["deepseek-ai/DeepSeek-V3-Base"] = {"main": folder}
    backbone = MoEBackbone.from_preset("deepseek_v3")
    assert backbone.bias_update_rate == 0.001
    assert backbone.num_layers == 3
    causal_lm = MoECausalLM.from_preset("deepseek_v3", bias_update_rate=0.0)
    assert causal_lm.backbone.bias_update_rate == 0.0
    assert causal_lm.backbone.balance_loss == 0.0001


@pytest.mark.parametrize("how", ["handle", "argument", "commit"])
def test_a_revision(hub, tmp_path, how):
    folder = tmp_path / "other"
    other = make_model("mixtral_tied")
    other.save_pretrained(folder)
    hub.repositories["someone/small-mixtral"]["v2"] = folder
    revision = commit_of(folder) if how == "commit" else "v2"
    if how == "handle":
        ours = MoECausalLM.from_preset(f"{HANDLE}@{revision}")
    else:
        ours = MoECausalLM.from_preset(HANDLE, revision=revision)
    assert ours.backbone.tied_embeddings
    ids = prompts()
    assert_close(our_logits(ours, ids), their_logits(other, ids))


def test_refuses_a_missing_revision(hub):
    with pytest.raises(ValueError, match="revision.*small-mixtral.*'v9'"):
        MoEBackbone.from_preset(f"{HANDLE}@v9")


def test_refuses_two_revisions(hub):
    with pytest.raises(ValueError, match="contradict.*@v1.*'v2'"):
        MoEBackbone.from_preset(f"{HANDLE}@v1", revision="v2")


def test_refuses_a_missing_repository(hub):
    with pytest.raises(ValueError, match="exists.*hf://someone/else"):
        MoEBackbone.from_preset("hf://someone/else")


@pytest.mark.parametrize("handle", ["hf://one", "hf://a/b/c", "hf://a/b@", "hf:///b"])
def test_refuses_a_handle_that_is_none(hub, handle):
    with pytest.raises(ValueError, match="hf://user/model"):
        MoEBackbone.from_preset(handle)
    assert not hub.requests


def test_refuses_a_gated_repository_without_a_token(hub):
    hub.gated["someone/small-mixtral"] = ["hf_good"]
    with pytest.raises(PermissionError, match="terms.*HF_TOKEN"):
        MoEBackbone.from_preset(HANDLE)
    with pytest.raises(PermissionError, match="terms.*HF_TOKEN") as error:
        MoEBackbone.from_preset(HANDLE, token="hf_other")
    assert "hf_other" not in str(error.value)


@pytest.mark.parametrize("how", ["argument", "environment", "file"])
def test_a_token_opens_a_gated_repository(hub, monkeypatch, tmp_path, how):
    hub.gated["someone/small-mixtral"] = ["hf_good"]
    arguments = {}
    if how == "argument":
        arguments["token"] = "hf_good"
    elif how == "environment":
        monkeypatch.setenv("HF_TOKEN", "hf_good")
    else:
        (tmp_path / "token").write_text("hf_good")
    MoEBackbone.from_preset(HANDLE, **arguments)


def test_says_when_the_hub_cannot_be_reached(hub, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match="hub.*small-mixtral"):
        MoEBackbone.from_preset(HANDLE)


def test_what_was_fetched_serves_without_the_hub(hub, monkeypatch):
    MoEBackbone.from_preset(HANDLE)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    MoEBackbone.from_preset(HANDLE)


def test_refuses_an_index_whose_shards_are_not_there(hub, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint[1], tmp_path / "partial")
    next(folder.glob("model-00002-*")).unlink()
    hub.repositories["someone/partial"] = {"main": folder}
    with pytest.raises(FileNotFoundError, match="model-00002-of"):
        MoEBackbone.from_preset("hf://someone/partial")


def test_refuses_a_repository_without_a_configuration(hub, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README.md").write_text("nothing yet")
    hub.repositories["someone/empty"] = {"main": tmp_path / "empty"}
    with pytest.raises(FileNotFoundError, match="config.json"):
        MoEBackbone.from_preset("hf://someone/empty")


def test_a_preset_of_keras_at_a_revision(hub, tmp_path):
    causal_lm = small_causal_lm()
    causal_lm.save_to_preset(str(tmp_path / "keras"))
    hub.repositories["someone/keras"] = {"v1": tmp_path / "keras"}
    again = MoECausalLM.from_preset("hf://someone/keras", revision="v1")
    ids = prompts()
    np.testing.assert_array_equal(our_logits(again, ids), our_logits(causal_lm, ids))


def test_revision_and_token_need_the_hub(tmp_path):
    make_model("mixtral").save_pretrained(tmp_path)
    for preset in (str(tmp_path), "mixtral_tiny_en"):
        with pytest.raises(ValueError, match="revision.*hub"):
            MoEBackbone.from_preset(preset, revision="v1")
        with pytest.raises(ValueError, match="token.*hub") as error:
            MoEBackbone.from_preset(preset, token="hf_secret")
        assert "hf_secret" not in str(error.value)
