"""Location of saved files: a directory, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.utils import HFValidationError

from ncprior._version import __version__


def upload(
    write: Callable[[Path, str], None],
    repo_id: str,
    *,
    private: bool | None,
    token: str | None,
    revision: str | None,
    commit_message: str,
) -> str:
    """Commits the files that ``write(directory, repo_id)`` writes; returns the commit's URL.

    The options are those of :meth:`ncprior.NCPrior.push_to_hub`.
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
    """Returns the local path of a file; a file of a Hub repository is downloaded.

    Arguments:
        path_or_repo: The file itself, its directory, or a Hub repository.
        file: Name of the file in a directory or repository.
        revision: Branch, tag or commit of the repository.

    Raises:
        FileNotFoundError: If there is no such directory or repository.
        ValueError: If a revision is given with a local path.
    """
    path = Path(path_or_repo)
    is_local = path.exists() or not isinstance(path_or_repo, str) or path.suffix == ".safetensors"
    if is_local and revision is not None:
        raise ValueError(
            f"A revision belongs to a Hub repository; {path} is a local path. Leave it out."
        )
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
            f"There is no directory {name}, and {file} cannot be downloaded from a Hub repository "
            f"{name}{at}. Check the name and your access. The reason is: {error}"
        ) from error
    return Path(found)
