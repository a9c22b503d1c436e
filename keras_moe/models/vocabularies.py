"""The two kinds of vocabulary that `MoETokenizer` runs on, alike to it."""

import itertools
import json
import os
import pathlib
import re

import sentencepiece
import tokenizers

from keras_moe import checks
from keras_moe.span_corruption import SENTINEL

SENTENCEPIECE_FILE = "vocabulary.spm"
BYTE_PAIR_FILE = "tokenizer.json"


class SentencePiece:
    """A SentencePiece model, as `MoETokenizer` uses it."""

    kind = "SentencePiece model"
    file_name = SENTENCEPIECE_FILE

    def __init__(self, source, extra_ids=0):
        self.source = source
        try:
            # No bytes at all would pass, as a processor that is to be loaded later.
            self._processor = sentencepiece.SentencePieceProcessor(
                model_proto=source or b"\0"
            )
        except RuntimeError as error:
            raise ValueError(
                f"`proto` (asset {self.file_name!r}) must be a SentencePiece model. "
                f"Received: proto={checks.brief(source)}"
            ) from error
        self._pieces = self._processor.vocab_size()
        self.size = self._pieces + extra_ids
        self.unknown_id = self._processor.unk_id()
        # The first sentinel has the highest id.
        self._sentinels = {
            SENTINEL.format(i): self.size - 1 - i for i in range(extra_ids)
        }
        self._names = {i: name for name, i in self._sentinels.items()}
        self._split = re.compile("|".join(map(re.escape, self._sentinels)) or "(?!)")

    def encode(self, texts):
        if not self._sentinels:
            return self._processor.encode(texts, out_type=int)
        return [self._encode_with_sentinels(text) for text in texts]

    def _encode_with_sentinels(self, text):
        ids, start = [], 0
        for found in self._split.finditer(text):
            ids += self._processor.encode(text[start : found.start()])
            ids.append(self._sentinels[found[0]])
            start = found.end()
        return ids + self._processor.encode(text[start:])

    def decode(self, rows):
        return [self._decode_row(row) for row in rows]

    def _decode_row(self, row):
        parts = []
        for is_sentinel, ids in itertools.groupby(row, lambda i: i >= self._pieces):
            if is_sentinel:
                parts += [self._names[i] for i in ids]
            else:
                parts.append(self._processor.decode([*ids]))
        return " ".join(part for part in parts if part)

    def find(self, token):
        if token in self._sentinels:
            return self._sentinels[token]
        found = self._processor.piece_to_id(token)
        return found if self.token(found) == token else None

    def token(self, token_id):
        if token_id in self._names:
            return self._names[token_id]
        return self._processor.id_to_piece(token_id)

    def tokens(self):
        return [self.token(i) for i in range(self.size)]


class BytePair:
    """A Hugging Face tokenizer, as `MoETokenizer` uses it."""

    kind = "tokenizer.json"
    file_name = BYTE_PAIR_FILE
    unknown_id = None

    def __init__(self, source, extra_ids=0):
        if extra_ids:
            raise ValueError(
                "`extra_ids` must be 0 with a tokenizer.json, which holds its sentinel "
                f"tokens itself. Received: extra_ids={extra_ids}"
            )
        self.source = source
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(source.decode("utf-8"))
        except Exception as error:  # tokenizers raises bare Exception
            raise ValueError(
                f"`tokenizer_json` (asset {self.file_name!r}) must be a file of the "
                f"`tokenizers` package. Received: {checks.brief(source)}, which is "
                f"not: {error}"
            ) from error
        # A file may ask for both; here every token counts, and packing comes later.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.size = max(self._tokenizer.get_vocab().values(), default=-1) + 1

    def encode(self, texts):
        encoded = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def decode(self, rows):
        return self._tokenizer.decode_batch(rows, skip_special_tokens=False)

    def find(self, token):
        return self._tokenizer.token_to_id(token)

    def token(self, token_id):
        return self._tokenizer.id_to_token(token_id)

    def tokens(self):
        vocabulary = self._tokenizer.get_vocab()
        return sorted(vocabulary, key=vocabulary.get)


MODELS = {model.file_name: model for model in (SentencePiece, BytePair)}


def read_proto(proto):
    """The bytes of a SentencePiece model that is given so, or by its path."""
    if isinstance(proto, bytes):
        return proto
    if isinstance(proto, (str, os.PathLike)):
        return _read_file("proto", proto)
    raise ValueError(
        "`proto` must be the path or the bytes of a SentencePiece model. Received: "
        f"proto={checks.brief(proto)}"
    )


def read_tokenizer_json(value):
    """The bytes of a tokenizer.json that is given by its path, as text or as a dict."""
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False).encode("utf-8")
    if isinstance(value, str) and value.lstrip().startswith("{"):
        return value.encode("utf-8")
    if isinstance(value, (str, os.PathLike)):
        return _read_file("tokenizer_json", value)
    raise ValueError(
        "`tokenizer_json` must be a path, JSON text or a dict. Received: "
        f"tokenizer_json={checks.brief(value)}"
    )


def _read_file(argument, path):
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"`{argument}` must be the path of a file that exists. Received: "
            f"{argument}={checks.brief(path)}"
        )
    return pathlib.Path(path).read_bytes()
