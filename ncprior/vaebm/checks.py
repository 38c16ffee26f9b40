"""Checks of a model's parts: one device, and gradients that are not cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ncprior.heads.checks import noise_of
from ncprior.source import LatentSource, device_of
from ncprior.vaebm.noise import NoiseMap, Walked


def require_one_device(
    energy: object, source: LatentSource[Any, Any], prior: nn.Module | None
) -> None:
    """Validates that the energy and the heads are on the device of the VAE.

    Raises:
        ValueError: If one of them is not. The message names it.
    """
    device = device_of(source)
    for name, part in (("energy", energy), ("prior", prior)):
        own = next(part.parameters(), None) if isinstance(part, nn.Module) else None
        if own is not None and own.device != device and not own.is_meta:
            raise ValueError(
                f"VAE, heads and energy must be on one device; the VAE draws latents on {device}, "
                f"and {name} is on {own.device}. Call {name}.to({str(device)!r})."
            )


def require_steady_energy(energy: object) -> None:
    """Validates that dropout and batch statistics of an energy are off.

    Raises:
        ValueError: If they are on: the energy is in training mode. Call ``model.eval()``.
    """
    if isinstance(energy, nn.Module) and (noise := noise_of(energy)):
        raise ValueError(
            f"The energy is in training mode and has {noise}, so that E(x) would not be one function "
            f"of x. Call model.eval() first, and model.train() to train on."
        )


def require_gradients(
    walk: NoiseMap,
    energy: Callable[[Tensor], Tensor],
    noise: Sequence[Tensor],
    walked: Walked,
    value: Tensor,
) -> None:
    """Validates that the parts of the target have gradients with respect to their inputs.

    A part without a gradient may be a constant: it is evaluated once more, elsewhere.

    Arguments:
        walk: Map from noise to z and x.
        energy: The energy.
        noise: The noise of the groups and of the decoder, which requires gradients.
        walked: The result of ``walk(noise)``.
        value: The result of ``energy(walked.x)``.

    Raises:
        ValueError: If a part changes with an input and has no gradient with respect to it, as under
            ``torch.no_grad``. The message names the part.
    """
    groups = tuple(noise[: walk.source.num_groups])
    heads = range(0 if walk.prior is None else len(groups))
    has_heads = walk.prior is not None and any(map(walk.prior.is_on, heads))
    cut_mean, cut_heads = _cut(walked.mean, groups), _cut(walked.log_weight, groups)
    (cut_energy,) = _cut(value, [walked.x])
    with torch.no_grad():
        if any(cut_mean) and _differ(walked.mean, walk(_moved(noise, cut_mean)).mean):
            _fail("decoder, or the likelihood", "z", "the decoder, the likelihood or the source")
        if has_heads and any(cut_heads):
            log_weight = walk(_moved(noise, cut_heads)).log_weight
            if _differ(walked.log_weight, log_weight):
                _fail("log-ratio of the heads", "z", "the heads, the features or the source")
        if cut_energy and _differ(value, energy(walked.x + 1)):
            _fail("energy", "x", "the energy")


def _cut(value: Tensor, inputs: Sequence[Tensor]) -> list[bool]:
    """Whether the value has no gradient with respect to each input."""
    if not value.requires_grad:
        return [True] * len(inputs)
    gradients = torch.autograd.grad(value.sum(), inputs, allow_unused=True, retain_graph=True)
    return [gradient is None for gradient in gradients]


def _moved(noise: Sequence[Tensor], which: Sequence[bool]) -> tuple[Tensor, ...]:
    """The noise, elsewhere in some of the groups."""
    moved = [part + 1 if cut else part for part, cut in zip(noise, which, strict=False)]
    return (*moved, *noise[len(which) :])


def _differ(one: Tensor, other: Tensor) -> bool:
    return not torch.allclose(one, other.to(one.dtype), rtol=1e-4, atol=1e-6, equal_nan=True)


def _fail(part: str, of: str, where: str) -> None:
    raise ValueError(
        f"The {part} changes with {of}, but has no gradient with respect to it: Langevin dynamics "
        f"would not see it. Remove torch.no_grad, torch.inference_mode or detach() in {where}."
    )
