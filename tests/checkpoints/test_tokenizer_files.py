"""Tokenizers of checkpoints, read and written."""

import json
import shutil

import keras
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from keras import ops

import keras_moe
from keras_moe.models import (
    MoECausalLM,
    MoECausalLMPreprocessor,
    MoETokenizer,
    presets,
)
from tests.checkpoints.small_checkpoints import (
    CONFIGS,
    assert_close,
    our_logits,
    their_logits,
)

TEXTS = [
    "The statement is true.",
    "  def f(x):\n\n    return x  ",
    "naïve café, 中文 and 🙂",
]


@pytest.fixture(scope="module")
def sentencepiece_model():
    return presets.ROOT / "mixtral_tiny_en/assets/tokenizer/vocabulary.spm"


@pytest.fixture(scope="module")
def byte_pair_file():
    return presets.ROOT / "deepseek_moe_tiny_en/assets/tokenizer/tokenizer.json"


def _checkpoint(folder, vocabulary=1024, **config):
    config = {**CONFIGS["mixtral"], "vocab_size": vocabulary, **config}
    config = transformers.AutoConfig.for_model(**config)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    return model


def _write(folder, name, **content):
    (folder / name).write_text(json.dumps(content))


def test_generates_text_from_a_checkpoint(tmp_path, byte_pair_file):
    theirs = _checkpoint(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(byte_pair_file))
    start, end = tokenizer.id_to_token(1), tokenizer.id_to_token(2)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, 1)]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    _write(
        tmp_path,
        "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token=start,
        eos_token={"content": end, "lstrip": False},
    )
    ours = MoECausalLM.from_preset(str(tmp_path))
    assert ours.preprocessor.add_start_token
    assert ours.preprocessor.sequence_length == 64
    prompt = "The statement"
    ids = [1, *tokenizer.encode(prompt, add_special_tokens=False).ids]
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(
        torch.tensor([ids]), do_sample=False, max_length=len(ids) + 5, pad_token_id=0
    )[0].tolist()
    ours.compile(sampler="greedy")
    text = ours.generate(prompt, max_length=len(ids) + 5, stop_token_ids=None)
    special = {0, 1, 2}
    assert text == tokenizer.decode([i for i in expected if i not in special])


def test_reads_sentencepiece(tmp_path, sentencepiece_model):
    _checkpoint(tmp_path)
    shutil.copy(sentencepiece_model, tmp_path / "tokenizer.model")
    _write(tmp_path, "special_tokens_map.json", bos_token="<s>", eos_token="</s>")
    tokenizer = MoETokenizer.from_preset(str(tmp_path))
    reference = sentencepiece.SentencePieceProcessor(
        model_file=str(sentencepiece_model)
    )
    assert tokenizer(TEXTS) == reference.encode(TEXTS)
    preprocessor = MoECausalLMPreprocessor.from_preset(
        str(tmp_path), sequence_length=16
    )
    assert preprocessor.sequence_length == 16
    assert preprocessor.generate_preprocess("The")["token_ids"][0] == 1
    # Without a word on the start token, it is added as Transformers does.
    assert preprocessor.add_start_token


def test_special_tokens_by_their_ids(tmp_path, sentencepiece_model):
    _checkpoint(tmp_path, bos_token_id=None, eos_token_id=[2, 5])
    shutil.copy(sentencepiece_model, tmp_path / "tokenizer.model")
    tokenizer = MoETokenizer.from_preset(str(tmp_path))
    assert tokenizer.start_token is None
    assert tokenizer.end_token_id == 2
    assert tokenizer.stop_token_ids == (2, 5)
    preprocessor = MoECausalLMPreprocessor.from_preset(str(tmp_path))
    assert not preprocessor.add_start_token


def test_stops_at_every_end_token(tmp_path, byte_pair_file):
    """As Transformers does, which has a list of them in `generation_config.json`."""
    theirs = _checkpoint(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(byte_pair_file))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    _write(tmp_path, "tokenizer_config.json", eos_token=tokenizer.id_to_token(2))
    prompt = "The statement"
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids

    def expected():
        prompts, length = torch.tensor([ids]), len(ids) + 6
        tokens = theirs.generate(
            prompts, do_sample=False, max_length=length, pad_token_id=0
        )
        return tokens[0, len(ids) :].tolist()

    theirs.generation_config.eos_token_id = None
    stop = expected()[2]
    theirs.generation_config.eos_token_id = [2, stop]
    theirs.generation_config.save_pretrained(tmp_path)
    new = expected()
    assert new[-1] == stop and len(new) <= 3
    ours = MoECausalLM.from_preset(str(tmp_path))
    assert ours.preprocessor.tokenizer.stop_token_ids == (2, stop)
    ours.compile(sampler="greedy")
    text = ours.generate(prompt, max_length=len(ids) + 6)
    assert text == tokenizer.decode([*ids, *new[:-1]])
    ours.export_to_transformers(tmp_path / "out")
    config = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert config["eos_token_id"] == [2, stop]


