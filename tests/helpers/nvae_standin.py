"""A small model of the layout of NVAE's AutoEncoder: our own code, with its traps kept."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli
from torch.nn.functional import batch_norm, conv2d, interpolate, silu
from torch.nn.modules.batchnorm import _BatchNorm

CHANNELS = {"bernoulli": (1, 1), "gaussian": (3, 6), "mixture": (3, 20)}  # of images and logits


class SyncBatchNormSwish(_BatchNorm):
    """Batch norm and swish in one kernel of CUDA, which refuses tensors that are not on a GPU."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Any shape will do."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_cuda:
            raise ValueError(f"expected a tensor on a GPU, got one on {x.device}")
        statistics = (self.running_mean, self.running_var, self.weight, self.bias)
        return silu(batch_norm(x, *statistics, training=self.training, eps=self.eps))


class Cell(nn.Module):
    """A residual cell: up or down by 2, or neither, as its type tells."""

    def __init__(self, c_in: int, c_out: int, cell_type: str) -> None:
        super().__init__()
        self.cell_type = cell_type
        self.stride = 2 if cell_type.startswith("down") else 1
        self.skip = nn.Conv2d(c_in, c_out, 1, stride=self.stride, bias=False)
        self.conv = nn.Sequential(
            nn.BatchNorm2d(c_in, momentum=0.05),
            nn.Conv2d(c_in, c_out, 3, stride=self.stride, padding=1, bias=False),
            SyncBatchNormSwish(c_out, momentum=0.05),
        )

    def forward(self, s: Tensor) -> Tensor:
        s = interpolate(s, scale_factor=2) if self.cell_type.startswith("up") else s
        return self.skip(s) + 0.5 * self.conv(s)


class EncoderCombiner(nn.Module):
    """Joins the decoder's features to the encoder's."""

    def __init__(self, c_enc: int, c_dec: int) -> None:
        super().__init__()
        self.cell_type = "combiner_enc"
        self.conv = nn.Conv2d(c_dec, c_enc, 1)

    def forward(self, s_enc: Tensor, s_dec: Tensor) -> Tensor:
        return s_enc + self.conv(s_dec)


class DecoderCombiner(nn.Module):
    """Joins z to the decoder's features."""

    def __init__(self, c_dec: int, num_latents: int) -> None:
        super().__init__()
        self.cell_type = "combiner_dec"
        self.conv = nn.Conv2d(c_dec + num_latents, c_dec, 1)

    def forward(self, s: Tensor, z: Tensor) -> Tensor:
        return self.conv(torch.cat([s, z], 1))


class MaskedConv(nn.Conv2d):
    """Sees only pixels above and to the left; its mask is a plain tensor, made on a GPU."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)
        mask = torch.zeros(3, 3)
        mask[0], mask[1, 0] = 1.0, 1.0
        self.mask = mask.cuda()

    def forward(self, z: Tensor) -> Tensor:
        return conv2d(z, self.weight * self.mask, self.bias, padding=1)


class Flow(nn.Module):
    """An autoregressive shift, which keeps volume, or with `log_scale` does not."""

    def __init__(self, channels: int, log_scale: float) -> None:
        super().__init__()
        self.conv, self.log_scale = MaskedConv(channels), log_scale

    def forward(self, z: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        z = math.exp(self.log_scale) * (z - self.conv(z))
        return z, torch.full_like(z, self.log_scale)


class RawNormal:
    """A normal from raw parameters, with both clamps."""

    def __init__(self, mu: Tensor, log_sigma: Tensor, lowest: float = -math.inf) -> None:
        self.mu = 5.0 * torch.tanh(mu / 5.0)
        self.sigma = (5.0 * torch.tanh(log_sigma / 5.0)).clamp(min=lowest).exp() + 1e-2

    def sample(self) -> Tensor:
        return torch.empty_like(self.mu).normal_() * self.sigma + self.mu

    def log_p(self, z: Tensor) -> Tensor:
        u = (z - self.mu) / self.sigma
        return -0.5 * u * u - 0.5 * math.log(2 * math.pi) - torch.log(self.sigma)


class NormalDecoder:
    """VAEBM's Gaussian decoder: one law to sample from, a wider one for the density."""

    def __init__(self, logits: Tensor, dist1: bool) -> None:
        mu, log_sigma = logits.chunk(2, 1)
        self.dist = RawNormal(mu, log_sigma)
        if dist1:
            self.dist1 = RawNormal(mu, log_sigma, lowest=-2.0)


