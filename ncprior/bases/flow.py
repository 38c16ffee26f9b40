r"""Normalizing flows as base priors: modules of zuko, or objects of normflows.

    source = rebase(source, fit_flow(latents_of(source, x)))

A flow f maps standardised latents w to noise, so that
log p(z) = log N(f(w); 0, I) + log |det ∂f/∂w| + log |∂w/∂z|. It fits curved densities better than
a mixture, and it has a density, so that Langevin dynamics can refine draws of SIR.

References:
    | Neural Spline Flows (Durkan et al., NeurIPS 2019) https://arxiv.org/abs/1906.04032
    | Density Estimation Using Real NVP (Dinh et al., ICLR 2017), coupling layers
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from numpy.typing import ArrayLike
from torch import Size, Tensor, nn
from torch.distributions import Distribution, constraints

from ncprior.bases.checks import flattened, own_floats, size_of
from ncprior.data.stream import Stream, split
from ncprior.utils.gradients import require_grad_mode
from ncprior.utils.optimise import minimise, standardise
from ncprior.utils.require import (
    described,
    real_tensor,
    require_counts,
    require_finite,
    require_flags,
    require_instance,
    require_numbers,
    require_positive,
)
from ncprior.utils.states import differences

_ROWS = 4096  # latents per batch of the held-out density

_MOST_MASKS = 16  # entries of the masks per saved weight

_MODEST = {"transforms": 4, "width": 128, "bins": 8}  # the default flow of fit_flow


class Flow(Distribution):
    """A normalizing flow over latents of any event shape, of empty batch shape.

    Arguments:
        flow: The flow of flat, standardised latents; it is frozen. A flow of zuko is a module that
            returns a distribution; a flow of normflows has ``log_prob(z)`` and ``sample(n)``,
            which returns a pair.
        loc: Means of the latents, with shape ``(D,)``.
        scale: Standard deviations of the latents, with shape ``(D,)``.
        event_shape: Shape of z without batch, D numbers in all; ``(D,)`` if ``None``.
        spline: Sizes of the neural spline flow that :func:`fit_flow` makes; ``None`` for any other
            flow, which is not saved with the heads.

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

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(
        self,
        flow: nn.Module,
        loc: Tensor,
        scale: Tensor,
        *,
        event_shape: Sequence[int] | None = None,
        spline: Mapping[str, int] | None = None,
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
        if not _is_flow(flow):
            raise TypeError(
                f"flow must be a flow of zuko, which returns a distribution, or of normflows, with "
                f"log_prob(z) and sample(n); got {described(flow)}."
            )
        self.flow = flow.eval().requires_grad_(False)
        self.loc, self.scale = loc, scale
        self.spline = None if spline is None else dict(spline)
        super().__init__(Size(), event, validate_args=False)

    @property
    def support(self) -> constraints.Constraint:
        """All of R^D."""
        return constraints.independent(constraints.real, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Flow:  # noqa: ANN401
        """Returns the distribution of independent rows, which share the flow."""
        new = copy.copy(self)
        new._batch_shape = Size(batch_shape)
        return new

    @torch.no_grad()
    def sample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: ANN401, B008
        """Draws z, with shape ``(*sample_shape, *batch, *event)``."""
        shape = self._extended_shape(size_of(sample_shape))
        white = _draw(self.flow, shape[: len(shape) - len(self.event_shape)].numel())
        return (self.loc + self.scale * white).reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(z) in nats, in the flow's dtype, with shape ``(*sample_shape, *batch)``."""
        flat, lead = flattened(value, self.event_shape, self.loc.device)
        if len(flat) == 0:  # which flows cannot reshape
            return self.loc.new_empty(lead)
        log_p = _log_prob(self.flow, (flat.to(self.loc.dtype) - self.loc) / self.scale)
        return (log_p - self.scale.log().sum()).reshape(lead)

    def config(self) -> dict[str, Any] | None:
        """Returns the configuration to save, ready for JSON; ``None`` for a flow of your own."""
        if self.spline is None:
            return None
        return {"event_shape": list(self.event_shape), "spline": self.spline}

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
        _check_sizes(len(loc), sum(t.numel() for t in weights.values()), **config["spline"])
        flow = _spline_flow(len(loc), **config["spline"])
        if wrong := differences(flow.state_dict(), weights, "flow."):
            raise ValueError(f"its tensors are others; {wrong}")
        flow.load_state_dict(weights, assign=True)
        return cls(flow, loc, scale, **config)

    def to(self, device: torch.device | str) -> Flow:
        """Returns the distribution with its tensors on a device."""
        new = copy.copy(self)
        new.flow = copy.deepcopy(self.flow).to(device)
        new.loc, new.scale = self.loc.to(device), self.scale.to(device)
        return new


def fit_flow(
    latents: Tensor | ArrayLike,
    flow: nn.Module | None = None,
    *,
    steps: int = 2000,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-4,
    patience: int | None = 10,
    progress: bool = True,
) -> Flow:
    """Normalizing flow fitted to latents by maximum likelihood.

    5 % of the latents are held out for early stopping. The flow keeps the moving average of the
    weights. The default is a neural spline flow of coupling layers: samples and densities cost one
    pass per layer, for any number of latents. An autoregressive flow needs D passes per sample,
    which makes SIR with hundreds of proposals slow.

    Arguments:
        latents: z, with shape ``(N, *event)``, such as those of :func:`ncprior.bases.latents_of`:
            floating-point numbers, as a tensor, an array or a list.
        flow: A flow of your own over D standardised numbers, of zuko or normflows. It is trained
            in place and then frozen, and is not saved with the heads; see
            :meth:`ncprior.NCPrior.save_pretrained`.
        steps: Number of optimizer steps.
        batch_size: Rows per batch.
        learning_rate: The first learning rate.
        weight_decay: AdamW's weight decay.
        patience: Held-out losses, one every 100 steps, without progress before it stops;
            ``None`` never stops early.
        progress: Whether to show a progress bar.

    Returns:
        The distribution, on the device of the latents, in the dtype of your flow or else in
        float32.

    Raises:
        FloatingPointError: If the held-out mean of log p(z) is not finite.
        ImportError: If no flow is given and zuko is not installed.
        RuntimeError: Inside ``torch.inference_mode``.
        TypeError: If ``flow`` is not a flow of zuko or normflows, another argument has the wrong
            type, or latents are integers: codes of categories have no flow.
        ValueError: If an argument is out of range, there are too few latents or some are not
            finite, or the flow is not over D numbers.

    References:
        Durkan et al. (2019), with the coupling layers of Dinh et al. (2017).

    Example:
        >>> base = fit_flow(3 + torch.randn(500, 2), steps=20, progress=False)
        >>> bool((base.sample((500,)).mean(0) - 3).abs().max() < 0.5)
        True
    """
    require_counts(batch_size=batch_size)
    require_counts("[0, inf)", steps=steps)
    require_counts("[1, inf) or None", patience=patience)
    require_numbers("(0, inf)", learning_rate=learning_rate)
    require_numbers("[0, inf)", weight_decay=weight_decay)
    require_flags(progress=progress)
    require_grad_mode("fit_flow")
    latents = real_tensor("latents", latents, integers=False)
    dtype = torch.float32 if flow is None else _dtype(flow)
    white, loc, scale = standardise(latents, dtype)
    spline = _MODEST if flow is None else None
    module = _spline_flow(len(loc), **_MODEST) if flow is None else flow
    module.to(white.device)
    _check_flow(module, white[:batch_size])
    train, held_out = split(white, 0.05, seed=int(torch.randint(2**31, ())))
    stream = Stream(train, int(batch_size))
    minimise(
        lambda: -_log_prob(module, next(stream)).mean(),
        lambda: -torch.cat([_log_prob(module, z) for z in held_out.split(_ROWS)]).mean(),
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        patience=patience,
        name="flow",
        progress=progress,
    )
    return Flow(module, loc, scale, event_shape=latents.shape[1:], spline=spline)


def _spline_flow(features: int, *, transforms: int, width: int, bins: int) -> nn.Module:
    """Neural spline flow of coupling layers, each with its own random split of the latents."""
    try:
        from zuko.flows import NSF
    except ImportError as error:
        raise ImportError(
            f"A spline flow needs zuko ({error}): pip install 'ncprior[flows]'"
        ) from error
    sizes = {"transforms": transforms, "hidden_features": (width, width), "bins": bins}
    flow: nn.Module = NSF(features, passes=2, randperm=features > 2, **sizes)
    return flow


def _check_sizes(features: int, numbers: int, *, transforms: int, width: int, bins: int) -> None:
    """Validates that a spline flow has no more weights than a file, before memory is allocated.

    zuko builds masks on the CPU, with ``features`` columns and one row per parameter of a spline.
    """
    rows = features * (3 * bins - 1)
    if transforms * width * (width + rows) > numbers or features * rows > _MOST_MASKS * numbers:
        raise ValueError(f"a flow of these sizes has more than the {numbers:,} saved weights")


def _dtype(flow: nn.Module) -> torch.dtype:
    parameters = flow.parameters() if isinstance(flow, nn.Module) else ()
    for parameter in parameters:
        if parameter.requires_grad:
            return parameter.dtype
    raise TypeError(
        f"fit_flow needs a flow that is an nn.Module with trainable parameters; got "
        f"{type(flow).__name__}. Pass a flow of zuko or normflows."
    )


def _is_flow(flow: Any) -> bool:  # noqa: ANN401
    try:
        distribution = flow if hasattr(flow, "log_prob") else flow()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return False
    return hasattr(distribution, "log_prob") and hasattr(distribution, "sample")


def _check_flow(flow: nn.Module, white: Tensor) -> None:
    """Validates a flow by the density of training data, which also initialises some flows."""
    count, d = white.shape
    try:
        shape = tuple(_log_prob(flow, white).shape)
    except (AttributeError, TypeError) as error:
        raise TypeError(
            f"A flow is a module of zuko, which returns a distribution, or an object of normflows, "
            f"with log_prob(z) and sample(n); got {type(flow).__name__} ({error})."
        ) from error
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"The flow must take z of {d} numbers, the flattened latents; it fails ({error}). "
            f"Make a flow of {d} features, without context."
        ) from error
    if shape != (count,):
        raise ValueError(
            f"The flow must give one log p(z) per row of z, ({count},) for z of {(count, d)}; got "
            f"{shape}."
        )


def _log_prob(flow: Any, white: Tensor) -> Tensor:  # noqa: ANN401
    distribution = flow if hasattr(flow, "log_prob") else flow()
    log_p: Tensor = distribution.log_prob(white)
    return log_p


def _draw(flow: Any, count: int) -> Tensor:  # noqa: ANN401
    white: Tensor
    if hasattr(flow, "log_prob"):
        white, _ = flow.sample(count)
    else:
        white = flow().sample((count,))
    return white
