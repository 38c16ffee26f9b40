"""Frequencies of codes as a base prior, and checks that all bases of codes share.

source = rebase(source, fit_code_frequencies(latents_of(source, x)))
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from numpy.typing import ArrayLike
from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from ncprior.bases.checks import size_of
from ncprior.bases.empirical import NoPrior
from ncprior.utils.require import described, floats, numbers, require_counts

_PSEUDO_COUNTS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)


class NoCodePrior(NoPrior):
    """Placeholder for the prior of a model of codes; sampling raises.

    Arguments:
        num_categories: Number of values of a code.

    Example:
        >>> NoCodePrior(512).sample()
        Traceback (most recent call last):
        ValueError: The codes of this model have no prior. Fit one: rebase(source, fit_code_bases(...
    """

    def __init__(self, num_categories: int) -> None:
        require_counts(num_categories=num_categories)
        super().__init__(
            "The codes of this model have no prior.",
            remedy="rebase(source, fit_code_bases(source, x))",
        )
        self.num_categories = int(num_categories)


class CodeFrequencies(Distribution):
    """Independent codes, each with its own frequencies: of empty batch shape.

    Arguments:
        logits: Log-frequencies of every code, with shape ``(*event, V)`` for V values of a code.

    Raises:
        TypeError: If they are no real numbers.
        ValueError: If they have no axis, or no distribution at a place: NaN, or all -infinity.

    Example:
        >>> base = CodeFrequencies(torch.zeros(4, 4, 512))
        >>> base.expand((3,)).sample((5,)).shape, base.num_categories
        (torch.Size([5, 3, 4, 4]), 512)
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, logits: Tensor) -> None:
        logits = floats("logits", logits).detach()
        fits = logits.ndim > 0 and logits.numel() > 0
        if not (fits and torch.isfinite(logits.logsumexp(-1)).all()):
            raise ValueError(
                f"logits must be numbers of shape (*event, V), one of each place finite and none NaN; "
                f"got {described(logits)}."
            )
        self.logits = logits.clone(memory_format=torch.contiguous_format)
        super().__init__(Size(), logits.shape[:-1], validate_args=False)

    @property
    def num_categories(self) -> int:
        """Number of values of a code."""
        return self.logits.shape[-1]

    @property
    def support(self) -> constraints.Constraint:
        """Whole numbers below the number of values."""
        codes = constraints.integer_interval(0, self.num_categories - 1)
        return constraints.independent(codes, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> CodeFrequencies:  # noqa: ANN401
        """Returns the distribution of independent rows, which share the frequencies."""
        new = copy.copy(self)
        new._batch_shape = Size(batch_shape)
        return new

    def sample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: ANN401, B008
        """Draws codes, with shape ``(*sample_shape, *batch, *event)``."""
        shape = self._extended_shape(size_of(sample_shape))
        lead = shape[: len(shape) - len(self.event_shape)]
        p = self.logits.softmax(-1).reshape(-1, self.num_categories)
        if lead.numel() == 0:
            return torch.empty(shape, dtype=torch.long, device=p.device)
        codes = torch.multinomial(p, lead.numel(), replacement=True)  # (places, draws)
        return codes.mT.reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(z) in nats, with shape ``(*sample_shape, *batch)``."""
        codes = event_codes(value, self.event_shape, self.num_categories)
        lead = codes.shape[: codes.ndim - len(self.event_shape)]
        table = self.logits.log_softmax(-1).expand(*lead, *self.logits.shape)
        log_p = table.gather(-1, codes.unsqueeze(-1)).squeeze(-1)
        return log_p.reshape(*lead, -1).sum(-1)

    def config(self) -> dict[str, Any]:
        """Returns the configuration to save besides the tensors: an empty one."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors by name."""
        return {"logits": self.logits}

    @classmethod
    def rebuild(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> CodeFrequencies:
        """Builds the distribution from its :meth:`config` and :meth:`tensors`.

        Raises:
            KeyError: If the tensor is missing.
            TypeError: If there are other tensors or settings.
        """
        return cls(**tensors, **config)

    def to(self, device: torch.device | str) -> CodeFrequencies:
        """Returns the distribution with its tensors on a device."""
        return CodeFrequencies(self.logits.to(device))


def fit_code_frequencies(
    codes: Tensor | ArrayLike, *, num_categories: int | None = None
) -> CodeFrequencies:
    """Frequencies of the codes at every place of a grid, as independent codes.

    The frequencies of a place are shrunk towards those of all places, by as many pseudo-counts as
    make every row most likely given all other rows.

    Arguments:
        codes: Whole numbers from 0, with shape ``(N, *event)``, such as those of
            :func:`ncprior.bases.latents_of`, as a tensor, an array or a list.
        num_categories: V, the number of values of a code; ``None`` takes the largest code plus 1.

    Returns:
        The distribution, on the device of the codes.

    Raises:
        TypeError: If the codes are no whole numbers.
        ValueError: If there are fewer than two rows, or a code is out of range.

    Example:
        >>> codes = torch.randint(5, (1000, 4, 4))
        >>> base = fit_code_frequencies(codes)
        >>> base.event_shape, round(base.log_prob(codes).mean().item() / 16, 1)  # log 1/5
        (torch.Size([4, 4]), -1.6)
    """
    codes, count = checked_codes(codes, num_categories)
    places = codes.reshape(len(codes), -1)
    offsets = count * torch.arange(places.shape[1], device=codes.device)
    counts = (places + offsets).flatten().bincount(minlength=count * places.shape[1])
    counts = counts.reshape(-1, count).cpu().double()  # MPS has no float64
    pooled = (counts.sum(0) + 1) / (counts.sum() + count)
    found = []
    for pseudo in _PSEUDO_COUNTS:
        others = (counts - 1).clamp(min=0) + pseudo * pooled  # without the row itself
        fit = (counts * (others / (len(codes) - 1 + pseudo)).log()).sum()
        found.append((fit.item(), pseudo))
    _, pseudo = max(found)
    frequencies = (counts + pseudo * pooled) / (len(codes) + pseudo)
    logits = frequencies.log().float().reshape(*codes.shape[1:], count)
    return CodeFrequencies(logits.to(codes.device))


def checked_codes(codes: Any, num_categories: int | None) -> tuple[Tensor, int]:  # noqa: ANN401
    """Returns codes as a tensor of int64, and the number of their values, after a check.

    Arguments:
        codes: Whole numbers, with shape ``(N, *event)``.
        num_categories: The number of values, or ``None`` for the largest code plus 1.

    Raises:
        TypeError: If the codes are no whole numbers.
        ValueError: If there are fewer than two rows, or a code is out of range.
    """
    require_counts("[1, inf) or None", num_categories=num_categories)
    codes = numbers("codes", codes, rows=2).detach()
    if codes.is_floating_point():
        raise TypeError(
            f"codes must be whole numbers; got {described(codes)}. Encode data by "
            f"latents_of(source, x); real numbers have bases such as fit_mixture."
        )
    least, most = (int(end) for end in codes.aminmax())
    count = most + 1 if num_categories is None else int(num_categories)
    if least < 0 or most >= count:
        raise ValueError(
            f"codes must be from 0 to num_categories - 1 = {count - 1}; got codes from {least} to "
            f"{most}."
        )
    return codes.long(), count


def event_codes(value: Any, event_shape: Size, num_categories: int) -> Tensor:  # noqa: ANN401
    """Returns codes of shape ``(*, *event)`` as int64, after a check; waits for a GPU.

    Raises:
        TypeError: If they are no tensor of whole numbers.
        ValueError: If their shape is wrong, or a code is out of range.
    """
    whole = isinstance(value, Tensor) and value.layout is torch.strided
    if not whole or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"z must be a tensor of codes, whole numbers; got {described(value)}.")
    if value.shape[value.ndim - len(event_shape) :] != event_shape or value.ndim < len(
        event_shape
    ):
        raise ValueError(
            f"z must have shape (*, *event) with event shape {tuple(event_shape)}; got "
            f"{tuple(value.shape)}."
        )
    if value.numel() > 0 and not ((value >= 0) & (value < num_categories)).all():
        raise ValueError(f"z must be codes from 0 to {num_categories - 1}; got others.")
    codes: Tensor = value.long()
    return codes
