import argparse
import json
import os
import pathlib
import pickle
import subprocess
import sys

import keras
import keras_hub
import numpy as np
import pytest
import sentencepiece
import tensorflow as tf
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_moe.models import MoEBackbone, MoECausalLM, MoECausalLMPreprocessor
from keras_moe.models.moe_tokenizer import MoETokenizer
from presets.tiny_tokenizers import train_byte_pair, train_sentencepiece

KINDS = ("sentencepiece", "byte_pair")
TEXTS = [
    "",
    " ",
    "The quick brown fox",
    "  two  spaces,   three   spaces, a tab\tand the end  ",
    "line\n\n\n  indented\r\nand on\n",
    "déjà vu, naïve, Ünïcödé, e\u0301",
    "中文文本和日本語と한국어",
    "smile 🙂, family 👩‍👩‍👧, flag 🇸🇪",
    "def f(x):\n    return {'a': x[0] ** 2}  # why?\n",
    "1234567890 3.14",
]


@pytest.fixture(scope="session")
def corpus():
    return [pathlib.Path(argparse.__file__).read_text()]


@pytest.fixture(scope="session")
def proto(corpus):
    return train_sentencepiece(corpus, vocabulary_size=512)


@pytest.fixture(scope="session")
def tokenizer_json(corpus):
    return train_byte_pair(corpus, vocabulary_size=512)


@pytest.fixture(params=KINDS)
def tokenizer(request, proto, tokenizer_json):
    if request.param == "sentencepiece":
        return MoETokenizer(proto=proto)
    return MoETokenizer(tokenizer_json=tokenizer_json)


@pytest.fixture
def preset(tokenizer, tmp_path):
    tiny_backbone(tokenizer).save_to_preset(str(tmp_path))
    tokenizer.save_to_preset(str(tmp_path))
    return tmp_path


def tiny_backbone(tokenizer):
    return MoEBackbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=1,
        hidden_dim=8,
        num_query_heads=2,
        num_experts=2,
        top_k=1,
        expert_dim=8,
    )


# ------------------------------------------------------------- equal to the reference


def test_sentencepiece_ids_equal_the_library_s(proto):
    reference = sentencepiece.SentencePieceProcessor(model_proto=proto)
    tokenizer = MoETokenizer(proto=proto)
    assert tokenizer.tokenize(TEXTS) == [reference.encode(text) for text in TEXTS]
    ids = [reference.encode(text) for text in TEXTS]
    assert tokenizer.detokenize(ids) == [reference.decode(row) for row in ids]


def test_byte_pair_ids_equal_transformers(tokenizer_json):
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer_json)
    )
    tokenizer = MoETokenizer(tokenizer_json=tokenizer_json)
    ids = [reference.encode(text, add_special_tokens=False) for text in TEXTS]
    assert tokenizer.tokenize(TEXTS) == ids
    assert tokenizer.detokenize(ids) == [reference.decode(row) for row in ids]


def test_a_file_s_own_split_normaliser_and_template_are_honoured(tokenizer_json):
    # What a published file carries: a split by regular expression, a normaliser, a
    # template that adds "<s>", a limit on the length and padding to it.
    reference = tokenizers.Tokenizer.from_str(tokenizer_json)
    reference.normalizer = tokenizers.normalizers.NFC()
    reference.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(
                tokenizers.Regex(r"\p{N}{1,3}|\s+(?!\S)|\s*[\r\n]+| ?[^\s\p{N}]+|\s+"),
                behavior="isolated",
            ),
            tokenizers.pre_tokenizers.ByteLevel(
                add_prefix_space=False, use_regex=False
            ),
        ]
    )
    expected = [reference.encode(text).ids for text in TEXTS]
    reference.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    reference.enable_truncation(4)
    reference.enable_padding()
    tokenizer = MoETokenizer(tokenizer_json=json.loads(reference.to_str()))
    assert tokenizer.tokenize(TEXTS) == expected


