r"""NVAE, and VAEBM's variant of it, as a latent source.

    from ncprior.adapters.nvae import NVAESource, load_checkpoint, on_cpu

The decoder is a tower of cells with features s. Each group has a combiner: the prior of group k is
computed from s, which is the context c(z_<k), and z_k is joined to s. Depending on the model, the
parameters of the posterior are added to those of the prior before both are clamped.

References:
    | NVAE: A Deep Hierarchical Variational Autoencoder (Vahdat and Kautz, NeurIPS 2020)
    | VAEBM (Xiao, Kreis, Kautz and Vahdat, ICLR 2021)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal

from ncprior.adapters.logistics import LogisticMixture
from ncprior.adapters.nvae.checkpoints import (
    without_cuda,
)
from ncprior.adapters.nvae.laws import (
    BoundedNormal,
    FlowedNormal,
    InsideBorder,
    Parameters,
    clamped,
    diagonal,
    log_normal,
)
from ncprior.adapters.nvae.layout import (
    cell_types,
    checked_model,
    cuda_only_layers,
    image_shape,
    masked_layers,
)
from ncprior.source import Group, LatentSource
from ncprior.utils.precision import at_least_float32, input_like
from ncprior.utils.random_state import seeded
from ncprior.utils.require import (
    floats_of_batch,
    require_counts,
    require_numbers,
    tensor_of_batch,
)
from ncprior.utils.visible import require_eval

_BORDER = 2  # around MNIST's 28×28 pixels


class NVAESource(LatentSource[Any, Any]):
    """NVAE's ``AutoEncoder``: K groups of Gaussian latents, down a tower of features.

    Images are as NVAE takes them: ``(B, C, H, W)`` in [0, 1], MNIST's padded to 32×32 and
    binarised, and with fewer than 8 bits on the levels k/(2^n - 1). The first of a tuple or list
    that a loader yields is the image. Without a GPU, see :class:`on_cpu`.

    With ``temperature`` t, the scale of every prior is multiplied by t. Train the heads at 1; to
    sample at t, put them on another source: ``NCPrior(NVAESource(model, temperature=t), heads)``.

    Arguments:
        model: The ``AutoEncoder`` of NVAE or VAEBM, in evaluation mode; it may be wrapped in
            DistributedDataParallel. It is never copied, moved or changed.
        temperature: t, greater than 0.

    Attributes:
        module: The model, unwrapped.
        num_groups: K.

    Raises:
        TypeError: If the model is no module of NVAE's layout.
        ValueError: If parts of the model contradict each other, or the temperature is not
            positive.

    Example:
        >>> from helpers.nvae_standin import nvae  # a small model of NVAE's layout, in the tests
        >>> from ncprior.adapters.nvae import on_cpu
        >>> from ncprior.source import sample_posterior
        >>> handle = on_cpu(model := nvae())
        >>> source = NVAESource(model)
        >>> x = torch.rand(4, 1, 8, 8).round()
        >>> latents, state = sample_posterior(source, x)
        >>> source.decode(state).shape, source.likelihood(state).log_prob(x).shape
        (torch.Size([4, 1, 8, 8]), torch.Size([4]))
    """

    class Encoding(NamedTuple):
        """Encoder features of x.

        Attributes:
            features: Features of x for the posterior of group 0.
            skips: The features of x that meet the decoder's, from group 1 on.
        """

        features: Tensor
        skips: tuple[Tensor, ...]

    class State(NamedTuple):
        """The state before group ``k``, or after all groups (``prior is None``).

        Attributes:
            k: The group.
            s: The decoder's features; behind the last group of a model with one group alone, z.
            prior: Location and scale, at temperature 1.
            posterior: Location and scale in front of the flows, or ``None`` without an x.
            features: Input of the flows, or ``None`` without flows.
            skips: As in the encoding.
        """

        k: int
        s: Tensor
        prior: Parameters | None
        posterior: Parameters | None
        features: Tensor | None
        skips: tuple[Tensor, ...] | None

    def __init__(self, model: nn.Module, *, temperature: float = 1.0) -> None:
        require_numbers("(0, inf)", temperature=temperature)
        self.module: nn.Module = checked_model(model)
        self.temperature = float(temperature)
        self.num_groups = len(self._model.enc_sampler)
        self._stairs = list(_stairs(self._model.dec_tower))
        joins = [cell for cell in self._model.enc_tower if cell.cell_type == "combiner_enc"]
        self._joins = joins[::-1]  # the encoder goes bottom-up, the groups top-down
        self._image_shape = image_shape(self._model)
        self._cuda_only = cuda_only_layers(self.module)
        self._masked = masked_layers(self.module)

    @property
    def _model(self) -> Any:  # noqa: ANN401 (its attributes are checked)
        return self.module

    def facts(self) -> dict[str, Any]:
        """Returns the temperature of the prior."""
        return {"temperature": self.temperature}

    def encode(self, x: Any) -> Encoding:  # noqa: ANN401
        """Returns the features of the encoder.

        Raises:
            ValueError: If x is not as the model takes it, or the model cannot run as it is.
        """
        self._require_ready()
        model, x = self._model, self._checked_images(x)
        s = model.stem(2 * x - 1)
        for cell in model.pre_process:
            s = cell(s)
        skips = []
        for cell in model.enc_tower:
            if cell.cell_type == "combiner_enc":
                skips.append(s)
            else:
                s = cell(s)
        return self.Encoding(model.enc0(s), tuple(skips[::-1]))

    def start(
        self, batch_size: int, encoding: Encoding | None = None, condition: None = None
    ) -> State:
        """Returns the state before group 0, whose prior is N(0, 1.01² t²)."""
        self._require_ready()
        require_counts(batch_size=batch_size)
        if condition is not None:
            raise ValueError("NVAE has no condition; got one. Leave it out.")
        model = self._model
        s = model.prior_ftr0.expand(batch_size, *model.prior_ftr0.shape)
        zeros = s.new_zeros(batch_size, *model.z0_size)
        posterior, features, skips = None, None, None
        if encoding is not None:
            features, skips = encoding
            posterior = clamped(*model.enc_sampler[0](features).chunk(2, dim=1))
        return self.State(0, s, clamped(zeros, zeros), posterior, self._shown(features), skips)

    def group(self, state: State) -> Group:
        """Returns p(z_k | z_<k), the context and, given an x, q(z_k | z_<k, x)."""
        if state.prior is None:
            raise ValueError(f"The walk is behind the last of {self.num_groups} groups.")
        loc, scale = state.prior
        posterior: Distribution | None = None
        if state.posterior is not None:
            posterior = diagonal(*state.posterior)
            if state.features is not None:
                posterior = FlowedNormal(posterior, self._flows(state.k), state.features)
        # The first s is the same for every row.
        context = at_least_float32(state.s) if state.k > 0 else None
        return Group(diagonal(loc, self.temperature * scale), posterior, context)

    def advance(self, state: State, z: Tensor) -> State:
        """Returns the state before the next group, given z_k with shape ``(B, *event)``."""
        if state.prior is None or z.shape != state.prior[0].shape:
            needs = "none" if state.prior is None else tuple(state.prior[0].shape)
            raise ValueError(f"The walk needs z of shape {needs}; got {tuple(z.shape)}.")
        model, k, s = self._model, state.k + 1, z.to(state.s)
        if model.vanilla_vae:
            return self.State(k, s, None, None, None, None)
        combiner, *cells = self._stairs[state.k]
        s = combiner(state.s, s)
        for cell in cells:
            s = cell(s)
        if k == self.num_groups:
            return self.State(k, s, None, None, None, None)
        return self._front(k, s, state.skips)

    def decode(self, state: State) -> Tensor:
        """Returns the mean of p(x | z) in [0, 1], with shape ``(B, C, H, W)``."""
        p_x = self._likelihood(self._logits(state))
        return p_x.mean.clamp(0, 1) if isinstance(p_x, Normal) else p_x.mean

    def likelihood(self, state: State) -> Distribution:
        """Returns p(x | z) over images in [0, 1].

        For a Bernoulli decoder, the log-probability leaves out the border that pads MNIST to 32×32.
        A Gaussian decoder has a density over x (in NVAE's code: over 2x - 1, which is smaller by
        log 2 per dimension). The scale of VAEBM's decoder has a lower bound, as in its training;
        ``drawn_scale`` is the scale without the bound, with which its code draws x.
        """
        p_x = self._likelihood(self._logits(state))
        if isinstance(p_x, LogisticMixture):
            return p_x
        if isinstance(p_x, Bernoulli) and self._model.crop_output:
            return InsideBorder(p_x, border=_BORDER)
        return Independent(p_x, 3, validate_args=False)

    @torch.no_grad()
    def self_check(self, x: Any, *, tolerance: float = 1e-6) -> float:  # noqa: ANN401
        """Compares this source with the model's own ``forward`` under the same seed.

        Arguments:
            x: One batch, as the user's loader yields it.
            tolerance: Largest allowed difference, relative to the largest value. On a CPU the two
                are equal; on a GPU, or under autocast, use 1e-3.

        Returns:
            The largest difference between the logits, log q(z | x) and log p(z), absolute.

        Raises:
            ValueError: If the two disagree: the model is not of the layout known here.

        Example:
            >>> from helpers.nvae_standin import nvae
            >>> from ncprior.adapters.nvae import on_cpu
            >>> with on_cpu(nvae()) as model:
            ...     NVAESource(model).self_check(torch.rand(2, 1, 8, 8).round())
            0.0
        """
        require_numbers("[0, inf)", tolerance=tolerance)
        self._require_ready()
        x = self._checked_images(x)
        on_gpu = x.is_cuda
        with seeded(0), nullcontext() if on_gpu else without_cuda():
            logits, log_q, log_p = self._model(x)[:3]
        with seeded(0):
            ours = self._totals(x)
        worst = 0.0
        for name, a, b in zip(("logits", "log q(z|x)", "log p(z)"), ours, (logits, log_q, log_p)):  # noqa: B905
            difference = (a - b).abs().max().item()
            if not difference <= tolerance * max(1.0, b.abs().max().item()):
                raise ValueError(
                    f"The model's forward and this walk disagree: {name} by up to "
                    f"{difference:.3g}. It is not the layout of NVAE that ncprior knows."
                )
            worst = max(worst, difference)
        return worst

    def _totals(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, log q and log p of one draw at temperature 1, summed in the model's order."""
        state = self.start(len(x), self.encode(x))
        log_q, log_p = torch.zeros(2, len(x), device=x.device)
        for _ in range(self.num_groups):
            posterior = self.group(state).posterior
            if isinstance(posterior, FlowedNormal):
                z_0, z, log_det = posterior.draw()
            else:
                z = z_0 = posterior.sample()  # type: ignore[union-attr]
                log_det = torch.zeros_like(z)
            log_q = log_q + (log_normal(z_0, *state.posterior) - log_det).sum([1, 2, 3])  # type: ignore[misc]
            log_p = log_p + log_normal(z, *state.prior).sum([1, 2, 3])  # type: ignore[misc]
            state = self.advance(state, z)
        return self._logits(state), log_q, log_p

    def _front(self, k: int, s: Tensor, skips: tuple[Tensor, ...] | None) -> State:
        """The state in front of group k > 0, where s has arrived at its combiner."""
        model = self._model
        loc_p, log_scale_p = model.dec_sampler[k - 1](s).chunk(2, dim=1)
        posterior, features = None, None
        if skips is not None:
            features = self._joins[k - 1](skips[k - 1], s)
            loc_q, log_scale_q = model.enc_sampler[k](features).chunk(2, dim=1)
            if model.res_dist:  # relative to the prior, before the clamps
                loc_q, log_scale_q = loc_p + loc_q, log_scale_p + log_scale_q
            posterior = clamped(loc_q, log_scale_q)
        prior = clamped(loc_p, log_scale_p)
        return self.State(k, s, prior, posterior, self._shown(features), skips)

    def _shown(self, features: Tensor | None) -> Tensor | None:
        return features if self._model.num_flows else None

    def _flows(self, k: int) -> list[nn.Module]:
        count = self._model.num_flows
        return list(self._model.nf_cells)[k * count : (k + 1) * count]

    def _logits(self, state: State) -> Tensor:
        if state.k < self.num_groups:
            raise ValueError(
                f"Decoding needs every z; this walk stands in front of group {state.k} of "
                f"{self.num_groups}. Call advance(state, z)."
            )
        s = self._model.stem_decoder(state.s) if self._model.vanilla_vae else state.s
        for cell in self._model.post_process:
            s = cell(s)
        logits: Tensor = self._model.image_conditional(s)
        return logits

    def _likelihood(self, logits: Tensor) -> Distribution:
        """p(x | z) of each pixel; for a mixture of logistics, of each image."""
        logits = at_least_float32(logits)
        p_x = self._model.decoder_output(logits)
        if isinstance(p_x, Bernoulli):
            return Bernoulli(logits=logits, validate_args=False)
        if hasattr(p_x, "logit_probs"):
            return LogisticMixture(logits, num_bits=round(math.log2(p_x.max_val + 1)))
        normal = getattr(p_x, "dist1", p_x.dist)  # on [-1, 1]
        return BoundedNormal((normal.mu + 1) / 2, normal.sigma / 2, p_x.dist.sigma / 2)

    def _require_ready(self) -> None:
        require_eval(self.module)
        device = self._model.prior_ftr0.device
        if device.type != "cuda" and any("forward" not in vars(m) for m in self._cuda_only):
            raise ValueError(
                f"The model's SyncBatchNormSwish runs on CUDA only; the model is on {device}. "
                f"Call ncprior.adapters.nvae.on_cpu(model), or move the model to a GPU."
            )
        stray = next((m for m in self._masked if m.mask.device != device), None)
        if stray is not None:
            raise ValueError(
                f"A mask of the flows is on {stray.mask.device}, the model on {device}: model.to "
                f"does not move the masks. For every submodule m with a tensor m.mask, set "
                f"m.mask = m.mask.to({str(device)!r})."
            )

    def _checked_images(self, x: Any) -> Tensor:  # noqa: ANN401
        images = tensor_of_batch(x)
        shape = self._image_shape
        if images.ndim != 4 or images.shape[1:] != shape:
            got = tuple(images.shape)
            remedy = " Pad by 2 on every side." if self._model.crop_output else ""
            raise ValueError(
                f"This NVAE expects images of shape (B, {', '.join(map(str, shape))}); got {got}.{remedy}"
            )
        remedy = "Divide bytes by 255."
        images = floats_of_batch(
            "NVAE", images, remedy, (0, 1), self._model, check=self._require_levels
        )
        return images.to(input_like(self.module))

    def _require_levels(self, images: Tensor) -> None:
        bits = 1 if images.shape[1] == 1 else getattr(self._model, "num_bits", 8)
        levels = 2**bits - 1
        if bits < 8 and bool(((images * levels).round() - images * levels).abs().max() > 1e-3):
            remedy = (
                "Binarise x" if bits == 1 else f"Use (x * 255 // {2 ** (8 - bits)}) / {levels}"
            )
            kind = "a Bernoulli decoder" if bits == 1 else f"{bits} bits"
            raise ValueError(
                f"The model has {kind}: x must be on the levels k/{levels}. {remedy}."
            )


def _stairs(tower: Any) -> Iterator[list[Any]]:  # noqa: ANN401
    """Yields, of every group, the combiner that joins its z and the cells down to the next."""
    kinds = cell_types(tower)
    starts = [i for i, kind in enumerate(kinds) if kind == "combiner_dec"]
    for start, end in pairwise([*starts, len(kinds)]):
        yield list(tower)[start:end]
