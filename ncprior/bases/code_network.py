"""Autoregressive network over a grid of codes as a base prior, fitted by maximum likelihood.

    source = rebase(source, fit_code_network(latents_of(source, x)))

It has an exact log p(z), and draws the codes one after the other, see
:mod:`ncprior.bases.masked_conv`. With a context, such as features of the codes of a coarser grid, it is
the base of a further group of latents.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from numpy.typing import ArrayLike
from torch import Size, Tensor
from torch.distributions import constraints
from torch.nn.functional import cross_entropy

from ncprior.bases.checks import contexts_by_row, require_fit, size_of
from ncprior.bases.codes import checked_codes, event_codes
from ncprior.bases.conditional import ConditionalBase
from ncprior.bases.masked_conv import MaskedConvNet
from ncprior.data.parts import split
from ncprior.data.stream import Stream
from ncprior.utils.optimise import minimise
from ncprior.utils.random_state import permutation
from ncprior.utils.require import (
    require_instance,
    require_numbers,
)
from ncprior.utils.states import differences

_AT_ONCE = 1024  # rows of codes per evaluation

_HELD_OUT = 0.05  # of the rows, for early stopping


class CodeNetwork(ConditionalBase):
    """Autoregressive distribution of a grid of codes, of empty batch shape.

    Arguments:
        network: The network; it is frozen. One with a context makes a conditional distribution:
            ``given(context)`` returns that of as many rows as the context has.

    Raises:
        TypeError: If the network is no ``MaskedConvNet``.

    Example:
        >>> from ncprior.bases import MaskedConvNet
        >>> base = CodeNetwork(MaskedConvNet((4, 4), 512, width=16))
        >>> z = base.expand((3,)).sample((5,))
        >>> z.shape, base.log_prob(z).shape
        (torch.Size([5, 3, 4, 4]), torch.Size([5, 3]))
    """

    is_autoregressive: ClassVar[bool] = True  # slow to draw: one code after another

    def __init__(self, network: MaskedConvNet) -> None:
        remedy = "Make one by fit_code_network(codes)."
        require_instance("network", network, MaskedConvNet, remedy)
        self.network = network.eval().requires_grad_(False)
        super().__init__(network.event_shape, network.context_shape)

    @property
    def num_categories(self) -> int:
        """Number of values of a code."""
        return self.network.num_categories

    @property
    def support(self) -> constraints.Constraint:
        """Whole numbers below the number of values."""
        codes = constraints.integer_interval(0, self.num_categories - 1)
        return constraints.independent(codes, len(self.event_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Any = Size()) -> Tensor:  # noqa: ANN401, B008
        """Draws codes, with shape ``(*sample_shape, *batch, *event)``."""
        shape = self._extended_shape(size_of(sample_shape))
        lead = shape[: len(shape) - len(self.event_shape)]
        rows = 1 if self.context is None else max(1, len(self.context))
        return self.network.draw(lead.numel() // rows, self.context).reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(z) in nats, with shape ``(*sample_shape, *batch)``."""
        codes = event_codes(value, self.event_shape, self.num_categories)
        lead = codes.shape[: codes.ndim - len(self.event_shape)]
        self._require_rows(lead)
        codes = codes.reshape(-1, *self.event_shape)
        found = [self.network.out.weight.new_empty(0)]
        for some in torch.arange(len(codes), device=codes.device).split(_AT_ONCE):
            c = None if self.context is None else self.context[some % len(self.context)]
            found.append(_log_p(self.network, codes[some], c))
        return torch.cat(found).reshape(lead)

    def config(self) -> dict[str, Any]:
        """Returns the sizes of the network, ready for JSON."""
        return self.network.config()

    def tensors(self) -> dict[str, Tensor]:
        """Returns the tensors of the network by name."""
        return dict(self.network.state_dict())

    @classmethod
    def rebuild(cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> CodeNetwork:
        """Builds the distribution from its :meth:`config` and :meth:`tensors`.

        Raises:
            ValueError: If a tensor is missing, unknown or of another shape or dtype.
        """
        with torch.device("meta"):  # no memory before names and shapes are compared
            network = MaskedConvNet(**config)
        if wrong := differences(network.state_dict(), tensors):
            raise ValueError(f"its tensors are others; {wrong}")
        network.load_state_dict(dict(tensors), assign=True)
        return cls(network)

    def to(self, device: torch.device | str) -> CodeNetwork:
        """Returns the distribution with its tensors on a device."""
        new = self._with_batch(self.batch_shape)
        new.network = copy.deepcopy(self.network).to(device)
        new.context = None if self.context is None else self.context.to(device)
        return new


def fit_code_network(
    codes: Tensor | ArrayLike,
    *,
    context: Tensor | Callable[[Tensor], Tensor] | None = None,
    num_categories: int | None = None,
    width: int = 32,
    depth: int = 3,
    kernel_size: int = 5,
    dropout: float = 0.1,
    steps: int = 2000,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
    weight_decay: float = 1e-2,
    patience: int | None = 5,
    max_seconds: float | None = None,
    progress: bool = True,
) -> CodeNetwork:
    """Autoregressive network of masked convolutions, fitted to codes by maximum likelihood.

    5 % of the rows are held out for early stopping. The network keeps the moving average of the
    weights.

    Arguments:
        codes: Whole numbers from 0, with shape ``(N, *event)`` of up to three event axes, such as
            those of :func:`ncprior.bases.latents_of`, as a tensor, an array or a list.
        context: Contexts of all rows, with shape ``(N, ...)``, or a function of row numbers that
            returns theirs; ``None`` without a context.
        num_categories: V, the number of values of a code; ``None`` takes the largest code plus 1.
        width: Features of the hidden layers.
        depth: Number of layers after the first.
        kernel_size: Side of the windows of the convolutions, an odd number.
        dropout: Dropout probability of hidden features, while training.
        steps: Number of optimizer steps.
        batch_size: Rows per batch.
        learning_rate: The first learning rate.
        weight_decay: AdamW's weight decay.
        patience: Held-out losses, one every 100 steps, without progress before it stops;
            ``None`` never stops early.
        max_seconds: Seconds after which training stops at the next held-out loss, or ``None``.
        progress: Whether to show a progress bar.

    Returns:
        The distribution, on the device of the codes.

    Raises:
        FloatingPointError: If the held-out loss is not finite.
        RuntimeError: Inside ``torch.inference_mode``.
        TypeError: If an argument has the wrong type, or the codes are no whole numbers.
        ValueError: If an argument is out of range, there are too few rows, a code is out of range,
            or the contexts are not of these rows.

    References:
        | Conditional Image Generation with PixelCNN Decoders (van den Oord et al., NeurIPS 2016)

    Example:
        >>> left = torch.randint(4, (500, 1))
        >>> base = fit_code_network(left.repeat(1, 2), width=16, steps=100, progress=False)
        >>> z = base.sample((100,))
        >>> bool((z[:, 0] == z[:, 1]).float().mean() > 0.8)
        True
    """
    require_fit(
        "fit_code_network",
        steps=steps,
        batch_size=batch_size,
        learning_rate=learning_rate,
        patience=patience,
        progress=progress,
    )
    require_numbers("(0, inf] or None", max_seconds=max_seconds)
    require_numbers("[0, inf)", weight_decay=weight_decay)
    codes, count = checked_codes(codes, num_categories)
    context_of = contexts_by_row(context, len(codes))
    first = context_of(permutation(len(codes), 0)[:_AT_ONCE].to(codes.device))
    network = MaskedConvNet(
        codes.shape[1:],
        count,
        context_shape=None if first is None else first.shape[1:],
        width=width,
        depth=depth,
        kernel_size=kernel_size,
        dropout=dropout,
    ).to(codes.device)
    if first is not None and network.context is not None:
        network.context.scale.fit(first)
    rows = torch.arange(len(codes), device=codes.device)
    train, held_out = split(rows, _HELD_OUT, seed=int(torch.randint(2**31, ())))
    stream = Stream(train, int(batch_size))
    places = max(1, codes[0].numel())

    def loss(some: Tensor) -> Tensor:
        return -_log_p(network, codes[some], context_of(some)) / places

    def of_batch() -> Tensor:
        network.train()
        return loss(next(stream)).mean()

    def of_held_out() -> Tensor:
        network.eval()
        return torch.cat([loss(some) for some in held_out.split(_AT_ONCE)]).mean()

    minimise(
        of_batch,
        of_held_out,
        list(network.parameters()),
        steps=steps,
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        patience=patience,
        max_seconds=max_seconds,
        name="network over codes",
        progress=progress,
    )
    return CodeNetwork(network)


def _log_p(network: MaskedConvNet, codes: Tensor, context: Tensor | None) -> Tensor:
    """log p of rows of codes, in nats."""
    logits = network(codes, context).movedim(-1, 1)
    nats = cross_entropy(logits, codes, reduction="none")
    return -nats.reshape(len(codes), -1).sum(1)