@settings(max_examples=50)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_text_survives_the_round_trip(round_trip_tokenizers, text):
    byte_pair, sentence_piece = round_trip_tokenizers
    assert byte_pair.detokenize(byte_pair.tokenize(text)) == text
    # SentencePiece writes a space as U+2581.
    expected = text.replace("\u2581", " ")
    assert sentence_piece.detokenize(sentence_piece.tokenize(text)) == expected


@pytest.fixture(scope="session")
def round_trip_tokenizers(proto, tokenizer_json):
    return MoETokenizer(tokenizer_json=tokenizer_json), MoETokenizer(proto=proto)


def test_training_is_repeatable(corpus, proto, tokenizer_json):
    assert train_sentencepiece(corpus, vocabulary_size=512) == proto
    assert train_byte_pair(corpus, vocabulary_size=512) == tokenizer_json


# ------------------------------------------------------------------ forms of the input


def test_forms_of_text(tokenizer):
    ids = tokenizer.tokenize("a fox")
    assert isinstance(ids, np.ndarray)
    assert ids.dtype == "int32"
    assert ids.ndim == 1
    for scalar in (b"a fox", np.array("a fox"), tf.constant("a fox")):
        assert tokenizer(scalar).tolist() == ids.tolist()
    for batch in (["a fox"], ("a fox",), np.array(["a fox"]), tf.constant(["a fox"])):
        assert tokenizer(batch) == [ids.tolist()]
    assert tokenizer([]) == []
    assert tokenizer.tokenize("").shape == (0,)


@pytest.mark.parametrize("inputs", [1, None, [1], [["a"]], {"a": "b"}])
def test_what_is_no_text(tokenizer, inputs):
    with pytest.raises(ValueError, match="`inputs` must be a string or a batch"):
        tokenizer.tokenize(inputs)


def test_a_lone_surrogate(tokenizer):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        tokenizer.tokenize("a\ud800")


def test_forms_of_ids(tokenizer):
    text = "a fox"
    row = tokenizer.tokenize(text).tolist()
    array = np.array(row)
    for ids in (row, tuple(row), array, array.astype("int64"), tf.constant(row)):
        assert tokenizer.detokenize(ids) == text
    assert tokenizer.detokenize(keras.ops.convert_to_tensor(array)) == text
    batches = [
        [row, row],
        [array, array],
        np.stack([array] * 2),
        keras.ops.convert_to_tensor(np.stack([array] * 2)),
        tf.constant([row, row]),
        tf.ragged.constant([row, row]),
    ]
    for ids in batches:
        assert tokenizer.detokenize(ids) == [text, text]
    assert tokenizer.detokenize([row, []]) == [text, ""]
    assert tokenizer.detokenize([]) == ""
    assert tokenizer.detokenize(row[0]) == tokenizer.detokenize(row[:1])


def test_ids_outside_the_vocabulary(tokenizer):
    row = tokenizer.tokenize("a fox").tolist()
    size = tokenizer.vocabulary_size()
    assert tokenizer.detokenize([size, *row, size + 7]) == "a fox"
    with pytest.raises(ValueError, match="must not be negative. Received:.* -1"):
        tokenizer.detokenize([-1, *row])


# ------------------------------------------------------------------------- vocabulary


def test_vocabulary(tokenizer):
    vocabulary = tokenizer.get_vocabulary()
    assert len(vocabulary) == len(set(vocabulary)) == tokenizer.vocabulary_size() == 512
    assert [tokenizer.token_to_id(token) for token in vocabulary] == list(range(512))
    assert [tokenizer.id_to_token(i) for i in range(512)] == vocabulary
    assert tokenizer.special_tokens[:2] == ["<s>", "</s>"]
    assert (tokenizer.start_token_id, tokenizer.end_token_id) == (1, 2)
    for token_id in (-1, 512):
        with pytest.raises(ValueError, match=f"from 0 to 511.*id={token_id}"):
            tokenizer.id_to_token(token_id)


