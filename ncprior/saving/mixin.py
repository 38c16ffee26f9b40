"""Saving of the trained part of a model, in a directory or on the Hugging Face Hub.

A saved model is one safetensors file: the trained tensors, and in its header the configuration.
Loading builds modules from a fixed table of names and runs no code that comes with the file. The
files beside it are for people: a file of JSON with the same name repeats the configuration, and
``README.md`` is a model card. No file of the VAE is replaced, so that both can share a folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ncprior._version import __version__
from ncprior.saving.cards import model_card, vae_link
from ncprior.saving.checks import FORMAT, SavedFile, Validators
from ncprior.saving.hub import locate, upload
from ncprior.saving.readme import CARD, keep_others
from ncprior.saving.tensors import to_bytes, write_atomically
from ncprior.source import LatentSource, device_of
from ncprior.utils.require import described, require_flags, require_instance

if TYPE_CHECKING:
    from typing_extensions import Self


class CardReport(Protocol):
    """Report for a model card, such as that of ``diagnose``; its text is ``str(report)``."""

    @property
    def num_proposals(self) -> tuple[int, ...]:
        """Numbers of proposals of SIR; the card's example takes the last."""
        ...


class Diagnosed(Protocol):
    """Report that contains one for a model card, such as that of ``improve``."""

    @property
    def diagnosis(self) -> CardReport | None:
        """The report of ``diagnose``, or ``None``."""
        ...


