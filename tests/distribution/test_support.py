"""A distribution that does nothing says so, wherever one could rely on it."""

import contextlib

import keras
import keras_hub
import numpy as np
import pytest

import keras_moe
from keras_moe.distribution import ExpertParallel, for_preset
from keras_moe.layers import MixtureOfExperts
from tests.models.small_models import (
    SETTINGS,
    full,
    random_ids,
    small_backbone,
    small_causal_lm,
    small_seq2seq_backbone,
)

INSTEAD = {
    "tensorflow": "tf.distribute.MirroredStrategy",
    "torch": "torch.nn.parallel.DistributedDataParallel",
}.get(keras.config.backend())


def refused():
    """What holds where Keras does not distribute: an error that names what does."""
    return pytest.raises(ValueError, match=INSTEAD) if INSTEAD else _nothing()


@contextlib.contextmanager
def _nothing():
    yield


def mesh():
    return keras.distribution.DeviceMesh((1,), ["expert"], ["cpu:0"])


def distribute(kind):
    """Sets one of Keras's own distributions over a single device."""
    if kind == "data":
        distribution = keras.distribution.DataParallel(device_mesh=mesh())
    else:
        layout_map = keras.distribution.LayoutMap(mesh())
        if kind == "experts":
            layout_map[r".*/experts/.*_kernel"] = ("expert", None, None)
        distribution = keras.distribution.ModelParallel(
            layout_map=layout_map, batch_dim_name="expert"
        )
    keras.distribution.set_distribution(distribution)


@pytest.mark.parametrize("kind", ["data", "model", "experts"])
@pytest.mark.parametrize(
    "make",
    [small_backbone, small_causal_lm, small_seq2seq_backbone],
    ids=["backbone", "causal_lm", "seq2seq"],
)
def test_backbones(make, kind):
    distribute(kind)
    with refused():
        make()


def test_a_backbone_without_experts():
    distribute("data")
    with refused():
        small_backbone(num_experts=0, num_shared_experts=0, expert_dim=None)


def test_from_preset():
    distribute("data")
    with refused():
        keras_moe.models.MoECausalLM.from_preset("mixtral_tiny_en")


def user_model():
    inputs = keras.Input((3, 4))
    outputs = keras.layers.Dense(2)(MixtureOfExperts(2, 4, name="mixture")(inputs))
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize("use", ["fit", "predict", "evaluate", "call"])
def test_a_mixture_in_a_model_of_ones_own(use):
    distribute("experts")
    model = user_model()
    x, y = np.ones((2, 3, 4), "float32"), np.ones((2, 3, 2), "float32")
    uses = {
        "fit": lambda: model.fit(x, y, verbose=0),
        "predict": lambda: model.predict(x, verbose=0),
        "evaluate": lambda: model.evaluate(x, y, verbose=0),
        "call": lambda: model(x),
    }
    with refused():
        uses[use]()


def test_a_distribution_set_after_the_model_was_built():
    backbone = small_backbone()
    distribute("data")
    with pytest.raises(ValueError, match=INSTEAD or "built before its distribution"):
        backbone.predict(full(random_ids(2, 3)), verbose=0)


def test_expert_parallel():
    layout_map = keras.distribution.LayoutMap(mesh())
    with refused():
        ExpertParallel(layout_map=layout_map)


def test_for_preset():
    with refused():
        for_preset(SETTINGS, devices=1)


def test_sparsify():
    model = keras_hub.models.MixtralBackbone(
        vocabulary_size=9,
        num_layers=1,
        num_query_heads=2,
        num_key_value_heads=1,
        hidden_dim=8,
        intermediate_dim=8,
        num_experts=2,
        top_k=1,
    )
    distribute("data")
    with refused():
        keras_moe.sparsify(model)
