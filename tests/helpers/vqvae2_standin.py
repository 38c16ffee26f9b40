"""A small model with the interface of the two-level VQ-VAE of rosinality/vq-vae-2-pytorch.

Written for the tests, with other layers: `encode` returns the quantised features of top and bottom,
a loss and both grids of codes, `decode_code` decodes codes, and the bottom codes depend on the
decoded top codes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Quantiser(nn.Module):
    """Nearest vectors of a codebook, stored as columns."""

    def __init__(self, dim: int, n_embed: int) -> None:
        super().__init__()
        self.dim, self.n_embed = dim, n_embed
        self.register_buffer("embed", torch.randn(dim, n_embed))

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors, loss and codes of features with channels last."""
        vectors = self.embed_code(self.codes(h))
        return vectors, (vectors - h).square().mean(), self.codes(h)

    def codes(self, h: Tensor) -> Tensor:
        table: Tensor = self.embed
        return (h.unsqueeze(-1) - table).square().sum(-2).argmin(-1)

    def embed_code(self, codes: Tensor) -> Tensor:
        return nn.functional.embedding(codes, self.embed.mT)


class TwoLevels(nn.Module):
    """Images of 8×8 pixels, bottom codes of 4×4 and top codes of 2×2."""

    def __init__(self, dim: int = 4, n_embed: int = 9) -> None:
        super().__init__()
        self.enc_b = nn.Conv2d(3, dim, 2, stride=2)
        self.enc_t = nn.Conv2d(dim, dim, 2, stride=2)
        self.quantize_t, self.quantize_b = Quantiser(dim, n_embed), Quantiser(dim, n_embed + 1)
        self.dec_t = nn.ConvTranspose2d(dim, dim, 2, stride=2)
        self.dec = nn.ConvTranspose2d(2 * dim, 3, 2, stride=2)
        self.join = nn.Conv2d(2 * dim, dim, 1)

    def encode(self, x: Tensor) -> tuple[Tensor, ...]:
        h = self.enc_b(x)
        top, diff_t, id_t = self.quantize_t(self.enc_t(h).movedim(1, -1))
        joined = torch.cat([self.dec_t(top.movedim(-1, 1)), h], 1)
        bottom, diff_b, id_b = self.quantize_b(self.join(joined).movedim(1, -1))
        return top.movedim(-1, 1), bottom.movedim(-1, 1), diff_t + diff_b, id_t, id_b

    def decode(self, top: Tensor, bottom: Tensor) -> Tensor:
        images: Tensor = self.dec(torch.cat([self.dec_t(top), bottom], 1))
        return images

    def decode_code(self, code_t: Tensor, code_b: Tensor) -> Tensor:
        top, bottom = self.quantize_t.embed_code(code_t), self.quantize_b.embed_code(code_b)
        return self.decode(top.movedim(-1, 1), bottom.movedim(-1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        top, bottom, diff, _, _ = self.encode(x)
        return self.decode(top, bottom), diff
