"""Sparsified models against untouched twins of the same weights."""

import copy
import functools
import re

import keras
import keras_hub
import numpy as np
import pytest
from keras import ops

import keras_moe
from keras_moe.ops._backend import backend
from tests import execution
from tests.models.small_models import small_backbone

models = keras_hub.models
FAMILIES = {
    "mixtral": (models.MixtralBackbone, models.MixtralCausalLM),
    "qwen_moe": (models.QwenMoeBackbone, models.QwenMoeCausalLM),
    "qwen3_moe": (models.Qwen3MoeBackbone, models.Qwen3MoeCausalLM),
}
COMMON = dict(
    vocabulary_size=40,
    num_layers=2,
    num_query_heads=4,
    num_key_value_heads=2,
    hidden_dim=16,
    num_experts=6,
    top_k=2,
)
QWEN = {"moe_intermediate_dim": 12}
SETTINGS = {
    "mixtral": dict(COMMON, intermediate_dim=24),
    "qwen_moe": dict(
        COMMON, **QWEN, intermediate_dim=20, shared_expert_intermediate_dim=28
    ),
    "qwen3_moe": dict(COMMON, **QWEN, intermediate_dim=20, head_dim=6),
}
# Sizes of which torch's grouped product takes none.
ODD = {"hidden_dim": 12, "num_query_heads": 2, "num_key_value_heads": 1}
CASES = [
    ("mixtral", {}),
    ("mixtral", {"top_k": 1, "router_aux_loss_coef": 0.5}),
    ("mixtral", {"top_k": 4, "sliding_window": 3, **ODD, "intermediate_dim": 10}),
    ("qwen_moe", {"norm_top_k_prob": True}),
    ("qwen_moe", {"top_k": 4, "num_layers": 3, "mlp_only_layers": [1]}),
    ("qwen_moe", {"top_k": 1, **ODD, "moe_intermediate_dim": 5}),
    ("qwen3_moe", {"norm_top_k_prob": True, "router_aux_loss_coefficient": 0.5}),
    ("qwen3_moe", {"top_k": 4, "decoder_sparse_step": 2, "tie_word_embeddings": True}),
    ("qwen3_moe", {"top_k": 1, "mlp_only_layers": [0], **ODD}),
]
of_cases = pytest.mark.parametrize(("family", "overrides"), CASES)
of_families = pytest.mark.parametrize("family", FAMILIES)


def _task(family, **overrides):
    backbone, task = FAMILIES[family]
    settings = {**SETTINGS[family], **overrides}
    return task(backbone(**settings), preprocessor=None)


def _twins(family, **overrides):
    """`(dense, sparse)` tasks of equal weights, large enough for routing to matter."""
    dense, sparse = (_task(family, **overrides) for _ in range(2))
    rng = np.random.default_rng(7)
    for weight, other in zip(dense.weights, sparse.weights, strict=True):
        value = rng.normal(scale=0.4, size=weight.shape)
        value = value + 1.0 if len(weight.shape) == 1 else value
        weight.assign(value)
        other.assign(value)
    with pytest.MonkeyPatch.context() as patch:
        # Of a new model nothing is traced. JAX would forget the programs of all eager
        # operations as well, and compile them again in every test.
        patch.setattr(backend, "forget_traces", lambda: None)
        return dense, keras_moe.sparsify(sparse)


def _inputs(batch=3, length=7, padding=True, seed=0):
    token_ids = np.random.default_rng(seed).integers(0, 40, (batch, length))
    mask = np.ones((batch, length), "int32")
    if padding:
        for row in range(1, batch):
            mask[row, -row - 1 :] = 0
    return {"token_ids": token_ids.astype("int32"), "padding_mask": mask}


def _numpy(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))


def _mixtures(model):
    return [
        layer
        for layer in model._flatten_layers()
        if type(layer).__name__.endswith("SparseMoeBlock")
    ]


def _is_sparse(model):
    """Whether all mixtures of a model are sparse, or none is."""
    (found,) = {len(type(mixture).__bases__) > 1 for mixture in _mixtures(model)}
    return found