@pytest.mark.parametrize(
    "stated", [{}, {"add_bos_token": True}, {"add_bos_token": False}]
)
@pytest.mark.parametrize("adds", [True, False])
def test_start_token_as_the_file_itself_adds_it(tmp_path, byte_pair_file, adds, stated):
    """Whatever `add_bos_token` says: Transformers 5 does not read it then."""
    _checkpoint(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(byte_pair_file))
    start, end = tokenizer.id_to_token(1), tokenizer.id_to_token(2)
    if adds:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, 1)]
        )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    named = {"bos_token": start, "eos_token": end, **stated}
    named["tokenizer_class"] = "LlamaTokenizerFast"
    _write(tmp_path, "tokenizer_config.json", **named)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs("The statement").input_ids[0] == 1) == adds
    preprocessor = MoECausalLMPreprocessor.from_preset(str(tmp_path))
    assert preprocessor.add_start_token == adds


MERGED_TEXTS = [
    *TEXTS,
    "",
    " ",
    "a  b\t\tc \r\n\r\n  d",
    "1234567 it's WE'LL don't",
    "e\u0301 \u1e9b\u0323 nai\u0308ve",
    "if x:\n\t\treturn {'a': [1, 2], \"b\": x**2}  # done\n",
    "</s>between</s>",
]


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "GPT2Tokenizer"])
def test_reads_merges_as_transformers_does(tmp_path, byte_pair_file, kind):
    _checkpoint(tmp_path)
    model = json.loads(byte_pair_file.read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    (tmp_path / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    end = {"content": "</s>", "special": True, "normalized": False}
    _write(
        tmp_path,
        "tokenizer_config.json",
        tokenizer_class=kind,
        eos_token="</s>",
        unk_token="</s>",
        bos_token=None,
        pad_token="</s>",
        added_tokens_decoder={str(model["vocab"]["</s>"]): end},
    )
    ours = MoETokenizer.from_preset(str(tmp_path))
    theirs = getattr(transformers, kind).from_pretrained(str(tmp_path))
    for text in MERGED_TEXTS:
        expected = theirs.encode(text, add_special_tokens=False)
        assert list(ours(text)) == expected, text
    assert ours.start_token is None and ours.end_token == "</s>"
    assert not MoECausalLMPreprocessor.from_preset(str(tmp_path)).add_start_token


def test_refuses_merges_without_a_pattern(tmp_path):
    _checkpoint(tmp_path)
    _write(tmp_path, "vocab.json", a=0)
    (tmp_path / "merges.txt").write_text("")
    _write(tmp_path, "tokenizer_config.json", eos_token="a", tokenizer_class="X")
    with pytest.raises(ValueError, match="`tokenizer_class`.*Qwen2Tokenizer.*'X'"):
        MoETokenizer.from_preset(str(tmp_path))


def test_refuses_a_broken_tokenizer(tmp_path):
    _checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    _write(tmp_path, "tokenizer_config.json", bos_token=None, eos_token="</s>")
    with pytest.raises(ValueError, match="tokenizer.json"):
        MoETokenizer.from_preset(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("tokenizer.json", "{", "tokenizer.json"),
        ("tokenizer.model", "no model", "tokenizer.model"),
        ("tokenizer_config.json", "[", "tokenizer_config.json"),
        ("tokenizer_config.json", '{"eos_token": null}', "eos_token"),
        ("tokenizer_config.json", '{"eos_token": "</nowhere>"}', "</nowhere>"),
    ],
)
def test_a_model_is_loaded_without_its_tokenizer_and_says_why(
    tmp_path, byte_pair_file, file, content, named
):
    theirs = _checkpoint(tmp_path)
    if file == "tokenizer_config.json":
        shutil.copy(byte_pair_file, tmp_path / "tokenizer.json")
    (tmp_path / file).write_text(content)
    with pytest.raises(ValueError, match=named):
        MoETokenizer.from_preset(str(tmp_path))
    with pytest.warns(UserWarning, match=f"without a preprocessor.*{named}"):
        ours = MoECausalLM.from_preset(str(tmp_path))
    assert ours.preprocessor is None
    ids = np.array([[5, 900, 17]], "int32")
    assert_close(our_logits(ours, ids), their_logits(theirs, ids))


def test_a_broken_tokenizer_of_our_own_stays_an_error(tmp_path):
    MoECausalLM.from_preset("mixtral_tiny_en").save_to_preset(str(tmp_path))
    (tmp_path / "assets/tokenizer/vocabulary.spm").write_bytes(b"none")
    with pytest.raises(ValueError, match="SentencePiece"):
        MoECausalLM.from_preset(str(tmp_path))


def test_refuses_a_checkpoint_without_a_tokenizer(tmp_path):
    _checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="tokenizer.json.*tokenizer.model"):
        MoETokenizer.from_preset(str(tmp_path))
    assert MoECausalLM.from_preset(str(tmp_path)).preprocessor is None


