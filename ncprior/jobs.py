"""Large sampling jobs: samples in parts on disk, drawn by any number of processes in any order.

A part depends on the seed of the job and on its own number alone. If a job is interrupted, run it
again: it draws the missing parts only. On the same kind of machine, with as many threads, the
files are bit for bit those of an uninterrupted job.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ncprior.prior import NCPrior
from ncprior.samplers.base import Sampler
from ncprior.samplers.compose import describe
from ncprior.saving.checks import fingerprints
from ncprior.saving.tensors import load_tensors, read_metadata, save_tensors, write_atomically
from ncprior.source import num_rows
from ncprior.utils.distributed import num_ranks, rank
from ncprior.utils.fingerprints import module_fingerprint
from ncprior.utils.random_state import seeded


def sample_parts(
    prior: NCPrior,
    sampler: Sampler,
    folder: str | os.PathLike[str],
    *,
    num_samples: int,
    part_size: int = 1000,
    seed: int = 0,
    condition: Any = None,  # noqa: ANN401
    parts: Iterable[int] | None = None,
) -> list[Path]:
    """Draws samples part by part into a folder; existing parts are kept.

    Arguments:
        prior: The prior.
        sampler: As for :meth:`ncprior.NCPrior.sample`.
        folder: The folder of the parts; made if missing.
        num_samples: N, the number of samples of the whole job.
        part_size: Samples per part, drawn at once; the last part may be smaller.
        seed: Seed of the job. The caller's random generators do not change.
        condition: Condition of the source, such as labels: a pytree of N rows, or ``None``.
        parts: The numbers of the parts that this process draws, such as those of a job array. The
            default is all parts, divided among the ranks of a process group if there is one.

    Returns:
        The files of the parts of this process: safetensors with ``x``, the decoder's means, with
        shape ``(B, ...)``, and ``z_0``, ``z_1``, … of the groups, each ``(B, *event)``.

    Raises:
        ValueError: If the folder holds another job, or a number is out of range. Pass another
            folder, or the number that the message names. Two bases of one type that can only be
            sampled cannot be distinguished.

    Example:
        >>> import tempfile
        >>> from functools import partial
        >>> from ncprior import sir
        >>> folder, sampler = tempfile.mkdtemp(), partial(sir, num_proposals=50)
        >>> files = sample_parts(prior, sampler, folder, num_samples=10, part_size=4)
        >>> [file.name for file in files]
        ['part-00000.safetensors', 'part-00001.safetensors', 'part-00002.safetensors']
        >>> torch.cat([part["x"] for part in read_parts(folder)]).shape
        torch.Size([10, 3])
    """
    if num_samples < 1 or part_size < 1:
        raise ValueError(
            f"num_samples and part_size must be at least 1; got {num_samples} and {part_size}."
        )
    if condition is not None and num_rows(condition) != num_samples:
        raise ValueError(
            f"A condition needs one row per sample; got {num_rows(condition)} rows for "
            f"{num_samples} samples. Pass {num_samples} rows."
        )
    count = -(-num_samples // part_size)
    chosen = range(rank(), count, num_ranks()) if parts is None else list(parts)
    if not all(0 <= i < count for i in chosen):
        raise ValueError(f"The parts of this job are 0 to {count - 1}; got {list(chosen)}.")
    job: dict[str, Any] = {"num_samples": num_samples, "part_size": part_size, "seed": seed}
    job |= {"sampler": describe(sampler), "prior": _digest(prior, condition)}
    folder = Path(folder)
    _claim(folder, job)
    for i in chosen:
        if not _is_whole(_path(folder, i)):
            rows = slice(i * part_size, min((i + 1) * part_size, num_samples))
            _draw(prior, sampler, _path(folder, i), rows, _seed(seed, i), condition)
    return [_path(folder, i) for i in chosen]


def read_parts(folder: str | os.PathLike[str]) -> Iterator[dict[str, Tensor]]:
    """Yields the tensors of a whole job, part by part.

    Arguments:
        folder: The folder of :func:`sample_parts`.

    Yields:
        The tensors of a part by name: ``x`` and ``z_0``, ``z_1``, …, with the part's rows.

    Raises:
        FileNotFoundError: If the folder holds no job, or a part is missing. Run the job again.
        ValueError: If a part is damaged. Delete it, and run the job again.

    Example:
        >>> next(read_parts("nowhere"))
        Traceback (most recent call last):
        FileNotFoundError: nowhere holds no sampling job. Run sample_parts first.
    """
    folder = Path(folder)
    if not (folder / "job.json").is_file():
        raise FileNotFoundError(f"{folder} holds no sampling job. Run sample_parts first.")
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    for i in range(-(-job["num_samples"] // job["part_size"])):
        yield load_tensors(_path(folder, i))[0]


def _draw(
    prior: NCPrior,
    sampler: Sampler,
    path: Path,
    rows: slice,
    seed: int,
    condition: Any,  # noqa: ANN401
) -> None:
    with seeded(seed):
        some = tree_map_only(Tensor, lambda t: t[rows], condition)
        sample = prior.sample(rows.stop - rows.start, sampler, condition=some)
    tensors = {f"z_{k}": z for k, z in enumerate(sample.latents)}
    try:
        save_tensors(path, {"x": sample.x, **tensors}, {"kind": "samples", "first": rows.start})
    except FileNotFoundError:
        if not _is_whole(path):  # otherwise another process has written it and removed ours
            raise
    for unfinished in path.parent.glob(f".{path.name}.*.tmp"):  # left by a process that was killed
        unfinished.unlink(missing_ok=True)


def _claim(folder: Path, job: dict[str, Any]) -> None:
    """Writes the job's settings to the folder, or compares them with those it holds.

    Raises:
        ValueError: If the folder holds another job; pass another folder.
    """
    path = folder / "job.json"
    if not path.exists():
        with write_atomically(path) as temporary:
            temporary.write_text(json.dumps(job, indent=2) + "\n", encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8"))
    if other := {name: found.get(name) for name in job if found.get(name) != job[name]}:
        raise ValueError(
            f"{folder} holds parts of another job, with {other}; got "
            f"{ {name: job[name] for name in other} }. Pass another folder."
        )


def _is_whole(path: Path) -> bool:
    try:
        return path.exists() and read_metadata(path).get("kind") == "samples"
    except ValueError:
        return False


def _path(folder: Path, i: int) -> Path:
    return folder / f"part-{i:05d}.safetensors"


def _seed(seed: int, i: int) -> int:
    """Returns the seed of part i: different for all parts, and for jobs of nearby seeds."""
    digest = hashlib.sha256(str(seed).encode()).digest()
    return (int.from_bytes(digest[:4], "big") + i) % 2**32  # the range of generators' seeds


def _digest(prior: NCPrior, condition: Any) -> str:  # noqa: ANN401
    """Returns a digest of everything that determines the draws, besides sampler and seed."""
    used = (prior.strength, prior.active, str(prior.precision))
    description = (used, module_fingerprint(prior.heads), fingerprints(prior.source))
    digest = hashlib.sha256(str(description).encode())

    def update(tensor: Tensor) -> Tensor:
        raw = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode() + raw.numpy().tobytes())
        return tensor

    tree_map_only(Tensor, update, condition)
    return digest.hexdigest()
