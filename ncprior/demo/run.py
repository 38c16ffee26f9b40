"""Demonstration: a small VAE trained on real digits, its prior hole, and the gap closed.

A VAE is trained on the plain ELBO, and :func:`ncprior.improve` finds a better prior for it. The gap
closed is measured against held-out images, on features of a classifier trained on other images.
Needs the extra ``demo``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ncprior._version import __version__
from ncprior.demo.arms import ARMS, Generation, draw_arms, in_batches, log_z
from ncprior.demo.datasets import Labelled, digits, read_images, split
from ncprior.demo.networks import VAE, Classifier
from ncprior.demo.pictures import discriminant_axes, plot_latents, plot_samples
from ncprior.evaluation.gap import gap_closed
from ncprior.recipe.improve import improve
from ncprior.samplers.identity import describe
from ncprior.saving.tensors import save_tensors, write_atomically
from ncprior.utils.optimise import train
from ncprior.utils.random_state import seeded
from ncprior.utils.require import require_choice, require_counts, require_flags, require_instance


@dataclass(frozen=True)
class _Settings:
    """Sizes and numbers of steps of a run; the defaults are those of the digits."""

    size: int = 8
    latents: int = 6
    counts: int = 16
    vae_steps: int = 1500
    classifier_steps: int = 500
    batch_size: int = 128
    held_out: int = 600
    num_features: int = 16
    budget: int = 50
    num_samples: int = 5000
    generations: int = 5
    log_z_draws: int = 100_000
    # Small networks gain little from more threads, and lose much on a busy machine.
    threads: int | None = 1


_SETTINGS = {
    "digits": _Settings(),
    "mnist": _Settings(
        size=28,
        latents=16,
        counts=1,
        vae_steps=4690,
        classifier_steps=940,
        held_out=10_000,
        num_features=64,
        num_samples=10_000,
        threads=None,
    ),
}

_SHOWN = 16  # images per strip of the figure

_SCATTERED = 3000  # points per cloud

_OWN, _NEW = "the VAE's prior", "the new prior"


def run_demo(
    data: str = "digits",
    *,
    out: str | os.PathLike[str],
    seed: int = 0,
    started: float | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Demonstration on real digits: trains a VAE, improves its prior, and measures the gap closed.

    Writes to ``out``: ``samples.png``, ``latents.png``, ``report.html`` of :func:`ncprior.improve`,
    ``vae.safetensors``, ``prior/``, the saved prior, and ``report.json``. Each file is written
    atomically, the last one last.

    Arguments:
        data: ``"digits"`` (scikit-learn's, 8×8) or ``"mnist"`` (``$NCPRIOR_DATA`` or the Hub).
        out: The folder to write to; made if missing.
        seed: Seed of all random numbers; the caller's random generators do not change.
        started: Start time of the command, in seconds since the epoch; now if ``None``.
        progress: Whether to show progress bars, on standard error.

    Returns:
        The contents of ``report.json``, ready for JSON: ``gap_closed``, ``gap_closed_low``,
        ``gap_closed_high``, ``d_base``, ``d_post``, ``d_ncp``, ``sampler``, ``log_z`` (nats),
        ``seconds``, a one-line ``summary`` and more.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``data`` is neither of the two, or the seed is out of range.
        NotADirectoryError: If ``out`` is a file.
        ImportError: If the extra ``demo`` is not installed.

    Example:
        >>> run_demo(out="ncprior-demo")["summary"]  # doctest: +SKIP
        'gap in samples closed: 97 % (93–101), 114 s'
    """
    started = time.time() if started is None else started
    require_choice("data", data, _SETTINGS)
    require_instance("out", out, (str, os.PathLike), "Pass the path of a folder.")
    require_counts("(-1e18, 1e18)", seed=seed)
    require_flags(progress=progress)
    if Path(out).exists() and not Path(out).is_dir():  # before minutes of training
        raise NotADirectoryError(f"out must be a folder; {out} is a file. Pass another path.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(
            "The demonstration needs matplotlib: install ncprior's extra 'demo' "
            "(pip install '.[demo]' in the clone)."
        )
    settings = _SETTINGS[data]
    folder = Path(out)
    with seeded(seed), _threads(settings.threads):
        result: dict[str, Any] = {"data": data, "seed": seed}
        result |= _run(*_read(data, settings.held_out, seed), folder, settings, progress)
        result["settings"], result["versions"] = asdict(settings), _versions()
        result["seconds"] = time.time() - started
        result["summary"] += f", {result['seconds']:.0f} s"
    text = json.dumps(result, indent=2, allow_nan=False)
    with write_atomically(folder / "report.json") as file:
        file.write_text(text + "\n", encoding="utf-8")
    return result


