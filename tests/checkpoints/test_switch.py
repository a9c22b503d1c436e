"""Switch Transformers of Transformers, computed by us, and ours by it."""

import json

import keras_hub
import numpy as np
import pytest
import safetensors.numpy
import tokenizers
import torch
import transformers
from keras import ops
from transformers.models.switch_transformers import modeling_switch_transformers

import keras_moe
from keras_moe.layers import routing_statistics
from keras_moe.models import (
    MoEBackbone,
    MoESeq2SeqBackbone,
    MoESeq2SeqLM,
    MoESeq2SeqLMPreprocessor,
)
from tests.checkpoints.small_checkpoints import assert_close
from tests.models.small_models import (
    small_seq2seq_backbone,
    small_seq2seq_lm,
    source_and_target,
)

V = 48
_SIZES = {
    "vocab_size": V,
    "d_model": 24,
    "d_kv": 5,  # four heads of it are not `d_model`
    "d_ff": 20,
    "num_heads": 4,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 2,
    "num_experts": 5,
    "decoder_start_token_id": 0,
}
CONFIGS = {
    "dropping": {"expert_capacity": 2},
    "roomy": {"expert_capacity": 64},
    "untied": {"tie_word_embeddings": False, "d_kv": 10, "expert_capacity": 1},
    # Every layer of the decoder, and the second of the encoder's three.
    "other_steps": {
        "num_layers": 3,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 4,
        "expert_capacity": 64,
    },
    "none_wanted": {  # and one there, in the encoder
        "num_sparse_encoder_layers": 0,
        "num_sparse_decoder_layers": 9,
        "dense_act_fn": "silu",
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 6,
    },
    "one_layer": {
        "num_layers": 1,
        "num_decoder_layers": 1,
        "num_sparse_encoder_layers": 1,
        "num_sparse_decoder_layers": 1,
        "dense_act_fn": "gelu",
        "layer_norm_epsilon": 1e-3,
    },
}


