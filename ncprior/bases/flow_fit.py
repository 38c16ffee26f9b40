"""Fits of normalizing flows to latents, by maximum likelihood."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from ncprior.bases.checks import contexts_by_row, require_fit
from ncprior.bases.flow import Conditional, Flow, flat_context, log_prob, spline_flow
from ncprior.bases.groups import GroupData, group_data
from ncprior.data.parts import split
from ncprior.data.stream import Stream
from ncprior.source import LatentSource, require_source
from ncprior.utils.optimise import minimise, standardise
from ncprior.utils.random_state import permutation
from ncprior.utils.require import (
    described,
    real_tensor,
    require_finite,
    require_numbers,
)

_ROWS = 4096  # latents per batch of the held-out density

_MODEST = {"transforms": 4, "width": 128, "bins": 8}  # the default flow of fit_flow


def fit_flow(
    latents: Tensor | ArrayLike,
    flow: nn.Module | None = None,
    *,
    context: Tensor | Callable[[Tensor], Tensor] | None = None,
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
        flow: A flow of your own over D standardised numbers, of zuko or normflows; with contexts,
            one of zuko with as many numbers of context, such as ``zuko.mixtures.GMM``. It is trained
            in place and then frozen, and is not saved with the heads; see
            :meth:`ncprior.NCPrior.save_pretrained`.
        context: Contexts of all rows, with shape ``(N, ...)``, or a function of row numbers that
            returns theirs, for a conditional flow p(z | c). A class is best as a one-hot vector.
        steps: Number of optimizer steps.
        batch_size: Rows per batch.
        learning_rate: The first learning rate.
        weight_decay: AdamW's weight decay.
        patience: Held-out losses, one every 100 steps, without progress before it stops;
            ``None`` never stops early.
        progress: Whether to show a progress bar.

    Returns:
        The distribution, on the device of the latents, in the dtype of your flow or else in
        float32. With contexts, it is conditional: ``given(context)`` is that of B rows.

    Raises:
        FloatingPointError: If the held-out mean of log p(z) is not finite.
        ImportError: If no flow is given and zuko is not installed.
        RuntimeError: Inside ``torch.inference_mode``.
        TypeError: If ``flow`` is not a flow of zuko or normflows, another argument has the wrong
            type, or latents are integers: codes of categories have no flow.
        ValueError: If an argument is out of range, there are too few latents or some are not
            finite, the flow is not over D numbers, or contexts are not of these rows.

    References:
        Durkan et al. (2019), with the coupling layers of Dinh et al. (2017).

    Example:
        >>> base = fit_flow(3 + torch.randn(500, 2), steps=20, progress=False)
        >>> bool((base.sample((500,)).mean(0) - 3).abs().max() < 0.5)
        True
    """
    require_fit(
        "fit_flow",
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        patience=patience,
        progress=progress,
    )
    require_numbers("[0, inf)", weight_decay=weight_decay)
    latents = real_tensor("latents", latents, integers=False)
    dtype = torch.float32 if flow is None else _dtype(flow)
    white, loc, scale = standardise(latents, dtype)
    spline = _MODEST if flow is None else None
    contexts = contexts_by_row(context, len(white))
    rows = torch.arange(len(white), device=white.device)
    first = contexts(rows[permutation(len(rows), 0)[:_ROWS].to(rows.device)])
    shape = None if first is None else first.shape[1:]
    count = None if shape is None else shape.numel()
    module = spline_flow(len(loc), count, **_MODEST) if flow is None else flow
    if flow is not None and count is not None:
        module = Conditional(flow, count)
    module.to(white if flow is None else white.device)
    numbers = flat_context(first, white)
    if numbers is not None:
        require_finite("context", numbers)
        _, module.context_loc, module.context_scale = standardise(numbers, dtype)

    def context_of(some: Tensor) -> Tensor | None:
        return flat_context(contexts(some), white)

    def log_p(some: Tensor) -> Tensor:
        return log_prob(module, white[some], context_of(some))

    _check_flow(module, white[:batch_size], context_of(rows[:batch_size]))
    train, held_out = split(rows, 0.05, seed=int(torch.randint(2**31, ())))
    stream = Stream(train, int(batch_size))
    minimise(
        lambda: -log_p(next(stream)).mean(),
        lambda: -torch.cat([log_p(some) for some in held_out.split(_ROWS)]).mean(),
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        patience=patience,
        buffers=list(module.buffers()),
        name="flow",
        progress=progress,
    )
    event = latents.shape[1:]
    return Flow(module, loc, scale, event_shape=event, context_shape=shape, spline=spline)