def test_refuses_a_tokenizer_without_an_end(tmp_path, byte_pair_file):
    _checkpoint(tmp_path, eos_token_id=None)
    shutil.copy(byte_pair_file, tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="eos_token"):
        MoETokenizer.from_preset(str(tmp_path))


@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize("kind", ["sentencepiece", "byte_pair"])
def test_exports_a_tokenizer_and_its_model(
    tmp_path, kind, adds, sentencepiece_model, byte_pair_file
):
    if kind == "sentencepiece":
        tokenizer = MoETokenizer(proto=str(sentencepiece_model))
    else:
        names = tokenizers.Tokenizer.from_file(str(byte_pair_file))
        tokenizer = MoETokenizer(
            tokenizer_json=str(byte_pair_file),
            start_token=names.id_to_token(1),
            end_token=names.id_to_token(2),
        )
    preprocessor = MoECausalLMPreprocessor(
        tokenizer, sequence_length=32, add_start_token=adds
    )
    _checkpoint(tmp_path / "in", tokenizer.vocabulary_size())
    ours = MoECausalLM.from_preset(str(tmp_path / "in"), preprocessor=preprocessor)
    ours.export_to_transformers(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    start = [tokenizer.start_token_id] if adds else []
    for text in TEXTS:
        ids = [*start, *np.array(tokenizer(text)).tolist()]
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids, skip_special_tokens=True).strip() == text.strip()
    assert theirs.bos_token_id == tokenizer.start_token_id
    assert theirs.eos_token_id == tokenizer.end_token_id
    # And the whole folder comes back to us.
    again = MoECausalLM.from_preset(str(tmp_path / "out"))
    assert again.preprocessor.add_start_token == adds
    assert again.preprocessor.tokenizer(TEXTS) == tokenizer(TEXTS)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == tokenizer.end_token_id
    ids = np.array([theirs(TEXTS[0])["input_ids"]], "int32")
    np.testing.assert_allclose(
        our_logits(again, ids), their_logits(model, ids), atol=1e-4
    )
    assert ops.shape(ids)[1] > 3


_TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
_CHAT = [{"role": "user", "content": "Hello"}, {"role": "bot", "content": "You too"}]


@pytest.fixture(scope="module", params=["chat_template.jinja", "tokenizer_config.json"])
def chat_checkpoint(request, tmp_path_factory, byte_pair_file):
    """A checkpoint whose folder says how to talk with the model and to generate."""
    folder = tmp_path_factory.mktemp("chat")
    theirs = _checkpoint(folder)
    theirs.generation_config.update(
        do_sample=True, temperature=0.6, top_p=0.95, eos_token_id=[2, 7]
    )
    theirs.generation_config.save_pretrained(folder)
    vocabulary = tokenizers.Tokenizer.from_file(str(byte_pair_file))
    names = [vocabulary.id_to_token(i) for i in range(4)]
    vocabulary.save(str(folder / "tokenizer.json"))
    template = {}
    if request.param == "chat_template.jinja":
        (folder / request.param).write_text(_TEMPLATE)
    else:
        template["chat_template"] = _TEMPLATE
    _write(
        folder,
        "tokenizer_config.json",
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token=names[1],
        eos_token=names[2],
        additional_special_tokens=[names[3], "<|nowhere|>"],
        model_max_length=77,
        **template,
    )
    return folder, names[3]


