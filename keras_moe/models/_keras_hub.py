"""Everything that reaches into the private parts of Keras and KerasHub, in one place.

TensorFlow appears here because KerasHub's text pipelines are `tf.data` whatever the
Keras backend. It is imported where a graph is being traced, never before.
"""

import atexit
import os
import threading
import time

import keras
from keras import ops
from keras.src.backend.common.variables import AutocastScope
from keras.src.saving import orbax_util
from keras_hub.src.models.mixtral import mixtral_decoder
from keras_hub.src.models.qwen3_moe import qwen3_moe_decoder
from keras_hub.src.models.qwen_moe import qwen_moe_decoder
from keras_hub.src.utils.preset_utils import (
    ASSET_DIR,
    check_file_exists,
    get_file,
    register_presets,
)
from keras_hub.src.utils.python_utils import classproperty
from keras_hub.src.utils.tensor_utils import (
    any_equal,
    canonicalize_python_token_inputs,
    convert_to_ragged_batch,
    preprocessing_function,
    strip_to_ragged,
    strip_to_ragged_python,
)

__all__ = [
    "Replicable",
    "any_equal",
    "as_stored",
    "classproperty",
    "preset_file",
    "preset_has_file",
    "register_names",
    "scope_of",
    "canonicalize_python_token_inputs",
    "find_tokenizer_asset",
    "is_orbax_checkpoint",
    "latest_orbax_checkpoint",
    "ids_to_strings",
    "mixtral_decoder",
    "preprocessing_function",
    "qwen3_moe_decoder",
    "qwen_moe_decoder",
    "strings_to_ids",
    "strip_to_ragged",
    "strip_to_ragged_python",
]


class Replicable:
    """What a model of KerasHub lacks to be trained by replicas."""

    def __setattr__(self, name, value):
        # KerasHub sets attributes past torch while a model is being built. This one is
        # where torch finds a model's parameters, and there would be none.
        if name == "_torch_params":
            keras.Model.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        # TensorFlow's trainer asks for this. To know the shapes of a batch, it takes
        # the mean of those of all replicas, which masks, being bool, have not.
        if iterator is not None and self._distribute_strategy is not None:
            _, _, batches = next(iter(iterator))
            local = self._distribute_strategy.experimental_local_results
            data_batch = keras.tree.map_structure(lambda t: local(t)[0], next(batches))
            iterator = None
        super()._maybe_symbolic_build(iterator, data_batch)


def is_orbax_checkpoint(path):
    """Whether Orbax wrote a folder, be it of steps or of one."""
    # Keras does not know a step by its own.
    return _is_orbax_step(path) or orbax_util.is_orbax_checkpoint(path)


def latest_orbax_checkpoint(directory):
    """The folder of a step: `directory` itself, or its latest that is whole."""
    if _is_orbax_step(directory):
        return str(directory)
    return orbax_util.find_latest_orbax_checkpoint(str(directory))


def _is_orbax_step(path):
    return os.path.exists(os.path.join(path, "_CHECKPOINT_METADATA"))


def find_tokenizer_asset(preset, config_file, file_name):
    """Local path of a tokenizer's asset in a preset, None when it has no such one.

    Args:
        preset: str. A folder, or a handle that KerasHub downloads ("hf://...").
        config_file: str. Name of the tokenizer's configuration in the preset.
        file_name: str. Name of the asset.
    """
    folder = config_file.split(".")[0]
    try:
        return get_file(preset, f"{ASSET_DIR}/{folder}/{file_name}")
    except FileNotFoundError:
        return None


_calls = 0
_exiting = False
_calls_changed = threading.Condition()


def _while_python_runs(function, nothing):
    """`function`, called from threads of `tf.data`, made safe for Python's exit.

    A pipeline may well be reading ahead when a program ends or fails, and a thread
    that then waits for the interpreter's lock hangs or aborts the process. So from
    the exit on every item is `nothing`, which soon fills what reads ahead.

    Args:
        function: callable from a list to a list of the same length.
        nothing: what stands for every item of the result at exit.
    """

    def run(items):
        global _calls
        with _calls_changed:
            _calls_changed.notify_all()
            if _exiting:
                return [nothing] * len(items)
            _calls += 1
        try:
            return function(items)
        finally:
            with _calls_changed:
                _calls -= 1
                _calls_changed.notify_all()

    # Once, and after TensorFlow's own, so that it comes before them.
    atexit.unregister(_let_pipelines_run_dry)
    atexit.register(_let_pipelines_run_dry)
    return run