def test_unknown_tokens(proto, tokenizer_json):
    assert MoETokenizer(proto=proto).token_to_id("no such token") == 0  # <unk>
    with pytest.raises(ValueError, match="`token` must be.*'no such token'"):
        MoETokenizer(tokenizer_json=tokenizer_json).token_to_id("no such token")


def test_padding_token(proto, tokenizer_json):
    tokenizer = MoETokenizer(proto=proto)  # has no "<pad>"
    assert tokenizer.pad_token_id == 0
    assert tokenizer.special_token_ids == [1, 2]
    tokenizer = MoETokenizer(tokenizer_json=tokenizer_json.replace("<pad>", "<none>"))
    assert tokenizer.pad_token_id == 0
    assert tokenizer.special_token_ids == [1, 2]
    tokenizer = MoETokenizer(tokenizer_json=tokenizer_json)
    assert tokenizer.pad_token_id == tokenizer.token_to_id("<pad>") == 0
    assert tokenizer.special_token_ids == [1, 2, 0]
    tokenizer = MoETokenizer(proto=proto, pad_token="</s>")
    assert tokenizer.pad_token_id == 2
    assert tokenizer.special_token_ids == [1, 2]


def test_no_start_token(tokenizer_json):
    tokenizer = MoETokenizer(tokenizer_json=tokenizer_json, start_token=None)
    assert tokenizer.start_token_id is None
    assert tokenizer.special_tokens == ["</s>", "<pad>"]


def test_special_tokens_within_text(proto, tokenizer_json):
    sentence_piece = MoETokenizer(proto=proto)
    assert 1 not in sentence_piece.tokenize("<s>")
    assert sentence_piece.detokenize([1, *sentence_piece("fox"), 2]) == "fox"
    byte_pair = MoETokenizer(tokenizer_json=tokenizer_json)
    assert byte_pair.tokenize("<s>").tolist() == [1]
    assert byte_pair.detokenize([1, *byte_pair("fox"), 2]) == "<s>fox</s>"


# ---------------------------------------------------------------------------- tf.data


def test_tf_data_gives_the_same_ids_and_text(tokenizer):
    strings = tf.data.Dataset.from_tensor_slices(TEXTS)
    expected = tokenizer.tokenize(TEXTS)
    one_by_one = strings.map(tokenizer)
    assert [ids.numpy().tolist() for ids in one_by_one] == expected
    batched = strings.batch(4).map(tokenizer)
    assert [ids for batch in batched for ids in batch.to_list()] == expected
    assert batched.element_spec.shape.as_list() == [None, None]
    assert batched.element_spec.dtype == "int32"
    back = one_by_one.map(tokenizer.detokenize)
    assert [text.numpy().decode() for text in back] == TEXTS
    back = batched.map(tokenizer.detokenize)
    assert [text.decode() for batch in back for text in batch.numpy()] == TEXTS


def test_tf_function(tokenizer):
    ids = tf.function(tokenizer.tokenize)(tf.constant(TEXTS))
    assert ids.to_list() == tokenizer.tokenize(TEXTS)
    with pytest.raises(ValueError, match="`inputs` must be .* rank 1"):
        tf.function(tokenizer.tokenize)(tf.constant([["a"]]))


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def both_saved(proto, tokenizer_json, tmp_path):
    for tokenizer in MoETokenizer(proto), MoETokenizer(tokenizer_json=tokenizer_json):
        folder = tmp_path / tokenizer.file_assets[0]
        folder.mkdir()
        tokenizer.save_assets(folder)
    return tmp_path


def test_a_pipeline_that_reads_ahead_does_not_hold_up_the_exit(both_saved):
    done = run_python(
        f"""
import pathlib
import tensorflow as tf
from keras_moe.models import MoETokenizer
pipelines = []
for folder in pathlib.Path({str(both_saved)!r}).iterdir():
    tokenizer = MoETokenizer()
    tokenizer.load_assets(folder)
    strings = tf.data.Dataset.from_tensor_slices(["a fox " * 200] * 100).repeat()
    ids = strings.map(tokenizer, num_parallel_calls=2).prefetch(50)
    pipelines.append(iter(ids))
    next(pipelines[-1])
"""
    )
    assert done.returncode == 0, done.stderr