def _assert_close(actual, expected, tolerance=1e-5):
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


@of_cases
def test_outputs(family, overrides):
    _assert_equal_outputs(family, _inputs(), **overrides)


@of_families
def test_outputs_without_padding(family):
    _assert_equal_outputs(family, _inputs(padding=False), num_layers=1)


def _assert_equal_outputs(family, inputs, **overrides):
    dense, sparse = _twins(family, **overrides)
    expected = _numpy(dense(inputs))
    assert expected.std() > 0.1
    _assert_close(_numpy(sparse(inputs)), expected)
    _assert_close(sparse.predict(inputs, verbose=0), expected)
    _assert_close(_numpy(sparse.backbone(inputs)), _numpy(dense.backbone(inputs)))


def _losses_and_gradients(task, inputs, mode):
    """Logits and added losses of a call in training, and every weight's gradient."""
    weights = task.trainable_variables

    def function(*values):
        mapping = list(zip(weights, values, strict=True))
        with keras.StatelessScope(state_mapping=mapping, collect_losses=True) as scope:
            logits = task(inputs, training=True)
        losses = [ops.reshape(loss, (1,)) for loss in scope.losses]
        return ops.concatenate([ops.reshape(logits, (-1,)), *losses])

    size = inputs["token_ids"].size * 40 + len(_mixtures(task))
    cotangent = np.random.default_rng(1).normal(size=size).astype("float32")
    values = [ops.convert_to_numpy(weight) for weight in weights]
    return execution.with_gradients(function, values, cotangent, mode)


def _assert_equal_gradients(family, mode, **overrides):
    dense, sparse = _twins(family, **overrides)
    inputs = _inputs()
    expected, gradients = _losses_and_gradients(dense, inputs, mode)
    assert (expected[inputs["token_ids"].size * 40 :] > 0).all()  # the losses
    got, of_sparse = _losses_and_gradients(sparse, inputs, mode)
    _assert_close(got, expected)
    for weight, a, b in zip(
        sparse.trainable_variables, of_sparse, gradients, strict=True
    ):
        atol = 3e-5 * max(1.0, np.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=weight.path)


# One layer, as compiling takes most of the time: which of several are mixtures is
# a matter of outputs.
GRADIENT_CASES = [
    (family, overrides, execution.COMPILED)
    for family, overrides in CASES
    if not {"mlp_only_layers", "num_layers"} & overrides.keys()
] + [("qwen_moe", {}, mode) for mode in execution.MODES if mode != execution.COMPILED]


@pytest.mark.parametrize(("family", "overrides", "mode"), GRADIENT_CASES)
def test_losses_and_gradients(family, overrides, mode):
    overrides = {**overrides, "num_layers": 1, "decoder_sparse_step": 1}
    if family == "mixtral":
        del overrides["decoder_sparse_step"]
    _assert_equal_gradients(family, mode, **overrides)


@of_families
def test_fit(family):
    dense, sparse = _twins(family)
    inputs, targets = _inputs(4, 6), _inputs(4, 6, seed=1)["token_ids"]
    histories = []
    for task in (dense, sparse):
        task.compile(optimizer=keras.optimizers.SGD(0.1))
        history = task.fit(inputs, targets, batch_size=2, epochs=2, verbose=0)
        histories.append(history.history["loss"])
    np.testing.assert_allclose(*histories, rtol=1e-5)
    assert histories[0][1] < histories[0][0]
    for a, b in zip(sparse.weights, dense.weights, strict=True):
        np.testing.assert_allclose(_numpy(a), _numpy(b), atol=1e-4, err_msg=a.path)


@of_families
@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_half_precision(family, dtype):
    # One layer: a later one could route otherwise by a rounding.
    dense, sparse = _twins(family, num_layers=1, dtype=dtype)
    inputs = _inputs()
    assert sparse(inputs).dtype == dense(inputs).dtype
    _assert_close(_numpy(sparse(inputs)), _numpy(dense(inputs)), 0.03)


