"""Optimisation: cosine schedule, moving average, descent with early stopping, a plain loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from ncprior.utils.gradients import gradients_enabled
from ncprior.utils.require import (
    require_callable,
    require_counts,
    require_flags,
    require_instance,
    require_numbers,
)

_EVAL_EVERY = 100  # steps between held-out losses

_EMA_DECAY = 0.999  # per step, reached after a warm-up

_MAX_GRAD_NORM = 5.0

_TINY = 1e-30  # a standard deviation, beside a mean of 0, that is none


def cosine_rate(learning_rate: float, taken: int, steps: int) -> float:
    """Returns the learning rate of the next step, on a cosine from ``learning_rate`` to 0.

    Arguments:
        learning_rate: The first learning rate.
        taken: Number of steps taken so far.
        steps: Number of all steps.
    """
    return 0.5 * float(learning_rate) * (1 + math.cos(math.pi * taken / steps))


@torch.no_grad()
def update_average(
    average: Iterable[Tensor], tensors: Iterable[Tensor], decay: float, step: int
) -> None:
    """Moves an exponential moving average towards tensors, in place, after a step.

    Arguments:
        average: The averages; integers are copied instead.
        tensors: The tensors, in the same order.
        decay: Decay per step; at most (1 + step) / (10 + step), which is a warm-up.
        step: Number of the step, from 1.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    for mean, tensor in zip(average, tensors, strict=True):
        if tensor.is_floating_point():
            mean.lerp_(tensor, weight)
        else:
            mean.copy_(tensor)


def one_if_constant(spread: Tensor, centre: Tensor) -> Tensor:
    """Returns standard deviations, with 1 for those that are of rounding alone.

    Arguments:
        spread: Standard deviations.
        centre: Means, of the same shape and dtype.

    Example:
        >>> x = torch.stack([torch.full((9,), 0.7), torch.arange(9) / 10], 1)
        >>> one_if_constant(x.std(0), x.mean(0))
        tensor([1.0000, 0.2739])
    """
    rounding = 8 * torch.finfo(centre.dtype).eps * centre.abs() + _TINY
    return torch.where(spread > rounding, spread, 1.0)


def standardise(z: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Flattens latents and gives each mean 0 and standard deviation 1.

    Arguments:
        z: Latents, with shape ``(N, *event)``.
        dtype: Dtype of the result.

    Returns:
        The flat, standardised latents, ``(N, D)``, their means and their standard deviations, both
        ``(D,)``; the standard deviation of a constant is taken to be 1.

    Raises:
        ValueError: If the latents have no event axis, fewer than two rows, or values that are not
            finite.
    """
    if z.ndim < 2 or len(z) < 2:
        raise ValueError(
            f"A base is fitted to latents of shape (N, *event), N at least 2; got "
            f"{tuple(z.shape)}. Encode data by latents_of(source, x)."
        )
    flat = z.detach().reshape(len(z), -1).to(dtype)
    centre, spread = flat.mean(0), flat.std(0)
    if not torch.isfinite(centre + spread).all():
        raise ValueError(
            "Some latents, or their means or standard deviations, are not finite. Look for NaN, "
            "infinity or huge numbers in the output of the encoder."
        )
    spread = one_if_constant(spread, centre)
    return (flat - centre) / spread, centre, spread


def minimise(
    loss: Callable[[], Tensor],
    held_out: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float = 0.0,
    patience: int | None = 10,
    max_seconds: float | None = None,
    buffers: Sequence[Tensor] = (),
    project: Callable[[], object] | None = None,
    name: str = "fit",
    progress: bool = False,
) -> float:
    """Minimises a loss in place, and keeps the parameters with the lowest held-out loss.

    The optimizer is AdamW with clipped gradients and a cosine schedule to 0. As in
    :func:`ncprior.fit`, a moving average of the parameters is evaluated and kept; the first
    candidate is the initial values.

    Arguments:
        loss: Draws a batch and returns its mean loss, a scalar.
        held_out: Returns the held-out loss, a deterministic function of the parameters.
        parameters: The parameters; no other tensor gets a gradient.
        steps: Number of steps.
        learning_rate: The first learning rate.
        weight_decay: AdamW's weight decay.
        patience: Held-out losses, one every 100 steps, without progress before training stops;
            ``None`` never stops early.
        max_seconds: Seconds after which training stops at the next held-out loss, or ``None``.
        buffers: Tensors that the loss changes, such as statistics of batches; those of the lowest
            held-out loss are kept with the parameters.
        project: Called after each step, to project the parameters onto a set. It must be convex,
            so that averages of parameters stay in it.
        name: Name of the fitted model, for the progress bar and for errors.
        progress: Whether to show a progress bar.

    Returns:
        The lowest held-out loss.

    Raises:
        FloatingPointError: If a held-out loss is not finite; the parameters are the best so far.
        TypeError: If a number is of the wrong type. The message names the remedy.
        ValueError: If a number is out of range. The message names the range.
    """
    require_counts("[0, inf)", steps=steps)
    require_counts("[1, inf) or None", patience=patience)
    require_numbers("(0, 1e18)", learning_rate=learning_rate)  # float32 takes no more
    require_numbers("[0, inf)", weight_decay=weight_decay)
    require_numbers("(0, inf] or None", max_seconds=max_seconds)
    end = math.inf if max_seconds is None else time.monotonic() + max_seconds
    require_flags(progress=progress)
    with gradients_enabled():
        optimizer = torch.optim.AdamW(parameters, learning_rate, weight_decay=weight_decay)
        best = _Best(parameters, buffers, held_out, name)
        with (
            gradients_enabled(),
            best.kept(),
            tqdm(total=steps, desc=name, disable=not progress) as bar,
        ):
            for step in range(1, steps + 1):
                optimizer.param_groups[0]["lr"] = cosine_rate(learning_rate, step - 1, steps)
                _step(optimizer, loss, parameters)
                if project is not None:
                    project()
                update_average(best.mean, parameters, _EMA_DECAY, step)
                bar.update()
                if step % _EVAL_EVERY == 0 or step == steps:
                    since = best.evaluate(step)
                    bar.set_postfix_str(f"held-out {best.loss:.3f}")
                    waited = patience is not None and since >= patience * _EVAL_EVERY
                    if waited or time.monotonic() >= end:
                        break
    return best.loss


def _step(
    optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], parameters: Sequence[Tensor]
) -> None:
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        # The gradient of a sum is one number expanded, which cannot be clipped in place.
        parameter.grad = None if gradient is None else gradient.contiguous()
    torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRAD_NORM)
    optimizer.step()


class _Best:
    """Moving average of the parameters, and its values at the lowest held-out loss."""

    def __init__(
        self,
        parameters: Sequence[Tensor],
        buffers: Sequence[Tensor],
        held_out: Callable[[], Tensor],
        name: str,
    ) -> None:
        self.parameters, self.buffers = parameters, buffers
        self.held_out, self.name = held_out, name
        # Evaluated before it is copied: some layers initialise themselves on their first batch.
        self.step, self.loss = 0, self._loss(0)
        self.best, self.mean = _copy([*parameters, *buffers]), _copy(parameters)

    def evaluate(self, step: int) -> int:
        """Evaluates the average; returns the number of steps since the best one."""
        now = _copy(self.parameters)
        _put(self.parameters, self.mean)
        try:
            loss = self._loss(step)
        finally:
            _put(self.parameters, now)
        if loss < self.loss:
            self.step, self.loss = step, loss
            self.best = _copy([*self.mean, *self.buffers])
        return step - self.step

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Context that ends, also on an error, with the best parameters, without gradients."""
        try:
            yield
        finally:
            _put([*self.parameters, *self.buffers], self.best)
            for parameter in self.parameters:
                parameter.grad = None

    @torch.no_grad()
    def _loss(self, step: int) -> float:
        loss = self.held_out().item()
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"The held-out loss of the {self.name} is {loss} at step {step}. Take a smaller "
                f"learning_rate, or look for NaN or infinity in the data."
            )
        return loss


