"""Report on an improved prior: its verdict, evidence and choices, as lines of text and as a page."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ncprior.diagnostics.report import Report, plain
from ncprior.recipe.choices import Choice, Score, duration
from ncprior.recipe.evidence import calibration, groups, latents, training
from ncprior.recipe.page import choices, details, document, summary
from ncprior.recipe.pictures import pictures
from ncprior.saving.tensors import write_atomically
from ncprior.training.history import History
from ncprior.utils.require import require_callable


class Improvement(NamedTuple):
    """Report on a prior: what was chosen, and how close its draws come to the encodings.

    ``print(report)`` shows one line per choice and the verdict; :meth:`save_html` writes a page.

    Attributes:
        verdict: The result in one or two sentences.
        scores: Jensen-Shannon divergence between held-out encodings and draws of each prior, in nats,
            that a classifier finds, by the name of the prior; 0 is perfect.
        choices: The choices in order, each with its candidates.
        diagnosis: Report of :func:`ncprior.diagnostics.diagnose` on held-out data, or ``None``.
        histories: Histories of the trainings.
        sampler: Description of the sampler.
        budget: Evaluations of each head per sample that the sampler may use, or ``None``.
        seed: Seed of the measurements, or ``None``.
        seconds: Time of all choices and measurements, in seconds, or NaN.
        details: Further facts by name, such as versions.
        latents: Draws of all latents, ``(N, D)`` on the CPU, by the name of the distribution.
        samples: Some x, ``(n, ...)`` on the CPU, by the name of the distribution.
        columns: Names of the columns of x, if the data were a table with names.

    Example:
        >>> choice = Choice("base", "mixture of 10", "It has the highest held-out log p.")
        >>> print(Improvement("The new prior is closer.", choices=(choice,)))
        base: mixture of 10 – It has the highest held-out log p
        The new prior is closer.
    """

    verdict: str
    scores: Mapping[str, Score] = {}
    choices: tuple[Choice, ...] = ()
    diagnosis: Report | None = None
    histories: tuple[History, ...] = ()
    sampler: str = ""
    budget: int | None = None
    seed: int | None = None
    seconds: float = math.nan
    details: Mapping[str, str] = {}
    latents: Mapping[str, Tensor] = {}
    samples: Mapping[str, Tensor] = {}
    columns: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([*map(str, self.choices), self.verdict])

    def __repr__(self) -> str:  # without thousands of numbers
        return f"Improvement({self.verdict!r}, {len(self.choices)} choices)"

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as values ready for JSON, without latents and samples.

        Non-finite numbers become ``None``.

        Example:
            >>> Improvement("Better.").to_dict()["verdict"]
            'Better.'
        """
        values: dict[str, Any] = plain(self._replace(diagnosis=None, latents={}, samples={}))
        del values["latents"], values["samples"]
        values["diagnosis"] = None if self.diagnosis is None else self.diagnosis.to_dict()
        return values

    def to_json(self) -> str:
        """Returns :meth:`to_dict` as JSON.

        Example:
            >>> '"seconds": null' in Improvement("Better.").to_json()
            True
        """
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_html(self, *, show: Callable[[Tensor], Any] | None = None) -> str:
        """Returns the page of :meth:`save_html`, whose arguments and errors it has.

        Example:
            >>> page = Improvement("Better.").to_html()
            >>> page.startswith("<!DOCTYPE html>"), "http" in page.replace("http-equiv", "")
            (True, False)
        """
        if show is not None:
            require_callable("show", show, "Pass show(x), which returns a matplotlib figure.")
        sections = [
            summary(self.verdict, self.scores, self._facts()),
            pictures(self.samples, show, self.columns),
            latents(self.latents),
            groups(self.diagnosis),
            calibration(self.diagnosis),
            training(self.histories),
            choices(self.choices),
            details(self.details),
        ]
        return document("Report on a prior", sections)

    def save_html(
        self, path: str | os.PathLike[str], *, show: Callable[[Tensor], Any] | None = None
    ) -> None:
        """Writes the report as one HTML page that needs no other file, no script and no network.

        The page shows the verdict, samples before and after, latents, the choices with their
        evidence, the groups, calibration and loss curves. Images ``(N, 1, H, W)`` or
        ``(N, 3, H, W)`` are drawn as grids, and columns of narrow tables as histograms.

        Arguments:
            path: The file to write, atomically; its folder is made if missing.
            show: ``show(x)`` draws a batch of x as a matplotlib figure, for x of any other kind,
                such as audio or molecules.

        Raises:
            TypeError: If the path is no path, or ``show`` is no function or returns no figure.
            OSError: If the file cannot be written.

        Example:
            >>> import os, tempfile
            >>> path = os.path.join(tempfile.mkdtemp(), "report.html")
            >>> Improvement("Better.").save_html(path)
            >>> os.path.getsize(path) > 1000
            True
        """
        text = self.to_html(show=show)
        with write_atomically(path) as file:
            file.write_text(text, encoding="utf-8")

    def _facts(self) -> dict[str, str]:
        budget = (
            "" if self.budget is None else f"{self.budget:,} evaluations of each head per sample"
        )
        return {
            "Sampler": self.sampler,
            "Budget": budget,
            "Time": duration(self.seconds) if math.isfinite(self.seconds) else "",
            "Seed": "" if self.seed is None else str(self.seed),
        }
