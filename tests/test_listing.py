import dataclasses

import pytest

import keras_moe
from keras_moe.models import (
    MoEBackbone,
    MoECausalLM,
    MoESeq2SeqBackbone,
    MoESeq2SeqLM,
    presets,
)


def records():
    return {record.name: record for record in keras_moe.list_presets()}


def test_every_preset_is_listed():
    listed = keras_moe.list_presets()
    assert [record.name for record in listed] == sorted(presets.names())
    decoders, others = MoEBackbone.presets, MoESeq2SeqBackbone.presets
    assert {record.name for record in listed} == {*decoders, *others}
    assert not decoders.keys() & others.keys()
    assert set(MoECausalLM.presets) == set(decoders)
    for record in listed:
        assert record.family == {**decoders, **others}[record.name]["family"]
        assert record.paper.startswith("https://")
        assert record.description.endswith(".")
        assert 0 < record.active_parameters < record.total_parameters


def test_sizes():
    record = records()["mixtral_tiny_en"]
    assert (
        record.total_parameters
        == MoEBackbone.from_preset("mixtral_tiny_en").count_params()
    )
    # arXiv:2401.04088: 47B and 13B.
    record = records()["mixtral_8x7b"]
    assert record.total_parameters == pytest.approx(46.7e9, rel=0.005)
    assert record.active_parameters == pytest.approx(12.9e9, rel=0.005)


def test_where_weights_are():
    found = records()
    assert found["mixtral_tiny_en"].weights == "packaged"
    assert found["mixtral_8x7b"].weights == "mistralai/Mixtral-8x7B-v0.1"
    assert found["glam_64b_64e"].weights is None
    assert not found["glam_64b_64e"].has_weights
    for record in found.values():
        assert record.has_weights == (record.weights is not None)
        # What has no weights has none under a licence.
        assert record.has_weights == (record.licence is not None)


def test_packaged_weights_load():
    packaged = [r.name for r in keras_moe.list_presets() if r.weights == "packaged"]
    for cls in (MoECausalLM, MoESeq2SeqLM):
        names = [name for name in packaged if name in cls.presets]
        assert names
        for name in names:
            assert cls.from_preset(name).preprocessor is not None


def test_a_record_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        records()["mixtral_8x7b"].name = "other"
