"""The training loop as a service: held-out early stopping, averaged weights, exact resume."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from ncprior.data.device_loader import Loader
from ncprior.data.encodings import CachedEncodings, epochs_to_cache
from ncprior.data.stream import Stream, first_batch, one_pass, split
from ncprior.diagnostics.diagnose import diagnose
from ncprior.heads.product import ProductHead, factors, fresh_head, rescale_head
from ncprior.prior import NCPrior
from ncprior.source import LatentSource, device_of, num_rows
from ncprior.trainer import NCETrainer
from ncprior.training.arguments import validate_fit_arguments
from ncprior.training.engine import drive, fingerprint_of, length_of, load, unchanged
from ncprior.training.heads_run import HeadTraining
from ncprior.training.held_out import HeldOut
from ncprior.training.history import History, Row
from ncprior.training.stages import reweighted, with_cached_proposals
from ncprior.utils.batches import to_device
from ncprior.utils.distributed import align_generators, num_ranks, on_rank_zero, own_seed, rank

_HELD_OUT_FRACTION = 0.05

_STAGE_CACHE = 50_000  # draws of the prior so far, where they can be kept: at most so many,

_DRAWS_PER_ROW = 10  # and so many per row of data, but for

_FEWEST_DRAWS = 5000

_WORTH = 0.02  # nats of Jensen-Shannon divergence that are worth another stage

_MOST_STAGES = 5  # of stages="auto"


def fit(
    prior: NCPrior,
    data: Any,  # noqa: ANN401
    *,
    held_out: Any = None,  # noqa: ANN401
    steps: int = 2000,
    batch_size: int = 256,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-2,
    noise_weight: float = 1.0,
    num_draws: int = 1,
    max_grad_norm: float | None = 5.0,
    ema_decay: float = 0.999,
    eval_every: int = 100,
    patience: int | None = 10,
    gate: bool = False,
    stages: int | Literal["auto"] = 1,
    calibrate: bool = False,
    num_cached_proposals: int | None = None,
    cache_epochs: float | Literal["auto"] | None = "auto",
    cache_memory: float = 4.0,
    precision: torch.dtype = torch.float32,
    batched: bool | None = None,
    group_parallel: bool = False,
    callback: Callable[[Row], Any] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 500,
    progress: bool = True,
) -> History:
    """Trains the heads of a prior, and leaves the VAE as it was.

    AdamW with a cosine schedule to 0; an exponential moving average of the weights is what is
    evaluated and kept, each group at its own best held-out loss. If ``checkpoint`` exists, training
    goes on from it as if it had never stopped: the weights come out the same, bit for bit.

    In several processes with a process group, such as ``torchrun`` starts them, call it in each
    with the same arguments. Rank 0 alone calls back, shows progress and writes the checkpoint.

    Arguments:
        prior: The prior; its heads end up with the kept weights, in evaluation mode.
        data: A tensor or map-style dataset of x, a ``DataLoader``, or any iterable of batches.
        held_out: Data of the same kind for early stopping. By default 5 % of a tensor or map-style
            dataset, taken at random, are held out; other data trains without, with a warning.
        steps: Number of optimizer steps.
        batch_size: Rows per batch, where batches are made here.
        learning_rate: The first learning rate.
        weight_decay: AdamW's weight decay.
        noise_weight: ν, see :func:`ncprior.nce_loss`.
        num_draws: Draws of z_k per row and step, from posterior and prior each. Where the VAE's
            walk costs more than its heads, several make better use of it.
        max_grad_norm: Largest norm of each head's gradient; ``None`` does not clip.
        ema_decay: Decay per step of the weights' moving average, reached after a warm-up.
        eval_every: Steps between rows of the history and held-out losses.
        patience: Evaluations without progress of any group before training stops; ``None`` never
            stops early.
        gate: Whether a group is switched off (``prior.active``) whose head has learnt nothing that
            holds on held-out data: whose best loss is not below 2 log 2, that of no head, by two
            standard errors. The paper does not.
        stages: Heads per group, multiplied: each further one learns what is left between q and
            the prior so far, see :mod:`ncprior.training`, and is kept where it learns something that
            holds on held-out data, as for ``gate``. ``"auto"`` goes on until none has 0.02 nats of
            Jensen-Shannon divergence left to learn: every stage costs as much as the first again.
        calibrate: Whether to rescale each group's log r to a·log r + b, with the a and b that fit
            held-out data best, see :func:`calibrate_heads`.
        num_cached_proposals: So many draws of the base are made once, and used again and again, where
            a base is slow to draw from: for a single group without a context. A tenth more, and at
            least 2,048, are made for the held-out losses. Further stages of such a group keep about
            ten per row of data, from 5,000 to 50,000.
        cache_epochs: For so many epochs, each row of x goes through the VAE once: the parameters of
            its groups are kept, and z_k is drawn anew from them at every step, see
            :mod:`ncprior.data`. With one group only the encoder's work is spared. With more, z_<k
            repeat. ``math.inf`` is once for all, ``None`` never. ``"auto"`` is once where a step's
            distribution stays what it is: for one group, rows of a tensor, and an encoder that
            draws nothing at random.
        cache_memory: GiB of memory for what is kept; if it is more, all of it is on disk, in the
            system's folder for temporary files.
        precision: Of the factors of the heads' products: ``torch.float32`` or ``torch.bfloat16``,
            which is mixed precision: weights, log r and sums stay in float32.
        batched: Whether heads of equal shape in several groups are one computation, whose memory
            grows with the number of groups; by default on a GPU.
        group_parallel: In several processes, whether each of them trains the heads of some groups
            alone, on whole batches, and no gradients are exchanged. Otherwise the rows of every
            batch are dealt out to all, and gradients are averaged.
        callback: Called with each new :class:`Row`; stops training by returning True.
        checkpoint: A file to save to and resume from; further stages have files of their own
            beside it.
        checkpoint_every: Steps between checkpoints.
        progress: Whether to show a progress bar.

    Returns:
        The history of the training.

    Raises:
        FloatingPointError: If a loss is not finite, naming group and step; the heads keep the best
            weights so far.
        ValueError: If the checkpoint belongs to another training, or the arguments do not go
            together.
        TypeError: If the data cannot be read in the way that is asked for, or the heads or the
            base cannot be staged, or the heads calibrated.

    Example:
        >>> history = fit(prior, torch.randn(500, 3), steps=20, progress=False)
        >>> len(history.rows[-1].loss)
        1
    """
    settings = {
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "noise_weight": noise_weight,
        "num_draws": num_draws,
        "max_grad_norm": max_grad_norm,
        "ema_decay": ema_decay,
        "eval_every": eval_every,
        "num_cached_proposals": num_cached_proposals,
        "cache_epochs": cache_epochs,
        "precision": str(precision),
        "batched": batched,
        "VAE": fingerprint_of(prior.source),
        "rows": length_of(data),
        "ranks": num_ranks(),
        "group_parallel": group_parallel,
    }
    validate_fit_arguments(
        *(prior, data, settings),
        stages=stages,
        calibrate=calibrate,
        patience=patience,
        checkpoint_every=checkpoint_every,
    )
    align_generators()
    saved = on_rank_zero(lambda: load(checkpoint))
    # That of another kind of training has none, and is refused by its settings.
    split_seed = int(torch.randint(2**31, ())) if saved is None else saved.get("split_seed", 0)
    train, held_out = _parts(data, held_out, split_seed)
    _check_held_out(held_out, stages, calibrate)
    fitting = _Fitting(
        *(train, held_out, settings, split_seed),
        precision=precision,
        walk_bytes=int(cache_memory * 2**30),
        patience=patience,
        callback=callback,
        checkpoint_every=checkpoint_every,
        progress=progress,
    )
    if num_cached_proposals is not None and not fitting.can_cache(prior.source):
        raise ValueError(
            "num_cached_proposals keeps draws of one prior for all rows: of a source with one group "
            "and without a context. Leave it out."
        )
    with unchanged(prior.source), _evaluating_after(prior):
        history = fitting.train(prior, prior.source, checkpoint, num_cached_proposals)
        if gate:
            off = tuple(k for k, learnt in enumerate(history.has_learnt()) if not learnt)
            prior.active = [on and k not in off for k, on in enumerate(prior.active)]
            history = history._replace(gated=off)
        history = history._replace(stages=tuple(fitting.further(prior, stages, checkpoint)))
        align_generators()
        if calibrate:
            history = history._replace(slopes=calibrate_heads(prior, held_out, batch_size))
    return history


@contextmanager
def _evaluating_after(prior: NCPrior) -> Iterator[None]:
    try:
        yield
    finally:
        prior.eval()


class _Inputs(NamedTuple):
    """A source and its data, to train on and to measure on; and what is done before a batch."""

    source: LatentSource[Any, Any]
    data: Any
    held_out_source: LatentSource[Any, Any] | None = None
    held_out: Any = None
    before: Callable[[int], None] | None = None


@dataclass(frozen=True)
class _Fitting:
    """What all stages of one fit have in common."""

    data: Any
    held_out: Any
    settings: dict[str, Any]
    split_seed: int
    precision: torch.dtype
    walk_bytes: int
    patience: int | None
    callback: Callable[[Row], Any] | None
    checkpoint_every: int
    progress: bool

    def train(
        self,
        prior: NCPrior,
        source: LatentSource[Any, Any],
        checkpoint: str | os.PathLike[str] | None,
        cache: int | None,
        stage: int = 1,
    ) -> History:
        """Trains the heads of a prior against the base of a source, or against draws kept of it."""
        align_generators()
        inputs = self._inputs(source, cache, stage)
        trained = prior if inputs.source is prior.source else NCPrior(inputs.source, prior.heads)
        settings = {**self.settings, "stage": stage}
        names = ("noise_weight", "num_draws", "max_grad_norm", "batched", "group_parallel")
        options = {name: settings[name] for name in names}
        optimizer = torch.optim.AdamW(
            prior.parameters(),
            settings["learning_rate"],
            weight_decay=settings["weight_decay"],
            fused=_can_fuse(prior),
        )
        trainer = NCETrainer(trained, optimizer, precision=self.precision, **options)
        batch_size, saved = settings["batch_size"], on_rank_zero(lambda: load(checkpoint))
        stream = Stream(inputs.data, batch_size, resumable=checkpoint is not None)
        evaluation = None
        if inputs.held_out_source is not None and inputs.held_out is not None:
            measured = NCPrior(inputs.held_out_source, prior.heads)
            groups = trainer.groups if trainer.group_parallel else None
            data = inputs.held_out
            evaluation = HeldOut(data, measured, batch_size, seed=self.split_seed, groups=groups)
        run = HeadTraining(trained, trainer, settings, self.split_seed)
        if saved is not None:
            run.restore(saved, stream)
        elif rank() > 0:  # so far all ranks draw the same; from here on, each its own z
            torch.manual_seed(own_seed(self.split_seed + stage, rank()))
        share = (0, 1) if trainer.group_parallel else (rank(), num_ranks())
        batches = Loader(stream, run.device, share, before=inputs.before, first=trainer.steps)
        self._loop(run, batches, evaluation, checkpoint)
        return run.history()

    def _inputs(self, source: LatentSource[Any, Any], cache: int | None, stage: int) -> _Inputs:
        """What is trained on and measured on, of draws and walks that are kept where asked for."""
        held_out_source = source
        if cache is not None:
            source, held_out_source = with_cached_proposals(source, cache, self.split_seed + stage)
        epochs = epochs_to_cache(source, self.data, self.settings, stage)
        if epochs is None:
            return _Inputs(source, self.data, held_out_source, self.held_out)
        walks = self._keep(source, self.data)
        inputs = _Inputs(walks.source, walks, before=walks.renewal(epochs))
        if self.held_out is None:
            return inputs
        held_out = self._keep(held_out_source, self.held_out)
        return inputs._replace(held_out_source=held_out.source, held_out=held_out)

    def _keep(self, source: LatentSource[Any, Any], data: Any) -> CachedEncodings:  # noqa: ANN401
        size = self.settings["batch_size"]
        return CachedEncodings(
            source, data, batch_size=size, seed=self.split_seed, budget=self.walk_bytes
        )

    def _loop(
        self,
        run: HeadTraining,
        batches: Loader,
        evaluation: HeldOut | None,
        checkpoint: str | os.PathLike[str] | None,
    ) -> None:
        def look() -> str:
            row = run.record(evaluation)
            run.decide(row, self.patience, self.callback)
            return _summary(row)

        stage = run.settings["stage"]
        drive(
            *(run, batches, run.step, look),
            name="heads" if stage == 1 else f"heads of stage {stage}",
            checkpoint=checkpoint,
            checkpoint_every=self.checkpoint_every,
            progress=self.progress,
        )

    def further(
        self,
        prior: NCPrior,
        stages: int | Literal["auto"],
        checkpoint: str | os.PathLike[str] | None,
    ) -> Iterator[History]:
        """Trains further stages, and multiplies in the heads that have learnt something."""
        most = _MOST_STAGES if stages == "auto" else stages
        for stage in range(2, most + 1):
            new = NCPrior(prior.source, map(fresh_head, prior.heads))
            path = None if checkpoint is None else f"{os.fspath(checkpoint)}.stage{stage}"
            cache = self._stage_cache() if self.can_cache(prior.source) else None
            history = self.train(new, reweighted(prior), path, cache, stage)
            learnt = history.has_learnt(_WORTH if stages == "auto" else 0.0)
            kept = [on and has for on, has in zip(prior.active, learnt, strict=True)]
            history = history._replace(kept=tuple(kept))
            for k in (k for k, keep in enumerate(kept) if keep):
                prior.heads[k] = ProductHead([*factors(prior.heads[k]), new.heads[k]]).eval()
            yield history
            if not any(kept):
                return

    def _stage_cache(self) -> int:
        batch_size = self.settings["batch_size"]
        batches = length_of(one_pass(self.data, batch_size))
        wanted = math.inf if batches is None else _DRAWS_PER_ROW * batches * batch_size
        return int(min(_STAGE_CACHE, max(_FEWEST_DRAWS, wanted)))

    def can_cache(self, source: LatentSource[Any, Any]) -> bool:
        """Whether all rows have the same prior, so that its draws can be kept."""
        if source.num_groups > 1:
            return False
        x = first_batch(self.data, self.settings["batch_size"])
        device = device_of(source)
        with torch.no_grad():
            encoding = source.encode(to_device(x, device))
            group = source.group(source.start(num_rows(encoding), encoding))
        return group.context is None


def calibrate_heads(
    prior: NCPrior,
    held_out: Any,  # noqa: ANN401
    batch_size: int = 256,
) -> tuple[float, ...]:
    """Rescales each group's log r to a·log r + b, with the a and b that fit held-out data best.

    Arguments:
        prior: The prior; its heads are changed in place.
        held_out: Data that no head was trained on, as for :func:`ncprior.diagnostics.diagnose`.
        batch_size: Rows per batch, where batches are made here.

    Returns:
        The slope a per group: below 1 where a head was over-confident; 1 where there is no fit, and
        the head is left as it was.

    Raises:
        TypeError: If a head has no method ``rescale(slope, offset)``.

    References:
        | On Calibration of Modern Neural Networks (Guo et al., 2017), temperature scaling

    Example:
        >>> calibrate_heads(prior, torch.randn(100, 3))  # a new head's log r is 0
        (1.0,)
    """
    slopes = []
    for group in diagnose(prior, held_out, batch_size=batch_size).groups:
        slope = group.slope if group.slope > 0 else 1.0
        if slope != 1:
            rescale_head(prior.heads[group.group], slope, group.offset)
        slopes.append(slope)
    return tuple(slopes)


def _check_held_out(held_out: Any, stages: int | Literal["auto"], calibrate: bool) -> None:  # noqa: ANN401
    if held_out is None and (stages == "auto" or calibrate):
        name = "calibrate=True" if calibrate else "stages='auto'"
        raise ValueError(f"{name} goes by held-out data, and there is none. Pass held_out=.")


def _parts(data: Any, held_out: Any, seed: int) -> tuple[Any, Any]:  # noqa: ANN401
    """The training and the held-out part of what the user gave."""
    if held_out is not None:
        return data, held_out
    parts = split(data, _HELD_OUT_FRACTION, seed)
    if parts is None:
        warnings.warn(
            f"Nothing is held out of {type(data).__name__}: overfitting will go unseen. "
            f"Pass held_out= for early stopping.",
            stacklevel=3,
        )
    return parts or (data, None)


def _can_fuse(prior: NCPrior) -> bool:
    """Whether AdamW has a fused step for these weights: some five times as fast on a CPU."""
    tensors = list(prior.parameters())
    fusable = {"cpu", "cuda"}
    return bool(tensors) and all(
        p.device.type in fusable and p.is_floating_point() for p in tensors
    )


def _summary(row: Row) -> str:
    text = f"NCE {sum(row.loss) / len(row.loss):.3f}"
    if row.held_out is not None:
        text += f", held out {sum(row.held_out) / len(row.held_out):.3f}"
    return text
