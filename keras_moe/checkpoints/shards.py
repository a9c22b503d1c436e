"""Safetensors files: headers are checked first, tensors are read and written singly."""

import json
import math
import os
import pathlib

import ml_dtypes
import numpy as np
import safetensors

from keras_moe import checks

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What weights may be stored as; the name of the dtype in the header.
DTYPES = {
    "F64": np.dtype("float64"),
    "F32": np.dtype("float32"),
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_NAMES = {dtype.name: name for name, dtype in DTYPES.items()}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Shards:
    """The tensors of a folder of safetensors files.

    Only headers are read until `read` is called. One file is open at a time, and
    nothing is mapped into memory.

    Args:
        folder: path.

    Raises:
        FileNotFoundError: for a folder without safetensors, or without a shard that
            the index names.
        ValueError: for an index that is broken, or names a file outside the folder
            or a tensor that the file lacks, and for a broken or truncated shard.
    """

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self._open_path = self._open_file = None
        self._headers = {}  # name of a tensor: (file, dtype name, shape, offset)
        files, listed = _files(self.folder)
        for number, file in enumerate(files):
            for name, *rest in _read_header(file):
                if name in self._headers:
                    raise ValueError(
                        "Shards must hold different tensors. Received: "
                        f"{name!r} in {self._headers[name][0].name!r} and {file.name!r}"
                    )
                self._headers[name] = (file, *rest, number)
        for name, file in listed.items():
            if name not in self._headers or self._headers[name][0].name != file:
                raise ValueError(
                    f"{INDEX!r} must name the file of each tensor. Received: "
                    f"{name!r} in {file!r}, which does not hold it"
                )

    def __contains__(self, name):
        return name in self._headers

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        """Closes the file that is open, if one is."""
        if self._open_file is not None:
            self._open_file.close()
        self._open_path = self._open_file = None

    def names(self):
        """The names of all tensors."""
        return self._headers.keys()

    def shape(self, name):
        """The shape of a tensor."""
        return self._headers[name][2]

    def dtype_name(self, name):
        """The dtype of a tensor, by its name in the header, such as `"BF16"`."""
        return self._headers[name][1]

    def file_name(self, name):
        """The name of the file that holds a tensor."""
        return self._headers[name][0].name

    def position(self, name):
        """Where a tensor lies: a number of a file, and an offset."""
        return self._headers[name][4], self._headers[name][3]

    def read(self, name, row=0, shape=None):
        """A tensor, or some rows of it, as a new array.

        Args:
            name: str.
            row: int, the first row, of the size that `shape` says.
            shape: tuple of int or None, that of the rows; None for all of the tensor.
        """
        file, dtype_name, whole, offset, _ = self._headers[name]
        dtype = DTYPES[dtype_name]
        shape = whole if shape is None else shape
        offset += row * math.prod(shape[1:]) * dtype.itemsize
        array = np.empty(shape, dtype)
        self._open(file).seek(offset)
        read = self._open_file.readinto(array.reshape(-1).view(np.uint8))
        if read != array.nbytes:
            raise ValueError(
                f"{str(file)!r} must hold what its header says. Received: a file "
                f"that ends within {name!r}"
            )
        return array

    def _open(self, path):
        if self._open_path != path:
            self.close()
            self._open_file = open(path, "rb")
            self._open_path = path
        return self._open_file


def _files(folder):
    """The shards of a folder, sorted, and what the index says: tensor to file."""
    if (folder / SINGLE).is_file():  # first, as in Transformers
        return [folder / SINGLE], {}
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            raise ValueError(
                f"{INDEX!r} must hold a `weight_map` of tensor names to file names. "
                f"Received: weight_map={checks.brief(weight_map)} in {str(folder)!r}"
            )
        names = sorted(set(weight_map.values()))
        for name in names:
            _check_shard_name(folder, name)
        return [folder / name for name in names], weight_map
    pickles = sorted(f.name for f in folder.iterdir() if f.suffix in _PICKLES)
    if pickles:
        raise ValueError(
            f"Weights must be safetensors, {SINGLE!r} or {INDEX!r} with its shards: "
            "a pickle can run code and is never loaded. Received: "
            f"{', '.join(pickles)} in {str(folder)!r}"
        )
    raise FileNotFoundError(
        f"The folder must hold {SINGLE!r}, or {INDEX!r} with its shards. "
        f"Received: {str(folder)!r}, which holds neither."
    )


def _check_shard_name(folder, name):
    # Backslashes and drives count on every system: a checkpoint travels.
    plain = pathlib.PureWindowsPath(name).name == name and name not in ("", ".", "..")
    if not plain:
        raise ValueError(
            f"{INDEX!r} must name files in its own folder. "
            f"Received: {name!r} in {str(folder)!r}"
        )
    if not name.endswith(".safetensors"):
        raise ValueError(
            f"{INDEX!r} must name safetensors: a pickle can run code and is never "
            f"loaded. Received: {name!r} in {str(folder)!r}"
        )
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"{INDEX!r} names the file {name!r}, which is missing from {str(folder)!r}."
        )


def _read_header(path):
    """`(tensor, dtype name, shape, offset in the file)` of each tensor in a file."""
    try:
        # The library checks the sizes, the offsets and the file's length.
        with safetensors.safe_open(path, framework="numpy"):
            pass
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{str(path)!r} must be a whole safetensors file. Received: one that is "
            f"broken or cut off ({error})"
        ) from error
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return [
        (
            name,
            tensor["dtype"],
            tuple(tensor["shape"]),
            8 + length + tensor["data_offsets"][0],
        )
        for name, tensor in header.items()
    ]


class ShardWriter:
    """Writes one safetensors file, a tensor at a time.

    Args:
        path: path of the file.
        specifications: list of `(name, dtype, shape)`, in the order of writing.
    """

    def __init__(self, path, specifications):
        self._path = path
        self._left = list(specifications)
        header, offset = {"__metadata__": {"format": "pt"}}, 0
        for name, dtype, shape in specifications:
            end = offset + math.prod(shape) * np.dtype(dtype).itemsize
            header[name] = {
                "dtype": _NAMES[np.dtype(dtype).name],
                "shape": list(shape),
                "data_offsets": [offset, end],
            }
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8 bytes
        self._file = open(path, "xb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def __enter__(self):
        return self

    def __exit__(self, error, *rest):
        with self._file:
            if error is None:
                assert not self._left, self._left
                # A disk may turn out to be full only here.
                self._file.flush()
                os.fsync(self._file.fileno())

    def write(self, array):
        """Writes the next tensor."""
        _, dtype, shape = self._left.pop(0)
        array = np.ascontiguousarray(array, dtype=dtype)
        assert array.shape == tuple(shape), (array.shape, shape)
        self._file.write(array.reshape(-1).view(np.uint8).data)


def read_json(path):
    """The JSON object in a file.

    Raises:
        ValueError: for what is no JSON, or no object.
    """
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} must be valid JSON. Received: {error}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{str(path)!r} must hold a JSON object. "
            f"Received: a {type(content).__name__}"
        )
    return content
