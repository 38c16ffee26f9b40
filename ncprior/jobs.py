"""Large sampling jobs: samples in parts on disk, drawn by any number of processes in any order.

A part depends on the seed of the job and on its own number alone. If a job is interrupted, run it
again: it draws the missing parts only. On the same kind of machine, with as many threads, the
files are bit for bit those of an uninterrupted job.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from ncprior.prior import NCPrior
from ncprior.samplers.base import Sample, Sampler
from ncprior.samplers.identity import identity_of
from ncprior.saving.folders import Folder, folder_at
from ncprior.saving.header import read_header
from ncprior.saving.identity import as_text, prior_facts
from ncprior.saving.tensors import read_tensors, to_bytes
from ncprior.source import LatentSource, device_of, num_rows
from ncprior.utils.batches import map_tensors, own_batch, take_rows, to_device
from ncprior.utils.distributed import num_ranks, rank
from ncprior.utils.random_state import seeded
from ncprior.utils.require import require_counts, require_flags, require_instance

_SETTINGS = ("num_samples", "part_size", "seed", "sampler", "prior")  # of a job, in job.json

_OPTIONAL = ("batch_size", "draw_x")  # which a job has only if they are not the default

_JOB = "job.json"

_JOB_BYTES = 2**24  # of it that are read

_SEEDS = "(-1e18, 1e18)"


def sample_parts(
    prior: NCPrior,
    folder: str | os.PathLike[str],
    *,
    num_samples: int,
    sampler: Sampler | None = None,
    part_size: int = 1000,
    batch_size: int | None = None,
    draw_x: bool = False,
    seed: int = 0,
    condition: Any = None,  # noqa: ANN401
    parts: Iterable[int] | None = None,
    progress: bool = True,
) -> list[Any]:
    """Draws samples part by part into a folder; existing parts are kept.

    Arguments:
        prior: The prior.
        folder: The folder of the parts; made if missing. A URL such as ``"s3://bucket/samples"`` is
            a folder of an object store, for which its package for fsspec must be installed, such as
            s3fs; fsspec's own settings hold its options.
        num_samples: N, the number of samples of the whole job.
        sampler: As for :meth:`ncprior.NCPrior.sample`: ``None`` takes the prior's own.
        part_size: Samples per part; the last part may be smaller.
        batch_size: Samples drawn at once, which bounds the memory; ``None`` draws a whole part.
        draw_x: Whether x is drawn from p(x | z), as for :meth:`ncprior.NCPrior.sample`.
        seed: Seed of the job. The caller's random generators do not change.
        condition: Condition of the source, such as labels: tensors or an array of N rows, or
            ``None``. Rows on the CPU are moved to the VAE's device part by part.
        parts: The numbers of the parts that this process draws, such as those of a job array. The
            default is all parts, divided among the ranks of a process group if there is one.
        progress: Whether to show a progress bar.

    Returns:
        The files of the parts of this process, as paths or, for a URL, as URLs: safetensors with
        ``x``, the decoder's means or draws of x, with shape ``(B, ...)``, and ``z_0``, ``z_1``, …
        of the groups, each ``(B, *event)``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If the folder holds another job or a part of one, ``job.json`` is damaged, or a
            number is out of range. The message names the file and the remedy. Two bases of one
            type that can only be sampled cannot be distinguished.

    Example:
        >>> import tempfile
        >>> from functools import partial
        >>> from ncprior import sir
        >>> folder, prior.sampler = tempfile.mkdtemp(), partial(sir, num_proposals=50)
        >>> files = sample_parts(prior, folder, num_samples=10, part_size=4, progress=False)
        >>> [file.name for file in files]
        ['part-00000.safetensors', 'part-00001.safetensors', 'part-00002.safetensors']
        >>> torch.cat([part["x"] for part in read_parts(folder)]).shape
        torch.Size([10, 3])
    """
    require_instance("prior", prior, NCPrior, "Pass an NCPrior: NCPrior(source, heads).")
    sampler = prior.chosen(sampler)
    require_instance("folder", folder, (str, os.PathLike), "Pass the path of a folder.")
    require_counts(num_samples=num_samples, part_size=part_size)
    require_counts("[1, inf) or None", batch_size=batch_size)
    require_counts(_SEEDS, seed=seed)
    require_flags(draw_x=draw_x, progress=progress)
    num_samples, part_size, seed = map(operator.index, (num_samples, part_size, seed))
    at_once = min(part_size, part_size if batch_size is None else operator.index(batch_size))
    if isinstance(condition, list):
        condition = own_batch(condition, torch.device("cpu"))
    condition = map_tensors(lambda tensor: tensor, condition)  # arrays become tensors once
    if condition is not None and num_rows(condition) != num_samples:
        raise ValueError(
            f"A condition needs one row per sample; got {num_rows(condition)} rows for "
            f"{num_samples} samples. Pass {num_samples} rows."
        )
    count = -(-num_samples // part_size)
    chosen = range(rank(), count, num_ranks()) if parts is None else _chosen(parts, count)
    job: dict[str, Any] = {"num_samples": num_samples, "part_size": part_size, "seed": seed}
    job |= {"sampler": identity_of(sampler), "prior": _digest(prior, condition, draw_x)}
    job |= {"batch_size": at_once} if at_once < part_size else {}
    job |= {"draw_x": True} if draw_x else {}
    place, draw = folder_at(folder), partial(prior.sample, sampler=sampler, draw_x=draw_x)
    claim, contents = _Claim(place, job), partial(_contents, _identity(job))
    if not chosen or place.has(_JOB):
        claim.renew()
    rows = [range(i * part_size, min((i + 1) * part_size, num_samples)) for i in chosen]
    total, quiet = sum(map(len, rows)), not progress or rank() > 0
    with tqdm(desc="samples", total=total, disable=quiet) as bar:
        for i, own in zip(chosen, rows, strict=True):
            name, tensors = _name(i), None
            if _is_drawn(place, name, contents(i)):
                bar.update(len(own))
            else:
                with seeded(_seed(seed, i)):
                    tensors = _draw(draw, own, at_once, condition, prior.source, bar)
            claim.renew()  # only now: a sampler that fails leaves nothing behind
            if tensors is not None:
                _save(place, name, tensors, contents(i))
            place.tidy(name)
    return [place.at(_name(i)) for i in chosen]


def read_parts(folder: str | os.PathLike[str]) -> Iterator[dict[str, Tensor]]:
    """Yields the tensors of a whole job, part by part.

    Arguments:
        folder: The folder of :func:`sample_parts`, or its URL.

    Yields:
        The tensors of a part by name: ``x`` and ``z_0``, ``z_1``, …, with the part's rows.

    Raises:
        FileNotFoundError: If the folder holds no job, or a part is missing. Run the job again.
        ValueError: If a part or ``job.json`` is damaged, or a part is of another job or has the
            number of another part. Delete the file that the message names, and run the job again.

    Example:
        >>> next(read_parts("nowhere"))
        Traceback (most recent call last):
        FileNotFoundError: nowhere holds no sampling job. Run sample_parts first.
    """
    require_instance("folder", folder, (str, os.PathLike), "Pass the path of a folder.")
    place = folder_at(folder)
    if not place.has(_JOB):
        raise FileNotFoundError(f"{folder} holds no sampling job. Run sample_parts first.")
    job = _read_job(place)
    contents = partial(_contents, _identity(job))
    for i in range(-(-job["num_samples"] // job["part_size"])):
        with place.open(_name(i)) as file:
            tensors, found = read_tensors(place.at(_name(i)), file)
        rows = min(job["part_size"], job["num_samples"] - i * job["part_size"])
        latents = {f"z_{k}" for k in range(max(1, len(tensors) - 1))}
        whole = tensors.keys() == {"x", *latents}
        whole = whole and all(t.shape[:1] == (rows,) for t in tensors.values())
        if found != contents(i) or not whole:
            _raise_strange(place, _name(i))
        yield tensors


def _chosen(parts: Iterable[int], count: int) -> list[int]:
    """Returns the numbers of the parts, after a check that the job has them."""
    parts = parts.tolist() if isinstance(parts, np.ndarray | Tensor) else parts
    require_instance("parts", parts, Iterable, "Pass a list of numbers.")
    chosen = []
    for i in parts:
        require_counts(f"[0, {count - 1}]", parts=i)
        chosen.append(operator.index(i))
    return chosen


def _draw(
    draw: Callable[..., Sample],
    rows: range,
    at_once: int,
    condition: Any,  # noqa: ANN401
    source: LatentSource[Any, Any],
    bar: Any,  # noqa: ANN401
) -> dict[str, Tensor]:
    """Returns the tensors of one part, drawn in batches under the condition of their rows."""
    batches: list[dict[str, Tensor]] = []
    for first in range(rows.start, rows.stop, at_once):
        own = slice(first, min(first + at_once, rows.stop))
        c = condition
        if c is not None:
            c = to_device(take_rows(c, own), device_of(source))
        sample = draw(own.stop - own.start, condition=c)
        tensors = {"x": sample.x, **{f"z_{k}": z for k, z in enumerate(sample.latents)}}
        batches.append({name: tensor.cpu() for name, tensor in tensors.items()})
        bar.update(own.stop - own.start)
    if len(batches) == 1:
        return batches[0]
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _save(folder: Folder, name: str, tensors: dict[str, Tensor], contents: dict[str, Any]) -> None:
    try:
        folder.write(name, to_bytes(tensors, contents))
    except FileNotFoundError:
        if not _is_drawn(folder, name, contents):  # else another process has written and tidied it
            raise


class _Claim:
    """Claim of a folder by a job, which is renewed before every part that is written.

    Of several processes that claim a folder at once, one writes ``job.json`` and all others compare.
    It is read again only if it has changed, or if its folder cannot say so.
    """

    def __init__(self, folder: Folder, job: dict[str, Any]) -> None:
        self.folder, self.job = folder, job
        self._compared: tuple[int, ...] | None = None

    def renew(self) -> None:
        """Writes the job's settings to the folder, or compares them with those it holds.

        Raises:
            ValueError: If the folder holds another job; pass another folder.
        """
        if self._compared is not None and self.folder.version(_JOB) == self._compared:
            return
        folder, job = self.folder, self.job
        folder.create(_JOB, f"{json.dumps(job, indent=2)}\n".encode())
        version = folder.version(_JOB)  # before it is read: a later one is another version
        found = _read_job(folder)
        names = [name for name in {**found, **job} if found.get(name) != job.get(name)]
        if names:
            raise ValueError(
                f"{folder} holds parts of another job, with { {n: found.get(n) for n in names} }; got "
                f"{ {n: job.get(n) for n in names} }. Pass another folder."
            )
        self._compared = version


def _read_job(folder: Folder) -> dict[str, Any]:
    """Returns the settings of the job of a folder, after a check of their types and ranges.

    Raises:
        ValueError: If the file is damaged.
    """
    try:
        with folder.open(_JOB) as file:
            found = json.loads(file.read(_JOB_BYTES).decode())
        job = {name: found[name] for name in _SETTINGS}
        require_counts(num_samples=job["num_samples"], part_size=job["part_size"])
        require_counts(_SEEDS, seed=job["seed"])
        job |= {name: found[name] for name in _OPTIONAL if name in found}
    except (FileNotFoundError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder.at(_JOB)} holds no job of sample_parts ({type(error).__name__}: {error}). "
            f"Delete it and call sample_parts with the job's settings again; whole parts are kept."
        ) from error
    return job


def _identity(job: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()


def _contents(identity: str, i: int) -> dict[str, Any]:
    """Returns the configuration of part i of a job, which its file must hold."""
    return {"kind": "samples", "job": identity, "part": i}


def _is_drawn(folder: Folder, name: str, contents: dict[str, Any]) -> bool:
    """Returns whether a file is a whole part.

    Raises:
        ValueError: If it is a whole file with other contents, such as a part of another job.
    """
    try:
        with folder.open(name) as file:
            found = read_header(folder.at(name), file).configuration
    except (FileNotFoundError, ValueError):
        return False
    if found != contents:
        _raise_strange(folder, name)
    return True


def _raise_strange(folder: Folder, name: str) -> NoReturn:
    raise ValueError(
        f"{folder.at(name)} is not this part of the job in {folder.at(_JOB)}: it is of another job, "
        f"a copy of another part, or not whole. Move or delete it, and run the job again."
    )


def _name(i: int) -> str:
    return f"part-{i:05d}.safetensors"


def _seed(seed: int, i: int) -> int:
    """Returns the seed of part i: different for all parts, and for jobs of nearby seeds."""
    digest = hashlib.sha256(str(seed).encode()).digest()
    return (int.from_bytes(digest[:4], "big") + i) % 2**32  # the range of generators' seeds


def _digest(prior: NCPrior, condition: Any, draw_x: bool) -> str:  # noqa: ANN401
    """Returns a digest of everything that determines the draws, besides sampler and seed."""
    facts = as_text(prior_facts(prior, None, draw_x=draw_x))
    given = identity_of(map_tensors(_digest_of, condition))  # with all names and texts in it
    return hashlib.sha256(f"{facts}{given}".encode()).hexdigest()


def _digest_of(tensor: Tensor) -> Tensor:
    """SHA-256 of dtype, shape and values of a tensor on any device, ``(32,)``."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    content = f"{tensor.dtype}{tuple(tensor.shape)}".encode() + raw
    return torch.tensor(list(hashlib.sha256(content).digest()))