@pytest.mark.parametrize("kept", ["preset", "file", None])
def test_what_came_with_a_tokenizer_goes_out(tmp_path, chat_checkpoint, kept):
    folder, special = chat_checkpoint
    ours = MoECausalLM.from_preset(str(folder))
    if kept == "preset":
        ours.save_to_preset(str(tmp_path / "ours"))
        ours = MoECausalLM.from_preset(str(tmp_path / "ours"))
    elif kept == "file":
        ours.save(str(tmp_path / "ours.keras"))
        ours = keras.saving.load_model(str(tmp_path / "ours.keras"))
    ours.export_to_transformers(tmp_path / "out")
    found, expected = (
        transformers.AutoTokenizer.from_pretrained(path)
        for path in (tmp_path / "out", folder)
    )
    assert found.model_max_length == expected.model_max_length == 77
    chats = [t.apply_chat_template(_CHAT, tokenize=False) for t in (found, expected)]
    assert chats == ["<user> Hello\n<bot> You too\n"] * 2
    assert special in expected.all_special_tokens
    # What the vocabulary lacks, the model knows no embedding of.
    assert found.all_special_tokens == [
        token for token in expected.all_special_tokens if token != "<|nowhere|>"
    ]
    found, expected = (
        transformers.GenerationConfig.from_pretrained(path)
        for path in (tmp_path / "out", folder)
    )
    assert found.to_diff_dict() == expected.to_diff_dict()
    assert (found.temperature, found.eos_token_id) == (0.6, [2, 7])


def test_another_tokenizer_is_not_given_the_folders_template(tmp_path, chat_checkpoint):
    folder, _ = chat_checkpoint
    own = MoECausalLMPreprocessor.from_preset(str(folder), sequence_length=8)
    ours = MoECausalLM.from_preset(str(folder), preprocessor=own)
    ours.export_to_transformers(tmp_path / "out")
    config = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert "chat_template" not in config
    config = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert config["top_p"] == 0.95


def _train(tmp_path, **settings):
    """A small SentencePiece model with a space before every text, as Mixtral's."""
    (tmp_path / "text.txt").write_text("\n".join(keras_moe.sample_text()[:80]))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "trained"),
        vocab_size=500,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
        **{
            "model_type": "bpe",
            "normalization_rule_name": "identity",
            **settings,
        },
    )
    return str(tmp_path / "trained.model")


def _export(tmp_path, proto):
    tokenizer = MoETokenizer(proto=proto)
    _checkpoint(tmp_path / "in", tokenizer.vocabulary_size())
    ours = MoECausalLM.from_preset(
        str(tmp_path / "in"),
        preprocessor=MoECausalLMPreprocessor(tokenizer, sequence_length=32),
    )
    ours.export_to_transformers(tmp_path / "out")
    return tokenizer


def test_exports_the_space_before_a_text(tmp_path):
    path = _train(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=path)
    assert reference.encode("a", out_type=str)[0].startswith("\u2581")
    _export(tmp_path, path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    new = keras_moe.sample_text()[80:110]
    for text in [*MERGED_TEXTS[:-1], *new, "a" + 57 * " " + "b"]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ids == reference.encode(text), text
    assert theirs("a")["input_ids"] == [1, *reference.encode("a")]


@pytest.mark.parametrize(
    "settings",
    [{"model_type": "unigram"}, {"normalization_rule_name": "nmt_nfkc"}],
    ids=str,
)
def test_warns_where_no_file_gives_the_same_ids(tmp_path, settings):
    path = _train(tmp_path, **settings)
    with pytest.warns(UserWarning, match="no tokenizer.json gives the same ids"):
        tokenizer = _export(tmp_path, path)
    assert not (tmp_path / "out/tokenizer.json").exists()
    again = MoETokenizer.from_preset(str(tmp_path / "out"))
    assert again(TEXTS) == tokenizer(TEXTS)


def test_a_trained_preset_goes_out(tmp_path):
    ours = MoECausalLM.from_preset("mixtral_tiny_en")
    ours.export_to_transformers(tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer(TEXTS[0], return_tensors="pt")
    expected = model.generate(**inputs, do_sample=False, max_length=24, pad_token_id=0)
    ours.compile(sampler="greedy")
    text = ours.generate(TEXTS[0], max_length=24)
    assert tokenizer.decode(expected[0], skip_special_tokens=True) == text
