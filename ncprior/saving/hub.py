"""Location of saved files: a directory, or a repository of the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ncprior._version import __version__
from ncprior.saving.readme import CARD, keep_others
from ncprior.utils.require import require_instance
from ncprior.utils.texts import printable

_ABSENT = (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError)

_REPOSITORY = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)


def is_repository(name: object) -> bool:
    """Returns whether a value has the form of a Hub repository: ``"owner/name"`` or ``"name"``."""
    return isinstance(name, str) and _REPOSITORY.fullmatch(name) is not None


def _has_owner(name: object) -> bool:
    """Returns whether a value has the form ``"owner/name"``, as all repositories of priors have."""
    return isinstance(name, str) and is_repository(name) and "/" in name


def upload(
    files: Callable[[str], dict[str, bytes]],
    repo_id: str,
    *,
    private: bool | None,
    token: str | None,
    revision: str | None,
    commit_message: str,
    asked: Sequence[str],
) -> str:
    """Commits the files that ``files(repo_id)`` returns by name; returns the commit's URL.

    The files are made before the repository, so that one that is not valid leaves no trace. A
    README of others stays. The options are those of :meth:`ncprior.NCPrior.push_to_hub`, and the
    names of the arguments that were given for the model card.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"repo_id must be a name on the Hub, such as 'user/my-prior'; got {repo_id!r}: {error}"
        ) from error
    contents = files(repo_id)
    api = HfApi(token=token, library_name="ncprior", library_version=__version__)
    visibility: dict[str, Any] = {} if private is None else {"private": private}
    full_id = api.create_repo(repo_id, exist_ok=True, **visibility).repo_id
    if full_id != repo_id:
        contents = files(full_id)
    if revision is not None:
        api.create_branch(full_id, branch=revision, exist_ok=True)
    present = _present_card(api, full_id, revision)
    contents = keep_others(contents, present, full_id, asked, stacklevel=3)
    operations = [CommitOperationAdd(name, content) for name, content in sorted(contents.items())]
    commit = api.create_commit(
        full_id, operations, commit_message=commit_message, revision=revision
    )
    return commit.commit_url


def _present_card(api: HfApi, repo_id: str, revision: str | None) -> bytes | None:
    """Returns the README of a repository, ``None`` if it has none.

    Raises:
        ConnectionError: If it cannot be read.
    """
    with TemporaryDirectory() as folder:
        try:
            found = api.hf_hub_download(repo_id, CARD, revision=revision, local_dir=folder)
        except Exception as error:
            is_absent = isinstance(error, EntryNotFoundError | RevisionNotFoundError)
            if is_absent and not isinstance(error, LocalEntryNotFoundError):
                return None
            if not isinstance(error, OSError) and not _is_of_download(error):
                raise
            raise ConnectionError(
                f"Nothing is saved to {repo_id}, as its {CARD} cannot be read: "
                f"{type(error).__name__}: {error}. Check the connection, or try again later."
            ) from error
        return Path(found).read_bytes()


def locate(
    path_or_repo: str | os.PathLike[str], file: str, revision: str | None, token: str | None
) -> Path:
    """Returns the local path of a file; a file of a Hub repository is downloaded.

    Arguments:
        path_or_repo: The file itself, its directory, or a Hub repository. A name that exists here,
            is a ``Path``, or is not of the form ``"owner/name"``, is local.
        file: Name of the file in a directory or repository.
        revision: Branch, tag or commit of the repository.
        token: The access token; ``None`` is the one logged in with.

    Raises:
        FileNotFoundError: If there is no such directory, no such repository, or no such file in it.
        OSError: If the Hub cannot be reached, denies access or fails, or the file cannot be stored.
        ValueError: If a revision is given with a local path.
    """
    require_instance("path_or_repo", path_or_repo, (str, os.PathLike), "Pass a path or a name.")
    require_instance("revision", revision, (str, type(None)), "Pass a branch, tag or commit.")
    require_instance("token", token, (str, type(None)), "Pass an access token, or log in.")
    path = Path(path_or_repo)
    is_local = path.exists() or not _has_owner(path_or_repo) or path.suffix == ".safetensors"
    if is_local and revision is not None:
        raise ValueError(
            f"A revision belongs to a Hub repository, owner/name; {path} is a local path. Leave it "
            f"out."
        )
    if is_local and not path.exists():
        raise FileNotFoundError(
            printable(f"There is no file or folder {path}, and a Hub repository is owner/name.")
        )
    if is_local:
        return path / file if path.is_dir() else path
    name = str(path_or_repo)
    try:
        found = hf_hub_download(
            name,
            file,
            revision=revision,
            token=token,
            library_name="ncprior",
            library_version=__version__,
        )
    except Exception as error:  # noqa: BLE001 (those of the library for HTTP are no OSError)
        _raise_hub_error(
            f"{name}{'' if revision is None else f' at revision {revision}'}", file, error
        )
    return Path(found)


def _raise_hub_error(where: str, file: str, error: Exception) -> NoReturn:
    """Raises FileNotFoundError if there is no such file, and any other error by its root cause."""
    cause: BaseException = error
    while cause.__cause__ is not None and isinstance(cause, FileNotFoundError):
        cause = cause.__cause__
    offline = isinstance(cause, OfflineModeIsEnabled | LocalEntryNotFoundError)
    if offline or (isinstance(cause, _ABSENT) and not isinstance(cause, GatedRepoError)):
        raise FileNotFoundError(
            f"There is no directory {where.split()[0]}, and {file} cannot be downloaded from a Hub "
            f"repository {where}. Check the name and your access. The reason is: {cause}"
        ) from error
    if isinstance(error, FileNotFoundError):  # which would say that there is no such file
        raise ConnectionError(
            f"There is no directory {where.split()[0]}, and {file} cannot be downloaded from a Hub "
            f"repository {where}: {type(cause).__name__}: {cause}. If you mean a directory, check its "
            f"path; if a repository, check the connection and the folder HF_HOME, or try again later."
        ) from error
    if _is_of_download(error):
        raise ConnectionError(
            f"The download of {file} from the Hub repository {where} broke off: "
            f"{type(error).__name__}: {error}. Check the connection, or try again later."
        ) from error
    raise error


def _is_of_download(error: Exception) -> bool:
    """Returns whether an error, which may be no OSError, is of a library that downloads files."""
    library = type(error).__module__.partition(".")[0]
    is_http = library.startswith(("httpx", "httpcore", "requests", "urllib3"))
    return is_http or type(error) is RuntimeError  # that of hf_xet
