"""What any training here has in common: schedule, moving average, checkpoint, exact resume."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from ncprior.data.device_loader import Loader
from ncprior.data.stream import Stream
from ncprior.saving.codec import pack, unpack
from ncprior.saving.tensors import load_tensors, save_tensors
from ncprior.utils.distributed import gather, rank
from ncprior.utils.random_state import random_state, set_random_state


class Stepper(Protocol):
    """A trainer: takes a step, and counts them."""

    steps: int
    optimizer: torch.optim.Optimizer


class ResumableTraining:
    """The state of one training: all that a checkpoint holds.

    Arguments:
        owner: What is put into training and evaluation mode.
        module: What of it is trained, averaged and saved.
        trainer: Takes the steps.
        settings: What must be the same for a checkpoint to be taken up: ``steps``, ``ema_decay``,
            ``learning_rate`` and any more.
    """

    def __init__(
        self, owner: nn.Module, module: nn.Module, trainer: Stepper, settings: dict[str, Any]
    ) -> None:
        self.owner, self.module, self.settings = owner, module, settings
        self.stepper = trainer
        self.device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self.average = weights_of(module)
        self.rows: list[Any] = []
        self.steps_since_row = 0
        self.stopped: str | None = None
        self.seconds, self.since = 0.0, time.perf_counter()

    def next_batch(self, batches: Loader) -> Any:  # noqa: ANN401
        """Sets the learning rate, a cosine to 0, and returns a batch; None stops the training."""
        total, taken = self.settings["steps"], self.stepper.steps
        for group in self.stepper.optimizer.param_groups:
            progress = math.pi * taken / total
            group["lr"] = 0.5 * self.settings["learning_rate"] * (1 + math.cos(progress))
        try:
            return next(batches)
        except StopIteration:
            self.stopped = f"data used up after {taken} of {total} steps"
            return None

    def stepped(self) -> None:
        """Moves the average, after a step; stops after the last one."""
        t, total = self.stepper.steps, self.settings["steps"]
        self.steps_since_row += 1
        self._update_average(min(self.settings["ema_decay"], (1 + t) / (10 + t)))
        if t == total:
            self.stopped = f"all {total} steps taken"

    def elapsed(self) -> float:
        """Seconds of this training, those before an interruption included."""
        now = time.perf_counter()
        self.seconds, self.since = self.seconds + now - self.since, now
        return self.seconds

    def kept(self) -> Mapping[str, Tensor]:
        """The weights that the training ends with."""
        return self.average

    def collect(self) -> None:
        """Makes the weights on every rank what they are on the rank that trains them."""

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state, of all weights."""
        state: dict[str, Any] = self.stepper.optimizer.state_dict()
        return state

    @contextmanager
    def training(self) -> Iterator[None]:
        """Training mode; on leaving, however, the kept weights, and evaluation mode."""
        self.owner.train()
        try:
            yield
        finally:
            kept = self.kept()
            for name, tensor in self.module.state_dict().items():
                tensor.copy_(kept[name])
            self.stepper.optimizer.zero_grad()
            self.owner.eval()

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds besides the place in the data and the generators."""
        return {
            "settings": self.settings,
            "steps": self.stepper.steps,
            "weights": dict(self.module.state_dict()),
            "average": self.average,
            "optimizer": self.optimizer_state(),
            "rows": [tuple(row) for row in self.rows],
            "steps_since_row": self.steps_since_row,
            "stopped": self.stopped,
            "seconds": self.elapsed(),
        }

    def save(self, path: str | os.PathLike[str], batches: Loader) -> None:
        """Writes a checkpoint, on rank 0, of what all ranks have."""
        self.collect()
        place = {"stream": batches.state(), "generators": gather(random_state())}
        state = {**self.state(), **place}
        if rank() == 0:
            tree, tensors = pack(state)
            save_tensors(path, tensors, {"kind": "checkpoint", "state": tree})

    def restore(self, saved: dict[str, Any], stream: Stream) -> None:
        """Takes up a training where a checkpoint left it.

        Raises:
            ValueError: If it belongs to another training.
        """
        for name, now in self.settings.items():
            if saved["settings"].get(name) != now:
                raise ValueError(
                    f"The checkpoint belongs to a training with {name}="
                    f"{saved['settings'].get(name)}; got {name}={now}. Pass the same data and "
                    f"settings, or another checkpoint file."
                )
        if _shapes(self.module.state_dict()) != _shapes(saved["weights"]):
            raise ValueError(
                "The checkpoint holds weights of other shapes than these heads or this energy. "
                "Build them as they were, or pass another checkpoint file."
            )
        self.module.load_state_dict(saved["weights"])
        for name, tensor in self.average.items():
            tensor.copy_(saved["average"][name])
        self.stepper.optimizer.load_state_dict(saved["optimizer"])
        self.stepper.steps = saved["steps"]
        self.steps_since_row = saved["steps_since_row"]
        self.stopped, self.seconds = saved["stopped"], saved["seconds"]
        if self.stopped is None:
            stream.restore(saved["stream"])
        set_random_state(saved["generators"][rank()])

    @torch.no_grad()
    def _update_average(self, decay: float) -> None:
        for name, tensor in self.module.state_dict().items():
            if tensor.is_floating_point():
                self.average[name].lerp_(tensor, 1 - decay)
            else:
                self.average[name].copy_(tensor)


def drive(
    run: ResumableTraining,
    batches: Loader,
    step: Callable[[Loader], None],
    look: Callable[[], str],
    *,
    name: str,
    checkpoint: str | os.PathLike[str] | None,
    checkpoint_every: int,
    progress: bool,
) -> None:
    """Steps until a training stops, looks at it, and writes checkpoints.

    Arguments:
        run: The training.
        batches: Its batches.
        step: Takes one step.
        look: Adds a row every ``eval_every`` steps and at the end; says in short what it is.
        name: What is trained, for the progress bar.
        checkpoint: A file to save to, or ``None``.
        checkpoint_every: Steps between checkpoints.
        progress: Whether to show a progress bar.
    """
    total, every = run.settings["steps"], run.settings["eval_every"]
    bar = tqdm(
        total=total, initial=run.stepper.steps, desc=name, disable=not progress or rank() > 0
    )
    with run.training(), bar:
        while run.stopped is None:
            step(batches)
            taken = run.stepper.steps
            bar.update(taken - bar.n)
            if run.steps_since_row and (taken % every == 0 or run.stopped is not None):
                bar.set_postfix_str(look())
            due = taken % checkpoint_every == 0 or run.stopped is not None
            if checkpoint is not None and due:
                run.save(checkpoint, batches)
        run.collect()


def load(path: str | os.PathLike[str] | None) -> dict[str, Any] | None:
    """Reads what a checkpoint holds; ``None`` if there is no file.

    Raises:
        ValueError: If the file is no checkpoint.
    """
    if path is None or not Path(path).exists():
        return None
    tensors, metadata = load_tensors(path)
    if metadata.get("kind") != "checkpoint":
        raise ValueError(f"{os.fspath(path)} is not a checkpoint of fit. Pass another file.")
    state: dict[str, Any] = unpack(metadata["state"], tensors)
    return state


def fingerprint_of(source: Any) -> str | None:  # noqa: ANN401
    """Returns a source's own fingerprint of its VAE, where it has one."""
    fingerprint: str | None = source.fingerprint()
    return fingerprint


def length_of(data: Any) -> int | None:  # noqa: ANN401
    """Returns the length of data that has one."""
    try:
        return len(data)
    except TypeError:
        return None


@contextmanager
def unchanged(source: Any) -> Iterator[None]:  # noqa: ANN401
    """Holds a source to its fingerprint, where it has one.

    Raises:
        RuntimeError: If the VAE is another on leaving.
    """
    before = fingerprint_of(source)
    yield
    if fingerprint_of(source) != before:
        raise RuntimeError(
            "The VAE has changed during training, although nothing here changes it. Does its "
            "encoder, or a callback, write to parameters or buffers?"
        )


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Returns a copy of a module's state."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