def _let_pipelines_run_dry():
    global _exiting
    with _calls_changed:
        _exiting = True
        end = time.monotonic() + 5
        while time.monotonic() < end and (_calls_changed.wait(0.1) or _calls):
            pass


def strings_to_ids(encode, strings, dtype):
    """Run a Python tokenizer on a string tensor inside a TensorFlow graph.

    Args:
        encode: callable from a list of str to a list of lists of int.
        strings: string tensor of shape `()` or `(batch,)`.
        dtype: str. The integer dtype of the ids.

    Returns:
        A tensor of shape `(tokens,)` for one string, a ragged tensor of shape
        `(batch, tokens)` for a batch.
    """
    import tensorflow as tf

    strings = tf.convert_to_tensor(strings)
    if strings.shape.rank not in (0, 1):
        raise ValueError(
            "`inputs` must be a string or a batch of strings of rank 1. Received: "
            f"inputs={strings}"
        )

    encode = _while_python_runs(encode, [])

    def run(batch):
        rows = encode([text.decode("utf-8") for text in batch.numpy().tolist()])
        return [i for row in rows for i in row], [len(row) for row in rows]

    batch = tf.reshape(strings, [-1])
    ids, lengths = tf.py_function(run, [batch], (dtype, "int64"))
    ids.set_shape([None])
    if strings.shape.rank == 0:
        return ids
    lengths.set_shape(strings.shape)
    return tf.RaggedTensor.from_row_lengths(ids, lengths)


def ids_to_strings(decode, ids):
    """Run a Python detokenizer on token ids inside a TensorFlow graph.

    Args:
        decode: callable from a list of lists of int to a list of str.
        ids: integer tensor of shape `(tokens,)` or `(batch, tokens)`, dense or
            ragged.

    Returns:
        A string tensor of shape `()` or `(batch,)`.
    """
    import tensorflow as tf

    ids, unbatched, _ = convert_to_ragged_batch(ids)

    decode = _while_python_runs(decode, "")

    def run(values, lengths):
        values, lengths = values.numpy().tolist(), lengths.numpy()
        rows = zip(lengths, lengths.cumsum(), strict=True)
        texts = decode([values[end - length : end] for length, end in rows])
        return tf.constant(texts, "string", shape=lengths.shape)

    strings = tf.py_function(run, [ids.values, ids.row_lengths()], "string")
    strings.set_shape(ids.shape[:1])
    return strings[0] if unbatched else strings


def preset_has_file(preset, name):
    """Whether a preset, a folder or a handle, holds a file."""
    return check_file_exists(preset, name)


def preset_file(preset, name):
    """The local path of a preset's file, None where it has none."""
    return get_file(preset, name) if preset_has_file(preset, name) else None


def as_stored(variables):
    """The values of variables in the dtypes they are stored in.

    Within a layer of a mixed dtype policy, Keras casts a variable whenever it is
    read: all of it, where a mixture needs a few experts.

    Args:
        variables: a sequence of `keras.Variable`.

    Returns:
        A tuple of tensors.
    """
    with AutocastScope(None):
        return tuple(ops.convert_to_tensor(variable) for variable in variables)


def scope_of(mapping):
    """A `keras.StatelessScope` of values in the dtypes that variables are stored in.

    Keras casts what such a scope is given to the dtype of the layer that is running.

    Args:
        mapping: a sequence of pairs, variable and tensor.
    """
    with AutocastScope(None):
        return keras.StatelessScope(state_mapping=[*mapping])


def register_names(folders, backbone_cls):
    """Lets KerasHub's own `from_preset` find presets by name.

    Args:
        folders: dict of preset name to `(folder, description)`.
        backbone_cls: the class of their backbones.
    """
    # KerasHub puts a registered "handle" in the name's place; a folder serves.
    register_presets(
        {
            name: {"kaggle_handle": folder, "metadata": {"description": description}}
            for name, (folder, description) in folders.items()
        },
        backbone_cls,
    )
