"""Training loop of heads and energies: schedule, moving average, checkpoint, exact resume."""

from __future__ import annotations

import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from ncprior.data.device_loader import Loader
from ncprior.data.generators import own_generators
from ncprior.data.stream import Stream
from ncprior.saving.codec import pack, unpack
from ncprior.saving.tensors import load_tensors, save_tensors
from ncprior.training.checkpoints import (
    Validators,
    are_generators,
    fits_loader,
    fits_optimizer,
    fits_stream,
    is_duration,
    is_finite,
    is_like,
    is_plain,
    is_step,
    require_valid,
)
from ncprior.training.history import to_table
from ncprior.training.settings import TrainingTerms
from ncprior.utils.distributed import gather, num_ranks, on_rank_zero, rank
from ncprior.utils.optimise import cosine_rate, update_average
from ncprior.utils.random_state import random_state, set_random_state
from ncprior.utils.states import tensors_of
from ncprior.utils.texts import printable

BY_CALLBACK = "stopped by the callback"  # and by nothing else: a checkpoint goes on


def is_true(answer: object) -> bool:
    """Returns whether the answer of a callback is true, also as one of NumPy or torch.

    Example:
        >>> is_true(np.mean([1, 2]) < 3), is_true(torch.tensor(True)), is_true(1), is_true(None)
        (True, True, False, False)
    """
    if isinstance(answer, Tensor):
        return answer.dtype == torch.bool and answer.numel() == 1 and bool(answer)
    return isinstance(answer, bool | np.bool_) and bool(answer)


class Stepper(Protocol):
    """A trainer that counts its steps."""

    steps: int
    optimizer: torch.optim.Optimizer


