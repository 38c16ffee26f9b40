"""A small model of the layout of VDVAE's VAE: our own code, with its traps kept."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, gelu, interpolate, pad


class Hyperparameters(dict[str, Any]):
    """Missing names give None, as VDVAE's do."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # or Python 3.10 takes None for a method of copying
            raise AttributeError(name)
        return self.get(name)


class Block(nn.Module):
    """Two 1×1 convolutions, or a 3×3 one where there is room."""

    def __init__(self, c_in: int, c_out: int, resolution: int, *, residual: bool = False) -> None:
        super().__init__()
        kernel = 3 if resolution > 2 else 1
        self.c1 = nn.Conv2d(c_in, 4, kernel, padding=kernel // 2)
        self.c2 = nn.Conv2d(4, c_out, 1)
        self.c2.weight.data *= 0.5  # so that thirty blocks on another stay finite
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.c2(gelu(self.c1(gelu(x))))
        return x + y if self.residual else y


class Encoder(nn.Module):
    """From channels last to features of every resolution."""

    def __init__(self, H: Hyperparameters) -> None:
        super().__init__()
        self.in_conv = nn.Conv2d(3, H.width, 3, padding=1)
        resolutions = sorted({block[0] for block in H.dec_blocks}, reverse=True)
        self.resolutions, self.widths = resolutions, H.widths
        self.enc_blocks = nn.ModuleList(
            [Block(H.width, H.width, r, residual=True) for r in resolutions]
        )

    def forward(self, x: Tensor) -> dict[int, Tensor]:
        x = self.in_conv(x.permute(0, 3, 1, 2).contiguous())
        activations = {}
        for resolution, block in zip(self.resolutions, self.enc_blocks, strict=True):
            x = block(avg_pool2d(x, x.shape[2] // resolution))
            extra = self.widths[resolution] - x.shape[1]
            activations[resolution] = pad(x, (0, 0, 0, 0, 0, extra))
        return activations


class DecoderBlock(nn.Module):
    """One group of latents."""

    def __init__(self, H: Hyperparameters, resolution: int, mixin: int | None) -> None:
        super().__init__()
        width = H.widths[resolution]
        self.base, self.mixin, self.zdim = resolution, mixin, H.zdim
        self.enc = Block(2 * width, 2 * H.zdim, resolution)
        self.prior = Block(width, 2 * H.zdim + width, resolution)
        self.z_proj = nn.Conv2d(H.zdim, width, 1)
        self.resnet = Block(width, width, resolution, residual=True)
        self.z_fn = lambda z: self.z_proj(z)  # closed over this very object

    def forward(
        self, features: dict[int, Tensor], activations: dict[int, Tensor]
    ) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
        seen = activations[self.base]
        h = features.get(self.base, torch.zeros_like(seen))
        h = h.repeat(len(seen), 1, 1, 1) if len(h) != len(seen) else h
        if self.mixin is not None:
            coarse = features[self.mixin][:, : h.shape[1]]
            h = h + interpolate(coarse, scale_factor=self.base // self.mixin)
        qm, qv = self.enc(torch.cat([h, seen], 1)).chunk(2, 1)
        p = self.prior(h)
        pm, pv, moved = p[:, : self.zdim], p[:, self.zdim : 2 * self.zdim], p[:, 2 * self.zdim :]
        z = qv.exp() * torch.empty_like(qm).normal_() + qm
        kl = -0.5 + pv - qv + 0.5 * (qv.exp() ** 2 + (qm - pm) ** 2) / (pv.exp() ** 2)
        features[self.base] = self.resnet(h + moved + self.z_fn(z))
        return features, {"z": z, "kl": kl}


class OutNet(nn.Module):
    """Parameters of the mixture of logistics, channels last."""

    def __init__(self, H: Hyperparameters) -> None:
        super().__init__()
        self.out_conv = nn.Conv2d(H.width, 10 * H.num_mixtures, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.out_conv(features).permute(0, 2, 3, 1)


class Decoder(nn.Module):
    """The blocks in order."""

    def __init__(self, H: Hyperparameters) -> None:
        super().__init__()
        self.H = H
        self.dec_blocks = nn.ModuleList([DecoderBlock(H, *block) for block in H.dec_blocks])
        resolutions = sorted({block[0] for block in H.dec_blocks})
        self.bias_xs = nn.ParameterList(
            nn.Parameter(torch.randn(1, H.widths[r], r, r))
            for r in resolutions
            if r <= H.no_bias_above
        )
        self.out_net = OutNet(H)
        self.gain = nn.Parameter(1 + 0.1 * torch.randn(1, H.width, 1, 1))
        self.bias = nn.Parameter(0.1 * torch.randn(1, H.width, 1, 1))
        self.final_fn = lambda h: h * self.gain + self.bias

    def forward(
        self, activations: dict[int, Tensor], get_latents: bool = False
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        features = {bias.shape[2]: bias for bias in self.bias_xs}
        blocks = []
        for block in self.dec_blocks:
            features, seen = block(features, activations)
            blocks.append(seen if get_latents else {"kl": seen["kl"]})
        return self.final_fn(features[self.H.image_size]), blocks


class VAE(nn.Module):
    """Takes VDVAE's hyperparameters, as far as they matter here."""

    def __init__(self, H: Hyperparameters) -> None:
        super().__init__()
        self.H = H
        self.encoder, self.decoder = Encoder(H), Decoder(H)


def vdvae(
    dataset: str = "cifar10",
    blocks: tuple[tuple[int, int | None], ...] = ((1, None), (4, 1), (4, None), (8, 4)),
    **others: Any,
) -> VAE:
    """An untrained model of 8×8 images, in evaluation mode."""
    widths: dict[int, int] = defaultdict(lambda: 4, others.pop("widths", {}))
    defaults: dict[str, Any] = {"width": 4, "zdim": 2, "num_mixtures": 2, "no_bias_above": 64}
    defaults.update(dataset=dataset, dec_blocks=blocks, widths=widths, image_size=8)
    return VAE(Hyperparameters({**defaults, **others})).eval()


def images(count: int = 4, size: int = 8) -> Tensor:
    """Random bytes, channels last."""
    return torch.randint(256, (count, size, size, 3), dtype=torch.uint8)
