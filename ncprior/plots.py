"""The demonstration's pictures: rows of samples, and clouds of latents. Needs the extra ``plot``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_latents", "plot_samples", "principal_axes"]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLORS = ("#E69F00", "#0072B2", "#009E73")


def plot_samples(rows: Mapping[str, Tensor]) -> Figure:
    """Draws labelled rows of grey images.

    Arguments:
        rows: Images in [0, 1], with shape ``(N, 1, H, W)``, by the label of their row.

    Returns:
        A figure of no window, to save.

    Raises:
        ImportError: If matplotlib is not installed.

    Example:
        >>> figure = plot_samples({"data": torch.rand(5, 1, 8, 8), "prior": torch.rand(5, 1, 8, 8)})
        >>> len(figure.axes)
        2
    """
    count = max(len(images) for images in rows.values())
    figure = _figure((0.62 * count + 1.6, 0.72 * len(rows) + 0.1))
    strips = figure.subplots(len(rows), squeeze=False).flat
    for axes, (label, images) in zip(strips, rows.items(), strict=True):
        gap = max(1, images.shape[-1] // 8)
        tiles = torch.nn.functional.pad(images[:, 0], (0, gap)).permute(1, 0, 2).flatten(1)
        axes.imshow(tiles[:, :-gap], cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=12, labelpad=10)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return figure


def plot_latents(clouds: Mapping[str, Tensor], axes: Tensor) -> Figure:
    """Draws clouds of latents side by side, projected to one plane.

    Arguments:
        clouds: Latents, with shape ``(N, D)``, by label, three at most.
        axes: Two directions, with shape ``(D, 2)``, such as :func:`principal_axes`.

    Returns:
        A figure of no window, to save.

    Raises:
        ImportError: If matplotlib is not installed.

    Example:
        >>> z = torch.randn(100, 6)
        >>> figure = plot_latents({"prior": z, "posterior": z + 2}, principal_axes(z))
        >>> len(figure.axes)
        2
    """
    figure = _figure((4 * len(clouds), 4.3))
    panels = figure.subplots(1, len(clouds), squeeze=False, sharex=True, sharey=True).flat
    for panel, color, (label, z) in zip(panels, _COLORS, clouds.items(), strict=False):
        panel.scatter(*(z @ axes).T, s=6, color=color, alpha=0.4, linewidths=0)
        panel.set_title(label, fontsize=13)
        panel.set(aspect="equal", xlabel="axis 1")
        panel.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("axis 2")
    return figure


def principal_axes(z: Tensor, num_axes: int = 2) -> Tensor:
    """Returns the directions of largest variance, with shape ``(D, num_axes)``.

    Arguments:
        z: Latents, with shape ``(N, D)``.
        num_axes: Number of directions, at most D.

    Example:
        >>> z = torch.randn(1000, 3) * torch.tensor([1.0, 3.0, 2.0])
        >>> principal_axes(z).abs().argmax(0)
        tensor([1, 2])
    """
    ascending: Tensor = torch.linalg.eigh(torch.cov(z.T)).eigenvectors
    return ascending.flip(1)[:, :num_axes]


def _figure(size: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure  # not pyplot, which would choose a backend
    except ImportError as error:
        raise ImportError(
            f"Pictures need matplotlib ({error}): pip install 'ncprior[plot]'"
        ) from error
    return Figure(figsize=size, layout="constrained")
