"""A VQ-VAE of images, with one grid of codes, or with a coarser one on top as in VQ-VAE-2."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import (
    binary_cross_entropy_with_logits,
    interpolate,
    mse_loss,
    one_hot,
)


class Codebook(nn.Module):
    """Nearest vectors of a codebook that follows its inputs by moving averages."""

    vectors: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, count: int, width: int, decay: float = 0.98) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("vectors", torch.randn(count, width))
        self.register_buffer("counts", torch.zeros(count))  # none is in use yet
        self.register_buffer("sums", torch.zeros(count, width))

    def look_up(self, codes: Tensor) -> Tensor:
        """Vectors of codes, as a feature map."""
        return self.vectors[codes].movedim(-1, 1)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes of a feature map, their vectors with h's gradient, and the loss that ties h to them."""
        flat = h.movedim(1, -1).reshape(-1, h.shape[1])
        codes = torch.cdist(flat, self.vectors).argmin(1)
        if self.training:
            self._follow(flat.detach(), codes)
        codes = codes.reshape(len(h), *h.shape[2:])
        found = self.look_up(codes)
        return codes, h + (found - h).detach(), mse_loss(h, found.detach())

    def _follow(self, flat: Tensor, codes: Tensor) -> None:
        chosen = one_hot(codes, len(self.vectors)).float()
        self.counts.lerp_(chosen.sum(0), 1 - self.decay)
        self.sums.lerp_(chosen.mT @ flat, 1 - self.decay)
        self.vectors.copy_(self.sums / self.counts.clamp(min=1e-3).unsqueeze(1))
        unused = (self.counts < 0.05).nonzero()[:, 0]  # they restart at inputs
        rows = flat[torch.randint(len(flat), (len(unused),))]
        self.vectors[unused], self.sums[unused], self.counts[unused] = rows, rows, 1.0


def residual(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 1)
    )


class VQVAE(nn.Module):
    """VQ-VAE with one grid of codes, a quarter of the image's side, or with a coarser one on top."""

    def __init__(self, channels: int, side: int, levels: int, num_codes: int) -> None:
        super().__init__()
        width = 32
        down = partial(nn.Conv2d, kernel_size=4, stride=2, padding=1)
        up = partial(nn.ConvTranspose2d, kernel_size=4, stride=2, padding=1)
        self.levels, self.side, self.num_codes, dim = levels, side, num_codes, 16
        self.encoder = nn.Sequential(down(channels, width), nn.ReLU(), down(width, width))
        self.refine = residual(width)
        if levels == 2:
            self.top = nn.Conv2d(width, dim, 3, stride=2, padding=1)
            self.top_book = Codebook(num_codes, dim)
            self.from_top = nn.Conv2d(dim, dim, 3, padding=1)
        extra = dim if levels == 2 else 0
        self.bottom = nn.Conv2d(width + extra, dim, 1)
        self.book = Codebook(num_codes, dim)
        self.stem = nn.Conv2d(dim + extra, width, 3, padding=1)
        self.polish = residual(width)
        self.decoder = nn.Sequential(nn.ReLU(), up(width, width), nn.ReLU(), up(width, channels))

    def _features(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        return h + self.refine(h)

    def context(self, top: Tensor) -> Tensor:
        """Features of the top codes at the places of the bottom codes."""
        return self._spread(self.top_book.look_up(top))

    def _spread(self, vectors: Tensor) -> Tensor:
        return self.from_top(interpolate(vectors, size=self.side // 4))

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        """Codes of images, the top level first."""
        h = self._features(x)
        if self.levels == 1:
            return (self.book(self.bottom(h))[0],)
        top = self.top_book(self.top(h))[0]
        return top, self.book(self.bottom(torch.cat([h, self.context(top)], 1)))[0]

    def decode(self, *codes: Tensor) -> Tensor:
        """Images of codes."""
        vectors = self.book.look_up(codes[-1])
        if self.levels == 2:
            vectors = torch.cat([vectors, self.context(codes[0])], 1)
        return self._logits(vectors).sigmoid()

    def _logits(self, vectors: Tensor) -> Tensor:
        h = self.stem(vectors)
        return self.decoder(h + self.polish(h))

    def encode_rows(self, x: Tensor) -> tuple[Tensor, ...]:
        """Codes of images, row by row."""
        return tuple(row for grid in self.encode(x) for row in grid.unbind(1))

    def grids(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """The grids of rows."""
        top = rows[0].shape[1] if self.levels == 2 else 0
        parts = [rows[:top], rows[top:]] if top else [rows]
        return [torch.stack(list(part), 1) for part in parts]

    def context_of_rows(self, *rows: Tensor) -> Tensor:
        """Vectors of the rows before the next one, and of the whole top grid, as channels."""
        top = rows[0].shape[1] if self.levels == 2 else 0
        if len(rows) < top:
            return torch.cat([self.top_book.vectors[row] for row in rows], 2).mT.unsqueeze(2)
        vectors = [self.book.vectors[row].mT for row in rows[top:]]
        if top:
            vectors.insert(0, self.context(torch.stack(rows[:top], 1)).flatten(1, 2))
        return torch.cat(vectors, 1).unsqueeze(2)

    def loss(self, x: Tensor) -> Tensor:
        """Cross-entropy of pixels, and the ties of features to their vectors."""
        h = self._features(x)
        if self.levels == 1:
            _, vectors, tie = self.book(self.bottom(h))
        else:
            _, top, tie = self.top_book(self.top(h))
            spread = self._spread(top)
            _, found, other = self.book(self.bottom(torch.cat([h, spread], 1)))
            vectors, tie = torch.cat([found, spread], 1), tie + other
        return 20 * binary_cross_entropy_with_logits(self._logits(vectors), x) + 0.25 * tie