class ResumableTraining(ABC):
    """Training as a template method: :meth:`run` is the loop, and a subclass takes the steps.

    A subclass overrides :meth:`step` and :meth:`evaluate`, and extends :meth:`state`,
    :meth:`validators` and :meth:`restore` by its own part of a checkpoint.

    Arguments:
        owner: The module that is put into training and evaluation mode.
        module: The part of it that is trained, averaged and saved.
        trainer: The trainer, which counts the steps.
        terms: The terms; a checkpoint is resumed only under equal terms.
        name: Name of the trained part, for the progress bar.
    """

    def __init__(
        self,
        owner: nn.Module,
        module: nn.Module,
        trainer: Stepper,
        terms: TrainingTerms[Any],
        name: str,
    ) -> None:
        self.owner, self.module, self.terms, self.name = owner, module, terms, name
        self.stepper = trainer
        self.device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self.average = weights_of(module)
        self.rows: list[Any] = []
        self.steps_since_row = 0
        self.stopped: str | None = None
        self.seconds, self.since = 0.0, time.perf_counter()
        self.begun = 0.0, 0  # seconds and steps before the loop of this process

    @abstractmethod
    def step(self, x: Any) -> None:  # noqa: ANN401
        """Takes one step on a batch; may stop the training."""

    @abstractmethod
    def row_width(self) -> int:
        """Returns how many numbers a row of the history has."""

    @abstractmethod
    def evaluate(self) -> str:
        """Adds a row to the history and returns its short summary; may stop the training."""

    def run(
        self,
        batches: Loader,
        *,
        checkpoint: str | os.PathLike[str] | None,
        checkpoint_every: int,
        progress: bool,
    ) -> None:
        """Trains until the training stops, with evaluations and checkpoints in between.

        Arguments:
            batches: The batches.
            checkpoint: A file to save to, or ``None``.
            checkpoint_every: Steps between checkpoints.
            progress: Whether to show a progress bar.
        """
        bar = tqdm(
            total=self.last,
            initial=self.stepper.steps,
            desc=self.name,
            unit=" steps",
            disable=not progress or rank() > 0,
        )
        self.begun = self.elapsed(), self.stepper.steps
        with self.training(), bar:
            while self.stopped is None:
                self._advance(batches)
                taken = self.stepper.steps
                bar.total = self.last
                bar.update(taken - bar.n)
                evaluates = taken % self.terms.eval_every == 0 or self.stopped is not None
                if self.steps_since_row and evaluates:
                    bar.set_postfix_str(self.evaluate())
                due = taken % checkpoint_every == 0 or self.stopped is not None
                if checkpoint is not None and due:
                    self.save(checkpoint, batches)
            self.collect()

    @property
    def last(self) -> int | None:
        """Number of all steps, as far as it is decided."""
        return self.terms.steps

    def rate(self, taken: int) -> float:
        """Returns the learning rate of the next step, on a cosine to 0."""
        return cosine_rate(self.terms.learning_rate, taken, int(self.terms.steps or 1))

    def ending(self, taken: int) -> str | None:
        """Returns the reason why training ends after so many steps; ``None`` if it goes on."""
        return f"all {taken} steps taken" if taken >= (self.last or math.inf) else None

    def most_steps(self, saved: Mapping[str, Any]) -> int:
        """Returns the largest number of steps that a checkpoint can have taken."""
        return int(self.terms.steps or 0)

    def elapsed(self) -> float:
        """Returns the seconds of this training, including those before an interruption."""
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now
        return self.seconds

    def kept(self) -> Mapping[str, Tensor]:
        """Returns the weights that the training ends with."""
        return self.average

    def collect(self) -> None:  # noqa: B027  # a hook: one process has nothing to do
        """Copies to every rank the weights of the rank that trains them."""

    def optimizer_state(self) -> dict[str, Any]:
        """Returns the state of the optimizer, for all weights."""
        state: dict[str, Any] = self.stepper.optimizer.state_dict()
        return state

    @contextmanager
    def training(self) -> Iterator[None]:
        """Training mode inside; afterwards, also on an error, kept weights and evaluation mode."""
        self.owner.train()
        try:
            yield
        finally:
            kept = self.kept()
            for name, tensor in tensors_of(self.module).items():
                tensor.copy_(kept[name])
            self.stepper.optimizer.zero_grad()
            self.owner.eval()

    def state(self) -> dict[str, Any]:
        """Content of a checkpoint, without the position in the data and the generators."""
        return {
            "settings": self.terms.stored(),
            "steps": self.stepper.steps,
            "weights": dict(self.module.state_dict()),
            "average": self.average,
            "optimizer": self.optimizer_state(),
            "rows": to_table(self.rows, self.row_width()),
            "steps_since_row": self.steps_since_row,
            "stopped": self.stopped,
            "seconds": self.elapsed(),
        }

    def save(self, path: str | os.PathLike[str], batches: Loader) -> None:
        """Writes a checkpoint of all ranks' states, on rank 0."""
        self.collect()
        loader = [generator.get_state() for generator in own_generators(batches.stream.loader)]
        place = {"stream": batches.state(), "loader": loader, "generators": gather(random_state())}
        state = {**self.state(), **place}

        def write() -> None:
            tree, tensors = pack(state)
            save_tensors(path, tensors, {"kind": "checkpoint", "state": tree})

        on_rank_zero(write)

    def validators(self, saved: Mapping[str, Any], stream: Stream) -> Validators:
        """Returns a check of each entry of a checkpoint.

        Arguments:
            saved: The checkpoint; whether the training has stopped, and when, decides on others.
            stream: The data.
        """
        weights, optimizer = dict(self.module.state_dict()), self.stepper.optimizer
        most = self.most_steps(saved)
        last: int = saved["steps"] if is_step(saved.get("steps"), most) else 0
        # One that has stopped may have diverged, and is not continued.
        trains = saved.get("stopped") is None
        return {
            "steps": lambda value: is_step(value, most),
            "steps_since_row": lambda value: is_step(value, last),
            "stopped": lambda value: value is None or isinstance(value, str),
            "seconds": is_duration,
            "weights": lambda v: is_like(v, weights) and (not trains or is_finite(v)),
            "average": lambda v: is_like(v, self.average) and (not trains or is_finite(v)),
            "optimizer": lambda v: not trains or fits_optimizer(v, optimizer, last),
            "stream": lambda v: not trains or fits_stream(v, stream, last),
            "loader": lambda value: fits_loader(value, stream),
            "generators": lambda value: are_generators(value, num_ranks()),
        }

    def restore(self, saved: dict[str, Any], stream: Stream) -> None:
        """Resumes a training from a checkpoint, after all of it has been checked.

        Hyperparameters of the optimizer stay: they belong to the terms.

        Raises:
            ValueError: If the checkpoint is damaged or belongs to another training. Nothing has
                changed then.
        """
        try:
            self.terms.require_equal(saved["settings"])
        except ValueError as error:
            raise ValueError(printable(str(error))) from None
        require_valid(saved, self.validators(saved, stream))
        self.stopped = None if saved["stopped"] is None else printable(saved["stopped"])
        for generator, own in zip(own_generators(stream.loader), saved["loader"], strict=True):
            generator.set_state(own)  # a further stage begins with it
        if self.stopped is None:
            stream.restore(saved["stream"])
            optimizer = self.stepper.optimizer
            own = {**optimizer.state_dict(), "state": saved["optimizer"]["state"]}
            optimizer.load_state_dict(own)
        self.module.load_state_dict(saved["weights"])
        for name, tensor in self.average.items():
            tensor.copy_(saved["average"][name])
        self.stepper.steps = saved["steps"]
        self.steps_since_row, self.seconds = saved["steps_since_row"], saved["seconds"]
        set_random_state(saved["generators"][rank()])

    def _advance(self, batches: Loader) -> None:
        """Sets the learning rate, takes one step and moves the average; stops at the end."""
        terms, taken = self.terms, self.stepper.steps
        for group in self.stepper.optimizer.param_groups:
            group["lr"] = self.rate(taken)
        try:
            x = next(batches)
        except StopIteration:
            of = "" if terms.steps is None else f" of {terms.steps}"
            self.stopped = f"data used up after {taken}{of} steps"
            return
        self.step(x)
        if self.stopped is not None:
            return
        self.steps_since_row += 1
        tensors = tensors_of(self.module).values()
        decay = terms.settings.ema_decay
        update_average(self.average.values(), tensors, decay, self.stepper.steps)
        self.stopped = self.ending(self.stepper.steps)


