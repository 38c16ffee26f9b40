"""Charts as SVG that takes its colours from the page and is scaled with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ncprior.recipe.markup import Html, element, join

_WIDTH, _HEIGHT = 320.0, 220.0

_MARGINS = (54.0, 8.0, 36.0, 12.0)  # left, top, bottom, right

_NARROW = 0.02  # of a value: the least space above and below, so that rulers have few digits

_MOST_POINTS = 200  # of a line

_LAYERS = 5  # of a cloud of points: where they lie on each other it becomes darker


class Line(NamedTuple):
    """Line of a chart.

    Attributes:
        x: Places on the horizontal axis.
        y: Values; the line is broken where they are not finite.
        style: CSS class of the line, which sets its colour.
        label: Description, shown under the pointer.
    """

    x: Sequence[float]
    y: Sequence[float]
    style: str
    label: str = ""


class Frame(NamedTuple):
    """Rectangle of a chart and its scales.

    Attributes:
        x: Least and largest value of the horizontal axis.
        y: Least and largest value of the vertical axis.
        height: Height of the picture in its own pixels; the width is 320.
        margins: Pixels at the left, at the top, at the bottom and at the right.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    height: float = _HEIGHT
    margins: tuple[float, float, float, float] = _MARGINS

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Pixels of a point."""
        left, top, bottom, right = self.margins
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return (
            left + across * (_WIDTH - left - right),
            self.height - bottom - up * (self.height - top - bottom),
        )


def line_chart(
    lines: Sequence[Line],
    *,
    label: str,
    axes: tuple[str, str],
    frame: Frame | None = None,
    levels: Sequence[tuple[float, str]] = (),
    marks: Sequence[tuple[float, float, str]] = (),
) -> Html:
    """Line chart.

    Arguments:
        lines: The lines.
        label: Description of the chart for those who cannot see it.
        axes: Names of the horizontal and of the vertical axis.
        frame: The scales; by default those that hold all lines.
        levels: Heights with a dotted line and their names.
        marks: Points x, y and CSS classes.
    """
    frame = frame or _around(lines, [level for level, _ in levels])
    content = [_axes(frame, *axes)]
    for level, name in levels:
        (left, y), (right, _) = frame.place(frame.x[0], level), frame.place(frame.x[1], level)
        content.append(element("line", x1=left, x2=right, y1=y, y2=y, class_="level"))
        content.append(element("text", name, x=right, y=y - 4, class_="tick end"))
    content += [_path(frame, line) for line in lines]
    for x, y, style in marks:
        cx, cy = frame.place(x, y)
        content.append(element("circle", cx=cx, cy=cy, r=3.5, class_=f"mark {style}"))
    return _svg(label, frame.height, content)


def scatter(
    points: Tensor, behind: Tensor | None, *, style: str, limit: float, label: str
) -> Html:
    """Cloud of points in a square without numbers, on top of another, grey cloud.

    Arguments:
        points: Points with shape ``(N, 2)``.
        behind: Points with shape ``(N, 2)``, or ``None``.
        style: CSS class of the points.
        limit: Both axes reach from -limit to limit.
        label: Description of the chart for those who cannot see it.
    """
    frame = Frame((-limit, limit), (-limit, limit), _WIDTH, (0.0, 0.0, 0.0, 0.0))
    (left, top), (right, bottom) = frame.place(-limit, limit), frame.place(limit, -limit)
    middle = frame.place(0.0, 0.0)
    cross = [
        element("rect", x=left, y=top, width=right - left, height=bottom - top, class_="box"),
        element("line", x1=left, x2=right, y1=middle[1], y2=middle[1], class_="ruler"),
        element("line", x1=middle[0], x2=middle[0], y1=top, y2=bottom, class_="ruler"),
    ]
    clouds = [] if behind is None else [_cloud(frame, behind, "behind")]
    return _svg(label, frame.height, [*cross, *clouds, _cloud(frame, points, style)])


def interval_bar(value: float, low: float, high: float, limits: tuple[float, float]) -> Html:
    """Point with its interval on a scale as wide as the page gives it, in percent of the width."""
    span = (limits[1] - limits[0]) or 1.0
    at = [100 * min(max((it - limits[0]) / span, 0), 1) for it in (value, low, high)]
    parts = [element("line", x1="0%", x2="100%", y1=9, y2=9, class_="rail")]
    if math.isfinite(low) and math.isfinite(high):
        parts.append(element("line", x1=f"{at[1]:.2f}%", x2=f"{at[2]:.2f}%", y1=9, y2=9))
    if math.isfinite(value):
        parts.append(element("circle", cx=f"{at[0]:.2f}%", cy=9, r=5))
    return element("svg", *parts, class_="interval", height="18", aria_hidden="true")


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from low to high, about ``count`` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(it for it in (1, 2, 2.5, 5, 10) if it * power >= 0.999 * rough)
    first = math.ceil(low / step - 1e-9)
    return [step * i for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _svg(label: str, height: float, content: Sequence[str]) -> Html:
    box = f"0 0 {_WIDTH:g} {height:g}"
    return element("svg", *content, viewBox=box, role="img", aria_label=label, class_="chart")


def _axes(frame: Frame, name_x: str, name_y: str) -> Html:
    """Rulers with their numbers, and the names of the axes."""
    parts = []
    for tick in ticks(*frame.x):
        x, bottom = frame.place(tick, frame.y[0])
        parts.append(element("text", _tick(tick), x=x, y=bottom + 14, class_="tick middle"))
    for tick in ticks(*frame.y):
        (left, y), (right, _) = frame.place(frame.x[0], tick), frame.place(frame.x[1], tick)
        parts.append(element("line", x1=left, x2=right, y1=y, y2=y, class_="ruler"))
        parts.append(element("text", _tick(tick), x=left - 5, y=y + 3.5, class_="tick end"))
    middle, bottom = frame.place(sum(frame.x) / 2, frame.y[0])
    _, upright = frame.place(frame.x[0], sum(frame.y) / 2)
    parts.append(element("text", name_x, x=middle, y=bottom + 30, class_="name middle"))
    turn = f"translate(12 {upright:.1f}) rotate(-90)"
    parts.append(element("text", name_y, transform=turn, class_="name middle"))
    return join(*parts)


def _tick(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.6g}".replace("-", "−") if abs(value) > 1e-9 else "0"


def _path(frame: Frame, line: Line) -> Html:
    """Line through at most some hundred points, broken where a value is not finite."""
    stride = -(-len(line.x) // _MOST_POINTS)
    steps, before = [], False
    points = list(zip(line.x, line.y, strict=True))
    for x, y in [*points[:-1:stride], *points[-1:]]:
        if math.isfinite(y):
            high = max(frame.y[0], min(frame.y[1], y))
            steps.append("{}{:.1f} {:.1f}".format("L" if before else "M", *frame.place(x, high)))
        before = math.isfinite(y)
    return element("path", d="".join(steps), class_=f"line {line.style}", aria_label=line.label)


def _cloud(frame: Frame, points: Tensor, style: str) -> Html:
    """Points as ends of lines without length; those outside of the frame are left out."""
    inside = points[(points.abs() <= frame.x[1]).all(1)].cpu().double().tolist()
    layers = [inside[i::_LAYERS] for i in range(_LAYERS)]
    return join(
        *(
            element(
                "path", d="".join(_dot(frame, *point) for point in layer), class_=f"dots {style}"
            )
            for layer in layers
        )
    )


def _dot(frame: Frame, x: float, y: float) -> str:
    return "M{:.1f} {:.1f}h0".format(*frame.place(x, y))


def _around(lines: Sequence[Line], levels: Sequence[float]) -> Frame:
    """Frame that holds all finite values, but only most of a line that starts far off."""
    xs = [x for line in lines for x in line.x] or [0.0, 1.0]
    ys = torch.tensor([y for line in lines for y in line.y if math.isfinite(y)] or [0.0])
    low, high = (float(ys.cpu().double().quantile(part)) for part in (0.0, 0.99))
    low, high = min([low, *levels]), max([high, *levels])
    spare = max(0.08 * (high - low), _NARROW * max(abs(low), abs(high))) or 0.5
    left, right = min(xs), max(xs)
    return Frame((left, right if right > left else left + 1), (low - spare, high + spare))
