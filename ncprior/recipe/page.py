"""Page of a report: the document, its summary, its choices and its details as HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ncprior.recipe.charts import interval_bar
from ncprior.recipe.choices import (
    BASE,
    DATA,
    GROUPS,
    NEW,
    OLD,
    POSTERIOR,
    Choice,
    Score,
    decimals,
    digits_of,
    duration,
    scored,
)
from ncprior.recipe.markup import Html, element, join
from ncprior.recipe.style import STYLE

# The CSS class of each arm, which sets its colour.
_STYLES = {
    DATA: "data",
    OLD: "old",
    BASE: "base",
    GROUPS: "base",
    NEW: "new",
    POSTERIOR: "posterior",
}

# By which a report is told from other pages, within so many bytes.
_GENERATOR = element("meta", name="generator", content="ncprior")
_HEAD = 1000

# Nothing is fetched and no script runs, whatever a text in the page says.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def style_of(arm: str) -> str:
    """CSS class of an arm."""
    return _STYLES.get(arm, "data")


def document(title: str, sections: Sequence[str]) -> str:
    """Whole HTML page: nothing is fetched, and no script runs."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        _GENERATOR,
        element("title", title),
        element("style", Html(STYLE)),
    )
    body = element("body", element("main", *sections))
    return "<!DOCTYPE html>\n" + element("html", head, body, lang="en") + "\n"


def require_replaceable(path: Path) -> None:
    """Validates that a report may be written to a path: nothing is there, or an older report.

    Raises:
        FileExistsError: If another file is there.
    """
    if path.exists() and not (path.is_file() and _GENERATOR.encode() in path.read_bytes()[:_HEAD]):
        raise FileExistsError(
            f"{path} is no report of ncprior and would be replaced. Move it, or pass another --out."
        )


def section(title: str, note: str, *content: str, split: bool = False) -> Html:
    """Section with its heading and a note; with ``split`` beside the content where there is room."""
    head = (element("h2", title), element("p", note, class_="lead"))
    if split:
        return element("section", element("div", *head), element("div", *content), class_="split")
    return element("section", *head, *content)


def facts(values: Mapping[str, str]) -> Html:
    """Short values by name; empty values are left out."""
    rows = (
        element("div", element("dt", name), element("dd", value))
        for name, value in values.items()
        if value
    )
    return element("dl", *rows, class_="facts")


def summary(verdict: str, scores: Mapping[str, Score], values: Mapping[str, str]) -> Html:
    """Verdict, whose first sentence is the heading; the remaining gap of every arm; and a few facts."""
    first, _, rest = verdict.partition(". ")
    return element(
        "header",
        element("p", "ncprior · report on a prior", class_="brand"),
        element("h1", first + ("." if rest else "")),
        element("p", rest, class_="verdict") if rest else "",
        _scores(scores) if scores else "",
        facts(values),
    )


def choices(made: Sequence[Choice]) -> Html:
    """All choices in order, each with its evidence, and the time that they took."""
    if not made:
        return Html("")
    total = sum(choice.seconds for choice in made if math.isfinite(choice.seconds))
    intro = "Every choice was made by a measurement on held-out data."
    if total > 0:
        intro += f" Together they took {duration(total)}; the bars are as long as their times."
    return section(
        "Choices",
        intro,
        _timeline(made, total) if total > 0 else "",
        element("ol", *map(_choice, made), class_="choices"),
    )


def details(values: Mapping[str, str]) -> Html:
    """How to draw from the prior, and the settings and versions behind the report."""
    code = "x = prior.sample(64).x"
    note = "Draw x from the new prior with its sampler; the VAE itself was not changed."
    return section("Details", note, element("pre", element("code", code)), facts(values))


def _scores(scores: Mapping[str, Score]) -> Html:
    """Divergences of all arms on a scale from 0."""
    most = max(max(filter(math.isfinite, score), default=0.0) for score in scores.values()) or 1.0
    digits = 3 if most < 1 else 2
    rows = [
        _interval(arm, score, (0.0, most), _nats(score, digits), "", f"arm {style_of(arm)}")
        for arm, score in scores.items()
    ]
    ends = element(
        "li",
        element("span", "0: indistinguishable"),
        element("span", f"{decimals(most, digits)} nats"),
        class_="ends",
    )
    title = (
        "Jensen-Shannon divergence that a classifier finds between draws and encodings of held-out "
        "data, in nats, with 95 % intervals"
    )
    return element(
        "div", element("p", title, class_="small"), element("ul", *rows, ends, class_="intervals")
    )


def _nats(score: Score, digits: int) -> str:
    known = math.isfinite(score.low) and math.isfinite(score.high)
    interval = f" ({decimals(score.low, digits)}–{decimals(score.high, digits)})" if known else ""
    return decimals(score.value, digits) + interval


def _interval(
    name: str, score: Score, limits: tuple[float, float], text: str, time: str, style: str | None
) -> Html:
    """Row with a name, a point with its interval, the score as text, and a time."""
    return element(
        "li",
        element("span", element("b", name)),
        element("span", text, class_="value"),
        element("span", time, class_="took"),
        interval_bar(*score, limits),
        class_=style,
    )


def _timeline(made: Sequence[Choice], total: float) -> Html:
    timed = [choice for choice in made if choice.seconds > 0]
    bars = (
        element(
            "span",
            title=f"{choice.part}: {duration(choice.seconds)}",
            style=f"flex: {choice.seconds / total:.4f}",
        )
        for choice in timed
    )
    label = "; ".join(f"{choice.part} {duration(choice.seconds)}" for choice in timed)
    return element("div", *bars, class_="time", role="img", aria_label=f"Time: {label}")


def _choice(choice: Choice) -> Html:
    timed = math.isfinite(choice.seconds)
    time = element("time", duration(choice.seconds)) if timed else ""
    return element(
        "li",
        element("div", choice.part, time, class_="part"),
        element(
            "div",
            element("h3", choice.chosen),
            element("p", choice.reason) if choice.reason else "",
            _candidates(choice) if choice.candidates else "",
        ),
    )


def _candidates(choice: Choice) -> Html:
    ends = [end for it in choice.candidates for end in it[1:4] if math.isfinite(end)] or [0.0]
    spare = 0.05 * (max(ends) - min(ends))
    limits = (min(ends) - spare, max(ends) + spare)
    better = "higher is better" if choice.higher_is_better else "lower is better"
    unit = f", {choice.unit}" if choice.unit else ""
    rows = []
    for it in choice.candidates:
        text = scored(it, digits_of(choice.candidates)).replace("-", "−")
        time = duration(it.seconds) if math.isfinite(it.seconds) else ""
        style = "new" if it.name == choice.chosen else None
        rows.append(_interval(it.name, Score(*it[1:4]), limits, text, time, style))
    return join(
        element("p", f"{choice.criterion or 'score'}{unit} ({better})", class_="small"),
        element("ul", *rows, class_="intervals"),
    )


def arm_caption(arm: str, *text: str) -> Html:
    """Caption of a picture of an arm, with its colour."""
    name = element("span", element("b", arm), class_=f"arm {style_of(arm)}")
    return element("figcaption", name, join(*text))
