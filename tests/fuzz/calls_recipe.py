"""Calls of the recipe and of its report."""

from __future__ import annotations

from typing import Any

from fuzz.calls import call
from fuzz.kinds import (
    DATA,
    FLAG,
    OPTIONAL_DATA,
    OPTIONAL_PATH,
    PATH,
    PRIOR,
    SAMPLER,
    SEED,
    SOURCE,
    count,
    function,
    instance,
    number,
    only_invalid,
)
from fuzz.values import LAYERS
from fuzz.world import World
from helpers.reports import improvement

from ncprior import improve, recipe
from ncprior.diagnostics import Report

Built = tuple[Any, dict[str, Any]]
# A function that draws: those of the pool return no figure.
SHOW = function(*(value._replace(valid=False) for value in LAYERS[:2]), none=True)


@call(
    "ncprior.recipe.report_on",
    options={"slow": True, "limit": 20.0},
    prior=PRIOR,
    held_out=DATA,
    train=OPTIONAL_DATA,
    sampler=SAMPLER,
    diagnosis=instance(Report, none=True),
    budget=count(2, huge=False),
    num_rows=only_invalid(count(2)),
    seed=SEED,
)
def _(w: World) -> Built:
    """With so few rows that no classifier is trained, and a diagnosis that is there already."""
    return recipe.report_on, {
        "prior": w.prior,
        "held_out": w.x[:9],
        "sampler": w.sampler,
        "diagnosis": improvement().diagnosis,
        "budget": 10,
    }


@call(
    "ncprior.improve",
    options={"slow": True, "limit": 90.0},  # without max_seconds until heads are trained
    source=SOURCE,
    data=DATA,
    held_out=OPTIONAL_DATA,
    budget=count(huge=False),
    max_seconds=number(0, open_low=True, none=True),
    seed=only_invalid(SEED).without("None"),
    checkpoint=OPTIONAL_PATH,
    progress=only_invalid(FLAG),
)
def _(w: World) -> Built:
    return improve, {
        "source": w.source,
        "data": w.x.repeat(4, 1),
        "budget": 3,
        "max_seconds": 0.5,
        "seed": 0,
        "progress": False,
    }


for _name in ("to_dict", "to_json"):

    @call(f"ncprior.recipe.Improvement.{_name}")
    def _(w: World, name: str = _name) -> Built:
        return getattr(improvement(), name), {}


@call("ncprior.recipe.Improvement.to_html", show=SHOW)
def _(w: World) -> Built:
    return improvement().to_html, {"show": None}


@call("ncprior.recipe.Improvement.save_html", path=PATH, show=SHOW)
def _(w: World) -> Built:
    return improvement().save_html, {"path": w.folder / "report.html", "show": None}
