"""Training that stops and goes on from a checkpoint, against training that does not."""

import pathlib

import keras
import numpy as np
import pytest

from keras_moe.models import MoEBackbone
from tests.distribution.meshes import MESHES, distribute
from tests.models.small_models import SETTINGS, random_ids, small_causal_lm

ON_JAX = keras.config.backend() == "jax"
SAVED_ON = "batch_expert" if ON_JAX else None
RESUMED_ON = [None, *MESHES] if ON_JAX else [None]
EPOCHS, STOP = 4, 2
BATCH, LENGTH = 8, 6
# Dropout, so that the state of random seeds counts; torch draws it from none of them.
DROPOUT = 0.0 if keras.config.backend() == "torch" else 0.1
MODEL = {"dropout": DROPOUT, "balance_loss": 0.1, "num_experts": 8, "expert_dim": 12}


def make(mesh, optimizer="adam", **settings):
    keras.distribution.set_distribution(None)
    if mesh is not None:
        distribute(mesh)
    keras.utils.set_random_seed(5)
    model = small_causal_lm(**{**MODEL, **settings})
    if optimizer:
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        optimizer = {"class_name": optimizer, "config": {"learning_rate": 0.01}}
        model.compile(keras.optimizers.get(optimizer), loss, weighted_metrics=[])
    return model


def fit(model, **arguments):
    ids = random_ids(2 * BATCH, LENGTH + 1)
    x = {"token_ids": ids[:, :-1], "padding_mask": np.ones((len(ids), LENGTH), bool)}
    arguments = {"batch_size": BATCH, "shuffle": False, "verbose": 0, **arguments}
    return model.fit(x, ids[:, 1:], **arguments).history["loss"]


@pytest.fixture(scope="module")
def unbroken():
    model = make(SAVED_ON)
    return fit(model, epochs=EPOCHS), model.get_weights()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of each of the first epochs."""
    folder = tmp_path_factory.mktemp("training") / "checkpoints"
    callback = keras.callbacks.OrbaxCheckpoint(str(folder), max_to_keep=None)
    fit(make(SAVED_ON), epochs=STOP, callbacks=[callback])
    assert sorted(path.name for path in folder.iterdir()) == ["0", "1"]
    return folder


def check_goes_on(model, first, unbroken):
    """The loss and weights of what is left of training, against the unbroken one's."""
    losses, weights = unbroken
    np.testing.assert_allclose(
        fit(model, epochs=EPOCHS, initial_epoch=first), losses[first:], rtol=1e-5
    )
    for got, expected in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("mesh", RESUMED_ON)
def test_training_goes_on_on_another_mesh(folder, mesh, unbroken):
    model = make(mesh)
    model.load_weights(folder)
    check_goes_on(model, STOP, unbroken)
    if mesh == "expert":
        experts = model.backbone.mixtures[0].experts.up_kernel.value
        assert {shard.data.shape[0] for shard in experts.addressable_shards} == {1}


def test_training_goes_on_from_an_earlier_step(folder, unbroken):
    model = make(SAVED_ON)
    model.load_weights(folder / "0")
    check_goes_on(model, 1, unbroken)


def test_the_names_of_other_models_do_not_matter(folder, unbroken):
    keras.backend.clear_session()  # which names things as a fresh process does
    model = make(SAVED_ON)
    model.load_weights(folder)
    check_goes_on(model, STOP, unbroken)


def test_keras_loads_the_whole_model(folder, unbroken):
    keras.distribution.set_distribution(None)
    if ON_JAX:
        distribute("expert_model")
    check_goes_on(keras.saving.load_model(str(folder)), STOP, unbroken)


def test_weights_alone(folder):
    """Of a model that is not compiled, and of a backbone."""
    trained = make(SAVED_ON)
    trained.load_weights(folder)
    task = make(None, optimizer=None)
    task.load_weights(folder)
    backbone = MoEBackbone(**{**SETTINGS, **MODEL})
    backbone.load_weights(folder)
    for model in (task, backbone):
        for got, expected in zip(
            model.get_weights(), trained.get_weights(), strict=True
        ):
            np.testing.assert_array_equal(got, expected)


# --- What is refused ---


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"num_experts": 4}, r"\(8,\) there, \(4,\) here"),
        ({"expert_dim": 16}, r"\(8, \d+, 12\) there, \(8, \d+, 16\) here"),
        ({"num_layers": 3}, r"transformer_layer_2/.*: none there, \(.*\) here"),
        ({"num_layers": 1}, r"transformer_layer_1.*: \(.*\) there, none here"),
        ({"optimizer": "sgd"}, r"optimizer_variables/.*none"),
    ],
)
def test_a_checkpoint_of_another_model(folder, settings, message):
    model = make("expert_model" if ON_JAX else None, **settings)
    before = model.get_weights()
    with pytest.raises(ValueError, match=f"(?s)Nothing was changed.*{message}"):
        model.load_weights(folder)
    for got, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(got, expected)
    assert int(model.optimizer.iterations) == 0


def test_a_folder_with_no_whole_checkpoint(tmp_path):
    (tmp_path / "3.orbax-checkpoint-tmp").mkdir()
    model = make(None)
    with pytest.raises(ValueError, match="No valid checkpoints"):
        model.load_weights(tmp_path)


def test_a_whole_checkpoint_beside_one_that_was_cut_short(folder, tmp_path, unbroken):
    """As a process leaves it that is killed while it saves."""
    for path in folder.rglob("*"):
        target = tmp_path / path.relative_to(folder)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    cut = tmp_path / "2.orbax-checkpoint-tmp"
    (cut / "pytree").mkdir(parents=True)
    pathlib.Path(cut / "pytree" / "manifest.ocdbt").write_bytes(b"cut")
    model = make(SAVED_ON)
    model.load_weights(tmp_path)
    check_goes_on(model, STOP, unbroken)
