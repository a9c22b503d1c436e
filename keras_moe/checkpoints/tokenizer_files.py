"""The tokenizer that comes with a checkpoint, and the one that goes out with it."""

import json
import pathlib
import warnings

import keras_hub
import sentencepiece
import tokenizers

from keras_moe.checkpoints.families import FAMILIES
from keras_moe.checkpoints.sentencepiece_files import to_byte_pair
from keras_moe.checkpoints.shards import read_json
from keras_moe.span_corruption import SENTINEL

BYTE_PAIR = "tokenizer.json"
SENTENCEPIECE = "tokenizer.model"
T5_SENTENCEPIECE = "spiece.model"  # T5's, to which sentinel tokens are added
MERGES = ("vocab.json", "merges.txt")  # a byte-pair tokenizer's older files
# What those files leave out, by `tokenizer_class`: how text is normalised, and split
# before it is merged; None for GPT-2's pattern, which `tokenizers` knows.
_SPLITS = {
    "GPT2Tokenizer": (None, None),
    "Qwen2Tokenizer": (
        "NFC",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
_SPECIAL = ("additional_special_tokens", "extra_special_tokens")
# What is said of a tokenizer that changes no id.
_CARRIED = (*_SPECIAL, "chat_template", "model_max_length", "padding_side", "unk_token")
CHAT_TEMPLATE = "chat_template.jinja"
_TOKENS = {
    "start_token": "bos_token",
    "end_token": "eos_token",
    "pad_token": "pad_token",
}


def has_tokenizer(folder):
    """Whether a checkpoint's folder holds a tokenizer that can be read."""
    folder = pathlib.Path(folder)
    return any(
        all((folder / name).is_file() for name in names)
        for names in ((BYTE_PAIR,), (SENTENCEPIECE,), (T5_SENTENCEPIECE,), MERGES)
    )


def read_tokenizer(folder):
    """The arguments of a `MoETokenizer` from a checkpoint's folder.

    `tokenizer.json` goes before `tokenizer.model` and T5's `spiece.model`, as in
    Transformers, and all of them before `vocab.json` and `merges.txt`, which are read
    with the split pattern of the `tokenizer_class` in `tokenizer_config.json`.

    Args:
        folder: path.

    Returns:
        A dict of `proto` or `tokenizer_json`, and the special tokens.

    Raises:
        FileNotFoundError: without any of them.
        ValueError: for a file that cannot be read, and without an end token.
    """
    folder = pathlib.Path(folder)
    if not has_tokenizer(folder):
        raise FileNotFoundError(
            f"The checkpoint must hold {BYTE_PAIR!r}, {SENTENCEPIECE!r}, "
            f"{T5_SENTENCEPIECE!r}, or {' and '.join(map(repr, MERGES))}. "
            f"Received: {str(folder)!r}, which holds none of them."
        )
    if (folder / BYTE_PAIR).is_file():
        arguments = {"tokenizer_json": folder / BYTE_PAIR}
    elif (folder / SENTENCEPIECE).is_file():
        arguments = {"proto": folder / SENTENCEPIECE}
    elif (folder / T5_SENTENCEPIECE).is_file():
        extra_ids = _read(folder, "tokenizer_config.json").get("extra_ids", 100)
        arguments = {"proto": folder / T5_SENTENCEPIECE, "extra_ids": extra_ids}
    else:
        arguments = {"tokenizer_json": _load_byte_pair(folder).to_str()}
    arguments.update(_special_tokens(folder))
    if arguments["end_token"] is None:
        raise ValueError(
            "The checkpoint's tokenizer must name an end token, as `eos_token` or "
            f"`eos_token_id`. Received: {str(folder)!r}, which names none."
        )
    return arguments


def read_preprocessing(folder):
    """The arguments of a preprocessor from a checkpoint's folder.

    Returns:
        A dict of `sequence_length` and `add_start_token`.
    """
    folder = pathlib.Path(folder)
    config = _read(folder, "config.json")
    keys = ("max_position_embeddings", "max_seq_len", "n_positions")
    context = next((config[key] for key in keys if config.get(key)), None)
    return {
        "sequence_length": min(1024, context) if isinstance(context, int) else 1024,
        "add_start_token": _adds_start_token(folder),
    }


def read_extras(folder, tokenizer=True):
    """What a checkpoint's folder says that neither model nor tokenizer holds.

    An export gives it back.

    Args:
        folder: path.
        tokenizer: bool, whether what is said of the tokenizer is wanted.

    Returns:
        A dict by file, of dicts: the ids of special tokens in `config.json`, all of
        `generation_config.json`, and of `tokenizer_config.json` such as
        `chat_template` and `model_max_length`.
    """
    folder = pathlib.Path(folder)
    config = _read(folder, "config.json")
    generation = _read(folder, "generation_config.json")
    generation.pop("transformers_version", None)  # that of who wrote it
    named = {}
    if tokenizer:
        named.update(_read(folder, "special_tokens_map.json"))
        named.update(_read(folder, "tokenizer_config.json"))
        if (folder / CHAT_TEMPLATE).is_file():  # first, as in Transformers
            text = (folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
            named["chat_template"] = text
    found = {
        "config.json": {key: config[key] for key in _IDS if key in config},
        "generation_config.json": generation,
        "tokenizer_config.json": {
            key: named[key] for key in _CARRIED if named.get(key) is not None
        },
    }
    return {file: content for file, content in found.items() if content}


def _special_tokens(folder):
    """By argument: what the tokenizer's files say, else the model's."""
    named = {
        **_read(folder, "special_tokens_map.json"),
        **_read(folder, "tokenizer_config.json"),
    }
    numbered = {
        **_read(folder, "config.json"),
        **_read(folder, "generation_config.json"),
    }
    found = {}
    for argument, key in _TOKENS.items():
        token = named.get(key)
        if isinstance(token, dict):  # with how it strips the text around it
            token = token.get("content")
        if key not in named and argument != "pad_token":
            ids = numbered.get(f"{key}_id")
            token_id = ids[0] if isinstance(ids, list) and ids else ids
            if isinstance(token_id, int):
                token = _id_to_token(folder, token_id)
        found[argument] = token
    found.update(_decoder_start(folder, found["pad_token"] or "<pad>"))
    ends = numbered.get("eos_token_id")
    ends = [_id_to_token(folder, i) for i in ends] if isinstance(ends, list) else []
    # What the file of a vocabulary does not hold cannot come out of it.
    found["stop_tokens"] = [t for t in ends if t not in (None, found["end_token"])]
    return found


def _decoder_start(folder, pad_token):
    """The token that targets begin with, by argument: of an encoder-decoder alone.

    None stands for the padding token, as in T5.
    """
    config = _read(folder, "config.json")
    family = FAMILIES.get(config.get("model_type"))
    if family is None or not family.has_encoder:
        return {}
    # As Transformers looks for it.
    for stated in (_read(folder, "generation_config.json"), config):
        token_id = stated.get("decoder_start_token_id")
        if token_id is None:
            continue
        token = _id_to_token(folder, token_id) if isinstance(token_id, int) else None
        if token is None:
            raise ValueError(
                "`decoder_start_token_id` must be the id of a token in the "
                f"tokenizer's file. Received: {token_id!r} in {str(folder)!r}"
            )
        return {"start_token": None if token == pad_token else token}
    return {}


def _id_to_token(folder, token_id):
    paths = [folder / name for name in (SENTENCEPIECE, T5_SENTENCEPIECE)]
    paths = [str(path) for path in paths if path.is_file()]
    if not paths or (folder / BYTE_PAIR).is_file():
        return _load_byte_pair(folder).id_to_token(token_id)
    try:
        model = sentencepiece.SentencePieceProcessor(model_file=paths[0])
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{paths[0]!r} must be a model of SentencePiece. Received: {error}"
        ) from error
    return model.id_to_piece(token_id) if token_id < model.vocab_size() else None


def _adds_start_token(folder):
    start = _special_tokens(folder)["start_token"]
    if start is None:
        return False
    if (folder / BYTE_PAIR).is_file():
        # Its own post-processor decides: Transformers 5 reads no `add_bos_token` then.
        return _begins_with(_load_byte_pair(folder), start)
    stated = _read(folder, "tokenizer_config.json").get("add_bos_token")
    if isinstance(stated, bool):
        return stated
    # As the tokenizers of Transformers over SentencePiece do, and no other.
    return (folder / SENTENCEPIECE).is_file()


def _begins_with(tokenizer, token):
    ids = tokenizer.encode("a").ids
    return bool(ids) and ids[0] == tokenizer.token_to_id(token)


def _load_merges(folder):
    config = _read(folder, "tokenizer_config.json")
    kind = str(config.get("tokenizer_class")).removesuffix("Fast")
    if kind not in _SPLITS:
        raise ValueError(
            f"{' and '.join(MERGES)} must come with a `tokenizer_class` in "
            f"tokenizer_config.json that is one of {', '.join(_SPLITS)}: they do not "
            f"say how text is split. Received: {config.get('tokenizer_class')!r}"
        )
    normalization, pattern = _SPLITS[kind]
    vocabulary, merges = (str(folder / name) for name in MERGES)
    try:
        model = tokenizers.models.BPE.from_file(vocabulary, merges)
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(
            f"{vocabulary!r} and {merges!r} must be a byte-pair vocabulary. "
            f"Received: {error}"
        ) from error
    tokenizer = tokenizers.Tokenizer(model)
    if normalization is not None:
        tokenizer.normalizer = getattr(tokenizers.normalizers, normalization)()
    pre = tokenizers.pre_tokenizers
    if pattern is None:
        tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    else:
        split = pre.Split(tokenizers.Regex(pattern), "isolated")
        bytes_ = pre.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre.Sequence([split, bytes_])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    added = config.get("added_tokens_decoder", {})
    for _, token in sorted(added.items(), key=lambda item: int(item[0])):
        flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
        flags = {name: token[name] for name in flags if name in token}
        tokenizer.add_tokens([tokenizers.AddedToken(token["content"], **flags)])
    return tokenizer


def _load_byte_pair(folder):
    path = folder / BYTE_PAIR
    if not path.is_file():
        return _load_merges(folder)
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(
            f"{str(path)!r} must be a file of the `tokenizers` package. "
            f"Received: {error}"
        ) from error


def _read(folder, name):
    return read_json(folder / name) if (folder / name).is_file() else {}


def write_tokenizer(folder, preprocessor, carried):
    """Writes a preprocessor's tokenizer as Transformers reads it.

    Args:
        folder: `pathlib.Path`.
        preprocessor: a `MoECausalLMPreprocessor` or a `MoESeq2SeqLMPreprocessor`.
        carried: dict: what `read_extras` found in `tokenizer_config.json`.

    Returns:
        A dict of the ids of special tokens, as `config.json` names them.
    """
    tokenizer = preprocessor.tokenizer
    has_source = isinstance(preprocessor, keras_hub.models.Seq2SeqLMPreprocessor)
    adds_start = (
        not has_source
        and preprocessor.add_start_token
        and tokenizer.start_token is not None
    )
    config = _known_tokens(carried, tokenizer)
    config.update(
        (key, getattr(tokenizer, argument))
        for argument, key in _TOKENS.items()
        if getattr(tokenizer, argument) is not None
    )
    config["add_bos_token"] = adds_start
    config["add_eos_token"] = has_source
    config["clean_up_tokenization_spaces"] = False
    tokenizer.save_assets(str(folder))
    saved = folder / tokenizer.file_assets[0]
    if saved.name == BYTE_PAIR:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    else:
        _write_sentencepiece(folder, saved, config, tokenizer.extra_ids, has_source)
    if (folder / BYTE_PAIR).is_file():
        _set_start_token(folder, tokenizer.start_token, adds_start)
        if has_source:
            _set_end_token(folder, tokenizer.end_token)
    write_json(folder / "tokenizer_config.json", config)
    ids = {
        f"{key}_id": getattr(tokenizer, f"{argument}_id")
        for argument, key in _TOKENS.items()
        if getattr(tokenizer, argument) is not None
    }
    if tokenizer.stop_tokens:
        ids["eos_token_id"] = list(tokenizer.stop_token_ids)
    if has_source:
        ids["pad_token_id"] = tokenizer.pad_token_id
        start = tokenizer.start_token_id
        ids["decoder_start_token_id"] = (
            tokenizer.pad_token_id if start is None else start
        )
    return ids


def _known_tokens(carried, tokenizer):
    """Without special tokens that the vocabulary lacks, or that `extra_ids` adds."""
    known = set() if tokenizer.extra_ids else set(tokenizer.get_vocabulary())

    def is_known(token):
        return (token.get("content") if isinstance(token, dict) else token) in known

    kept = dict(carried)
    for key in _SPECIAL:
        tokens = kept.pop(key, None)
        if isinstance(tokens, dict):
            tokens = {name: t for name, t in tokens.items() if is_known(t)}
        elif isinstance(tokens, list):
            tokens = [token for token in tokens if is_known(token)]
        if tokens:
            kept[key] = tokens
    return kept


def _write_sentencepiece(folder, saved, config, extra_ids, has_source):
    """Adds the file that Transformers reads alike, where there is one."""
    # Transformers 5 reads a model of SentencePiece as if no space came first.
    model = sentencepiece.SentencePieceProcessor(model_file=str(saved))
    byte_pair = to_byte_pair(model)
    if byte_pair is None and has_source:
        if not any(model.is_byte(i) for i in range(model.vocab_size())):
            saved.rename(folder / T5_SENTENCEPIECE)
            config["tokenizer_class"] = "T5Tokenizer"
            config["extra_ids"] = extra_ids
            return
    path = saved.rename(folder / SENTENCEPIECE)
    if byte_pair is not None:
        sentinels = [SENTINEL.format(i) for i in reversed(range(extra_ids))]
        byte_pair.add_special_tokens(
            [tokenizers.AddedToken(name, normalized=False) for name in sentinels]
        )
        byte_pair.save(str(folder / BYTE_PAIR))
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        return
    warnings.warn(
        f"{path.name} is exported as it is: no tokenizer.json gives the same ids, as "
        "it does not merge byte pairs or normalises its text. Transformers may read "
        "other ids from it.",
        stacklevel=2,
    )
    config["tokenizer_class"] = "LlamaTokenizer"
    config["legacy"] = False


def _set_start_token(folder, start, adds_start):
    """Makes the file's own post-processor begin a text with the start token."""
    tokenizer = _load_byte_pair(folder)
    if not adds_start or _begins_with(tokenizer, start):
        return
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{start}:0 $A:0",
        pair=f"{start}:0 $A:0 {start}:1 $B:1",
        special_tokens=[(start, tokenizer.token_to_id(start))],
    )
    tokenizer.save(str(folder / BYTE_PAIR))


def _set_end_token(folder, end):
    """Makes the file's own post-processor close a text with the end token."""
    tokenizer = _load_byte_pair(folder)
    token_id = tokenizer.token_to_id(end)
    if tokenizer.encode("a").ids[-1:] == [token_id]:
        return
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"$A:0 {end}:0",
        pair=f"$A:0 {end}:0 $B:1 {end}:1",
        special_tokens=[(end, token_id)],
    )
    tokenizer.save(str(folder / BYTE_PAIR))


def write_json(path, content):
    """Writes a JSON object."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