@of_families
@pytest.mark.parametrize(("sampler", "length"), [("greedy", 9), ("beam", 6)])
def test_generation(family, sampler, length):
    inputs = _inputs(length=length)
    inputs["padding_mask"][:, 4:] = 0
    tokens = []
    for task in _twins(family):
        task.compile(sampler=sampler)
        tokens.append(task.generate(inputs, stop_token_ids=None)["token_ids"])
    np.testing.assert_array_equal(*tokens)


# --- What is not chosen is not read.


def _one_token(length=5):
    # Of one token only, all positions attend to the same values and route alike.
    token_ids = np.full((2, length), 3, "int32")
    return {"token_ids": token_ids, "padding_mask": np.ones_like(token_ids)}


def _fill(task, expert, value):
    """Sets an expert's weights to a value; returns all experts' as they were."""
    (mixture,) = _mixtures(task)
    before = [_numpy(weight) for weight in mixture.expert_bank.weights]
    for weight, array in zip(mixture.expert_bank.weights, before, strict=True):
        array = array.copy()
        array[expert] = value
        weight.assign(array)
    return before


@functools.cache
def _idle_experts(family, dtype):
    """Experts whose weights may be zero without a change, by KerasHub's own code."""
    task, _ = _twins(family, num_layers=1, dtype=dtype)
    expected = _numpy(task(_one_token()))
    (mixture,) = _mixtures(task)
    idle = []
    for expert in range(COMMON["num_experts"]):
        before = _fill(task, expert, 0.0)
        if (_numpy(task(_one_token())) == expected).all():
            idle.append(expert)
        for weight, array in zip(mixture.expert_bank.weights, before, strict=True):
            weight.assign(array)
    assert len(idle) == COMMON["num_experts"] - COMMON["top_k"]
    return idle


@of_families
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_idle_experts_are_not_computed(family, dtype):
    idle = _idle_experts(family, dtype)
    dense, sparse = _twins(family, num_layers=1, dtype=dtype)
    expected = _numpy(dense(_one_token()))
    for task in (dense, sparse):
        for expert in idle:
            _fill(task, expert, np.nan)
    assert np.isnan(_numpy(dense(_one_token()))).all()
    tolerance = 1e-5 if dtype == "float32" else 0.03
    _assert_close(_numpy(sparse(_one_token())), expected, tolerance)
    chosen = next(e for e in range(COMMON["num_experts"]) if e not in idle)
    _fill(sparse, chosen, np.nan)
    assert np.isnan(_numpy(sparse(_one_token()))).all()


def test_what_was_compiled_before_is_dropped(family="qwen_moe"):
    # One family, as nothing about it differs between them.
    idle = _idle_experts(family, "float32")
    task, _ = _twins(family, num_layers=1)
    inputs = _one_token()
    targets = inputs["token_ids"]
    task.compile(optimizer=keras.optimizers.SGD(0.0), sampler="greedy")

    def run():
        # One token only: from it on, other experts may be chosen.
        prompt = {k: np.array(v) for k, v in inputs.items()}
        prompt["padding_mask"][:, -1:] = 0
        generated = task.generate(prompt, stop_token_ids=None)["token_ids"]
        return (
            task.predict(inputs, verbose=0),
            task.train_on_batch(inputs, targets)[0],
            task.evaluate(inputs, targets, verbose=0, return_dict=True)["loss"],
            generated,
        )

    expected = run()
    held = task.train_function, task.test_function, task.predict_function
    keras_moe.sparsify(task)
    for expert in idle:
        _fill(task, expert, np.nan)
    got = run()
    assert all(held)  # kept until here, so that no cache has lost them
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# --- It stays a KerasHub model.


@of_families
def test_in_place(family):
    dense, _ = _twins(family)
    backbone = dense.backbone
    variables = list(dense.variables)
    types = [type(layer).__name__ for layer in dense._flatten_layers()]
    assert keras_moe.sparsify(dense) is dense
    assert dense.backbone is backbone
    assert all(a is b for a, b in zip(dense.variables, variables, strict=True))
    assert type(dense) is FAMILIES[family][1]
    assert type(backbone) is FAMILIES[family][0]
    assert [type(layer).__name__ for layer in dense._flatten_layers()] == types
    mixtures = _mixtures(dense)
    kinds = [type(mixture) for mixture in mixtures]
    for mixture in mixtures:
        assert isinstance(mixture, type(mixture).__bases__[-1])
    keras_moe.sparsify(dense)
    keras_moe.sparsify(backbone)
    assert [type(mixture) for mixture in _mixtures(dense)] == kinds