class Pretrained(nn.Module):
    """Mixin of models on a frozen VAE: saves the trained part, and loads it onto the VAE again.

    A subclass defines the constants and the five methods at the end.
    """

    source: LatentSource[Any, Any]

    _file: ClassVar[str]  # name of the safetensors file
    _own_modules: ClassVar[str]  # argument of from_pretrained that passes the user's modules
    _tags: ClassVar[tuple[str, ...]]  # of the model card
    _validators: ClassVar[Validators]  # of each value of the configuration

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        report: CardReport | Diagnosed | None = None,
        base_model: str | None = None,
        card_data: Mapping[str, Any] | None = None,
    ) -> None:
        """Saves the trained part, without the VAE; earlier files are replaced.

        All files are written beside the earlier ones first. If one cannot be written, such as on a
        full disk, the earlier files stay as they were. The folder can be that of the VAE: its own
        ``config.json`` and ``README.md`` stay.

        An :class:`~ncprior.NCPrior` saves its heads, strength, active groups, sampler and a fitted
        base: a ``GaussianMixture`` (a VampPrior is one), a ``FlowMatching``, the flows that
        ``fit_flow`` and ``fit_flows`` build by default, and those of ``fit_code_frequencies``,
        ``fit_code_network`` and ``fit_code_bases``. Put any other base, such as your own flow, on
        the source again before loading. A joint head is saved with its first prior. Samplers are
        those of :mod:`ncprior.samplers`, also composed. A :class:`~ncprior.vaebm.VAEBM` saves its
        energy and the settings of its chains, without the ratio heads.

        Arguments:
            directory: Directory of the files, made if missing: one safetensors file, which is all
                that loading reads, the same settings as JSON, and the model card ``README.md``,
                unless a README without ``library_name: ncprior`` is there.
            report: Report for the model card: of :func:`ncprior.diagnostics.diagnose`, or of
                :func:`ncprior.improve`, which contains one. By default that of ``prior.report``,
                if there is one.
            base_model: Hub repository of the VAE, such as ``"user/my-vae"``, for the model card.
            card_data: Further metadata of the model card, such as ``{"license": "mit"}``: texts,
                numbers, and lists and dicts of them.

        Raises:
            OSError: If a file cannot be written. The message names the files that are new.
            TypeError: If an argument has the wrong type, or the energy of a VAEBM is not an
                ``nn.Module``. Make it one.
            ValueError: If ``from_pretrained`` could not load the result, such as weights that are
                NaN. The message names the part.

        Warns:
            UserWarning: If the prior's sampler is of another kind: it is then left out. Also if
                ``report``, ``base_model`` or ``card_data`` is given, and no card is written.

        Example:
            >>> import tempfile
            >>> prior.save_pretrained(tempfile.mkdtemp())
        """
        require_instance("directory", directory, (str, os.PathLike), "Pass the path of a folder.")
        directory = Path(directory)
        name, readme = directory.resolve().name, directory / CARD
        card = {"report": report, "base_model": base_model, "card_data": card_data}
        files = self._files(name, **card)
        try:
            present = readme.read_bytes() if readme.is_file() else None
            files = keep_others(files, present, directory, _given(card), stacklevel=2)
            with ExitStack() as stack:
                for file, content in files.items():
                    if (directory / file).is_dir():
                        raise IsADirectoryError(f"{file} is a folder")
                    temporary = stack.enter_context(write_atomically(directory / file))
                    temporary.write_bytes(content)
        except OSError as error:
            new = [file for file, content in files.items() if _holds(directory / file, content)]
            cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
            raise OSError(
                *(() if cause.errno is None else (cause.errno,)),
                f"Cannot save to {directory}: {cause.strerror or cause}. New files there: "
                f"{', '.join(new) or 'none'}; all others are as before. Make room or pass another "
                f"folder.",
            ) from error

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        **card: Any,  # noqa: ANN401
    ) -> str:
        """Saves the files of :meth:`save_pretrained` to the Hugging Face Hub, as one commit.

        No file is left on the disk, and no repository is made before all files are valid.

        Arguments:
            repo_id: The repository, such as ``"user/my-prior"``; made if missing. It can be that of
                the VAE, whose own files stay.
            private: Whether a repository made now is private; ``None`` is the account's default.
            token: The access token; ``None`` is the one logged in with.
            revision: The branch to commit to; made if missing. ``None`` is the main one.
            commit_message: First line of the commit; ``None`` names the class.
            card: ``report``, ``base_model`` and ``card_data``, see :meth:`save_pretrained`.

        Returns:
            The URL of the commit.

        Raises:
            ConnectionError: If the present ``README.md`` cannot be read.
            TypeError: As :meth:`save_pretrained`.
            ValueError: As :meth:`save_pretrained`.

        Warns:
            UserWarning: As :meth:`save_pretrained`.

        Example:
            >>> prior.push_to_hub("user/my-prior", private=True)  # doctest: +SKIP
            'https://huggingface.co/user/my-prior/commit/0f3c...'
        """
        require_instance("repo_id", repo_id, str, 'Pass a name such as "user/my-prior".')
        for name, value in {"revision": revision, "commit_message": commit_message}.items():
            require_instance(name, value, (str, type(None)), "Pass a text.")
        if private is not None:
            require_flags(private=private)
        return upload(
            partial(self._files, **card),
            repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            asked=_given(card),
        )

    @classmethod
    def from_pretrained(
        cls,
        source: Any,  # noqa: ANN401
        path_or_repo: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | None = None,
        check_fingerprint: bool = True,
        **own: Any,  # noqa: ANN401
    ) -> Self:
        """Loads the saved part onto the VAE that it was trained on.

        Arguments:
            source: The VAE, set up as it was in training; a saved base need not be put on it. A
                :class:`~ncprior.vaebm.VAEBM` over an NCP prior takes that prior instead.
            path_or_repo: Directory of :meth:`save_pretrained`, its safetensors file, or a Hub
                repository, from which that one file is downloaded.
            revision: Branch, tag or commit of the repository.
            token: The access token; ``None`` is the one logged in with.
            check_fingerprint: Whether another VAE or base prior raises an error; for an energy,
                also another decoder noise or other ratio heads.
            own: Your own modules, which take the saved tensors; needed if the saved modules are
                not of this package: ``heads``, one per group, or ``energy``.

        Returns:
            The model, in evaluation mode, on the device of the source's prior.

        Raises:
            FileNotFoundError: If there is no such file, directory or repository.
            ImportError: If the saved base is a flow, and zuko is not installed.
            OSError: If the Hub cannot be reached, denies access or fails, or the file cannot be
                stored. The message names the cause.
            TypeError: If an argument has the wrong type or an unknown name.
            ValueError: If the file is damaged, or does not fit the source or your own modules,
                which are then left unchanged. The message names the remedy.

        Warns:
            UserWarning: If the file or the source has no fingerprint of the VAE to compare.

        Example:
            >>> import tempfile
            >>> from ncprior import NCPrior
            >>> directory = tempfile.mkdtemp()
            >>> prior.save_pretrained(directory)
            >>> NCPrior.from_pretrained(source, directory).strength
            1.0
        """
        require_flags(check_fingerprint=check_fingerprint)
        if unknown := sorted(own.keys() - {cls._own_modules}):
            raise TypeError(
                f"{cls.__name__}.from_pretrained got an unexpected keyword argument {unknown[0]!r}. "
                f"Its keywords are revision, token, check_fingerprint and {cls._own_modules}."
            )
        path = locate(path_or_repo, cls._file, revision, token)
        # Weights made in inference mode could not be trained; a new flow draws weights.
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            saved = SavedFile.read(path, cls._validators)
            model: Self = cls._build(saved, source, check_fingerprint, **own)
            return model.to(device_of(model.source)).eval()

    def _files(self, name: str, **card: Any) -> dict[str, bytes]:  # noqa: ANN401
        """Returns the files to save, after a check that they can be loaded.

        Arguments:
            name: The name to load the model by.
            card: Arguments of the card.
        """
        tensors = self._tensors()
        config = {"format": FORMAT, "ncprior": __version__, **self._configuration()}
        data = to_bytes(tensors, config)
        try:
            with torch.random.fork_rng(devices=[]):
                self._check(SavedFile(Path(self._file), tensors, config, self._validators))
        except ValueError as error:
            raise ValueError(
                f"This {type(self).__name__} is not saved, as its file could not be loaded. {error}"
            ) from error
        texts = {
            f"{Path(self._file).stem}.json": json.dumps(config, indent=2) + "\n",
            CARD: self._card(config, name, **card),
        }
        return {self._file: data, **{file: text.encode() for file, text in texts.items()}}

    def _card(
        self,
        config: Mapping[str, Any],
        name: str,
        report: CardReport | Diagnosed | None = None,
        base_model: str | None = None,
        card_data: Mapping[str, Any] | None = None,
    ) -> str:
        """Model card, with a report at its end."""
        report = _diagnosis(report, getattr(self, "report", None))
        text = self._card_text(
            config,
            name=name,
            vae=vae_link(base_model),
            num_proposals=500 if report is None else report.num_proposals[-1],
        )
        given = {} if card_data is None else card_data
        require_instance("card_data", given, Mapping, "Pass a dict of metadata.")
        data = {"base_model": base_model, **given}
        return model_card(text, self._tags, data, None if report is None else str(report))

    def _tensors(self) -> dict[str, Tensor]:
        """Returns the trained tensors by name."""
        raise NotImplementedError

    def _configuration(self) -> dict[str, Any]:
        """Returns everything else that loading needs, ready for JSON."""
        raise NotImplementedError

    def _card_text(self, config: Mapping[str, Any], **names: Any) -> str:  # noqa: ANN401
        """Returns the text of the model card, given ``name``, ``vae`` and ``num_proposals``."""
        raise NotImplementedError

    @classmethod
    def _check(cls, saved: SavedFile) -> None:
        """Validates a model before it is saved, as :meth:`_build` validates a file."""
        raise NotImplementedError

    @classmethod
    def _build(cls, saved: SavedFile, source: Any, check_fingerprint: bool) -> Any:  # noqa: ANN401
        """Builds the model of a file on a source; a subclass also takes the user's modules."""
        raise NotImplementedError


def _diagnosis(report: Any, own: Any) -> CardReport | None:  # noqa: ANN401
    """The report of ``diagnose``: the given one, a part of it, or a part of the model's own report.

    The model's own report can be any object.
    """
    found = getattr(own if report is None else report, "diagnosis", report)
    if found is None or hasattr(found, "num_proposals"):
        diagnosis: CardReport | None = found
        return diagnosis
    if report is None:
        return None
    raise TypeError(
        f"report must be the report of diagnose or improve; got {described(report)}. Pass "
        f"diagnose(prior, x), or leave it out."
    )


def _given(card: Mapping[str, Any]) -> list[str]:
    """Names of the arguments of a card that are not ``None``."""
    return [name for name, value in card.items() if value is not None]


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content