def _copy(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def _put(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        if not torch.equal(tensor, value):  # an expanded buffer, which cannot be written to, stays
            tensor.copy_(value)


def train(
    module: nn.Module,
    loss: Callable[[Tensor], Tensor],
    num_rows: int,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float = 2e-3,
    max_grad_norm: float | None = None,
    name: str = "training",
    progress: bool = True,
) -> None:
    """Trains a network by Adam with a cosine schedule, and leaves it in evaluation mode.

    Arguments:
        module: The network.
        loss: Maps the indices of a batch to its loss, a scalar.
        num_rows: Number of rows to take indices from.
        steps: Number of optimizer steps.
        batch_size: Rows per batch.
        learning_rate: The first learning rate.
        max_grad_norm: Largest norm of the gradient; ``None`` does not clip.
        name: Title of the progress bar.
        progress: Whether to show a progress bar.

    Raises:
        TypeError: If an argument is of the wrong type. The message names the remedy.
        ValueError: If a number is out of range. The message names the range.

    Example:
        >>> x, line = torch.randn(100, 1), nn.Linear(1, 1)
        >>> def loss(rows):
        ...     return (line(x[rows]) - 3 * x[rows]).square().mean()
        >>> train(line, loss, 100, steps=100, batch_size=50, learning_rate=0.2, progress=False)
        >>> round(line.weight.item(), 1)
        3.0
    """
    require_instance("module", module, nn.Module, "Pass the network to train.")
    require_callable("loss", loss, "Pass a function of row numbers that returns a scalar.")
    require_counts(num_rows=num_rows, steps=steps, batch_size=batch_size)
    require_numbers("(0, 1e18)", learning_rate=learning_rate)  # float32 takes no more
    require_numbers("(0, inf] or None", max_grad_norm=max_grad_norm)
    require_instance("name", name, str, "Pass a title.")
    require_flags(progress=progress)
    optimizer = torch.optim.Adam(module.parameters(), learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = islice(_shuffled_rows(int(num_rows), int(min(batch_size, num_rows))), steps)
    bar = tqdm(batches, desc=name, total=steps, disable=not progress)
    module.train()
    try:
        with gradients_enabled(), bar:
            for rows in bar:
                optimizer.zero_grad()
                require_instance("loss(rows)", loss(rows), Tensor, "Return a scalar.").backward()
                if max_grad_norm is not None:
                    nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm)
                optimizer.step()
                schedule.step()
    finally:
        optimizer.zero_grad()
        module.eval()


def _shuffled_rows(num_rows: int, batch_size: int) -> Iterator[Tensor]:
    """Yields batches of row indices, epoch after epoch; an incomplete last batch is left out."""
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    while True:
        order = torch.randperm(num_rows, generator=generator, device="cpu")
        for rows in order.split(batch_size):
            if len(rows) == batch_size:
                yield rows
