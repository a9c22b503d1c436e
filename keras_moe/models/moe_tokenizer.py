"""One tokenizer for every preset: SentencePiece or byte-pair, as its files say."""

import itertools
import os
import pathlib

import keras
import keras_hub
import numpy as np

from keras_moe import checkpoints, checks
from keras_moe.models import presets
from keras_moe.models._keras_hub import (
    canonicalize_python_token_inputs,
    find_tokenizer_asset,
    ids_to_strings,
    preprocessing_function,
    strings_to_ids,
)
from keras_moe.models.moe_backbone import MoEBackbone
from keras_moe.models.moe_seq2seq_backbone import MoESeq2SeqBackbone
from keras_moe.models.vocabularies import (
    BYTE_PAIR_FILE,
    MODELS,
    SENTENCEPIECE_FILE,
    BytePair,
    SentencePiece,
    read_proto,
    read_tokenizer_json,
)
from keras_moe.span_corruption import SENTINEL


@keras.saving.register_keras_serializable(package="keras_moe")
class MoETokenizer(keras_hub.tokenizers.Tokenizer):
    """Text to token ids and back, with the vocabulary a model was trained on.

    A SentencePiece model runs in the `sentencepiece` package, a Hugging Face
    `tokenizer.json` in the `tokenizers` package with its own normalisation, split
    pattern, merges and decoder. Ids therefore equal those of the reference. In a
    preset the vocabulary is an asset, `assets/tokenizer/vocabulary.spm` or
    `assets/tokenizer/tokenizer.json`, and which of the two is there decides.

    No special token is added to a text. A special token written out in a text, such
    as `"<s>"`, is plain characters to SentencePiece; a `tokenizer.json` turns it
    into the special token's id, as Hugging Face does, which chat templates rely on.
    Take such tokens out of text that you do not trust.

    TensorFlow is not needed. Where it is installed, the tokenizer also works within
    `tf.data` pipelines and `tf.function`.

    Args:
        proto: A SentencePiece model: its bytes, or the path of the file.
        tokenizer_json: A Hugging Face `tokenizers` file: its path, its text or the
            parsed dict. Give either `proto` or `tokenizer_json`. With neither, the
            tokenizer awaits `load_assets()`.
        start_token: str. The token that begins a text, or `None` for a model
            trained without one.
        end_token: str. The token that ends a text and stops generation.
        pad_token: str. The token that fills up a batch. `None` stands for
            `"<pad>"` if the vocabulary has it, and otherwise for id 0, whatever
            token that is: padding is masked, so its id has no effect.
        extra_ids: int. How many sentinel tokens T5 adds to a SentencePiece model:
            `"<extra_id_0>"` has the highest id. Unlike other special tokens they
            are recognised in a text, and the spaces around them have no meaning.
        stop_tokens: list of str or None. Further tokens that stop generation, such
            as the one that ends a turn of a conversation.
        dtype: str. The integer dtype of token ids.
        **kwargs: Further arguments of `keras_hub.tokenizers.Tokenizer`, such as
            `name`.

    Call arguments:
        inputs: str, list of str, or an array or tensor of strings of rank 0 or 1.

    Returns:
        For one string a NumPy array of ids, `(tokens,)`; for a batch a list of
        lists of int. Within a TensorFlow graph, a tensor or a ragged tensor.

    Raises:
        ValueError: If both vocabularies are given, if one cannot be parsed, or if
            a special token is not in it.
        FileNotFoundError: If a path leads to no file.

    Example:
    ```python
    tokenizer = keras_moe.models.MoETokenizer(proto="vocabulary.spm")
    ids = tokenizer("The quick brown fox")
    tokenizer.detokenize(ids)  # "The quick brown fox"
    ```

    References:
        - [Kudo and Richardson, 2018](https://arxiv.org/abs/1808.06226)
        - [Sennrich et al., 2016](https://arxiv.org/abs/1508.07909)
    """

    backbone_cls = MoEBackbone

    def __init__(
        self,
        proto=None,
        tokenizer_json=None,
        start_token="<s>",
        end_token="</s>",
        pad_token=None,
        dtype="int32",
        extra_ids=0,
        stop_tokens=None,
        **kwargs,
    ):
        super().__init__(dtype=dtype, **kwargs)
        checks.at_least("extra_ids", extra_ids, 0)
        if "int" not in self.compute_dtype:
            raise ValueError(
                f"`dtype` must be an integer type. Received: dtype={dtype!r}"
            )
        if not isinstance(end_token, str):
            raise ValueError(
                f"`end_token` must be a string. Received: end_token={end_token!r}"
            )
        if proto is not None and tokenizer_json is not None:
            raise ValueError(
                "`proto` and `tokenizer_json` exclude each other. Received: "
                f"proto={checks.brief(proto)}, "
                f"tokenizer_json={checks.brief(tokenizer_json)}"
            )
        self.start_token = start_token
        self.end_token = end_token
        self.pad_token = pad_token
        self.extra_ids = extra_ids
        self.stop_tokens = list(stop_tokens or ())
        self.start_token_id = None
        self.end_token_id = None
        self.pad_token_id = None
        self._model = None
        if proto is not None:
            self._set_model(SentencePiece(read_proto(proto), extra_ids))
        if tokenizer_json is not None:
            source = read_tokenizer_json(tokenizer_json)
            self._set_model(BytePair(source, extra_ids))

    def _set_model(self, model):
        def find(argument, token):
            token_id = model.find(token)
            if token_id is None:
                raise ValueError(
                    f"`{argument}` must be in the vocabulary. Received: "
                    f"{argument}={token!r}, which is none of the {model.size} "
                    f"tokens of the {model.kind}."
                )
            return token_id

        for argument in ("start_token", "end_token", "pad_token"):
            token = getattr(self, argument)
            token_id = None if token is None else find(argument, token)
            setattr(self, f"{argument}_id", token_id)
        stops = [find("stop_tokens", token) for token in self.stop_tokens]
        self.stop_token_ids = (self.end_token_id, *stops)
        if self.pad_token is None:
            # 0 as in KerasHub; `or` serves a "<pad>" at 0 as well.
            self.pad_token_id = model.find("<pad>") or 0
        self.file_assets = [model.file_name]
        self._model = model

    def _loaded_model(self):
        if self._model is None:
            raise ValueError(
                f"The tokenizer {self.name!r} has no vocabulary yet. Pass `proto` or "
                "`tokenizer_json` when creating it, or call `load_assets()`."
            )
        return self._model

    @property
    def has_vocabulary(self):
        """Whether there is a vocabulary, or assets are still to bring it."""
        return self._model is not None

    def tokenize(self, inputs):
        """Token ids of a string or of a batch of strings."""
        model = self._loaded_model()
        if self._use_tf_workflow():
            return self._tokenize_in_graph(inputs)
        texts, batched = _as_texts(inputs)
        rows = model.encode(texts)
        return rows if batched else np.array(rows[0], dtype=self.compute_dtype)

    @preprocessing_function
    def _tokenize_in_graph(self, inputs):
        return strings_to_ids(self._model.encode, inputs, self.compute_dtype)

    def detokenize(self, inputs):
        """The string, or list of strings, that token ids stand for.

        Special tokens: SentencePiece leaves `<s>` and `</s>` out and writes
        `<unk>` as U+2047; a `tokenizer.json` writes them as their text. Bytes that
        are no UTF-8 become U+FFFD. Ids past the end of the vocabulary, which a
        model can produce whose embeddings are padded to a round number, are left
        out.

        Args:
            inputs: int, list of ints, list of lists of ints, or an integer array or
                tensor of rank 0, 1 or 2, of any backend, dense or ragged.

        Raises:
            ValueError: If an id is negative.
        """
        self._loaded_model()
        if self._use_tf_workflow():
            return self._detokenize_in_graph(inputs)
        rows, batched = canonicalize_python_token_inputs(inputs)
        texts = self._decode(rows)
        return texts if batched else texts[0]

    @preprocessing_function
    def _detokenize_in_graph(self, inputs):
        return ids_to_strings(self._decode, inputs)

    def _decode(self, rows):
        lowest = min((i for row in rows for i in row), default=0)
        if lowest < 0:
            raise ValueError(
                f"Token ids must not be negative. Received: inputs with {lowest}"
            )
        size = self._model.size
        return self._model.decode([[i for i in row if i < size] for row in rows])

    def call(self, inputs, training=None):
        return self.tokenize(inputs)

    def compute_output_spec(self, inputs, training=None):
        return keras.KerasTensor((*inputs.shape, None), dtype=self.compute_dtype)

    def vocabulary_size(self):
        """Number of ids, special tokens included: the highest id and one."""
        return self._loaded_model().size

    def get_vocabulary(self):
        """The tokens as a list of str, ordered by id."""
        return self._loaded_model().tokens()

    def id_to_token(self, id):
        """The token of an id.

        Raises:
            ValueError: If the vocabulary has no such id.
        """
        model = self._loaded_model()
        token = model.token(int(id)) if 0 <= id < model.size else None
        if token is None:
            raise ValueError(
                f"`id` must be in the vocabulary, from 0 to {model.size - 1}. "
                f"Received: id={id}"
            )
        return token

    def token_to_id(self, token):
        """The id of a token.

        A token that is not in the vocabulary has the id of `<unk>` in a
        SentencePiece model, as in that library.

        Raises:
            ValueError: If a byte-pair vocabulary has no such token.
        """
        model = self._loaded_model()
        token_id = model.find(token)
        if token_id is None:
            token_id = model.unknown_id
        if token_id is None:
            raise ValueError(
                f"`token` must be in the vocabulary. Received: token={token!r}"
            )
        return token_id

    @property
    def sentinel_token_ids(self):
        """The ids of `"<extra_id_0>"`, `"<extra_id_1>"` and so on, a list."""
        model = self._loaded_model()
        found = (model.find(SENTINEL.format(i)) for i in itertools.count())
        return list(itertools.takewhile(lambda i: i is not None, found))

    @property
    def special_tokens(self):
        """The start, end, padding and stop tokens, of those that exist."""
        tokens = [self.start_token, self.end_token, self.pad_token, *self.stop_tokens]
        if self.pad_token is None and self._loaded_model().find("<pad>") is not None:
            tokens.append("<pad>")
        return list(dict.fromkeys(token for token in tokens if token is not None))

    @property
    def special_token_ids(self):
        """The ids of `special_tokens`, which `generate()` strips from its text."""
        return [self.token_to_id(token) for token in self.special_tokens]

    def save_assets(self, dir_path):
        model = self._loaded_model()
        pathlib.Path(dir_path, model.file_name).write_bytes(model.source)

    def load_assets(self, dir_path):
        folder = pathlib.Path(dir_path)
        found = [f for f in MODELS if (folder / f).is_file()]
        if not found:
            raise FileNotFoundError(
                f"`dir_path` must hold {SENTENCEPIECE_FILE!r} or {BYTE_PAIR_FILE!r}. "
                f"Received: dir_path={str(dir_path)!r}, which holds neither."
            )
        if len(found) > 1:
            raise ValueError(
                f"`dir_path` must hold one of {SENTENCEPIECE_FILE!r} and "
                f"{BYTE_PAIR_FILE!r}. Received: dir_path={str(dir_path)!r}, which "
                "holds both."
            )
        source = (folder / found[0]).read_bytes()
        self._set_model(MODELS[found[0]](source, self.extra_ids))

    def load_preset_assets(self, preset):
        paths = [find_tokenizer_asset(preset, self.config_file, f) for f in MODELS]
        paths = [path for path in paths if path is not None]
        if not paths:
            raise FileNotFoundError(
                f"The preset must hold {SENTENCEPIECE_FILE!r} or {BYTE_PAIR_FILE!r} "
                f"under 'assets/{self.config_file.split('.')[0]}'. Received: "
                f"preset={preset!r}, which holds neither."
            )
        self.load_assets(os.path.dirname(paths[0]))

    def get_config(self):
        # The vocabulary is an asset: a configuration holds neither it nor a path.
        return {
            **super().get_config(),
            "start_token": self.start_token,
            "end_token": self.end_token,
            "pad_token": self.pad_token,
            "extra_ids": self.extra_ids,
            "stop_tokens": self.stop_tokens,
        }

    @classmethod
    def from_config(cls, config):
        # A configuration can come from anyone, and must not make us read a file.
        for argument in ("proto", "tokenizer_json"):
            if isinstance(config.get(argument), (str, os.PathLike)):
                raise ValueError(
                    f"`{argument}` must not be a path or a string in a "
                    "configuration: the vocabulary is loaded from the assets next "
                    f"to it. Received: {argument}={checks.brief(config[argument])}"
                )
        # This name becomes part of a path within the preset.
        config_file = config.get("config_file", "")
        if os.path.basename(config_file) != config_file:
            raise ValueError(
                "`config_file` must be a file name without folders in a "
                f"configuration. Received: config_file={config_file!r}"
            )
        return super().from_config(config)

    @classmethod
    def from_preset(cls, preset, **kwargs):
        """Load the tokenizer of a preset.

        Args:
            preset: str. A preset's name, a local folder, or a handle such as
                `"hf://user/name"`. A checkpoint of Transformers will do as well.
            **kwargs: Arguments of the constructor that replace the preset's.
        """
        folder = presets.preset_folder(preset, tokenizer=True)
        if presets.is_checkpoint(folder):
            return cls(**{**checkpoints.read_tokenizer(folder), **kwargs})
        return super().from_preset(folder, **kwargs)


@keras.saving.register_keras_serializable(package="keras_moe")
class _MoESeq2SeqTokenizer(MoETokenizer):
    """How KerasHub, which looks for a tokenizer by its backbone, finds `MoETokenizer`.

    It reads from a preset which class to build, and so builds that.
    """

    backbone_cls = MoESeq2SeqBackbone


def _as_texts(inputs):
    """A list of str, and whether `inputs` was a batch."""
    if hasattr(inputs, "__array__"):  # NumPy, or an eager TensorFlow tensor
        inputs = np.asarray(inputs).tolist()
    batched = isinstance(inputs, (list, tuple))
    texts = list(inputs) if batched else [inputs]
    texts = [t.decode("utf-8") if isinstance(t, bytes) else t for t in texts]
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(
                "`inputs` must be a string or a batch of strings of rank 1. "
                f"Received: inputs with {checks.brief(text)} of type "
                f"{type(text).__name__}"
            )
        text.encode("utf-8")  # a lone surrogate is an error in every tokenizer
    return texts, batched
