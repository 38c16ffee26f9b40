"""Sections of the page with evidence: latents, training, calibration and the groups."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from ncprior.diagnostics.group_report import GroupReport, Verdict
from ncprior.diagnostics.report import Report
from ncprior.diagnostics.table import verdict_lines
from ncprior.recipe.charts import Frame, Line, line_chart, scatter
from ncprior.recipe.choices import OLD, POSTERIOR, decimals
from ncprior.recipe.markup import Html, element
from ncprior.recipe.page import arm_caption, section, style_of
from ncprior.recipe.plane import separating_plane
from ncprior.training.history import History

_MOST_CHARTS = 6  # of one training; those of further groups are folded

_MANY_GROUPS = 8

_NO_HEAD = 2 * math.log(2)  # nats

_WIDEST = 100_000  # proposals at the right end of a bar

_IDLE = (Verdict.OFF, Verdict.MATCHES, Verdict.CONSTANT)


def latents(clouds: Mapping[str, Tensor]) -> Html:
    """Draws of every arm on the plane in which the old prior differs most from the encodings."""
    if POSTERIOR not in clouds or len(clouds) < 2:
        return Html("")
    encodings = clouds[POSTERIOR].float()
    others = {arm: z.float() for arm, z in clouds.items() if arm != POSTERIOR}
    plane = separating_plane(others.get(OLD, next(iter(others.values()))), encodings)
    centre = encodings.mean(0)
    flat = {arm: (z - centre) @ plane for arm, z in (*others.items(), (POSTERIOR, encodings))}
    limit = 1.05 * max(float(points.abs().quantile(0.995)) for points in flat.values()) or 1.0
    panels = []
    for arm, points in flat.items():
        behind = None if arm == POSTERIOR else flat[POSTERIOR]
        label = f"{len(points)} latents of the {arm} in two directions"
        cloud = scatter(points, behind, style=style_of(arm), limit=limit, label=label)
        panels.append(element("figure", cloud, arm_caption(arm)))
    note = (
        "A point is one draw of all latents, on the two directions in which the old prior differs "
        "most from encodings of held-out data. Grey: these encodings. The colour should cover the grey."
    )
    return section("Latents", note, element("div", *panels, class_="grid clouds"))


def training(histories: Sequence[History]) -> Html:
    """Loss curves of every group of every training and stage."""
    runs = list(_runs(histories))
    if not runs:
        return Html("")
    note = (
        "NCE loss in nats: thin on training data, thick on held-out data, and a dot at the weights that "
        "were kept. The dotted line is the loss without a head, 2 log 2."
    )
    parts = [_curves(name, history) for name, history in runs]
    few = max(len(history.best_step) for _, history in runs) == 1
    return section("Training", note, *parts, split=few)


def calibration(report: Report | None) -> Html:
    """Reliability curves of all groups in one chart, beside an explanation."""
    curves = [] if report is None else [(g, g.reliability) for g in report.groups if g.reliability]
    if not curves:
        return Html("")
    lines = [Line((0.0, 1.0), (0.0, 1.0), "diagonal")]
    marks = []
    for group, curve in curves:
        style = "old" if group.verdict is Verdict.OVER_CONFIDENT else "new"
        lines.append(Line(curve.predicted, curve.observed, style, f"group {group.group}"))
        marks += [(x, y, style) for x, y in zip(curve.predicted, curve.observed, strict=True)]
    chart = line_chart(
        lines,
        label="Reliability: predicted against observed fraction of posterior draws",
        axes=("D = σ(log r)", "posterior draws"),
        frame=Frame((0.0, 1.0), (0.0, 1.0), 280.0),
        marks=marks if len(curves) == 1 else (),
    )
    note = (
        "Draws of posterior and prior, ordered by the probability D that the head gives to the "
        "posterior, against the fraction that came from it. Calibrated heads follow the dotted line; a "
        "flatter curve is over-confident, a steeper one too cautious."
    )
    figure = element("div", element("figure", chart), class_="grid")
    return section("Calibration of log r", note, figure, split=True)


def groups(report: Report | None) -> Html:
    """Table of the groups with the proposals that they need, and advice, unless all heads are off."""
    if report is None or all(group.verdict is Verdict.OFF for group in report.groups):
        return Html("")
    shown = list(report.groups)
    many = len(shown) > _MANY_GROUPS
    if many:
        shown.sort(key=lambda g: (g.verdict in _IDLE, -g.proposals_needed))
    low, high = report.num_proposals
    titles = ["proposals needed", f"ESS of {low:,}", f"ESS of {high:,}", "JSD, nats", "KL, nats"]
    titles += ["slope", "missing JSD", "train gap"]
    head = [element("th", title, scope="col") for title in ("group", "verdict")]
    head += [element("th", title, class_="number", scope="col") for title in titles]
    table = element(
        "table",
        element("thead", element("tr", *head)),
        element("tbody", *map(_group, shown)),
    )
    note = (
        "Proposals that SIR needs for draws close to the posterior, and the effective sample size "
        "(ESS) of two numbers of proposals."
    )
    note += " The groups that need most are first." if many else ""
    label = "Table of the groups"
    advice = (element("li", line) for line in verdict_lines(report.groups))
    return section(
        "Proposals and groups",
        note,
        element("div", table, class_="scroll", tabindex="0", role="region", aria_label=label),
        element("ul", *advice, class_="plain"),
    )


def _runs(histories: Sequence[History]) -> Iterator[tuple[str, History]]:
    """Every training and stage that has rows, with its name."""
    for number, history in enumerate(histories, start=1):
        run = f"Training {number}" if len(histories) > 1 else ""
        for stage, part in enumerate((history, *history.stages), start=1):
            name = f"stage {stage}" if history.stages else ""
            if part.rows:
                yield ", ".join(filter(None, (run, name))).capitalize(), part


def _curves(name: str, history: History) -> Html:
    """One chart per group, those with the widest gap first and those of many groups folded."""
    losses = history.best_loss or history.rows[-1].loss
    order = list(range(len(losses)))
    if len(order) > _MOST_CHARTS:
        order.sort(key=lambda k: losses[k])
    charts = [_curve(history, k) for k in order]
    first, rest = charts[:_MOST_CHARTS], charts[_MOST_CHARTS:]
    folded = element(
        "details",
        element("summary", f"{len(rest)} more groups, with smaller gaps"),
        element("div", *rest, class_="grid"),
    )
    return element(
        "div",
        element("h3", name) if name else "",
        element("p", f"Ended because: {history.stopped}.", class_="note"),
        element("div", *first, class_="grid"),
        folded if rest else "",
    )


def _curve(history: History, k: int) -> Html:
    steps = [row.step for row in history.rows]
    lines = [Line(steps, [row.loss[k] for row in history.rows], "thin new", "training")]
    marks: list[tuple[float, float, str]] = []
    if history.rows[-1].held_out is not None:
        held = [math.nan if row.held_out is None else row.held_out[k] for row in history.rows]
        lines.append(Line(steps, held, "new", "held out"))
    if history.best_loss is not None and history.best_step[k] > 0:
        marks.append((history.best_step[k], history.best_loss[k], "new"))
    title = f"group {k}" if len(history.best_step) > 1 else "all latents"
    chart = line_chart(
        lines,
        label=f"NCE loss by step, {title}",
        axes=("step", "NCE loss"),
        levels=[(_NO_HEAD, "no head")],
        marks=marks,
    )
    text = title
    if history.best_loss is not None:
        text += (
            f": {decimals(history.best_loss[k], 3)} nats held out at step {history.best_step[k]:,}"
        )
    return element("figure", chart, element("figcaption", text))


def _group(group: GroupReport) -> Html:
    style = "good" if group.verdict is Verdict.GOOD else "warn"
    style = "idle" if group.verdict in _IDLE else style
    first, second = tuple(group.ess.values()) or (math.nan, math.nan)
    numbers = (
        decimals(first, 0),
        decimals(second, 0),
        decimals(group.jsd, 3),
        decimals(group.kl),
        _with_error(group.slope, group.slope_error),
        decimals(group.missing, 3),
        decimals(group.train_gap, 3),
    )
    return element(
        "tr",
        element("td", str(group.group)),
        element("td", str(group.verdict), class_=style),
        element("td", *_needed(group), class_="number"),
        *(element("td", number.replace("-", "−"), class_="number") for number in numbers),
    )


def _needed(group: GroupReport) -> tuple[str, ...]:
    if group.verdict in _IDLE:
        return ("−",)
    count = group.proposals_needed
    share = 100 * min(1.0, math.log(max(count, 1)) / math.log(_WIDEST))
    bar = element("span", class_="amount", style=f"--share: {share:.0f}%", aria_hidden="true")
    text = f"{count:,}" if count < 1_000_000 else f"{count:.0e}".replace("e+0", "e")
    return ("> " if group.needs_more else "") + text, bar


def _with_error(value: float, error: float) -> str:
    return decimals(value) + (f" ± {decimals(error)}" if math.isfinite(error) else "")
