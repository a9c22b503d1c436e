"""Fetching a checkpoint from the Hugging Face hub.

Environment variables (`HF_TOKEN`, `HF_ENDPOINT`, `HF_HOME`, `HF_HUB_OFFLINE`) mean
what they mean to `huggingface_hub`.
"""

import os
import pathlib

import huggingface_hub
from huggingface_hub import errors

from keras_moe.checkpoints.shards import INDEX, SINGLE, read_json

PREFIX = "hf://"
# What is small, and says what else there is.
_SMALL_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    INDEX,
)


def fetch(handle, weights=True, revision=None, token=None, before_weights=None):
    """Downloads a repository's checkpoint, or what of it is not here yet.

    Args:
        handle: str, `"hf://user/model"`, or `"hf://user/model@revision"`.
        weights: bool, whether safetensors are wanted, where it is a checkpoint of
            Transformers.
        revision: str or None, a branch, a tag or a commit.
        token: str, bool or None, as `huggingface_hub` takes it: None for the one
            that is logged in or in `HF_TOKEN`.
        before_weights: callable or None: given the folder once all but the weights
            is there, and what it raises keeps them from being fetched.

    Returns:
        `pathlib.Path`: a local folder.

    Raises:
        ValueError: for a handle that is none, and a repository or revision that
            does not exist.
        PermissionError: for a repository that the token may not read.
        FileNotFoundError: for a repository without `config.json`.
        ConnectionError: where the hub cannot be reached and nothing is here yet.
    """
    repository, revision = parse_handle(handle, revision)

    def download(files):
        return _download(handle, repository, revision, token, list(files))

    folder = download(_SMALL_FILES)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            "A repository must hold `config.json`. Received: "
            f"preset={handle!r}, which does not."
        )
    if weights and "model_type" in read_json(folder / "config.json"):
        if before_weights is not None:
            before_weights(folder)
        download([SINGLE])  # before any shards, as in Transformers
        if not (folder / SINGLE).is_file() and (folder / INDEX).is_file():
            weight_map = read_json(folder / INDEX).get("weight_map")
            # What is wrong with an index is said where it is read.
            if isinstance(weight_map, dict):
                files = sorted({str(name) for name in weight_map.values()})
                download([name for name in files if name.endswith(".safetensors")])
    return folder


def fetch_all(handle, revision=None, token=None):
    """Downloads all files of a repository; arguments and errors as for `fetch`."""
    repository, revision = parse_handle(handle, revision)
    return _download(handle, repository, revision, token, None)


def parse_handle(handle, revision=None):
    """The repository and the revision that a handle names.

    Returns:
        `(repository, revision or None)`.
    """
    repository, at, within = handle.removeprefix(PREFIX).partition("@")
    if at and revision is not None and within != revision:
        raise ValueError(
            "`revision` must not contradict the handle's own. Received: "
            f"preset={handle!r}, revision={revision!r}"
        )
    if (
        repository.count("/") != 1
        or not all(repository.split("/"))
        or at
        and not within
    ):
        raise ValueError(
            "`preset` must be a handle such as 'hf://user/model' or "
            f"'hf://user/model@revision'. Received: preset={handle!r}"
        )
    return repository, within or revision


def _download(handle, repository, revision, token, files):
    at = "" if revision is None else f", revision={revision!r}"
    received = f"Received: preset={handle!r}{at}"
    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            revision=revision,
            token=token,
            allow_patterns=files,
            # The library reads it once, when it is imported.
            endpoint=os.environ.get("HF_ENDPOINT"),
        )
    except errors.GatedRepoError as error:
        raise PermissionError(
            f"Access to the repository {repository!r} must be granted: accept its "
            "terms on its page, and give a token of your account as `token` or in "
            f"HF_TOKEN. {received}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"`preset` must name a repository that exists, and that your token "
            f"(`token` or HF_TOKEN) may read. {received}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(
            f"`revision` must be a branch, a tag or a commit of {repository!r}. "
            f"{received}"
        ) from error
    except errors.HFValidationError as error:
        raise ValueError(
            "`preset` must be a handle such as 'hf://user/model'. " + received
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError) as error:
        raise ConnectionError(
            f"The checkpoint must be on the hub or in its cache here. {received}, "
            f"and: {error}"
        ) from error
    return pathlib.Path(folder)