class DiscMixLogistic:
    """What the adapter sees of the mixture of logistics."""

    def __init__(self, logits: Tensor, num_bits: int) -> None:
        self.logit_probs = logits[:, : logits.shape[1] // 10]
        self.max_val = 2.0**num_bits - 1


class AutoEncoder(nn.Module):
    """Takes NVAE's arguments, as far as they matter here."""

    def __init__(self, args: argparse.Namespace, writer: None, arch_instance: Any) -> None:
        super().__init__()
        self.dataset, self.num_bits = args.dataset, args.num_x_bits
        self.vaebm, self.decoder = args.vaebm, args.decoder
        self.crop_output = args.crop_output
        self.res_dist, self.num_flows = args.res_dist, args.num_nf
        self.vanilla_vae = args.num_latent_scales == args.num_groups_per_scale == 1
        c, d = args.num_channels_dec, args.num_latent_per_group
        scales, per_scale = args.num_latent_scales, args.num_groups_per_scale
        side = args.size // 2**scales
        in_channels, out_channels = CHANNELS[args.decoder]
        top = c * 2**scales
        self.prior_ftr0 = nn.Parameter(torch.rand(top, side, side))
        self.z0_size = [d, side, side]
        self.stem = nn.Conv2d(in_channels, c, 3, padding=1)
        self.pre_process = nn.ModuleList([Cell(c, 2 * c, "down_pre")])
        up, down, self.dec_sampler = [], [], nn.ModuleList()
        for scale in range(scales):
            width = 2 * c * 2**scale
            for group in range(per_scale):
                up.append(Cell(width, width, "normal_enc"))
                if (scale, group) != (scales - 1, per_scale - 1):
                    up.append(EncoderCombiner(width, width))
            if scale < scales - 1:
                up.append(Cell(width, 2 * width, "down_enc"))
        self.enc_sampler, self.nf_cells = nn.ModuleList(), nn.ModuleList()
        for scale in range(scales):
            width = top // 2**scale
            for group in range(per_scale):
                self.enc_sampler.append(nn.Conv2d(width, 2 * d, 3, padding=1))
                for _ in range(self.num_flows):
                    self.nf_cells.append(Flow(d, args.flow_log_scale))
                if (scale, group) != (0, 0):
                    down.append(Cell(width, width, "normal_dec"))
                    self.dec_sampler.append(nn.Sequential(nn.ELU(), nn.Conv2d(width, 2 * d, 1)))
                down.append(DecoderCombiner(width, d))
            if scale < scales - 1:
                down.append(Cell(width, width // 2, "up_dec"))
        self.enc0 = nn.Sequential(nn.ELU(), nn.Conv2d(top, top, 1), nn.ELU())
        if self.vanilla_vae:
            self.enc_tower, self.dec_tower = [], []
            self.stem_decoder = nn.Conv2d(d, top, 1)
        else:
            self.enc_tower, self.dec_tower = nn.ModuleList(up), nn.ModuleList(down)
        self.post_process = nn.ModuleList([Cell(2 * c, c, "up_post")])
        self.image_conditional = nn.Sequential(nn.ELU(), nn.Conv2d(c, out_channels, 3, padding=1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, log q(z|x) and log p(z)."""
        s = self.stem(2 * x - 1)
        for cell in self.pre_process:
            s = cell(s)
        met: list[tuple[nn.Module, Tensor]] = []
        for cell in self.enc_tower:
            if cell.cell_type == "combiner_enc":
                met.insert(0, (cell, s))
            else:
                s = cell(s)
        features = self.enc0(s)
        mu, log_sigma = self.enc_sampler[0](features).chunk(2, 1)
        z, log_q = self._draw(0, RawNormal(mu, log_sigma), features)
        log_p = RawNormal(torch.zeros_like(z), torch.zeros_like(z)).log_p(z).sum([1, 2, 3])
        s, k = self.prior_ftr0.unsqueeze(0).expand(len(x), -1, -1, -1), 0
        for cell in self.dec_tower:
            if cell.cell_type != "combiner_dec":
                s = cell(s)
                continue
            if k > 0:
                p = self.dec_sampler[k - 1](s)
                combiner, s_enc = met[k - 1]
                features = combiner(s_enc, s)
                q = self.enc_sampler[k](features)
                q = p + q if self.res_dist else q
                z, step = self._draw(k, RawNormal(*q.chunk(2, 1)), features)
                log_q = log_q + step
                log_p = log_p + RawNormal(*p.chunk(2, 1)).log_p(z).sum([1, 2, 3])
            s, k = cell(s, z), k + 1
        if self.vanilla_vae:
            s = self.stem_decoder(z)
        for cell in self.post_process:
            s = cell(s)
        return self.image_conditional(s), log_q, log_p

    def decoder_output(self, logits: Tensor) -> Any:
        """The law of x, as NVAE hands it out."""
        if self.decoder == "bernoulli":
            return Bernoulli(logits=logits)
        if self.decoder == "gaussian":
            return NormalDecoder(logits, dist1=self.vaebm)
        return DiscMixLogistic(logits, self.num_bits)

    def _draw(self, k: int, q: RawNormal, features: Tensor) -> tuple[Tensor, Tensor]:
        z = q.sample()
        log_q = q.log_p(z)
        for flow in self.nf_cells[k * self.num_flows : (k + 1) * self.num_flows]:
            z, log_det = flow(z, features)
            log_q = log_q - log_det
        return z, log_q.sum([1, 2, 3])


def arguments(
    decoder: str = "bernoulli",
    *,
    num_groups: int = 2,
    num_scales: int = 1,
    num_flows: int = 0,
    **others: Any,
) -> argparse.Namespace:
    """What `AutoEncoder` is built from; `num_groups` per scale."""
    chosen: dict[str, Any] = {
        "dataset": "mnist" if decoder == "bernoulli" else "cifar10",
        "num_x_bits": 8,
        "num_channels_dec": 2,
        "num_latent_per_group": 2,
        "res_dist": True,
        "size": 8,
        "crop_output": False,
        "vaebm": False,
        "flow_log_scale": 0.0,
        **others,
    }
    counts = {"num_groups_per_scale": num_groups, "num_latent_scales": num_scales}
    return argparse.Namespace(decoder=decoder, num_nf=num_flows, **counts, **chosen)


def nvae(decoder: str = "bernoulli", **options: Any) -> AutoEncoder:
    """An untrained model with BatchNorm statistics as if trained, in evaluation mode."""
    from ncprior.adapters.nvae.checkpoints import without_cuda

    with without_cuda():
        model = AutoEncoder(arguments(decoder, **options), None, {})
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.running_mean.normal_(std=0.3)
            layer.running_var.uniform_(0.5, 2.0)
    return model.eval()


def images(decoder: str = "bernoulli", count: int = 4, size: int = 8) -> Tensor:
    """Random images for the decoder."""
    x = torch.rand(count, CHANNELS[decoder][0], size, size)
    return x.round() if decoder == "bernoulli" else (255 * x).round() / 255


def randomly(model: nn.Module, scale: float = 0.3) -> nn.Module:
    """Moves every parameter, so that nothing is where its initialisation left it."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p))
    return model