@of_families
def test_twice_keeps_what_is_compiled(family):
    _, sparse = _twins(family)
    sparse.predict(_inputs(), verbose=0)
    compiled = sparse.predict_function
    keras_moe.sparsify(sparse)
    assert sparse.predict_function is compiled


@of_families
def test_a_backbone_and_a_model_around_it(family):
    dense, _ = _twins(family)
    expected = _numpy(dense(_inputs()))
    keras_moe.sparsify(dense.backbone)
    assert _is_sparse(dense)
    _assert_close(_numpy(dense(_inputs())), expected)

    inner, _ = _twins(family)
    x = inner.backbone(inner.backbone.input)
    outer = keras.Model(inner.backbone.input, keras.layers.Dense(2)(x))
    expected = outer.predict(_inputs(), verbose=0)
    keras_moe.sparsify(outer)
    assert _is_sparse(inner)
    _assert_close(outer.predict(_inputs(), verbose=0), expected)


@of_families
def test_a_task_made_of_a_sparse_backbone(family):
    dense, sparse = _twins(family)
    task = FAMILIES[family][1](sparse.backbone, preprocessor=None)
    _assert_close(_numpy(task.backbone(_inputs())), _numpy(dense.backbone(_inputs())))


@of_families
def test_presets(family, tmp_path):
    dense, sparse = _twins(family)
    folders = tmp_path / "dense", tmp_path / "sparse"
    for task, folder in zip((dense, sparse), folders, strict=True):
        task.save_to_preset(str(folder))
    for name in ("config.json", "task.json"):
        texts = [_without_names((folder / name).read_text()) for folder in folders]
        assert texts[0] == texts[1]
    for loader in (models.CausalLM, FAMILIES[family][1]):
        loaded = loader.from_preset(str(folders[1]), preprocessor=None)
        assert type(loaded) is FAMILIES[family][1]
        assert not _is_sparse(loaded)
        _assert_close(_numpy(loaded(_inputs())), _numpy(dense(_inputs())))
    backbone = models.Backbone.from_preset(str(folders[1]))
    assert type(backbone) is FAMILIES[family][0]
    assert not _is_sparse(backbone)


def _without_names(text):
    """A configuration without the numbers that Keras puts after names."""
    return re.sub(r'"(name|date_saved)": "[^"]*"', "", text)


@of_families
def test_saved_models_and_copies(family, tmp_path):
    dense, sparse = _twins(family)
    expected = _numpy(dense(_inputs()))
    path = str(tmp_path / "model.keras")
    sparse.save(path)
    copies = [
        keras.saving.load_model(path),
        copy.deepcopy(sparse),
        FAMILIES[family][1].from_config(sparse.get_config()),
    ]
    copies[2].set_weights(sparse.get_weights())
    for copied in copies:
        assert type(copied) is FAMILIES[family][1]
        assert not _is_sparse(copied)
        _assert_close(_numpy(copied(_inputs())), expected)
        keras_moe.sparsify(copied)
        assert _is_sparse(copied)
        _assert_close(_numpy(copied(_inputs())), expected)


@of_families
def test_clones(family):
    # Of a backbone: KerasHub's tasks cannot be cloned, sparse or not.
    dense, sparse = _twins(family)
    clone = keras.models.clone_model(sparse.backbone)
    assert not _is_sparse(clone)
    clone.set_weights(sparse.backbone.get_weights())
    expected = _numpy(dense.backbone(_inputs()))
    _assert_close(_numpy(clone(_inputs())), expected)
    assert _is_sparse(keras_moe.sparsify(clone))
    _assert_close(_numpy(clone(_inputs())), expected)


