"""The tokenizer that comes with a checkpoint, and the one that goes out with it."""

import json
import pathlib

import sentencepiece
import tokenizers

from keras_moe.checkpoints.shards import read_json

BYTE_PAIR = "tokenizer.json"
SENTENCEPIECE = "tokenizer.model"
_TOKENS = {
    "start_token": "bos_token",
    "end_token": "eos_token",
    "pad_token": "pad_token",
}


def has_tokenizer(folder):
    """Whether a checkpoint's folder holds a tokenizer that can be read."""
    folder = pathlib.Path(folder)
    return any((folder / name).is_file() for name in (BYTE_PAIR, SENTENCEPIECE))


def read_tokenizer(folder):
    """The arguments of a `MoETokenizer` from a checkpoint's folder.

    `tokenizer.json` goes before `tokenizer.model`, as in Transformers.

    Args:
        folder: path.

    Returns:
        A dict of `proto` or `tokenizer_json`, and the special tokens.

    Raises:
        FileNotFoundError: without either file.
        ValueError: for a file that cannot be read, and without an end token.
    """
    folder = pathlib.Path(folder)
    if not has_tokenizer(folder):
        raise FileNotFoundError(
            f"The checkpoint must hold {BYTE_PAIR!r} or {SENTENCEPIECE!r}. "
            f"Received: {str(folder)!r}, which holds neither."
        )
    if (folder / BYTE_PAIR).is_file():
        arguments = {"tokenizer_json": folder / BYTE_PAIR}
    else:
        arguments = {"proto": folder / SENTENCEPIECE}
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
    context = config.get("max_position_embeddings") or config.get("max_seq_len")
    return {
        "sequence_length": min(1024, context) if isinstance(context, int) else 1024,
        "add_start_token": _adds_start_token(folder),
    }


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
    return found


def _id_to_token(folder, token_id):
    if (folder / BYTE_PAIR).is_file():
        return _load_byte_pair(folder).id_to_token(token_id)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / SENTENCEPIECE))
    return model.id_to_piece(token_id) if token_id < model.vocab_size() else None


def _adds_start_token(folder):
    start = _special_tokens(folder)["start_token"]
    if start is None:
        return False
    stated = _read(folder, "tokenizer_config.json").get("add_bos_token")
    if isinstance(stated, bool):
        return stated
    if not (folder / BYTE_PAIR).is_file():
        return True  # as the tokenizers of Transformers over SentencePiece do
    return _begins_with(_load_byte_pair(folder), start)


def _begins_with(tokenizer, token):
    ids = tokenizer.encode("a").ids
    return bool(ids) and ids[0] == tokenizer.token_to_id(token)


def _load_byte_pair(folder):
    path = folder / BYTE_PAIR
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(
            f"{str(path)!r} must be a file of the `tokenizers` package. "
            f"Received: {error}"
        ) from error


def _read(folder, name):
    return read_json(folder / name) if (folder / name).is_file() else {}


def write_tokenizer(folder, preprocessor):
    """Writes a preprocessor's tokenizer as Transformers reads it.

    Args:
        folder: `pathlib.Path`.
        preprocessor: a `MoECausalLMPreprocessor`.

    Returns:
        A dict of the ids of special tokens, as `config.json` names them.
    """
    tokenizer = preprocessor.tokenizer
    adds_start = preprocessor.add_start_token and tokenizer.start_token is not None
    config = {
        key: getattr(tokenizer, argument)
        for argument, key in _TOKENS.items()
        if getattr(tokenizer, argument) is not None
    }
    config["add_bos_token"] = adds_start
    config["add_eos_token"] = False
    config["clean_up_tokenization_spaces"] = False
    tokenizer.save_assets(str(folder))
    saved = folder / tokenizer.file_assets[0]
    if saved.name == BYTE_PAIR:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        _set_start_token(folder, tokenizer.start_token, adds_start)
    else:
        config["tokenizer_class"] = "LlamaTokenizer"
        config["legacy"] = False
        saved.rename(folder / SENTENCEPIECE)
    write_json(folder / "tokenizer_config.json", config)
    return {
        f"{key}_id": getattr(tokenizer, f"{argument}_id")
        for argument, key in _TOKENS.items()
        if getattr(tokenizer, argument) is not None
    }


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


def write_json(path, content):
    """Writes a JSON object."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")