def make_model(name="dropping", **overrides):
    """A model of Transformers, its weights as it draws them."""
    config = transformers.SwitchTransformersConfig(
        **{**_SIZES, **CONFIGS[name], **overrides}
    )
    torch.manual_seed(sum(map(ord, name)))
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if "layer_norm" in key:
                value.uniform_(0.8, 1.2)
    return model


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """A model of Transformers, and ours from its checkpoint of several files."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = make_model(request.param)
    theirs.save_pretrained(folder, max_shard_size="15KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return theirs, MoESeq2SeqLM.from_preset(str(folder))


def batch(source=13, target=9, seed=5):
    """Three sources, padded at the right, at the left and not at all."""
    rng = np.random.default_rng(seed)
    mask = np.ones((3, source), "int32")
    mask[1, -4:] = mask[2, :3] = 0
    return {
        "encoder_token_ids": rng.integers(1, V, (3, source)).astype("int32"),
        "encoder_padding_mask": mask,
        "decoder_token_ids": rng.integers(0, V, (3, target)).astype("int32"),
        "decoder_padding_mask": np.ones((3, target), "int32"),
    }


def theirs_on(model, inputs, **arguments):
    tensors = {name: torch.tensor(value).long() for name, value in inputs.items()}
    with torch.no_grad():
        return model(
            input_ids=tensors["encoder_token_ids"],
            attention_mask=tensors["encoder_padding_mask"],
            decoder_input_ids=tensors["decoder_token_ids"],
            **arguments,
        )


def ours_on(seq2seq_lm, inputs):
    """Encoder states and logits."""
    backbone = seq2seq_lm.backbone
    states = backbone(inputs)["encoder_sequence_output"]
    return [ops.convert_to_numpy(t) for t in (states, seq2seq_lm(inputs))]


def test_states_and_logits_equal(pair):
    theirs, ours = pair
    expected = theirs_on(theirs, batch())
    states, logits = ours_on(ours, batch())
    # Padding included: it is routed, and takes capacity.
    assert_close(states, expected.encoder_last_hidden_state.numpy())
    assert_close(logits, expected.logits.numpy())


@pytest.mark.parametrize("name, drops", [("dropping", True), ("roomy", False)])
def test_tokens_are_dropped_where_capacity_is_low(name, drops, tmp_path):
    make_model(name).save_pretrained(tmp_path)
    backbone = MoESeq2SeqBackbone.from_preset(str(tmp_path))
    found = backbone.routing_statistics(batch())
    assert len(found) == 4
    assert all((float(s.dropped) > 0) == drops for s in found)
    # Padding is counted as their routers do.
    assert [float(s.tokens) for s in found] == [39.0, 39.0, 27.0, 27.0]


def test_greedy_generation_is_identical(pair):
    theirs, ours = pair
    inputs = batch(target=12)
    # Their cache fails where the decoder has more layers than the encoder.
    same = theirs.config.num_layers == theirs.config.num_decoder_layers
    expected = theirs.generate(
        input_ids=torch.tensor(inputs["encoder_token_ids"]).long(),
        attention_mask=torch.tensor(inputs["encoder_padding_mask"]).long(),
        do_sample=False,
        max_length=12,
        eos_token_id=None,
        use_cache=same,
    )
    ours.compile(sampler="greedy")
    inputs["decoder_token_ids"][:] = 0
    inputs["decoder_padding_mask"][:, 1:] = 0
    found = ours.generate(inputs, stop_token_ids=None)["decoder_token_ids"]
    np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["dropping", "roomy", "untied"])
def test_targets_begun_with_several_tokens(name, beams, tmp_path):
    """By greedy and by beam search, in which no beam ends."""
    theirs = make_model(name)
    theirs.save_pretrained(tmp_path)
    ours = MoESeq2SeqLM.from_preset(str(tmp_path))
    inputs, begun = batch(target=12), 5
    expected = theirs.generate(
        input_ids=torch.tensor(inputs["encoder_token_ids"]).long(),
        attention_mask=torch.tensor(inputs["encoder_padding_mask"]).long(),
        decoder_input_ids=torch.tensor(inputs["decoder_token_ids"][:, :begun]).long(),
        num_beams=beams,
        do_sample=False,
        max_length=12,
        eos_token_id=None,
    )
    sampler = keras_hub.samplers.BeamSampler(num_beams=beams)
    ours.compile(sampler=sampler if beams > 1 else "greedy")
    inputs["decoder_padding_mask"][:, begun:] = 0
    found = ours.generate(inputs, stop_token_ids=None)["decoder_token_ids"]
    np.testing.assert_array_equal(found, expected.numpy())


def test_router_losses_by_their_definition(pair):
    """Theirs take all mixtures of a stack as one, and each sequence alone."""
    theirs, ours = pair
    inputs = batch()
    expected = theirs_on(theirs, inputs, output_router_logits=True)
    logits = _router_logits(ours.backbone, inputs)
    found = ours.backbone.routing_statistics(inputs)
    for name, blocks in (
        ("encoder", ours.backbone.encoder_transformer_layers),
        ("decoder", ours.backbone.decoder_transformer_layers),
    ):
        count = sum(block.is_mixture for block in blocks)
        own, logits = logits[:count], logits[count:]
        statistics, found = found[:count], found[count:]
        theirs_z = getattr(expected, f"{name}_z_loss")
        step = getattr(theirs.config, f"{name}_sparse_step")
        if step <= 1:
            assert theirs_z == 0  # not computed there
            continue
        # Their z-loss is the mean of ours, which are summed over mixtures.
        mean = sum(float(routing_statistics.z_loss(s)) for s in statistics) / count
        np.testing.assert_allclose(mean, float(theirs_z), rtol=1e-4)
        joined = torch.tensor(np.concatenate(own, axis=1))
        balance = modeling_switch_transformers.load_balancing_loss_func(
            torch.softmax(joined, -1), joined.argmax(-1)
        )
        theirs_balance = getattr(expected, f"{name}_aux_loss")
        np.testing.assert_allclose(float(balance), float(theirs_balance), rtol=1e-4)


def _router_logits(backbone, inputs):
    """`[B, S, E]` of each mixture, first to last, of what its block hands it."""
    tensors = {name: ops.convert_to_tensor(value) for name, value in inputs.items()}
    ids, mask = (tensors[f"encoder_{name}"] for name in ("token_ids", "padding_mask"))
    found = []

    def walk(blocks, x, position_bias, mask, **source):
        for block in blocks:
            if block.is_mixture:
                y = block.attention(
                    block.attention_norm(x), mask=mask, position_bias=position_bias
                )
                y = x + y
                if source:
                    normed = block.cross_attention_norm(y)
                    y = y + block.cross_attention(normed, **source)
                routing = block.feed_forward.router(
                    ops.reshape(block.feed_forward_norm(y), (-1, y.shape[-1]))
                )
                logits = ops.reshape(routing.logits, (*y.shape[:2], -1))
                found.append(ops.convert_to_numpy(logits))
            x = block(x, padding_mask=mask, position_bias=position_bias, **source)

    x = backbone.embed(ids)
    walk(
        backbone.encoder_transformer_layers, x, backbone.encoder_position_bias(x), mask
    )
    source = {"source": backbone.encode(ids, mask), "source_mask": mask}
    x = backbone.embed(tensors["decoder_token_ids"], backbone.decoder_embedding)
    walk(
        backbone.decoder_transformer_layers,
        x,
        backbone.decoder_position_bias(x),
        tensors["decoder_padding_mask"],
        **source,
    )
    return found


def test_losses_of_one_mixture_and_sequence_are_theirs(tmp_path):
    theirs = make_model(num_sparse_encoder_layers=1, num_sparse_decoder_layers=1)
    theirs.save_pretrained(tmp_path)
    backbone = MoESeq2SeqBackbone.from_preset(str(tmp_path))
    inputs = {name: value[:1] for name, value in batch().items()}
    expected = theirs_on(theirs, inputs, output_router_logits=True)
    encoder, decoder = backbone.routing_statistics(inputs)
    for statistics, balance, z in (
        (encoder, expected.encoder_aux_loss, expected.encoder_z_loss),
        (decoder, expected.decoder_aux_loss, expected.decoder_z_loss),
    ):
        found = routing_statistics.balance_loss(statistics)
        np.testing.assert_allclose(float(found), float(balance), rtol=1e-4)
        found = routing_statistics.z_loss(statistics)
        np.testing.assert_allclose(float(found), float(z), rtol=1e-4)


def test_what_is_of_training_comes_in_and_goes_out(tmp_path):
    given = {
        "dropout_rate": 0.25,
        "router_jitter_noise": 0.03,
        "router_aux_loss_coef": 0.08,
        "router_z_loss_coef": 0.004,
    }
    theirs = make_model("roomy", **given)
    theirs.save_pretrained(tmp_path / "in")
    ours = MoESeq2SeqLM.from_preset(str(tmp_path / "in"))
    block = ours.backbone.decoder_transformer_layers[1]
    assert block.dropout == block.attention.dropout == 0.25
    assert block.feed_forward.experts.dropout == 0.25
    assert block.feed_forward.router.jitter == 0.03
    # The z-loss that training adds is theirs, by their coefficient.
    inputs = batch()
    expected = theirs_on(theirs, inputs, output_router_logits=True)
    expected = 0.004 * float(expected.encoder_z_loss + expected.decoder_z_loss)
    found = ours.backbone.routing_statistics(inputs)
    found = [float(routing_statistics.z_loss(s)) for s in found]
    coefficients = {mixture.z_loss for mixture in ours.backbone.mixtures}
    assert len(coefficients) == 1
    np.testing.assert_allclose(coefficients.pop() * sum(found), expected, rtol=1e-4)
    assert ours.backbone.balance_loss == pytest.approx(0.08 / 2)
    ours.export_to_transformers(tmp_path / "out")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert {key: getattr(config, key) for key in given} == pytest.approx(given)


def test_dtypes(tmp_path):
    theirs = make_model().to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    backbone = MoESeq2SeqBackbone.from_preset(str(tmp_path), dtype="bfloat16")
    assert backbone.variable_dtype == "bfloat16"
    assert all(m.router.kernel.dtype == "float32" for m in backbone.mixtures)
    ours = MoESeq2SeqLM.from_preset(str(tmp_path))  # computed in float32
    exact = type(theirs).from_pretrained(tmp_path, dtype="float32")
    _, logits = ours_on(ours, batch())
    assert_close(logits, theirs_on(exact, batch()).logits.numpy())


def test_a_checkpoint_with_one_table_of_embeddings(tmp_path):
    """As releases before 5 wrote them, whose output alone is not shared."""
    theirs = make_model("untied")
    with torch.no_grad():
        for stack in (theirs.encoder, theirs.decoder):
            stack.embed_tokens.weight.copy_(theirs.shared.weight)
    expected = theirs_on(theirs, batch()).logits.numpy()
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    for name in ("encoder", "decoder"):
        del tensors[f"{name}.embed_tokens.weight"]
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    ours = MoESeq2SeqLM.from_preset(str(tmp_path))
    assert_close(ours_on(ours, batch())[1], expected)


EMBEDDINGS = (
    "shared.weight",
    "encoder.embed_tokens.weight",
    "decoder.embed_tokens.weight",
    "lm_head.weight",
)


@pytest.mark.parametrize("alike", [False, True], ids=["different", "alike"])
@pytest.mark.parametrize(
    "there",
    [(0, 1, 2, 3), (0, 3), (0, 2), (1, 3), (1, 2), (2, 3), (3,)],
    ids=lambda there: "".join("sedl"[i] for i in there),
)
def test_embeddings_said_to_be_tied(there, alike, tmp_path):
    """What a checkpoint holds stays as it is; logits are scaled as tied ones are."""
    theirs = make_model("roomy")
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    table = tensors.pop("shared.weight")
    assert not set(EMBEDDINGS) & set(tensors)
    for i in there:
        tensors[EMBEDDINGS[i]] = table if alike else np.roll(table, i, axis=0)
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    theirs = type(theirs).from_pretrained(tmp_path).eval()
    assert theirs.config.tie_word_embeddings
    expected = theirs_on(theirs, batch())
    ours = MoESeq2SeqLM.from_preset(str(tmp_path))
    states, logits = ours_on(ours, batch())
    assert_close(states, expected.encoder_last_hidden_state.numpy())
    assert_close(logits, expected.logits.numpy())
    tied = alike or len(there) == 1
    assert ours.backbone.tied_embeddings == tied
    if tied:
        return
    # No `config.json` says this of a model: it does not go out as another.
    with pytest.raises(ValueError, match="output_multiplier="):
        ours.export_to_transformers(tmp_path / "out")


def _letters():
    names = ["<pad>", "</s>", *"abcdefghijklmnop"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({name: i for i, name in enumerate(names)}, [])
    )
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return tokenizer


@pytest.mark.parametrize(
    "config, generation, start",
    [(0, None, 0), (5, None, 5), (5, 7, 7), (0, 7, 7), (None, None, 0)],
)
def test_targets_begin_with_the_token_that_is_named(
    config, generation, start, tmp_path
):
    theirs = make_model("roomy")
    theirs.save_pretrained(tmp_path)
    _letters().save(str(tmp_path / "tokenizer.json"))
    for name, value in (("config", config), ("generation_config", generation)):
        path = tmp_path / f"{name}.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps({**content, "decoder_start_token_id": value}))
    if generation is None:
        path.unlink()  # Transformers then takes it from `config.json`
    theirs = type(theirs).from_pretrained(tmp_path).eval()
    if config is None:  # where Transformers asks for it
        theirs.generation_config.decoder_start_token_id = 0
    source = torch.tensor([[2, 3, 4, 1]])
    expected = theirs.generate(source, max_length=6, eos_token_id=None)[0].tolist()
    assert expected[0] == start
    ours = MoESeq2SeqLM.from_preset(str(tmp_path))
    ours.compile(sampler="greedy")
    prompt = ours.preprocessor.generate_preprocess(
        ["abc"], encoder_sequence_length=4, decoder_sequence_length=6
    )
    assert np.asarray(prompt["encoder_token_ids"]).tolist() == source.tolist()
    x, y, _ = ours.preprocessor(
        {"encoder_text": ["abc"], "decoder_text": ["de"]}, decoder_sequence_length=3
    )
    assert np.asarray(x["decoder_token_ids"]).tolist() == [[start, 5, 6]]
    without = MoESeq2SeqLM(ours.backbone)
    without.compile(sampler="greedy")
    prompt = {name: np.asarray(value) for name, value in prompt.items()}
    found = without.generate(prompt, stop_token_ids=None)["decoder_token_ids"]
    assert found[0].tolist() == expected
    # And out, and in again.
    ours.export_to_transformers(tmp_path / "out")
    back = type(theirs).from_pretrained(tmp_path / "out").eval()
    assert back.config.decoder_start_token_id == start
    found = back.generate(source, max_length=6, eos_token_id=None)[0].tolist()
    assert found == expected
    again = MoESeq2SeqLM.from_preset(str(tmp_path / "out")).preprocessor
    assert again.tokenizer.start_token == ours.preprocessor.tokenizer.start_token


def test_a_start_that_the_tokenizer_lacks_is_refused(tmp_path):
    make_model("roomy", decoder_start_token_id=40).save_pretrained(tmp_path)
    _letters().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="`decoder_start_token_id`.*40"):
        MoESeq2SeqLMPreprocessor.from_preset(str(tmp_path))
    with pytest.warns(UserWarning, match="`decoder_start_token_id`.*40"):
        assert MoESeq2SeqLM.from_preset(str(tmp_path)).preprocessor is None


def test_a_model_without_a_tokenizer_generates_there(tmp_path):
    ours = small_seq2seq_lm(vocabulary_size=V, dense_dim=24)
    ours.export_to_transformers(tmp_path / "out")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    found = theirs.generate(torch.tensor([[2, 3]]), max_length=6, eos_token_id=None)
    ours.compile(sampler="greedy")
    inputs = source_and_target([np.array([2, 3])], [np.array([0])], 6)
    expected = ours.generate(inputs, stop_token_ids=None)["decoder_token_ids"]
    np.testing.assert_array_equal(found.numpy(), expected)


def test_plans(pair, tmp_path):
    theirs, ours = pair
    theirs.save_pretrained(tmp_path)
    plan = keras_moe.plan(str(tmp_path), sequence_length=8, dtype="float32")
    assert plan.total_parameters == ours.backbone.count_params()


def test_exports_load_back(pair, tmp_path):
    theirs, ours = pair
    ours.export_to_transformers(tmp_path / "out", max_shard_size="15KB")
    again, report = type(theirs).from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values())
    expected = theirs_on(theirs, batch())
    found = theirs_on(again.eval(), batch())
    np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
    returned = MoESeq2SeqBackbone.from_preset(str(tmp_path / "out"))
    for a, b in zip(returned.get_weights(), ours.backbone.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    "overrides",
    [
        {},  # nothing is dropped
        {"tied_embeddings": False},
        {
            "dispatch": "capacity",
            "capacity": 2,
            "capacity_group": "sequence",
            "route_padding": True,
        },
    ],
    ids=["dropless", "untied", "capacity"],
)
def test_exports_models_of_our_own(overrides, tmp_path):
    ours = small_seq2seq_lm(vocabulary_size=V, dense_dim=24, **overrides)
    ours.export_to_transformers(tmp_path / "out")
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    inputs = batch()
    states, logits = ours_on(ours, inputs)
    expected = theirs_on(theirs.eval(), inputs)
    real = inputs["encoder_padding_mask"].astype(bool)
    np.testing.assert_allclose(
        states[real], expected.encoder_last_hidden_state.numpy()[real], atol=2e-5
    )
    assert_close(logits, expected.logits.numpy())


@pytest.mark.parametrize(
    "overrides, named",
    [
        ({"extra_dense": True}, "extra_dense=True"),
        ({"expert_gated": True}, "expert_gated=True"),
        ({"positions": "rotary"}, "positions='rotary'"),
        ({"dispatch": "capacity", "capacity_factor": 1.0}, "capacity_factor=1.0"),
        ({"encoder_layers": 3, "moe_every": 3, "moe_offset": 2}, "encoder_mixtures"),
        ({"top_k": 2}, "top_k=2"),
        ({"dense_dim": 32}, "dense_dim=32"),
    ],
)
def test_what_transformers_does_not_compute_is_refused(overrides, named, tmp_path):
    backbone = small_seq2seq_backbone(**{"dense_dim": 24, **overrides})
    with pytest.raises(ValueError, match=f"'switch_transformers'.*{named}"):
        backbone.export_to_transformers(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "key, value",
    [
        ("router_bias", True),
        ("router_dtype", "bfloat16"),
        ("is_gated_act", True),
        ("dense_act_fn", "gated-gelu"),
        ("num_experts", 0),
        ("batch_prioritized_routing", True),
        ("encoder_sparse_step", -1),
    ],
)
def test_keys_that_are_not_implemented_are_refused(key, value, tmp_path):
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    with pytest.raises(ValueError, match=key):
        MoESeq2SeqBackbone.from_preset(str(tmp_path))


def test_configurations_of_older_releases(tmp_path, recwarn):
    theirs = make_model()
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "feed_forward_proj": "relu",
        "is_gated_act": False,
        "n_positions": 512,
        "output_past": True,
        "router_type": "tokens_masked",
        "batch_prioritized_routing": False,
    }
    for name in ("dtype", "add_cross_attention", "is_decoder", "tie_word_embeddings"):
        del config[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = MoESeq2SeqLM.from_preset(str(tmp_path))
    assert not [w for w in recwarn if "not known" in str(w.message)]
    assert_close(ours_on(ours, batch())[1], theirs_on(theirs, batch()).logits.numpy())


def test_the_wrong_class_is_named(tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="encoder-decoder.*MoESeq2SeqBackbone"):
        MoEBackbone.from_preset(str(tmp_path))


def test_nllb_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nllb-moe"}))
    with pytest.raises(ValueError, match="'nllb-moe'.*sinusoidal"):
        MoESeq2SeqBackbone.from_preset(str(tmp_path))


def test_missing_tensors_are_named(tmp_path):
    make_model().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    name = "decoder.block.1.layer.2.mlp.experts.expert_4.wo.weight"
    del tensors[name]
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=name):
        MoESeq2SeqBackbone.from_preset(str(tmp_path))
