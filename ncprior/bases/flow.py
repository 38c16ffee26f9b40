r"""Normalizing flows as base priors: modules of zuko, or objects of normflows.

    source = rebase(source, fit_flow(latents_of(source, x)))
    source = rebase(source, fit_flows(source, x))  # several groups: p'(z_k | c_k) of each

A flow f maps standardised latents w to noise, so that
log p(z) = log N(f(w); 0, I) + log |det ∂f/∂w| + log |∂w/∂z|. It fits curved densities better than
a mixture, and it has a density, so that Langevin dynamics can refine draws of SIR. With a context c,
f depends on it too: p(z | c).

References:
    | Neural Spline Flows (Durkan et al., NeurIPS 2019) https://arxiv.org/abs/1906.04032
    | Density Estimation Using Real NVP (Dinh et al., ICLR 2017), coupling layers
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn
from torch.distributions import constraints

from ncprior.bases.checks import flattened, own_floats, size_of
from ncprior.bases.conditional import ConditionalBase
from ncprior.bases.groups import frame_of
from ncprior.utils.require import (
    described,
    require_finite,
    require_flags,
    require_instance,
    require_positive,
)
from ncprior.utils.states import differences

_MOST_MASKS = 16  # entries of the masks per saved weight


class Flow(ConditionalBase):
    """A normalizing flow over latents of any event shape, of empty batch shape.

    Arguments:
        flow: The flow of flat, standardised latents; it is frozen. A flow of zuko is a module that
            returns a distribution; a flow of normflows has ``log_prob(z)`` and ``sample(n)``,
            which returns a pair.
        loc: Means of the latents, with shape ``(D,)``.
        scale: Standard deviations of the latents, with shape ``(D,)``.
        event_shape: Shape of z without batch, D numbers in all; ``(D,)`` if ``None``.
        context_shape: Shape of the context without batch, for a flow of zuko that has one of so
            many numbers: a conditional distribution, whose ``given(context)`` is that of B rows.
        spline: Sizes of the neural spline flow that :func:`fit_flow` makes; ``None`` for any other
            flow, which is not saved with the heads.
        is_relative: Whether it is a flow of (z - μ) / σ, with the VAE's own prior N(μ, σ²) of each
            row, which :meth:`given` then needs; only with contexts.

    Raises:
        TypeError: If ``flow`` is not a flow, or ``loc`` or ``scale`` are not real numbers.
        ValueError: If the shapes do not fit, a value is not finite, or a scale is not positive.

    Example:
        >>> import zuko
        >>> p = Flow(zuko.flows.MAF(4), torch.zeros(4), torch.ones(4), event_shape=(2, 2))
        >>> z = p.expand((3,)).sample((5,))
        >>> z.shape, p.expand((3,)).log_prob(z).shape
        (torch.Size([5, 3, 2, 2]), torch.Size([5, 3]))
    """

    def __init__(
        self,
        flow: nn.Module,
        loc: Tensor,
        scale: Tensor,
        *,
        event_shape: Sequence[int] | None = None,
        context_shape: Sequence[int] | None = None,
        spline: Mapping[str, int] | None = None,
        is_relative: bool = False,
    ) -> None:
        require_instance("flow", flow, nn.Module, "Pass a flow of zuko or normflows.")
        loc, scale = own_floats("loc", loc), own_floats("scale", scale)
        event = loc.shape if event_shape is None else size_of(event_shape, "event_shape")
        if loc.ndim != 1 or scale.shape != loc.shape or event.numel() != len(loc):
            raise ValueError(
                f"A flow takes loc and scale of shape (D,), with an event shape of D numbers; got "
                f"{tuple(loc.shape)}, {tuple(scale.shape)} and {tuple(event)}."
            )
        require_finite("loc", loc)
        require_positive("scale", scale)
        shape = None if context_shape is None else size_of(context_shape, "context_shape")
        if not _is_flow(flow, None if shape is None else loc.new_zeros(1, shape.numel())):
            raise TypeError(
                f"flow must be a flow of zuko, which returns a distribution, or of normflows, with "
                f"log_prob(z) and sample(n); got {described(flow)} and context_shape="
                f"{None if shape is None else tuple(shape)}."
            )
        require_flags(is_relative=is_relative)
        if is_relative and shape is None:
            raise ValueError("A flow relative to a prior of each row needs contexts; got none.")
        self.flow = flow.eval().requires_grad_(False)
        self.is_relative = is_relative
        self.frame: tuple[Tensor, Tensor] | None = None  # μ and σ of the rows, (B, D) each
        self.loc, self.scale = loc, scale
        self.spline = None if spline is None else dict(spline)
        super().__init__(event, shape)

    @property
    def support(self) -> constraints.Constraint:
        """All of R^D."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def given(self, context: Tensor | None, prior: Any = None) -> Flow:  # noqa: ANN401
        """Returns the distribution of B rows with contexts of shape ``(B, ...)``.

        Arguments:
            context: The contexts.
            prior: The VAE's own prior of these rows, if the flow is relative to it.

        Raises:
            TypeError: If the context is no tensor of real numbers, or the flow is relative and the
                prior is no Gaussian with independent latents.
            ValueError: If the flow takes no context, or one of another shape, or the prior has
                other rows.
        """
        new = super().given(context)
        if not self.is_relative:
            return new
        frame = frame_of(prior)
        if frame is None:
            raise TypeError(
                f"This flow is relative to the VAE's own prior, a Gaussian with independent latents; "
                f"got {described(prior)}. Pass group.prior of the VAE that it was fitted on."
            )
        if frame[0].shape != new.batch_shape + new.event_shape:
            raise ValueError(
                f"The prior must have the shape of z, {tuple(new.batch_shape + new.event_shape)}; got "
                f"{tuple(frame[0].shape)}."
            )
        new.frame = (frame[0].flatten(1).to(self.loc), frame[1].flatten(1).to(self.loc))
        return new

    @torch.no_grad()
    def sample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: ANN401, B008
        """Draws z, with shape ``(*sample_shape, *batch, *event)``."""
        shape = self._extended_shape(size_of(sample_shape))
        lead = shape[: len(shape) - len(self.event_shape)]
        white = draw(self.flow, lead.numel(), self._contexts(lead))
        loc, scale = self._affine()
        return (loc + scale * white.reshape(*lead, len(self.loc))).reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(z) in nats, in the flow's dtype, with shape ``(*sample_shape, *batch)``."""
        flat, lead = flattened(value, self.event_shape, self.loc.device)
        context = self._contexts(lead)
        if len(flat) == 0:  # which flows cannot reshape
            return self.loc.new_empty(lead)
        loc, scale = self._affine()
        white = (flat.to(loc.dtype).reshape(*lead, len(self.loc)) - loc) / scale
        log_p = log_prob(self.flow, white.reshape(flat.shape), context)
        return log_p.reshape(lead) - scale.log().sum(-1)

    def _affine(self) -> tuple[Tensor, Tensor]:
        """Loc and scale of z = loc + scale · w, ``(D,)``, or ``(B, D)`` relative to a prior."""
        if self.frame is None:
            return self.loc, self.scale
        mean, sd = self.frame
        return mean + sd * self.loc, sd * self.scale

    def _contexts(self, lead: Size) -> Tensor | None:
        """The context of every latent of z with shape ``(*lead, *event)``, flat."""
        self._require_rows(lead)
        context = flat_context(self.context, self.loc)
        return None if context is None else context.expand(*lead, -1).reshape(lead.numel(), -1)

    def config(self) -> dict[str, Any] | None:
        """Returns the configuration to save, ready for JSON; ``None`` for a flow of your own."""
        if self.spline is None:
            return None
        config: dict[str, Any] = {
            "event_shape": list(self.event_shape),
            "spline": self.spline,
        }
        if self.context_shape is not None:
            config |= {
                "context_shape": list(self.context_shape),
                "is_relative": self.is_relative,
            }
        return config

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors by name."""
        flow = {f"flow.{name}": t for name, t in self.flow.state_dict().items()}
        return {"loc": self.loc, "scale": self.scale, **flow}

    @classmethod
    def rebuild(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Flow:
        """Builds the flow from its :meth:`config` and :meth:`tensors`.

        Raises:
            ImportError: If zuko is not installed.
            KeyError: If a tensor or a setting is missing.
            ValueError: If a tensor of the flow is missing, unknown or of another shape or dtype.
        """
        weights = {n.removeprefix("flow."): t for n, t in tensors.items()}
        loc, scale = weights.pop("loc"), weights.pop("scale")
        shape = config.get("context_shape")
        context = None if shape is None else size_of(shape, "context_shape").numel()
        sizes = config["spline"]
        _check_sizes(len(loc), sum(t.numel() for t in weights.values()), context or 0, **sizes)
        flow = spline_flow(len(loc), context, **sizes)
        if wrong := differences(flow.state_dict(), weights, "flow."):
            raise ValueError(f"its tensors are others; {wrong}")
        flow.load_state_dict(weights, assign=True)
        return cls(flow, loc, scale, **config)

    def to(self, device: torch.device | str) -> Flow:
        """Returns the distribution with its tensors on a device."""
        new = copy.copy(self)
        new.flow = copy.deepcopy(self.flow).to(device)
        new.loc, new.scale = self.loc.to(device), self.scale.to(device)
        new.context = None if self.context is None else self.context.to(device)
        if self.frame is not None:
            new.frame = (self.frame[0].to(device), self.frame[1].to(device))
        return new


class Conditional(nn.Module):
    """Flow of zuko whose contexts are standardised.

    Arguments:
        flow: The flow, of C numbers of context.
        count: C.
    """

    context_loc: Tensor
    context_scale: Tensor

    def __init__(self, flow: nn.Module, count: int) -> None:
        super().__init__()
        self.flow = flow
        self.register_buffer("context_loc", torch.zeros(count))
        self.register_buffer("context_scale", torch.ones(count))

    def forward(self, context: Tensor) -> Any:  # noqa: ANN401
        """Returns the distribution of rows of contexts, with shape ``(N, C)``."""
        return self.flow((context - self.context_loc) / self.context_scale)


def flat_context(context: Tensor | None, like: Tensor) -> Tensor | None:
    """Returns contexts as rows of numbers, with shape ``(B, C)``, in dtype and device of a tensor."""
    if context is None:
        return None
    return (context.flatten(1) if context.ndim > 1 else context[:, None]).to(like)


def spline_flow(
    features: int, context: int | None, *, transforms: int, width: int, bins: int
) -> nn.Module:
    """Neural spline flow of coupling layers, each with its own random split of the latents."""
    try:
        from zuko.flows import NSF
    except ImportError as error:
        raise ImportError(
            f"A spline flow needs zuko ({error}): install ncprior's extra 'flows' "
            f"(pip install '.[flows]' in the clone)."
        ) from error
    sizes = {"transforms": transforms, "hidden_features": (width, width), "bins": bins}
    flow: nn.Module = NSF(features, context or 0, passes=2, randperm=features > 2, **sizes)
    return flow if context is None else Conditional(flow, context)


def _check_sizes(
    features: int, numbers: int, context: int, *, transforms: int, width: int, bins: int
) -> None:
    """Validates that a spline flow has no more weights than a file, before memory is allocated.

    zuko builds masks on the CPU, with ``features`` columns and one row per parameter of a spline.
    """
    rows = features * (3 * bins - 1)
    weights = transforms * width * (width + rows + context)
    if weights > numbers or features * rows > _MOST_MASKS * numbers:
        raise ValueError(f"a flow of these sizes has more than the {numbers:,} saved weights")


def _is_flow(flow: Any, context: Tensor | None) -> bool:  # noqa: ANN401
    try:
        distribution = _given(flow, context)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return hasattr(distribution, "log_prob") and hasattr(distribution, "sample")


def _given(flow: Any, context: Tensor | None) -> Any:  # noqa: ANN401
    """The distribution of a flow of zuko, or a flow of normflows itself."""
    if context is not None:
        return flow(context)
    return flow if hasattr(flow, "log_prob") else flow()


def log_prob(flow: Any, white: Tensor, context: Tensor | None) -> Tensor:  # noqa: ANN401
    log_p: Tensor = _given(flow, context).log_prob(white)
    return log_p


def draw(flow: Any, count: int, context: Tensor | None) -> Tensor:  # noqa: ANN401
    white: Tensor
    if context is not None:
        white = flow(context).sample()
    elif hasattr(flow, "log_prob"):
        white, _ = flow.sample(count)
    else:
        white = flow().sample((count,))
    return white
