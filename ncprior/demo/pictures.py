"""Figures of samples and of latents. Needs the extra ``plot``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor

from ncprior.utils.require import described, numbers, real_tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The palette of Okabe and Ito, for colour-blind readers.
_COLORS = ("#E69F00", "#0072B2", "#009E73")


def plot_samples(samples: Mapping[str, Tensor]) -> Figure:
    """Figure of labelled strips of images: grey ones dark on white, or in colour.

    Arguments:
        samples: Images in [0, 1], with shape ``(N, 1, H, W)`` or ``(N, 3, H, W)``, by label.

    Returns:
        A figure without a window, to save.

    Raises:
        ImportError: If matplotlib is not installed.

    Example:
        >>> figure = plot_samples({"data": torch.rand(5, 1, 8, 8), "prior": torch.rand(5, 1, 8, 8)})
        >>> len(figure.axes)
        2
    """
    count = max(len(images) for images in samples.values())
    figure = _figure((0.62 * count + 1.6, 0.72 * len(samples) + 0.1))
    strips = figure.subplots(len(samples), squeeze=False).flat
    for axes, (label, images) in zip(strips, samples.items(), strict=True):
        images = _drawable(images)
        gap = max(1, images.shape[-1] // 8)
        white = 0.0 if images.shape[1] == 1 else 1.0  # grey images show ink, others light
        tiles = torch.nn.functional.pad(images, (0, gap), value=white)
        tiles = rearrange(tiles, "n c h w -> h (n w) c")[:, :-gap]
        axes.imshow(tiles, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axes.set_ylabel(label, rotation=0, ha="right", va="center", fontsize=12, labelpad=10)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return figure


def plot_latents(clouds: Mapping[str, Tensor], axes: Tensor) -> Figure:
    """Scatter plots of latents side by side, projected to one plane.

    Arguments:
        clouds: Latents, with shape ``(N, D)``, by label; at most three.
        axes: Two directions, with shape ``(D, 2)``, such as :func:`discriminant_axes`.

    Returns:
        A figure without a window, to save.

    Raises:
        ImportError: If matplotlib is not installed.

    Example:
        >>> z = torch.randn(100, 6)
        >>> len(plot_latents({"prior": z, "posterior": z + 2}, torch.eye(6)[:, :2]).axes)
        2
    """
    planes = {label: _drawable(z) @ _drawable(axes) for label, z in clouds.items()}
    limit = 1.05 * max(float(points.abs().max()) for points in planes.values())
    figure = _figure((3.6 * len(clouds) + 0.4, 4.1))
    panels = figure.subplots(1, len(clouds), squeeze=False, sharex=True, sharey=True).flat
    for panel, color, (label, points) in zip(panels, _COLORS, planes.items(), strict=False):
        panel.scatter(*points.T, s=6, color=color, alpha=0.4, linewidths=0)
        panel.set_title(label, fontsize=13)
        panel.set(xlabel="axis 1", xlim=(-limit, limit), ylim=(-limit, limit))
        panel.set_box_aspect(1)
        panel.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("axis 2")
    return figure


def discriminant_axes(z: Tensor, labels: Tensor) -> Tensor:
    """Plane of linear discriminant analysis (LDA), as two orthonormal directions.

    The plane has the largest variance between classes relative to the variance within classes. The
    projection of N(0, I) is N(0, I).

    Arguments:
        z: Latents, with shape ``(N, D)``.
        labels: Classes of the latents, with shape ``(N,)``; at least three classes.

    Returns:
        The directions, with shape ``(D, 2)``.

    Raises:
        TypeError: If the latents or labels are no numbers.
        ValueError: If latents are not finite or lie in a plane, the rows of labels are others, or there are fewer
            than three classes.

    References:
        The Utilization of Multiple Measurements in Problems of Biological Classification
        (Rao, 1948), the linear discriminant analysis of several classes

    Example:
        >>> labels = torch.arange(4).repeat(500)
        >>> z = torch.randn(2000, 3) * torch.tensor([9.0, 1.0, 1.0])
        >>> z[:, 1] += 4 * (labels % 2)
        >>> z[:, 2] += 4 * (labels // 2)
        >>> discriminant_axes(z, labels).square().sum(1).round()  # the plane of axes 1 and 2
        tensor([0., 1., 1.])
    """
    z, labels = real_tensor("z", z, ndim=2, rows=3), numbers("labels", labels)
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    if labels.shape != z.shape[:1] or len(labels.unique()) < 3:
        raise ValueError(
            f"labels must be one class per row of z, {len(z)}, and 3 classes or more; got "
            f"{described(labels)} with {len(labels.unique())} classes. Pass the classes of the rows."
        )
    classes = [z[labels == label] for label in labels.unique()]
    within = torch.stack([torch.cov(members.T) for members in classes]).mean(0)
    between = torch.cov(torch.stack([members.mean(0) for members in classes]).T)
    root, failed = torch.linalg.cholesky_ex(within)
    if failed:
        raise ValueError("z must vary within the classes in every direction; it does not.")
    whitened = torch.linalg.solve(root, torch.linalg.solve(root, between).T)
    ascending = torch.linalg.solve(root.T, torch.linalg.eigh(whitened).eigenvectors)
    axes: Tensor = torch.linalg.qr(ascending.flip(1)[:, :2]).Q
    return axes


def _drawable(values: Tensor) -> Tensor:
    """Numbers that matplotlib takes, from any device and dtype."""
    return values.detach().cpu().float()


def _figure(size: tuple[float, float]) -> Figure:
    try:
        from matplotlib.figure import Figure  # not pyplot, which would choose a backend
    except ImportError as error:
        raise ImportError(
            f"Pictures need matplotlib ({error}): install ncprior's extra 'plot' "
            f"(pip install '.[plot]' in the clone)."
        ) from error
    return Figure(figsize=size, layout="constrained")
