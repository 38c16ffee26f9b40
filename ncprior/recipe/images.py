"""Grids of images as PNG, without an imaging library."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate

from ncprior.recipe.choices import DATA

_MOST_PIXELS = 128  # height and width of a tile; larger images are reduced

_ENOUGH_PIXELS = 56

_LARGE = 48  # pixels: of larger images, a grid shows 16 in the place of 64

_SMALLEST_SIDE = 8  # of rows of numbers that are shown as square images

_SIGNATURE = b"\x89PNG\r\n\x1a\n"

_GREY_ALPHA, _RGB_ALPHA = 4, 6  # colour types


def as_images(samples: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Images in [0, 1] of every arm, with shape ``(N, C, H, W)`` and C of 1 or 3, or ``None``.

    Rows of H² numbers in [0, 1] become grey images, if H is 8 or more. All arms have the scale of
    the held-out data.

    Arguments:
        samples: x by arm, each with shape ``(N, ...)``.
    """
    first = samples.get(DATA, next(iter(samples.values()), torch.empty(0)))
    least, most = (float(end) for end in first.aminmax()) if first.numel() else (0.0, 0.0)
    side = math.isqrt(first[0].numel()) if first.ndim == 2 and len(first) else 0
    if side >= _SMALLEST_SIDE and side**2 == first.shape[1] and least >= 0 and most <= 1:
        samples = {arm: x.unflatten(1, (1, side, side)) for arm, x in samples.items()}
        first = next(iter(samples.values()))
    if first.ndim != 4 or first.shape[1] not in (1, 3) or least == most:
        return None
    if least >= 0:
        limits = (0.0, 1.0) if most <= 1 else (0.0, 255.0) if most <= 255 else (least, most)
    else:
        limits = (-1.0, 1.0) if least >= -1 and most <= 1 else (least, most)
    return {
        arm: ((x.float() - limits[0]) / (limits[1] - limits[0])).nan_to_num(0.0).clamp(0, 1)
        for arm, x in samples.items()
    }


def grid(images: Tensor) -> tuple[str, int]:
    """Grid of images as the URI of a PNG, with transparent gaps, and the number of images in it.

    Arguments:
        images: Images in [0, 1], with shape ``(N, 1, H, W)`` or ``(N, 3, H, W)``.
    """
    columns = 4 if max(images.shape[2:]) > _LARGE else 8
    images = _resized(images[: columns**2])
    count, gap = len(images), max(1, images.shape[-1] // 12)
    opaque = torch.cat([images, torch.ones_like(images[:, :1])], 1)
    missing = opaque.new_zeros(-count % columns, *opaque.shape[1:])
    tiles = torch.nn.functional.pad(torch.cat([opaque, missing]), (0, gap, 0, gap))
    whole = rearrange(tiles, "(r s) c h w -> (r h) (s w) c", s=columns)[:-gap, :-gap]
    return data_uri(_png((255 * whole).round().byte())), count


def data_uri(png: bytes) -> str:
    """URI that holds the bytes of a PNG."""
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _resized(images: Tensor) -> Tensor:
    """Large images reduced to 128 pixels, and small ones with every pixel repeated up to 56."""
    side = max(images.shape[2:])
    if side <= _MOST_PIXELS:
        factor = max(1, _ENOUGH_PIXELS // side)
        return images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    size = [max(1, round(_MOST_PIXELS / side * it)) for it in images.shape[2:]]
    return interpolate(images, size=size, mode="area")


def _png(pixels: Tensor) -> bytes:
    """PNG of bytes with shape (H, W, C), where C is 2 (grey, alpha) or 4 (red, green, blue, alpha)."""
    height, width, channels = pixels.shape
    colour = _GREY_ALPHA if channels == 2 else _RGB_ALPHA
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    rows = torch.nn.functional.pad(pixels.flatten(1), (1, 0))  # each row begins with filter 0
    data = zlib.compress(rows.contiguous().numpy().tobytes())
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
