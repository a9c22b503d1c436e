"""Checkpoints that Transformers made, computed by us."""

import dataclasses
import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from keras import ops

import keras_moe
from keras_moe.checkpoints.families import FAMILIES, find_family
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


@pytest.fixture(scope="module", params=[*CONFIGS, "deepseek"])
def pair(request, tmp_path_factory):
    """A model of Transformers, and ours from its checkpoint."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "deepseek":
        theirs = make_deepseek(folder)
    else:
        theirs = make_model(request.param)
        theirs.save_pretrained(folder, max_shard_size="15KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
    return theirs, MoECausalLM.from_preset(str(folder))


def test_logits_equal(pair):
    theirs, ours = pair
    ids = prompts()
    assert_close(our_logits(ours, ids), their_logits(theirs, ids))


def test_greedy_generation_is_identical(pair):
    theirs, ours = pair
    ids = prompts(6)
    expected = theirs.generate(
        torch.tensor(ids).long(), do_sample=False, max_length=12, pad_token_id=0
    )
    inputs = {
        "token_ids": np.pad(ids, ((0, 0), (0, 6))),
        "padding_mask": np.pad(np.ones_like(ids), ((0, 0), (0, 6))),
    }
    ours.compile(sampler="greedy")
    found = ours.generate(inputs, stop_token_ids=None)["token_ids"]
    np.testing.assert_array_equal(ops.convert_to_numpy(found), expected.numpy())


def test_routers_choose_the_same_experts(pair):
    theirs, ours = pair
    chosen, expected = _our_choices(ours, prompts()), _their_choices(theirs, prompts())
    assert len(chosen) == len(expected) > 0
    for (our_ids, our_gates), (their_ids, their_gates) in zip(
        chosen, expected, strict=True
    ):
        ours_dense, theirs_dense = (
            _spread(ids, gates, len(ours.backbone.mixtures[0].router.kernel[0]))
            for ids, gates in ((our_ids, our_gates), (their_ids, their_gates))
        )
        np.testing.assert_array_equal(ours_dense > 0, theirs_dense > 0)
        np.testing.assert_allclose(ours_dense, theirs_dense, atol=1e-5)


def _our_choices(ours, ids):
    """Expert ids and gates of every token, a pair a mixture."""
    found = []
    backbone = ours.backbone
    x = backbone.embed(ops.convert_to_tensor(ids))
    for layer in backbone.transformer_layers:
        if layer.is_mixture:
            # As the block computes what its mixture gets.
            hidden = x + layer.attention(layer.attention_norm(x))
            tokens = layer.feed_forward_norm(hidden)
            routing = layer.feed_forward.router(
                ops.reshape(tokens, (-1, tokens.shape[-1]))
            )
            found.append(
                [ops.convert_to_numpy(t) for t in (routing.expert_ids, routing.gates)]
            )
        x = layer(x)
    return found


def _their_choices(theirs, ids):
    found = []

    def note(module, inputs, outputs):
        if isinstance(outputs, tuple):
            _, gates, chosen = outputs
        else:  # DBRX, whose router gives logits alone
            block = owner[module]
            gates, chosen = block.route_tokens_to_experts(outputs)
        found.append((chosen.numpy(), gates.numpy()))

    owner = {}
    for module in theirs.modules():
        if type(module).__name__.endswith(("Router", "Gate")):
            module.register_forward_hook(note)
        if hasattr(module, "route_tokens_to_experts"):
            owner[module.router] = module
    their_logits(theirs, ids)
    return found


def _spread(ids, gates, experts):
    dense = np.zeros((len(ids), experts))
    np.put_along_axis(dense, ids, gates, axis=1)
    return dense


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    model = make_model("mixtral")
    model.save_pretrained(folder, max_shard_size="15KB")
    return folder


@pytest.mark.parametrize("policy", ["float32", "bfloat16", "float16", "mixed_bfloat16"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_dtype_is_chosen_at_load(tmp_path, stored, policy):
    theirs = make_model("mixtral").to(stored)
    theirs.save_pretrained(tmp_path)
    ours = MoEBackbone.from_preset(str(tmp_path), dtype=policy)
    kernel = ours.transformer_layers[0].attention.query.kernel
    wanted = "float32" if policy == "mixed_bfloat16" else policy
    assert kernel.dtype == wanted
    weight = theirs.model.layers[0].self_attn.q_proj.weight.detach()
    expected = weight.float().numpy().T.reshape(kernel.shape)
    dtype = ml_dtypes.bfloat16 if wanted == "bfloat16" else wanted
    np.testing.assert_array_equal(
        ops.convert_to_numpy(ops.cast(kernel.value, "float32")),
        expected.astype(dtype).astype("float32"),
    )


def test_bfloat16_computed_in_float32(tmp_path):
    theirs = make_model("mixtral").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours = MoECausalLM.from_preset(str(tmp_path))  # computed in float32
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype="float32"
    )
    assert_close(our_logits(ours, prompts()), their_logits(theirs, prompts()))


def test_settings_override(mixtral):
    backbone = MoEBackbone.from_preset(
        str(mixtral), balance_loss=0.02, context_length=32, name="mine"
    )
    assert (backbone.balance_loss, backbone.context_length) == (0.02, 32)
    assert backbone.name == "mine"


def test_without_weights(mixtral):
    backbone = MoEBackbone.from_preset(str(mixtral), load_weights=False, num_layers=1)
    assert backbone.num_layers == 1
    kernel = ops.convert_to_numpy(backbone.mixtures[0].experts.up_kernel)
    assert np.abs(kernel).max() > 0


def test_saves_as_a_preset_of_keras(mixtral, tmp_path):
    ours = MoECausalLM.from_preset(str(mixtral))
    ours.save_to_preset(str(tmp_path))
    again = MoECausalLM.from_preset(str(tmp_path))
    ids = prompts()
    np.testing.assert_array_equal(our_logits(again, ids), our_logits(ours, ids))


def test_plans_a_checkpoint(mixtral):
    backbone = MoEBackbone.from_preset(str(mixtral))
    plan = keras_moe.plan(str(mixtral), dtype="float32")
    assert plan.total_parameters == backbone.count_params()


def test_a_progress_bar_if_wanted(mixtral, capsys):
    MoEBackbone.from_preset(str(mixtral), verbose=True)
    assert "100%" in capsys.readouterr().err
    MoEBackbone.from_preset(str(mixtral), verbose=False)
    assert "%" not in capsys.readouterr().err


def test_configurations_of_transformers_4(tmp_path):
    """`rope_theta` and `rope_scaling` at the top, as older checkpoints have them."""
    theirs = make_model("qwen3_moe_window")
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    parameters["type"] = parameters.pop("rope_type")
    config["rope_scaling"] = parameters
    config["torch_dtype"] = config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = MoECausalLM.from_preset(str(tmp_path))
    assert_close(our_logits(ours, prompts()), their_logits(theirs, prompts()))


def test_dbrx_as_it_was_published(tmp_path):
    theirs = make_model("dbrx")
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_parameters"]
    config["attn_config"]["rope_theta"] = 400.0
    del config["ffn_config"]["moe_normalize_expert_weights"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = MoECausalLM.from_preset(str(tmp_path))
    assert ours.backbone.rope_theta == 400.0
    assert_close(our_logits(ours, prompts()), their_logits(theirs, prompts()))


def test_layers_that_predict_several_tokens_are_left_aside(tmp_path):
    theirs = make_model("deepseek_v3")
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["model.layers.3.eh_proj.weight"] = np.ones((20, 40), "float32")
    tensors["model.layers.3.enorm.weight"] = np.ones(20, "float32")
    safetensors.numpy.save_file(tensors, file)
    ours = MoECausalLM.from_preset(str(tmp_path))
    assert_close(our_logits(ours, prompts()), their_logits(theirs, prompts()))


@pytest.mark.parametrize(
    "name",
    [
        "mixtral",
        "qwen2_moe",
        "qwen3_moe_window",
        "olmoe",
        "deepseek_v2_groups",
        "deepseek_v3",
        "deepseek_v3_halves",
    ],
)
def test_experts_stacked_as_transformers_5_holds_them(tmp_path, name):
    theirs = make_model(name)
    theirs.save_pretrained(tmp_path, save_original_format=False, max_shard_size="15KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert any(key.endswith("experts.gate_up_proj") for key in index["weight_map"])
    ours = MoECausalLM.from_preset(str(tmp_path))
    assert_close(our_logits(ours, prompts()), their_logits(theirs, prompts()))


def test_float8_in_stacks_of_experts(tmp_path):
    """Each expert's matrices have blocks of their own, the gate's and the other's none.

    12 rows of each in blocks of 8: the second block is half of the one, half of the
    other.
    """
    make_model("qwen3_moe").save_pretrained(tmp_path, save_original_format=False)
    file = tmp_path / "model.safetensors"
    tensors, exact = safetensors.numpy.load_file(file), {}
    for name in [name for name in tensors if ".experts." in name]:
        parts = [_to_float8(matrix) for matrix in tensors[name]]
        small, scales, exact[name] = (
            np.stack(part) for part in zip(*parts, strict=True)
        )
        tensors[name], tensors[name + "_scale_inv"] = small, scales
    safetensors.numpy.save_file(tensors, file)
    _quantise_config(tmp_path)
    ours = MoEBackbone.from_preset(str(tmp_path))
    for layer, mixture in enumerate(ours.mixtures):
        gate_up, down = (
            exact[f"model.layers.{layer}.mlp.experts.{name}_proj"].swapaxes(1, 2)
            for name in ("gate_up", "down")
        )
        gate, up = np.split(gate_up, 2, axis=2)
        for kernel, expected in (("gate", gate), ("up", up), ("down", down)):
            found = getattr(mixture.experts, f"{kernel}_kernel")
            np.testing.assert_array_equal(ops.convert_to_numpy(found), expected)


def test_float8_in_blocks(tmp_path):
    theirs = make_model("deepseek_v3")
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors, exact = {}, {}
    for name, tensor in safetensors.numpy.load_file(file).items():
        tensors[name] = exact[name] = tensor
        if name.endswith("proj.weight"):
            tensors[name], tensors[name + "_scale_inv"], exact[name] = _to_float8(
                tensor
            )
    safetensors.numpy.save_file(tensors, file)
    _quantise_config(tmp_path)
    ours = MoECausalLM.from_preset(str(tmp_path))
    reference = tmp_path / "exact"
    theirs.save_pretrained(reference)
    safetensors.numpy.save_file(
        exact, reference / "model.safetensors", {"format": "pt"}
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(reference)
    assert_close(our_logits(ours, prompts()), their_logits(theirs, prompts()))


def _quantise_config(folder):
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [8, 8],
    }
    _change_config(folder, quantization_config=quantization)


def _to_float8(tensor, block=8):
    """A matrix in float8, the scale of each block, and what the two stand for."""
    rows, columns = (-(-size // block) for size in tensor.shape)
    scales = np.zeros((rows, columns), "float32")
    small = np.zeros(tensor.shape, ml_dtypes.float8_e4m3fn)
    exact = np.zeros_like(tensor)
    for i in range(rows):
        for j in range(columns):
            part = np.s_[i * block : (i + 1) * block, j * block : (j + 1) * block]
            scales[i, j] = np.abs(tensor[part]).max() / 448
            small[part] = (tensor[part] / scales[i, j]).astype(small.dtype)
            exact[part] = small[part].astype("float32") * scales[i, j]
    return small, scales, exact


# --- What is refused.


def _spoil(source, folder):
    shutil.copytree(source, folder, dirs_exist_ok=True)
    return folder


def _change_config(folder, **values):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps(config))


@pytest.fixture
def spoiled(mixtral, tmp_path):
    """A copy of a checkpoint in shards, to spoil."""
    return _spoil(mixtral, tmp_path)


@pytest.fixture
def single(tmp_path):
    """A checkpoint in one file, and its tensors, to spoil."""
    make_model("mixtral").save_pretrained(tmp_path)
    return tmp_path, safetensors.numpy.load_file(tmp_path / "model.safetensors")


def _write(folder, tensors):
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("model_type", ["llama", ["mixtral"], None, 3])
def test_refuses_an_unknown_model_type(spoiled, model_type):
    _change_config(spoiled, model_type=model_type)
    received = re.escape(f"model_type={model_type!r}")
    with pytest.raises(ValueError, match=f"'mixtral', 'qwen2_moe'.*{received}"):
        MoEBackbone.from_preset(str(spoiled))


def test_says_what_gpt_oss_lacks(spoiled):
    _change_config(spoiled, model_type="gpt_oss")
    with pytest.raises(ValueError, match="gpt_oss.*sinks.*biases"):
        MoEBackbone.from_preset(str(spoiled))


def test_refuses_a_missing_shard(spoiled):
    next(spoiled.glob("model-00002-*")).unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of.*missing"):
        MoEBackbone.from_preset(str(spoiled))


def test_refuses_a_truncated_shard(spoiled):
    shard = next(spoiled.glob("model-00002-*"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(ValueError, match="model-00002-of.*cut off"):
        MoEBackbone.from_preset(str(spoiled))


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a\\b.safetensors", ""]
)
def test_refuses_an_index_that_leads_outside(spoiled, name):
    path = spoiled / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = name
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="own folder"):
        MoEBackbone.from_preset(str(spoiled))


def test_refuses_an_index_to_pickles(spoiled):
    path = spoiled / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"lm_head.weight": "weights.bin"}}))
    (spoiled / "weights.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ValueError, match="pickle.*weights.bin"):
        MoEBackbone.from_preset(str(spoiled))


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}'])
def test_refuses_a_broken_index(spoiled, text):
    (spoiled / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match="index.json"):
        MoEBackbone.from_preset(str(spoiled))


def test_refuses_an_index_that_names_the_wrong_file(spoiled):
    path = spoiled / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    files = sorted(set(index["weight_map"].values()))
    index["weight_map"] = {
        name: files[file == files[0]] for name, file in index["weight_map"].items()
    }
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="does not hold it"):
        MoEBackbone.from_preset(str(spoiled))


def test_never_loads_a_pickle(single):
    folder, _ = single
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(ValueError, match="pickle.*pytorch_model.bin"):
        MoEBackbone.from_preset(str(folder))


def test_refuses_a_folder_without_weights(single):
    folder, _ = single
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors"):
        MoEBackbone.from_preset(str(folder))


def test_refuses_broken_safetensors(single):
    folder, _ = single
    (folder / "model.safetensors").write_bytes(b"not at all")
    with pytest.raises(ValueError, match="model.safetensors.*broken"):
        MoEBackbone.from_preset(str(folder))


def test_refuses_broken_json(single):
    folder, _ = single
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json.*JSON"):
        MoEBackbone.from_preset(str(folder))


def test_refuses_missing_tensors(single):
    folder, tensors = single
    del tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    _write(folder, tensors)
    with pytest.raises(ValueError, match="without.*layers.1.*experts.2.w3"):
        MoEBackbone.from_preset(str(folder))


def test_refuses_tensors_left_over(single):
    folder, tensors = single
    tensors["model.layers.0.self_attn.q_proj.lora_a"] = np.ones(3, "float32")
    _write(folder, tensors)
    with pytest.raises(ValueError, match="lora_a.*as well"):
        MoEBackbone.from_preset(str(folder))


def test_refuses_another_shape(single):
    folder, tensors = single
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name].T.copy()[:, :20]
    _write(folder, tensors)
    with pytest.raises(ValueError, match=r"k_proj.*\(24, 24\).*\(24, 20\)"):
        MoEBackbone.from_preset(str(folder))


def test_refuses_another_dtype(single):
    folder, tensors = single
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype("int8")
    _write(folder, tensors)
    with pytest.raises(ValueError, match="I8 for 'model.norm.weight'"):
        MoEBackbone.from_preset(str(folder))


def test_refuses_float8_without_scales(single):
    folder, tensors = single
    name = "model.layers.0.self_attn.k_proj.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.float8_e4m3fn)
    _write(folder, tensors)
    with pytest.raises(ValueError, match="k_proj.*scale_inv"):
        MoEBackbone.from_preset(str(folder))


def test_refuses_settings_that_do_not_fit_the_weights(mixtral):
    with pytest.raises(ValueError, match="as well"):
        MoEBackbone.from_preset(str(mixtral), num_layers=2)
    with pytest.raises(ValueError, match="shape"):
        MoEBackbone.from_preset(str(mixtral), hidden_dim=12)
    with pytest.raises(ValueError, match="num_expert'"):
        MoEBackbone.from_preset(str(mixtral), num_expert=12)


@pytest.mark.parametrize(
    ("name", "values", "named"),
    [
        ("mixtral", {"hidden_act": "quick_gelu"}, "hidden_act"),
        ("mixtral", {"hidden_size": "many"}, "hidden_size"),
        ("mixtral", {"hidden_size": None}, "hidden_size"),
        ("mixtral", {"num_attention_heads": 0}, "num_attention_heads"),
        (
            "mixtral",
            {"rope_scaling": {"type": "dynamic", "factor": 2}},
            "rope_scaling.*not 'dynamic'",
        ),
        (
            "qwen3_moe",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 500.0,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                }
            },
            "rope_parameters.*not 'longrope'",
        ),
        (
            "mixtral",
            {
                "rope_scaling": {
                    "type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                }
            },
            "high_frequency_factor.*above",
        ),
        ("mixtral", {"rope_scaling": {"type": "yarn", "new": 2}}, "rope_scaling.*new"),
        ("mixtral", {"rope_scaling": {"type": "linear"}}, "rope_scaling.*factor"),
        ("mixtral", {"rope_parameters": {"full": {}, "a": {}}}, "rope_parameters"),
        ("mixtral", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (
            "mixtral",
            {"rope_parameters": {"rope_theta": 9.0, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor",
        ),
        ("mixtral", {"quantization_config": {"quant_method": "gptq"}}, "quantization"),
        ("mixtral", {"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ("qwen2_moe", {"mlp_only_layers": 1}, "mlp_only_layers"),
        ("qwen2_moe", {"layer_types": ["chunked"] * 3}, "layer_types"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("deepseek_v3", {"rope_interleave": None}, "rope_interleave"),
        ("deepseek_v3", {"norm_topk_prob": None}, "norm_topk_prob"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("dbrx", {"tie_word_embeddings": True}, "tie_word_embeddings"),
        (
            "dbrx",
            {"ffn_config": {"ffn_hidden_size": 12, "moe_normalize_expert_weights": 2}},
            "moe_normalize_expert_weights",
        ),
    ],
)
def test_names_settings_that_are_not_implemented(tmp_path, name, values, named):
    # Nothing is read but the configuration: there are no weights.
    transformers.AutoConfig.for_model(**CONFIGS[name]).save_pretrained(tmp_path)
    _change_config(tmp_path, **values)
    with pytest.raises(ValueError, match=named):
        MoEBackbone.from_preset(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("deepseek_v3", "routed_scaling_factor"),
        ("deepseek_v3", "norm_topk_prob"),
        ("mixtral", "rope_parameters"),
        ("qwen2_moe", "norm_topk_prob"),
    ],
)
def test_a_missing_key_means_what_it_does_to_transformers(tmp_path, name, key):
    make_model(name).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    _assert_equal_logits(tmp_path)


# Of the code that comes with DeepSeekMoE's checkpoint.
_DEEPSEEK_DEFAULTS = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "n_shared_experts": None,
    "n_routed_experts": None,
    "num_experts_per_tok": None,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 0,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "attention_bias": False,
}


def _class_defaults(model_type):
    if model_type == "deepseek":
        return _DEEPSEEK_DEFAULTS
    found = transformers.CONFIG_MAPPING[model_type]
    fields = {field.name: field.default for field in dataclasses.fields(found)}
    plain = {k: v for k, v in fields.items() if v is not dataclasses.MISSING}
    return {**plain, "rope_theta": found.default_theta}


def _read(config):
    """The settings that a configuration means, or what it is refused with."""
    family = find_family(config)
    try:
        return family.settings(family.reader(config))
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    "model_type", [name for name, family in FAMILIES.items() if not family.has_encoder]
)
def test_a_missing_key_means_the_default_of_its_class(model_type):
    defaults = _class_defaults(model_type)
    small = CONFIGS.get(model_type, {**CONFIGS["qwen2_moe"], "n_routed_experts": 6})
    small = {**small, "model_type": model_type}
    for config in (small, {"model_type": model_type, "num_experts_per_tok": 2}):
        for key, default in defaults.items():
            without = {k: v for k, v in config.items() if k != key}
            assert _read(without) == _read({**without, key: default}), key
    complete = {**defaults, "model_type": model_type, "num_experts_per_tok": 2}
    assert _read(complete) == _read(config)


@pytest.mark.parametrize("part", ["attn_config", "ffn_config"])
def test_a_missing_key_of_a_part_of_dbrx(part):
    whole = CONFIGS["dbrx"]
    cls = transformers.CONFIG_MAPPING["dbrx"].sub_configs[part]
    own = [name for name in cls.__annotations__ if name != "base_config_key"]
    assert len(own) >= 3
    for key in own:
        without = {k: v for k, v in whole[part].items() if k != key}
        given = {**without, key: getattr(cls, key)}
        assert _read({**whole, part: without}) == _read({**whole, part: given}), key


def _assert_equal_logits(folder):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    ours = MoECausalLM.from_preset(str(folder))
    assert_close(our_logits(ours, prompts()), their_logits(theirs, prompts()))


def test_an_output_matrix_of_its_own_goes_before_a_tie(tmp_path):
    make_model("mixtral_tied").save_pretrained(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"][::-1].copy()
    _write(tmp_path, tensors)
    _assert_equal_logits(tmp_path)
    assert not MoEBackbone.from_preset(str(tmp_path)).tied_embeddings


def test_the_single_file_goes_before_shards(tmp_path):
    make_model("mixtral").save_pretrained(tmp_path, max_shard_size="15KB")
    other = make_model("mixtral")
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(-1)
    other.save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "other/model.safetensors", tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    _assert_equal_logits(tmp_path)


def test_follows_transformers_where_it_ignores_a_key(tmp_path):
    make_model("deepseek_v2").save_pretrained(tmp_path)
    _change_config(tmp_path, norm_topk_prob=True)
    with pytest.warns(UserWarning, match="norm_topk_prob"):
        _assert_equal_logits(tmp_path)


def test_warns_of_keys_it_does_not_know(mixtral, tmp_path):
    folder = _spoil(mixtral, tmp_path)
    _change_config(folder, attention_logit_cap=30.0)
    with pytest.warns(UserWarning, match="attention_logit_cap=30.0"):
        MoEBackbone.from_preset(str(folder))


def test_refuses_what_memory_cannot_hold(tmp_path):
    """A model of 4 trillion parameters, whose file is all hole."""
    config = {
        **CONFIGS["mixtral"],
        "num_hidden_layers": 1,
        "hidden_size": 2**16,
        "intermediate_size": 2**22,
    }
    transformers.AutoConfig.for_model(**config).save_pretrained(tmp_path)
    shapes = {
        "model.embed_tokens.weight": (48, 2**16),
        "lm_head.weight": (48, 2**16),
        "model.norm.weight": (2**16,),
    }
    layer = "model.layers.0"
    for norm in ("input_layernorm", "post_attention_layernorm"):
        shapes[f"{layer}.{norm}.weight"] = (2**16,)
    for letter, size in (("q", 48), ("k", 24), ("v", 24)):
        shapes[f"{layer}.self_attn.{letter}_proj.weight"] = (size, 2**16)
    shapes[f"{layer}.self_attn.o_proj.weight"] = (2**16, 48)
    shapes[f"{layer}.block_sparse_moe.gate.weight"] = (5, 2**16)
    for expert in range(5):
        block = f"{layer}.block_sparse_moe.experts.{expert}"
        for name, shape in (("w1", (0, 1)), ("w3", (0, 1)), ("w2", (1, 0))):
            sizes = (2**22, 2**16)
            shapes[f"{block}.{name}.weight"] = tuple(sizes[i] for i in shape)
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    with pytest.raises(MemoryError, match=r"4,123 billion.*GB in bfloat16.*avail"):
        MoEBackbone.from_preset(str(tmp_path), dtype="bfloat16")