@of_families
def test_weights_of_either_load_into_the_other(family, tmp_path):
    dense, sparse = _twins(family)
    for index, (source, target) in enumerate([(dense, sparse), (sparse, dense)]):
        for weight in source.weights:
            weight.assign(_numpy(weight) * 0.9)
        path = str(tmp_path / f"{index}.weights.h5")
        source.save_weights(path)
        target.load_weights(path)
        _assert_close(_numpy(target(_inputs())), _numpy(source(_inputs())))


@of_families
@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(family, when):
    dense, _ = _twins(family)
    sparse, _ = _twins(family)
    if when == "after":
        keras_moe.sparsify(sparse)
    for task in (dense, sparse):
        task.backbone.enable_lora(2)
    if when == "before":
        keras_moe.sparsify(sparse)
    rng = np.random.default_rng(3)
    pairs = zip(dense.trainable_variables, sparse.trainable_variables, strict=True)
    adapted = 0
    for a, b in pairs:
        assert a.shape == b.shape
        if "lora" in a.name:
            adapted += 1
            value = rng.normal(size=a.shape)
            a.assign(value)
            b.assign(value)
    assert adapted
    _assert_close(_numpy(sparse(_inputs())), _numpy(dense(_inputs())))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.filterwarnings("ignore")  # of layers that KerasHub does not quantize
def test_quantized_but_for_the_experts(when, family="qwen_moe"):
    dense, _ = _twins(family, num_layers=1)
    sparse, _ = _twins(family, num_layers=1)
    if when == "after":
        keras_moe.sparsify(sparse)
    for task in (dense, sparse):
        task.quantize("int8")
    if when == "before":
        keras_moe.sparsify(sparse)
    _assert_close(_numpy(sparse(_inputs())), _numpy(dense(_inputs())))


# --- What cannot be served is refused, and nothing has changed.


def _dense_mistral():
    settings = {**SETTINGS["mixtral"]}
    del settings["num_experts"], settings["top_k"]
    return models.MistralBackbone(**settings)


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: "mixtral_8_7b_en",
        lambda: keras.layers.Dense(2),
        _dense_mistral,
        small_backbone,
        lambda: FAMILIES["qwen3_moe"][0](
            **{**SETTINGS["qwen3_moe"], "mlp_only_layers": [0, 1]}
        ),
    ],
)
def test_models_without_such_a_mixture(make):
    model = make()
    received = type(model).__name__ if isinstance(model, keras.Model) else repr(model)
    with pytest.raises(ValueError, match="Mixtral, QwenMoe or Qwen3Moe") as error:
        keras_moe.sparsify(model)
    assert "Received: " in str(error.value)
    assert received in str(error.value)


@of_families
def test_experts_of_other_weights(family):
    task, _ = _twins(family)
    bank = _mixtures(task)[-1].expert_bank
    # As a later KerasHub might store them.
    name = "_expert_feedforward_output_dense"
    stored = keras.Variable(
        np.zeros(getattr(bank, name).shape), dtype="int8", trainable=False
    )
    bank._tracker.unlock()
    setattr(bank, name, stored)
    bank._tracker.lock()
    with pytest.raises(ValueError, match="float dtype.*Received.*int8"):
        keras_moe.sparsify(task)
    assert not _is_sparse(task)


@of_families
def test_mixtures_of_another_class(family):
    task, _ = _twins(family)
    mixture = _mixtures(task)[-1]

    class MySparseMoeBlock(type(mixture)):
        def call(self, *args, **kwargs):
            return super().call(*args, **kwargs)

    mixture.__class__ = MySparseMoeBlock
    with pytest.raises(ValueError, match="subclass.*Received.*MySparseMoeBlock"):
        keras_moe.sparsify(task)
    assert not _is_sparse(task)


def test_router_jitter():
    _, sparse = _twins("mixtral", router_jitter_noise=0.1)
    assert np.isfinite(_numpy(sparse(_inputs()))).all()
    with pytest.raises(NotImplementedError, match="router_jitter_noise=0.1"):
        sparse(_inputs(), training=True)