def _read(data: str, held_out: int, seed: int) -> tuple[Labelled, Labelled]:
    """Shuffled training and held-out images."""
    if data == "digits":
        return split(digits(), held_out, seed)
    train_set, test_set = (read_images("ylecun/mnist", name) for name in ("train", "test"))
    test_set = test_set.rows(torch.randperm(len(test_set.labels))[:held_out])
    return train_set.rows(torch.randperm(len(train_set.labels))), test_set


def _run(
    data: Labelled, held_out: Labelled, folder: Path, settings: _Settings, progress: bool
) -> dict[str, Any]:
    """Trains, samples and measures; writes figures, VAE and prior, and returns the results."""
    vae, classifier = _train_networks(data, settings, progress)
    source = vae.source()
    prior = improve(source, data.images, budget=settings.budget, progress=progress)
    assert prior.sampler is not None
    features, first = draw_arms(
        prior,
        prior.sampler,
        data.images,
        base=source,
        features=classifier.features,
        num_samples=settings.num_samples,
        generations=settings.generations,
        progress=progress,
    )
    means = in_batches(lambda x: vae.posterior(x).mean, data.images)
    _save_figures(held_out.images, first, discriminant_axes(means, data.labels), folder)
    shape = {"size": settings.size, "latents": settings.latents, "counts": settings.counts}
    save_tensors(folder / "vae.safetensors", vae.state_dict(), shape)
    prior.save_pretrained(folder / "prior")
    prior.report.save_html(folder / "report.html")
    right = in_batches(classifier, held_out.images).argmax(1) == held_out.labels
    return {
        **_gap(in_batches(classifier.features, held_out.images), features),
        "sampler": describe(prior.sampler),
        "strength": prior.strength,
        "log_z": log_z(prior, settings.log_z_draws),
        "features": f"{settings.num_features} features of a classifier of the training images",
        "classifier_accuracy": _mean(right),
        "negative_elbo": _mean(in_batches(vae.negative_elbo, data.images)),
        "negative_elbo_held_out": _mean(in_batches(vae.negative_elbo, held_out.images)),
        "improvement": prior.report.to_dict(),
    }


def _gap(reference: Tensor, features: dict[str, list[Tensor]]) -> dict[str, Any]:
    """The gap closed, as entries of the report."""
    base, ours, posterior = (features[arm] for arm in ARMS)
    gap = gap_closed(reference, base=base, ours=ours, posterior=posterior)
    return {
        "summary": str(gap),
        "gap_closed": gap.gap_closed,
        "gap_closed_low": gap.low,
        "gap_closed_high": gap.high,
        "d_base": gap.d_base,
        "d_post": gap.d_post,
        "d_ncp": gap.d_ours,
        "distances": dict(zip(ARMS, gap.distances.tolist(), strict=True)),
    }


def _train_networks(data: Labelled, settings: _Settings, progress: bool) -> tuple[VAE, Classifier]:
    """Trains VAE and classifier on the training images."""
    vae = VAE(settings.size, latents=settings.latents, counts=settings.counts)
    classifier = Classifier(settings.size, num_features=settings.num_features)

    def negative_elbo(rows: Tensor) -> Tensor:
        return vae.negative_elbo(data.images[rows]).mean()

    def misfit(rows: Tensor) -> Tensor:
        return cross_entropy(classifier(data.images[rows]), data.labels[rows])

    do = partial(train, num_rows=len(data.labels), batch_size=settings.batch_size)
    do(vae, negative_elbo, steps=settings.vae_steps, name="VAE", progress=progress)
    steps = settings.classifier_steps
    do(classifier, misfit, steps=steps, name="classifier", progress=progress)
    return vae, classifier


def _save_figures(data: Tensor, first: dict[str, Generation], axes: Tensor, folder: Path) -> None:
    base, ours, posterior = (first[arm] for arm in ARMS)
    samples = {"data": data, _OWN: base.x, _NEW: ours.x, "posterior samples": posterior.x}
    samples = {label: images[:_SHOWN] for label, images in samples.items()}
    arms = {_OWN: base, _NEW: ours, "aggregate posterior": posterior}
    clouds = {label: arm.latents[0][:_SCATTERED] for label, arm in arms.items()}
    figures = {"samples.png": plot_samples(samples), "latents.png": plot_latents(clouds, axes)}
    for name, figure in figures.items():
        with write_atomically(folder / name) as file:
            figure.savefig(file, dpi=150, format="png")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Context with a number of threads; the number before is restored at the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _mean(values: Tensor) -> float:
    return values.double().mean().item()


def _versions() -> dict[str, str]:
    versions = {"ncprior": __version__, "torch": str(torch.__version__)}
    return versions | {"python": platform.python_version(), "machine": platform.machine()}
