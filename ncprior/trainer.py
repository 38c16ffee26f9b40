"""Single steps of head training, for a loop of your own; :func:`ncprior.fit` is the whole loop.

Every step draws new z_k ~ q(z_k | z_<k, x) and z_k ~ p(z_k | z_<k) group by group, and
back-propagates one head at a time, so that memory does not grow with the number of groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from ncprior.prior import NCPrior
from ncprior.source import num_rows
from ncprior.utils.batches import map_tensors
from ncprior.utils.distributed import (
    average_over_ranks,
    num_ranks,
    rank,
    require_own_device,
    sum_over_ranks,
    warn_of_equal_noise,
)
from ncprior.utils.gradients import (
    check_parameters,
    gradients_enabled,
    gradients_kept,
    leaves,
    reduce_and_clip,
    require_whole_steps,
    share_weights,
    without_gradients,
    zero_gradients,
)
from ncprior.utils.precision import HALF, check_precision
from ncprior.utils.require import (
    require_callable,
    require_counts,
    require_flags,
    require_instance,
    require_numbers,
)


class StepMetrics(NamedTuple):
    """Metrics of one step, per group.

    Attributes:
        loss: NCE loss at ν = 1 in nats, with shape ``(K,)``.
        grad_norm: Norm of each head's gradient before clipping, with shape ``(K,)``.

    Example:
        >>> StepMetrics(torch.zeros(1), torch.zeros(1))._asdict().keys()
        dict_keys(['loss', 'grad_norm'])
    """

    loss: Tensor
    grad_norm: Tensor


class NCETrainer:
    """Single steps of head training, for a loop of your own.

    When a process group exists, the heads start from rank 0's weights and their gradients are
    averaged over the rows of all ranks. With Accelerate, pass ``backward=accelerator.backward``
    and prepare the optimizer only; with Lightning, use manual optimisation.

    Arguments:
        prior: The prior whose heads are trained; it is put in training mode.
        optimizer: An optimizer of the heads' parameters.
        backward: Back-propagates a loss.
        noise_weight: ν, see :func:`ncprior.nce_loss`.
        num_draws: Draws of z_k per row and step, from posterior and prior each. Several draws make
            better use of a VAE whose encoder and decoder cost more than the heads.
        score_weight: Weight of the score term, see :func:`ncprior.nce.score_loss`, for latents on
            R^n whose posterior and prior have densities.
        max_grad_norm: Largest norm of each head's gradient; ``None`` does not clip.
        precision: Precision of the factors in the heads' matrix products: ``torch.float32`` or
            ``torch.bfloat16``; weights, log r and sums are in float32 in either case.
        group_parallel: Whether the groups are divided among the ranks. Each rank then trains only its
            own heads, on all rows of its batches, and ranks exchange no gradients. A head is then
            up to date only on its :meth:`owner`.

    Raises:
        TypeError: If the prior is no NCPrior, such as one in DataParallel or
            DistributedDataParallel. Pass ``prior.module``.
        ValueError: If the optimizer holds parameters that do not belong to the heads, accumulates
            gradients or scales them, nothing in the heads can be trained, or a number is out of
            range. The message names the remedy.

    Example:
        >>> trainer = NCETrainer(prior, torch.optim.AdamW(prior.parameters(), lr=1e-3))
        >>> for _ in range(3):
        ...     metrics = trainer.step(x)
        >>> metrics.loss.shape
        torch.Size([1])
    """

    def __init__(
        self,
        prior: NCPrior,
        optimizer: torch.optim.Optimizer,
        *,
        backward: Callable[[Tensor], Any] = Tensor.backward,
        noise_weight: float = 1.0,
        num_draws: int = 1,
        score_weight: float = 0.0,
        max_grad_norm: float | None = 5.0,
        precision: torch.dtype = torch.float32,
        group_parallel: bool = False,
    ) -> None:
        require_trainable(prior)
        require_instance(
            "optimizer", optimizer, torch.optim.Optimizer, "Make one of prior.parameters()."
        )
        require_callable("backward", backward, "Pass a function of the loss.")
        require_numbers("(0, inf)", noise_weight=noise_weight)
        require_counts(num_draws=num_draws)
        require_numbers("[0, inf)", score_weight=score_weight)
        require_numbers("(0, inf] or None", max_grad_norm=max_grad_norm)
        check_precision(precision)
        require_flags(group_parallel=group_parallel)
        check_parameters(optimizer, prior, "the heads'", "prior.parameters()")
        require_whole_steps(optimizer)
        self.prior = prior
        self.optimizer = optimizer
        self.backward = backward
        self.noise_weight = noise_weight
        self.num_draws = num_draws
        self.score_weight = score_weight
        self.max_grad_norm = math.inf if max_grad_norm is None else max_grad_norm
        self.precision = precision
        self.group_parallel = group_parallel
        self.steps = 0
        self._vae: list[ref[Tensor]] | None = None  # what features of z reach, after a step
        prior.train()
        share_weights(prior)

    def owner(self, k: int) -> int | None:
        """Returns the only rank that trains head k, or ``None`` if all ranks train it.

        Arguments:
            k: The group, from 0.

        Raises:
            TypeError: If it is not a whole number.
            ValueError: If there is no such group.
        """
        require_counts(f"[0, {len(self.prior.heads) - 1}]", k=k)
        return k % num_ranks() if self.group_parallel else None

    @property
    def groups(self) -> list[int]:
        """The groups whose heads this rank trains."""
        return [k for k in range(len(self.prior.heads)) if self.owner(k) in (None, rank())]

    def step(self, x: Any) -> StepMetrics:  # noqa: ANN401
        """Takes one optimizer step on one batch.

        Arguments:
            x: One batch of B rows, as the user's loader yields it.

        Returns:
            NCE loss in nats and gradient norm per group, averaged over the rows of all ranks.
            Gradients are computed also inside ``torch.no_grad`` and ``torch.inference_mode``.

        Raises:
            ValueError: If the batch is empty, or the loss of a head with parameters has no
                gradient. Look for ``detach`` or ``torch.no_grad`` in its ``forward``.
            FloatingPointError: If a loss or gradient is not finite; the message names group and
                step. The heads are then as they were before the step. Use a lower learning rate.

        Example:
            >>> trainer = NCETrainer(prior, torch.optim.AdamW(prior.parameters()))
            >>> trainer.step(x).loss  # 2 log 2 before the first step
            tensor([1.3863])
        """
        if self.steps == 0 and not self.group_parallel:
            warn_of_equal_noise(stacklevel=3)
        with gradients_enabled():
            return self._step(_usable(x))

    def _step(self, x: Any) -> StepMetrics:  # noqa: ANN401
        for k, head in enumerate(self.prior.heads):
            zero_gradients(head) if k in self.groups else head.zero_grad()
        rows = num_rows(x) if num_ranks() > 1 and not self.group_parallel else 1
        frozen = (known() for known in self._vae or ())  # draws of the first step are gone
        with without_gradients(t for t in frozen if t is not None):
            losses = self._backward(x)
        if self.group_parallel:
            own = torch.stack([losses, self._norms(losses, rows)])
            mean_loss, norms = sum_over_ranks(own.float())  # other ranks' heads may be in float64
        else:
            mean_loss, norms = average_over_ranks(losses, rows), self._norms(losses, rows)
        self._require_finite(mean_loss, norms)
        self.optimizer.step()
        self.steps += 1
        return StepMetrics(mean_loss, norms)

    def _backward(self, x: Any) -> Tensor:  # noqa: ANN401
        """Back-propagates the loss of each group in turn; returns the losses, with shape ``(K,)``."""
        losses: list[Tensor] = []
        groups, reached = self.groups, list[Tensor]()
        for loss in self.prior.group_losses(
            x,
            self.noise_weight,
            self.num_draws,
            score_weight=self.score_weight,
            precision=self.precision,
            groups=groups,
        ):
            k = len(losses)
            if loss.total.requires_grad:
                others = self._others(loss.total)
                with gradients_kept(others):
                    self.backward(loss.total)
                reached += others
            elif k in groups and any(p.requires_grad for p in self.prior.heads[k].parameters()):
                raise ValueError(
                    f"The loss of group {k} has no gradient, although its head has parameters to "
                    f"train. Look for detach() or torch.no_grad in the head's forward."
                )
            losses.append(loss.nce.detach())
        self._vae = list(map(ref, reached)) if self._vae is None else self._vae
        return torch.stack(losses)

    def _others(self, loss: Tensor) -> list[Tensor]:
        """Parameters besides those of the heads that a loss reaches, at the first step.

        They are of the VAE, whose features of z are differentiated in z by the score term.
        """
        if self._vae is not None or not self.score_weight:
            return []
        own = set(map(id, self.prior.parameters()))
        return [t for t in leaves(loss) if id(t) not in own]

    def _norms(self, losses: Tensor, rows: int) -> Tensor:
        """Averages and clips the heads' gradients; returns their norms before clipping."""
        shared = not self.group_parallel
        heads = self.prior.heads
        norms = [
            reduce_and_clip(head, self.max_grad_norm, rows=rows, shared=shared) for head in heads
        ]
        # The norm of a head without gradients is on the CPU.
        return torch.stack([norm.to(losses) for norm in norms])

    def _require_finite(self, losses: Tensor, norms: Tensor) -> None:
        finite = torch.isfinite(losses) & torch.isfinite(norms)
        if not finite.all():  # the one synchronisation of a step
            k = int((~finite).nonzero()[0])
            self.optimizer.zero_grad()
            raise FloatingPointError(
                f"The NCE loss of group {k} is {losses[k].item():.4g} with a gradient norm of "
                f"{norms[k].item():.4g} at step {self.steps}. The heads are as they were before "
                f"this step. Look for NaN or infinity in x, or take a lower learning rate."
            )


