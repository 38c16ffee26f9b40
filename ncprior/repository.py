"""What a saved model is as files: in a directory, or in a repository of the Hugging Face Hub.

One safetensors file with the configuration in its header is all that loading reads; ``config.json``
and ``README.md`` beside it are for people.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NoReturn

from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from huggingface_hub.utils import HFValidationError
from torch import Tensor

from ncprior.files import save_tensors, write_atomically
from ncprior.fingerprints import base_fingerprint

if TYPE_CHECKING:
    from ncprior.source import LatentSource

__all__ = [
    "check_configuration",
    "check_fingerprints",
    "check_tensors",
    "fingerprints",
    "locate",
    "refuse",
    "upload",
    "version",
    "write_files",
]


def version() -> str:
    """Returns the version of this package.

    Example:
        >>> version().count(".")
        2
    """
    from ncprior import __version__

    return __version__


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

    Example:
        >>> import tempfile
        >>> directory = Path(tempfile.mkdtemp())
        >>> write_files(directory, "a.safetensors", {}, {"format": 1}, "# A model")
        >>> sorted(path.name for path in directory.iterdir())
        ['README.md', 'a.safetensors', 'config.json']
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

    Example:
        >>> upload(write, "user/my-prior", **options)  # doctest: +SKIP
        'https://huggingface.co/user/my-prior/commit/0f3c...'
    """
    api = HfApi(token=token, library_name="ncprior", library_version=version())
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

    Example:
        >>> locate("a.safetensors", "ncprior.safetensors", None).name
        'a.safetensors'
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
            name, file, revision=revision, library_name="ncprior", library_version=version()
        )
    except (OSError, HFValidationError) as error:
        at = "" if revision is None else f" at revision {revision}"
        raise FileNotFoundError(
            f"There is no directory {name}, and no {file} to be had from a Hub repository "
            f"{name}{at}: {error}"
        ) from error
    return Path(found)


def fingerprints(source: LatentSource[Any, Any]) -> dict[str, str | None]:
    """Returns those of the VAE, where the source has one, and of a base that is not in the VAE.

    Example:
        >>> sorted(fingerprints(source))
        ['base', 'vae']
    """
    fingerprint = getattr(source, "fingerprint", None)
    return {
        "vae": None if fingerprint is None else fingerprint(),
        "base": base_fingerprint(getattr(source, "prior", None)),
    }


def check_configuration(
    path: Path, config: Mapping[str, Any], sound: Mapping[str, Callable[[Any], bool]], form: int
) -> None:
    """Refuses the configuration of another format, with other keys, or with unsound values.

    Arguments:
        path: The file, for the message.
        config: What its header says.
        sound: What is wanted of the value of every key.
        form: The format that this version reads.

    Raises:
        ValueError: If it is refused.

    Example:
        >>> check_configuration(Path("a"), {"format": 1}, {"format": lambda value: value == 1}, 1)
    """
    if config.get("format") != form:
        refuse(
            path,
            f"it has format {config.get('format')!r}, and ncprior {version()} reads format "
            f"{form}. Install the version of ncprior that wrote it",
        )
    if unknown := sorted(config.keys() - sound.keys()):
        refuse(path, f"its configuration has unknown keys: {', '.join(unknown)}")
    wrong = [key for key, fits in sound.items() if key not in config or not fits(config[key])]
    if wrong:
        refuse(path, f"its configuration makes no sense of: {', '.join(wrong)}")


def check_fingerprints(
    path: Path,
    stored: Mapping[str, str | None],
    given: Mapping[str, str | None],
) -> None:
    """Refuses what was trained on another VAE or base; warns where that cannot be told.

    Raises:
        ValueError: If one of the two differs.

    Warns:
        UserWarning: If there is no fingerprint of the VAE to compare.

    Example:
        >>> check_fingerprints(Path("a"), fingerprints(source), fingerprints(source))
    """
    for part, name in (("vae", "VAE"), ("base", "base prior")):
        if None not in (stored[part], given[part]) and stored[part] != given[part]:
            refuse(
                path,
                f"it was trained on the {name} {stored[part]}, and the source's is {given[part]}. Pass the one it was trained on, or check_fingerprint=False",
            )
    if None in (stored["vae"], given["vae"]):
        whose = "The file" if stored["vae"] is None else "The source"
        warnings.warn(
            f"{whose} has no fingerprint of the VAE, so that nothing tells whether {path} was "
            f"trained on this one. Give SingleGroup module=vae, or a source of your own a method "
            f"fingerprint().",
            stacklevel=5,
        )


def check_tensors(
    path: Path, saved: Mapping[str, Tensor], own: Mapping[str, Tensor], whose: str
) -> None:
    """Refuses tensors that are not, by name and shape, those of what is to take them.

    Raises:
        ValueError: If any is missing, unexpected or of another shape.

    Example:
        >>> check_tensors(Path("a"), vae.state_dict(), vae.state_dict(), "heads")
    """
    differences = {
        "missing": sorted(own.keys() - saved.keys()),
        "unexpected": sorted(saved.keys() - own.keys()),
        "of another shape": [
            f"{name} {tuple(saved[name].shape)} for {tuple(own[name].shape)}"
            for name in sorted(own.keys() & saved.keys())
            if saved[name].shape != own[name].shape
        ],
    }
    found = [f"{kind}: {', '.join(names)}" for kind, names in differences.items() if names]
    if found:
        refuse(path, f"its tensors are not those of the {whose} ({'; '.join(found)})")


def refuse(path: Path, reason: str) -> NoReturn:
    """Raises the error of a file that cannot be loaded.

    Raises:
        ValueError: Always.

    Example:
        >>> refuse(Path("a.safetensors"), "it is empty")
        Traceback (most recent call last):
        ValueError: Cannot load a.safetensors: it is empty.
    """
    raise ValueError(f"Cannot load {path}: {reason}.")