def fit_flows(
    source: LatentSource[Any, Any],
    data: Any,  # noqa: ANN401
    flow: Callable[[int, int], nn.Module] | None = None,
    **options: Any,  # noqa: ANN401
) -> list[Flow]:
    """Normalizing flows p'(z_k | c_k) for all groups of a VAE, each given the context of its group.

    A flow is fitted to one draw of z_k ~ q(z_k | z_<k, x) and its context per row of the data. For a
    VAE with one group and a condition, the flow is p'(z | c). Where the VAE's own prior of a group
    with a context is N(μ, σ²), the flow is one of (z_k - μ) / σ: it starts from the own prior, and
    does not have to learn μ and σ again.

    Arguments:
        source: The VAE.
        data: Training data, as for :func:`ncprior.bases.latents_of`.
        flow: Makes a flow of your own for a group, from its numbers of latents and of context, such
            as ``lambda d, c: zuko.mixtures.GMM(d, c, components=10)``; see :func:`fit_flow`.
        options: Further arguments of :func:`fit_flow`, such as ``steps``.

    Returns:
        One base per group, for :func:`ncprior.bases.rebase`.

    Raises:
        TypeError: If latents are codes, or an argument has the wrong type.
        ValueError: If an argument is out of range, or the data have too few rows.

    Example:
        >>> from ncprior.bases import rebase
        >>> bases = fit_flows(source, torch.randn(99, 3), steps=5, progress=False)
        >>> closer = rebase(source, bases)
        >>> closer.group(closer.start(4)).prior.sample().shape
        torch.Size([4, 2])
    """
    require_source(source)
    if flow is not None and (isinstance(flow, nn.Module) or not callable(flow)):
        raise TypeError(
            f"Every group needs a flow of its own: flow must be a function of the numbers of latents "
            f"and of context; got {described(flow)}. Pass lambda d, c: {type(flow).__name__}(...)."
        )
    if "context" in options:
        raise TypeError("fit_flows takes the contexts from the source. Leave out context.")

    def fitted(group: GroupData) -> Flow:
        z, context, frame = group
        rows = torch.arange(1, device=z.device)
        count = 0 if context is None else context(rows)[0].numel()
        own = None if flow is None else flow(z[0].numel(), count)
        if frame is None:
            return fit_flow(z, own, context=context, **options)
        mean, sd = frame
        found = fit_flow((z - mean) / sd, own, context=context, **options)
        return Flow(
            *(found.flow, found.loc, found.scale),
            event_shape=found.event_shape,
            context_shape=found.context_shape,
            spline=found.spline,
            is_relative=True,
        )

    return [fitted(group) for group in group_data(source, data)]


def _check_flow(flow: nn.Module, white: Tensor, context: Tensor | None) -> None:
    """Validates a flow by the density of training data, which also initialises some flows."""
    count, d = white.shape
    c = 0 if context is None else context.shape[1]
    try:
        shape = tuple(log_prob(flow, white, context).shape)
    except (AttributeError, TypeError) as error:
        raise TypeError(
            f"A flow is a module of zuko, which returns a distribution, or an object of normflows, "
            f"with log_prob(z) and sample(n); got {type(flow).__name__} ({error})."
        ) from error
    except (AssertionError, IndexError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"The flow must take z of {d} numbers, the flattened latents; it fails ({error}). "
            f"Make a flow of {d} features, {f'with context={c}' if c else 'without context'}."
        ) from error
    if shape != (count,):
        raise ValueError(
            f"The flow must give one log p(z) per row of z, ({count},) for z of {(count, d)}; got "
            f"{shape}."
        )


def _dtype(flow: nn.Module) -> torch.dtype:
    parameters = flow.parameters() if isinstance(flow, nn.Module) else ()
    for parameter in parameters:
        if parameter.requires_grad:
            return parameter.dtype
    raise TypeError(
        f"fit_flow needs a flow that is an nn.Module with trainable parameters; got "
        f"{type(flow).__name__}. Pass a flow of zuko or normflows."
    )