def require_trainable(prior: NCPrior) -> None:
    """Validates that the heads of a prior can be trained.

    Raises:
        TypeError: If it is no NCPrior. The message names the remedy.
        ValueError: If no parameter of the heads takes a gradient, or one is in half precision.

    Example:
        >>> require_trainable(prior.requires_grad_(False))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: Heads must have parameters that can be trained; got ...
    """
    if isinstance(prior, DataParallel | DistributedDataParallel):
        raise TypeError(
            f"Training takes the NCPrior itself, not {type(prior).__name__}(prior). It "
            f"back-propagates one group at a time, and DDP would not average those gradients over "
            f"the ranks. NCETrainer averages them itself. Pass prior.module."
        )
    remedy = "Make one of a source by NCPrior.for_source(source, x)."
    parameters = list(require_instance("prior", prior, NCPrior, remedy).parameters())
    if not any(p.requires_grad for p in parameters):
        raise ValueError(
            f"Heads must have parameters that can be trained; got {len(parameters)} parameters, "
            f"none of which requires a gradient. Call prior.requires_grad_(True)."
        )
    if any(p.is_inference() for p in parameters):
        raise ValueError(
            "The parameters of the heads were made under torch.inference_mode and can take no "
            "gradient. Make the prior outside of it."
        )
    low = [p.dtype for p in parameters if p.dtype in HALF]
    if low:
        raise ValueError(
            f"Heads must be trained in float32 or better; got parameters of {low[0]}. Call "
            f"prior.float(), and pass precision=torch.bfloat16 for faster products."
        )
    require_own_device(parameters[0].device)


def _usable(x: Any) -> Any:  # noqa: ANN401
    """Returns a batch with rows, whose tensors autograd can save."""
    rows: list[int] = []

    def usable(tensor: Tensor) -> Tensor:
        rows.extend(tensor.shape[:1])
        return tensor.clone() if tensor.is_inference() else tensor

    x = map_tensors(usable, x)
    if rows and rows[0] == 0:
        raise ValueError("A batch must have 1 or more rows; got 0. Leave out empty batches.")
    return x