def test_tensorflow_is_not_needed(both_saved, proto, tokenizer_json):
    backend = keras.config.backend()
    done = run_python(
        f"""
import pathlib, sys
sys.modules["tensorflow"] = sys.modules["tensorflow_text"] = None
from keras_moe.models import MoECausalLMPreprocessor, MoETokenizer
for folder in sorted(pathlib.Path({str(both_saved)!r}).iterdir()):
    tokenizer = MoETokenizer()
    tokenizer.load_assets(folder)
    preprocessor = MoECausalLMPreprocessor(tokenizer, sequence_length=8)
    preprocessor(["a fox"])
    prompt = preprocessor.generate_preprocess(["a fox"])
    print(tokenizer.tokenize("a fox"), preprocessor.generate_postprocess(prompt))
""",
        KERAS_BACKEND="jax" if backend == "tensorflow" else backend,
    )
    byte_pair = MoETokenizer(tokenizer_json=tokenizer_json).tokenize("a fox")
    sentence_piece = MoETokenizer(proto=proto).tokenize("a fox")
    expected = f"{byte_pair} ['a fox']\n{sentence_piece} ['a fox']\n"
    assert done.stdout == expected, done.stderr


# ------------------------------------------------------------------ saving and loading


@pytest.mark.parametrize("cls", [MoETokenizer, keras_hub.tokenizers.Tokenizer])
def test_preset_folder(cls, tokenizer, preset):
    restored = cls.from_preset(str(preset))
    assert type(restored) is MoETokenizer
    assert restored.tokenize(TEXTS) == tokenizer.tokenize(TEXTS)
    assert restored.special_token_ids == tokenizer.special_token_ids
    again = preset / "again"
    tiny_backbone(tokenizer).save_to_preset(str(again))
    restored.save_to_preset(str(again))
    assets = "assets/tokenizer"
    (asset,) = os.listdir(preset / assets)
    assert (again / assets / asset).read_bytes() == (
        preset / assets / asset
    ).read_bytes()


def test_preset_settings_can_be_replaced(preset):
    tokenizer = MoETokenizer.from_preset(str(preset), start_token=None)
    assert tokenizer.start_token_id is None


def test_keras_archive(tokenizer, tmp_path):
    task = MoECausalLM(
        backbone=tiny_backbone(tokenizer),
        preprocessor=MoECausalLMPreprocessor(tokenizer, sequence_length=8),
    )
    task.save(tmp_path / "model.keras")
    restored = keras.saving.load_model(tmp_path / "model.keras").preprocessor
    assert restored.tokenizer.tokenize(TEXTS) == tokenizer.tokenize(TEXTS)
    assert restored.sequence_length == 8


def test_pickle(tokenizer):
    restored = pickle.loads(pickle.dumps(tokenizer))
    assert restored.tokenize(TEXTS) == tokenizer.tokenize(TEXTS)


def test_the_configuration_holds_no_vocabulary(tokenizer):
    config = tokenizer.get_config()
    assert len(json.dumps(config)) < 500
    restored = MoETokenizer.from_config(config)
    assert restored.get_config() == config
    with pytest.raises(ValueError, match="no vocabulary yet. Pass `proto` or"):
        restored.tokenize("a fox")
    with pytest.raises(ValueError, match="no vocabulary yet"):
        restored.vocabulary_size()


@pytest.mark.parametrize("form", [str, pathlib.Path])
def test_paths_and_a_dict(form, proto, tokenizer_json, tmp_path):
    (tmp_path / "a.spm").write_bytes(proto)
    (tmp_path / "a.json").write_text(tokenizer_json)
    first = MoETokenizer(proto=form(tmp_path / "a.spm"))
    assert first.tokenize(TEXTS) == MoETokenizer(proto=proto).tokenize(TEXTS)
    second = MoETokenizer(tokenizer_json=form(tmp_path / "a.json"))
    third = MoETokenizer(tokenizer_json=json.loads(tokenizer_json))
    assert second.tokenize(TEXTS) == third.tokenize(TEXTS)


