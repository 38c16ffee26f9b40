"""Section of the page with samples before and after: images, figures of the user, or histograms."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ncprior.recipe.charts import Line, line_chart
from ncprior.recipe.choices import DATA, NEW, OLD
from ncprior.recipe.images import as_images, data_uri, grid
from ncprior.recipe.markup import Html, element
from ncprior.recipe.page import arm_caption, section, style_of
from ncprior.utils.require import described

_MOST_COLUMNS = 30  # of a table whose columns are shown

_BINS = 24

_TITLE = "Samples, before and after"


def pictures(
    samples: Mapping[str, Tensor],
    show: Callable[[Tensor], Any] | None,
    columns: Sequence[str] = (),
) -> Html:
    """Samples of every arm side by side; nothing if there is no way to draw them.

    Arguments:
        samples: x by arm, with shape ``(N, ...)``.
        show: Function that draws x as a matplotlib figure, or ``None``.
        columns: Names of the columns of x; numbers stand for them if their count differs.
    """
    if not samples:
        return Html("")
    if show is not None:
        panels = [_panel(arm, _shown(show, x)) for arm, x in samples.items()]
        note = "Samples were not picked."
        return section(_TITLE, note, element("div", *panels, class_="grid pictures shown"))
    alike = _of_one_shape(samples)
    if alike is None:
        return Html("")
    if (images := as_images(alike)) is not None:
        grids = {arm: grid(x) for arm, x in images.items()}
        panels = [_panel(arm, uri, count) for arm, (uri, count) in grids.items()]
        note = "Samples were not picked. The last grid holds decoded encodings of the first one."
        return section(
            _TITLE,
            note,
            element("div", *panels, class_="grid pictures"),
        )
    return _columns(alike, columns)


def _of_one_shape(samples: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
    """Samples whose rows have one shape, that of the images where others are flat; else ``None``."""
    shapes = {x.shape[1:] for x in samples.values()}
    if len({shape.numel() for shape in shapes}) > 1:
        return None
    shape = max(shapes, key=len, default=torch.Size())
    return {arm: x.reshape(len(x), *shape) for arm, x in samples.items()}


def is_narrow(x: Tensor) -> bool:
    """Whether x is a table with few columns, which histograms can show."""
    return x.ndim == 2 and 0 < x.shape[1] <= _MOST_COLUMNS


def _panel(arm: str, uri: str, count: int = 0) -> Html:
    what = f"{count} images: {arm}" if count else arm
    return element("figure", element("img", src=uri, alt=what), arm_caption(arm))


def _shown(show: Callable[[Tensor], Any], x: Tensor) -> str:
    figure = show(x)
    if not hasattr(figure, "savefig"):
        raise TypeError(
            f"show(x) must return a matplotlib figure; got {described(figure)}. Return "
            f"matplotlib.figure.Figure or the figure of plt.subplots()."
        )
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
    return data_uri(file.getvalue())


def _columns(samples: Mapping[str, Tensor], names: Sequence[str]) -> Html:
    """One histogram per column of a narrow table."""
    shown = {arm: samples[arm] for arm in (DATA, OLD, NEW) if arm in samples}
    if not shown or not all(map(is_narrow, shown.values())):
        return Html("")
    count = next(iter(shown.values())).shape[1]
    if len(names) != count:
        names = [f"column {i + 1}" for i in range(count)]
    columns = ({arm: x[:, i] for arm, x in shown.items()} for i in range(count))
    charts = [_histogram(name, column) for name, column in zip(names, columns, strict=True)]
    legend = [element("span", element("b", arm), class_=f"arm {style_of(arm)}") for arm in shown]
    note = "Fraction of rows per bin, one chart per column of x."
    return section(
        "Columns, before and after",
        note,
        element("p", *legend, class_="legend"),
        element("div", *charts, class_="grid"),
    )


def _histogram(name: str, column: Mapping[str, Tensor]) -> Html:
    finite = {arm: x.cpu().double()[x.isfinite()] for arm, x in column.items()}
    whole = torch.cat(list(finite.values()))
    if not len(whole):
        return Html("")
    low, high = whole.quantile(0.005).item(), whole.quantile(0.995).item()
    high = high if high > low else low + max(1.0, 1e-6 * abs(low))
    edges = torch.linspace(low, high, _BINS + 1, dtype=torch.float64)
    lines = []
    for arm, x in finite.items():
        heights = torch.histogram(x.clamp(low, high), edges).hist / max(1, len(x))
        ys = [0.0, *heights.repeat_interleave(2).tolist(), 0.0]
        filled = " area" if arm == DATA else ""
        lines.append(Line(edges.repeat_interleave(2).tolist(), ys, style_of(arm) + filled, arm))
    label = f"Histograms of {name}: {', '.join(column)}"
    return element("figure", line_chart(lines, label=label, axes=(name, "fraction of rows")))
