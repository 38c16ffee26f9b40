"""Reports made by hand, with all that a page can show, for the tests of the page."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ncprior.diagnostics import GroupReport, Reliability, Report, Verdict
from ncprior.recipe import Candidate, Choice, Improvement, Score
from ncprior.training.history import History, Row

ARMS = ("old prior", "fitted base", "new prior", "posterior")


def group(k: int, proposals: int, verdict: Verdict = Verdict.GOOD) -> GroupReport:
    """A group with plausible numbers."""
    curve = Reliability((0.1, 0.5, 0.9), (0.12, 0.5, 0.88), (100, 100, 100))
    return GroupReport(
        k, verdict, 1.2, 0.01, 0.08, 0.005, 0.4, 0.02, slope=0.97, slope_error=0.03,
        ess={50: 21.0, 500: 180.0}, proposals_needed=proposals, train_gap=0.01, reliability=curve,
    )  # fmt: skip


def history(num_groups: int, num_rows: int = 40) -> History:
    """A training whose losses fall, faster in later groups."""
    rows = []
    for i in range(num_rows):
        fall = [(k + 1) / num_groups * (1 - math.exp(-i / 8)) / 2 for k in range(num_groups)]
        loss = [2 * math.log(2) - it + 0.01 * math.sin(i) for it in fall]
        rows.append(Row(50 * (i + 1), loss, [it + 0.02 for it in loss], 1e-3, 0.5 * i))
    held_out = rows[-1].held_out
    assert held_out is not None
    steps = [rows[-1].step] * num_groups
    return History(rows, steps, held_out, [0.01] * num_groups, "all 2,000 steps taken")


def choices() -> tuple[Choice, ...]:
    """Some choices: with candidates and without, timed and not."""
    bases = (
        Candidate("N(0, I)", -14.9, -14.93, -14.87, 0.2),
        Candidate("mixture of 10", -12.8, -12.84, -12.76, 4.0),
        Candidate("mixture of 100", -12.31, -12.35, -12.27, 17.0),
    )
    return (
        Choice(
            "base", "mixture of 100", "It is best.", bases, "held-out log p", "nats", True, 21.0
        ),
        Choice(
            "heads", "one per group", "They lower the held-out loss by 0.4 nats.", seconds=95.0
        ),
        Choice("sampler", "sir(num_proposals=50)"),
    )


def images(channels: int = 1, side: int = 8) -> dict[str, Tensor]:
    """Images of every arm: gradients with noise."""
    ramp = torch.linspace(0, 0.8, side).expand(64, channels, side, side)
    arms = ("held-out data", *ARMS)
    return {arm: (ramp + 0.2 * torch.rand(ramp.shape)).clamp(0, 1) for arm in arms}


def improvement(num_groups: int = 1, samples: dict[str, Tensor] | None = None) -> Improvement:
    """A report with everything."""
    verdicts = (Verdict.GOOD, Verdict.TOO_FEW, Verdict.MATCHES, Verdict.OVER_CONFIDENT)
    found = tuple(group(k, 3 * 2**k, verdicts[k % 4]) for k in range(num_groups))
    ring = torch.randn(400, 5)
    ring[:, :2] *= 2 / ring[:, :2].norm(dim=1, keepdim=True)
    near = ring + 0.2 * torch.randn(400, 5)
    clouds = (torch.randn(400, 5), near, near + 0.05, ring)
    first = history(num_groups)
    return Improvement(
        verdict="Prior hole closed: 93 %. A classifier measured 0.41 nats before, and 0.03 nats now.",
        scores=dict(
            zip(ARMS, (Score(0.41, 0.39, 0.43), Score(0.1), Score(0.03, 0.01, 0.05)), strict=False)
        ),
        choices=choices(),
        diagnosis=Report(found, 1000, 8192, (50, 500)),
        histories=(first._replace(stages=(first._replace(kept=(True,) * num_groups),)),),
        sampler="sir(num_proposals=50)",
        budget=50,
        seed=0,
        seconds=130.0,
        details={"VAE": "SingleGroup", "Versions": "ncprior 1.0, torch 2.10"},
        latents=dict(zip(ARMS, clouds, strict=True)),
        samples=images() if samples is None else samples,
    )