# ------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("argument", ["proto", "tokenizer_json"])
def test_a_configuration_cannot_make_us_read_a_file(argument, preset):
    secret = preset / "secret"
    secret.write_text("{}")
    path = preset / "tokenizer.json"
    config = json.loads(path.read_text())
    config["config"][argument] = str(secret)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"`{argument}` must not be a path"):
        MoETokenizer.from_preset(str(preset))


def test_a_configuration_cannot_lead_out_of_the_preset(preset):
    path = preset / "tokenizer.json"
    config = json.loads(path.read_text())
    config["config"]["config_file"] = "../../outside/tokenizer.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="`config_file` must be a file name"):
        MoETokenizer.from_preset(str(preset))


def test_both_or_neither_vocabulary(proto, tokenizer_json):
    with pytest.raises(ValueError, match="`proto` and `tokenizer_json` exclude"):
        MoETokenizer(proto=proto, tokenizer_json=tokenizer_json)
    with pytest.raises(ValueError, match="no vocabulary yet"):
        MoETokenizer().tokenize("a fox")


@pytest.mark.parametrize("broken", [b"", b"\x00", b"not a model" * 50])
def test_a_broken_sentencepiece_model(broken):
    with pytest.raises(ValueError, match="`proto` .* must be a SentencePiece model"):
        MoETokenizer(proto=broken)


@pytest.mark.parametrize("broken", ["{", "{}", '{"model": {"type": "BPE"', {}])
def test_a_broken_tokenizer_json(broken):
    with pytest.raises(ValueError, match="`tokenizer_json` .* must be a file of the"):
        MoETokenizer(tokenizer_json=broken)


def test_arguments_of_the_wrong_kind(proto):
    with pytest.raises(ValueError, match="`proto` must be the path or the bytes"):
        MoETokenizer(proto=3)
    with pytest.raises(ValueError, match="`tokenizer_json` must be a path, JSON text"):
        MoETokenizer(tokenizer_json=b"{}")
    with pytest.raises(FileNotFoundError, match="`proto` must be .*proto='none.spm'"):
        MoETokenizer(proto="none.spm")
    with pytest.raises(FileNotFoundError, match="`tokenizer_json` must be the path"):
        MoETokenizer(tokenizer_json="none.json")
    with pytest.raises(ValueError, match="`dtype` must be an integer type"):
        MoETokenizer(proto=proto, dtype="float32")
    with pytest.raises(ValueError, match="`end_token` must be a string"):
        MoETokenizer(proto=proto, end_token=None)


@pytest.mark.parametrize("argument", ["start_token", "end_token", "pad_token"])
def test_special_tokens_must_be_in_the_vocabulary(argument, proto, tokenizer_json):
    for vocabulary in ({"proto": proto}, {"tokenizer_json": tokenizer_json}):
        with pytest.raises(ValueError, match=f"`{argument}` must be in.*'<x>'.* 512"):
            MoETokenizer(**vocabulary, **{argument: "<x>"})


def test_assets_that_are_missing_or_doubled(preset, proto, tokenizer_json):
    folder = preset / "assets" / "tokenizer"
    for name in os.listdir(folder):
        (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match="must hold 'vocabulary.spm' or"):
        MoETokenizer.from_preset(str(preset))
    with pytest.raises(FileNotFoundError, match="which holds neither"):
        MoETokenizer().load_assets(preset / "nowhere")
    (folder / "vocabulary.spm").write_bytes(proto)
    (folder / "tokenizer.json").write_text(tokenizer_json)
    with pytest.raises(ValueError, match="which holds both"):
        MoETokenizer.from_preset(str(preset))
    (folder / "tokenizer.json").unlink()
    (folder / "vocabulary.spm").write_bytes(b"broken")
    with pytest.raises(ValueError, match="asset 'vocabulary.spm'"):
        MoETokenizer.from_preset(str(preset))
