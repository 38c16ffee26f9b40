"""What a saved model is as files: in a directory, or in a repository of the Hugging Face Hub.

One safetensors file with the configuration in its header is all that loading reads; ``config.json``
and ``README.md`` beside it are for people.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.utils import HFValidationError
from torch import Tensor

from ncprior._version import __version__
from ncprior.saving.tensors import save_tensors, write_atomically


def write_files(
    directory: Path,
    file: str,
    tensors: Mapping[str, Tensor],
    configuration: Mapping[str, Any],
    card: str,
) -> None:
    """Writes the file itself, the configuration as ``config.json`` and the card as ``README.md``.

    Arguments:
        directory: Where to; made if missing.
        file: The safetensors file's name.
        tensors: What was trained.
        configuration: What goes into its header.
        card: The model card.
    """
    save_tensors(directory / file, tensors, configuration)
    texts = {"config.json": json.dumps(configuration, indent=2) + "\n", "README.md": card}
    for name, text in texts.items():
        with write_atomically(directory / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def upload(
    write: Callable[[Path, str], None],
    repo_id: str,
    *,
    private: bool | None,
    token: str | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Commits to the Hub what a function writes.

    Arguments:
        write: Writes the files into a directory, given the repository's name too.
        repo_id: The repository; made if missing.
        private: Whether a repository made now is private; ``None`` is the account's default.
        token: The access token; ``None`` is the one logged in with.
        revision: The branch to commit to; made if missing. ``None`` is the main one.
        commit_message: The first line of the commit.

    Returns:
        The URL of the commit.
    """
    api = HfApi(token=token, library_name="ncprior", library_version=__version__)
    visibility: dict[str, Any] = {} if private is None else {"private": private}
    repo_id = api.create_repo(repo_id, exist_ok=True, **visibility).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with TemporaryDirectory() as directory:
        write(Path(directory), repo_id)
        files = sorted(Path(directory).iterdir())
        operations = [CommitOperationAdd(path_in_repo=f.name, path_or_fileobj=f) for f in files]
        commit = api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision
        )
    return commit.commit_url


def locate(path_or_repo: str | os.PathLike[str], file: str, revision: str | None) -> Path:
    """Finds a file: in a directory, as such, or on the Hub.

    Raises:
        FileNotFoundError: If there is no such directory or repository.
        ValueError: If a revision is given of a local path.
    """
    path = Path(path_or_repo)
    is_local = path.exists() or not isinstance(path_or_repo, str) or path.suffix == ".safetensors"
    if is_local and revision is not None:
        raise ValueError(f"A revision is one of a Hub repository; {path} is a local path.")
    if is_local:
        return path / file if path.is_dir() else path
    name = str(path_or_repo)
    try:
        found = hf_hub_download(
            name, file, revision=revision, library_name="ncprior", library_version=__version__
        )
    except (OSError, HFValidationError) as error:
        at = "" if revision is None else f" at revision {revision}"
        raise FileNotFoundError(
            f"There is no directory {name}, and no {file} to be had from a Hub repository "
            f"{name}{at}: {error}"
        ) from error
    return Path(found)