def load(path: str | os.PathLike[str] | None) -> dict[str, Any] | None:
    """Reads the content of a checkpoint; returns ``None`` if there is no file.

    Raises:
        ValueError: If the file is no checkpoint.
    """
    if path is None or not Path(path).exists():
        return None
    tensors, metadata = load_tensors(path)
    reason = ""
    if metadata.get("kind") == "checkpoint":
        try:
            state: dict[str, Any] = unpack(metadata.get("state"), tensors)
            match state:
                case {"settings": dict(settings)} if is_plain(settings):
                    if is_step(state.get("split_seed", 0), 2**31):
                        return state
        except ValueError as error:
            reason = f": {error}"
    reason = printable(f"{os.fspath(path)} is not a checkpoint of fit{reason}").rstrip(".")
    raise ValueError(f"{reason}. Pass another file.")


def time_limit(path: str | os.PathLike[str] | None, limit: float | None) -> float | None:
    """Returns the limit of a training in seconds: that of its checkpoint, if there is one, else another.

    A checkpoint is resumed under its own limit, which includes the time before the interruption.
    """
    saved = load(path)
    if saved is None:
        return limit
    own = saved["settings"].get("max_seconds")
    return own if own is None or is_duration(own) else limit


def length_of(data: Any) -> int | None:  # noqa: ANN401
    """Returns the length of data, or ``None`` if the data has none."""
    try:
        return len(data)
    except TypeError:
        return None


@contextmanager
def unchanged(source: Any) -> Iterator[None]:  # noqa: ANN401
    """Context that validates that the fingerprint of a source's VAE, if any, stays the same.

    Raises:
        RuntimeError: If the VAE has changed in between.
    """
    before = source.fingerprint()
    yield
    if source.fingerprint() != before:
        raise RuntimeError(
            "The VAE has changed during training, which itself does not change it. Look for an "
            "encoder or a callback that writes to parameters or buffers."
        )


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Returns a copy of a module's tensors."""
    return {name: tensor.detach().clone() for name, tensor in tensors_of(module).items()}
