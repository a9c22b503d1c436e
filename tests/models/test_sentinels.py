"""T5's sentinel tokens, in a text and through a checkpoint."""

import argparse
import io
import pathlib

import keras
import numpy as np
import pytest
import sentencepiece
import transformers

from keras_moe.models import (
    MoESeq2SeqLM,
    MoESeq2SeqLMPreprocessor,
    MoETokenizer,
)
from presets.tiny_tokenizers import train_sentencepiece
from tests.models.small_models import small_seq2seq_lm

TEXTS = [
    "The <extra_id_0> parser<extra_id_1>.",
    "<extra_id_0><extra_id_4> <extra_id_1>",
    "  spaces  and <extra_id_9>",  # which is no token of five
    "plain",
    "",
]


@pytest.fixture(scope="module")
def proto():
    """A model of SentencePiece as T5's is made: unigrams, `<pad>` first."""
    model = io.BytesIO()
    text = pathlib.Path(argparse.__file__).read_text()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for line in text.splitlines() if line.strip()),
        model_writer=model,
        model_type="unigram",
        vocab_size=300,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture
def tokenizer(proto):
    return MoETokenizer(proto=proto, extra_ids=5, start_token=None)


@pytest.fixture
def theirs(proto, tmp_path):
    (tmp_path / "spiece.model").write_bytes(proto)
    return transformers.T5Tokenizer.from_pretrained(tmp_path, extra_ids=5)


def test_ids_are_those_of_transformers(tokenizer, theirs):
    expected = theirs(TEXTS, add_special_tokens=False).input_ids
    assert tokenizer(TEXTS) == expected
    assert tokenizer("<extra_id_0>").tolist() == [304]
    assert tokenizer.sentinel_token_ids == [304, 303, 302, 301, 300]
    assert tokenizer.vocabulary_size() == 305 == len(tokenizer.get_vocabulary())
    assert tokenizer.id_to_token(303) == "<extra_id_1>"
    assert tokenizer.token_to_id("<extra_id_4>") == 300


def test_texts_come_back_with_spaces_around_sentinels(tokenizer):
    texts = ["The <extra_id_0> parser <extra_id_1> .", "plain", "<extra_id_2>"]
    ids = tokenizer(texts)
    assert tokenizer.detokenize(ids) == texts
    padded = np.array([[0, 304, 1]])
    assert "<extra_id_0>" in tokenizer.detokenize(padded)[0]


def test_a_vocabulary_without_sentinels_has_none(proto):
    tokenizer = MoETokenizer(proto=proto, start_token=None)
    assert tokenizer.sentinel_token_ids == []
    assert len(tokenizer("<extra_id_0>")) > 1
    with pytest.raises(ValueError, match="extra_ids=-1"):
        MoETokenizer(proto=proto, start_token=None, extra_ids=-1)
    with pytest.raises(ValueError, match=r"tokenizer\.json.*extra_ids=2"):
        MoETokenizer(tokenizer_json={}, start_token=None, extra_ids=2)


def test_saved_with_the_tokenizer(tokenizer, tmp_path):
    tokenizer.save_to_preset(str(tmp_path))
    config = tokenizer.get_config()
    assert config["extra_ids"] == 5
    copy = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(tokenizer)
    )
    copy.load_assets(str(tmp_path / "assets/tokenizer"))
    assert copy(TEXTS) == tokenizer(TEXTS)


@pytest.mark.parametrize("kind", ["unigrams", "byte_pairs", "tokenizer_json"])
def test_through_a_checkpoint(kind, tokenizer, theirs, tmp_path):
    if kind == "tokenizer_json":
        json = theirs.backend_tokenizer.to_str()
        tokenizer = MoETokenizer(tokenizer_json=json, start_token=None)
    elif kind == "byte_pairs":
        text = pathlib.Path(argparse.__file__).read_text()
        proto = train_sentencepiece([text], vocabulary_size=400)
        tokenizer = MoETokenizer(proto=proto, extra_ids=5)
    preprocessor = MoESeq2SeqLMPreprocessor(
        tokenizer, encoder_sequence_length=20, decoder_sequence_length=10
    )
    seq2seq_lm = small_seq2seq_lm(preprocessor, vocabulary_size=420, dense_dim=24)
    folder = tmp_path / "exported"
    seq2seq_lm.export_to_transformers(folder)
    exported = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder)
    start = tokenizer.start_token_id
    start = tokenizer.pad_token_id if start is None else start
    assert model.config.decoder_start_token_id == start
    assert model.config.eos_token_id == tokenizer.end_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id == 0
    texts = [text for text in TEXTS if text]
    # With the end token, as the preprocessor packs a source.
    ids = exported(texts).input_ids
    assert ids == [[*row, tokenizer.end_token_id] for row in tokenizer(texts)]
    again = MoESeq2SeqLM.from_preset(str(folder))
    assert again.preprocessor.tokenizer(TEXTS) == tokenizer(TEXTS)
    for source in texts[:2]:
        batch = exported(source, return_tensors="pt")
        expected = model.generate(**batch, max_length=10, do_sample=False)
        again.compile(sampler="greedy")
        found = again.generate(source, max_length=10)
        special = [0, *tokenizer.special_token_ids]
        ids = [i for i in expected[0].tolist() if i not in special]
        assert found == again.preprocessor.tokenizer.detokenize(ids)
