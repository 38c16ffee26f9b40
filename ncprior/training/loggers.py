"""Callbacks that log each row of a training's history: to a file, TensorBoard or Weights & Biases.

None of them imports the library that it writes to: the writer or the run is the user's.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ncprior.training.arguments import require_writable
from ncprior.utils.require import described, require_instance

_START = b'{"step": '


def log_to_json(path: str | os.PathLike[str]) -> Callable[[Any], None]:
    """Returns a callback that appends each row of a training to a file, as one line of JSON.

    The keys of a line are the fields of the row; a value that is NaN or infinite becomes ``null``.
    A training that resumes from its checkpoint repeats the rows after the checkpoint: a row that
    the file already holds, seconds aside, is not written again.

    Arguments:
        path: The file; it is made if it does not exist. Lines in it stay. A last line that was cut
            off, as when a job is killed, is removed before the next row.

    Raises:
        TypeError: If the path is none.
        ValueError: If the file holds something else than such rows. Pass another path.
        OSError: If the file cannot be written.

    Example:
        >>> from ncprior import fit
        >>> log = log_to_json(getfixture("tmp_path") / "log.jsonl")
        >>> history = fit(prior, torch.randn(500, 3), steps=20, callback=log, progress=False)
    """
    require_instance("path", path, (str, os.PathLike), "Pass the path of a file.")
    file = Path(path)
    require_writable("path", file)
    content = file.read_bytes() if file.exists() else b""
    end = content.rfind(b"\n") + 1
    written = {_known(fields) for fields in _rows(file, content[:end], content[end:])}
    is_cut = end < len(content)

    def log(row: Any) -> None:  # noqa: ANN401
        nonlocal is_cut
        fields = {name: _finite(value) for name, value in _fields(row).items()}
        if _known(fields) in written:
            return
        if is_cut:
            os.truncate(file, end)
            is_cut = False
        with file.open("ab") as opened:
            opened.write(f"{json.dumps(fields)}\n".encode())
        written.add(_known(fields))

    return log


def log_to_tensorboard(writer: Any, *, section: str = "nce") -> Callable[[Any], None]:  # noqa: ANN401
    """Returns a callback that logs each row of a training as scalars of TensorBoard.

    The scalars are ``nce/group_0/loss`` and ``nce/group_0/held_out`` of each group,
    ``nce/learning_rate`` and ``nce/seconds``; those of the second stage are
    ``nce/stage_2/group_0/loss``, and so on.

    Arguments:
        writer: A ``torch.utils.tensorboard.SummaryWriter``; the user closes it.
        section: The first part of all names.

    Raises:
        TypeError: If the writer has no ``add_scalar``, or the section is no text.

    Example:
        >>> from ncprior import fit
        >>> class Writer:  # in place of SummaryWriter("runs")
        ...     def add_scalar(self, name, value, step):
        ...         print(name, step)
        >>> log = log_to_tensorboard(Writer())
        >>> _ = fit(prior, torch.randn(500, 3), steps=20, callback=log, progress=False)
        nce/group_0/loss 20
        nce/group_0/held_out 20
        nce/learning_rate 20
        nce/seconds 20
    """
    _require_methods("writer", writer, ["add_scalar"], "torch.utils.tensorboard.SummaryWriter()")
    require_instance("section", section, str, "Pass a text such as 'nce'.")

    def log(row: Any) -> None:  # noqa: ANN401
        for name, value in _scalars(row, section).items():
            writer.add_scalar(name, value, row.step)

    return log


def log_to_wandb(run: Any, *, section: str = "nce") -> Callable[[Any], None]:  # noqa: ANN401
    """Returns a callback that logs each row of a training to a run of Weights & Biases.

    The names are those of :func:`log_to_tensorboard`. The training's own steps, ``nce/step``, are
    the horizontal axis, so that other things can be logged to the same run.

    Arguments:
        run: What ``wandb.init`` returns, in any mode; the user finishes it.
        section: The first part of all names.

    Raises:
        TypeError: If the run has no ``log`` or ``define_metric``, or the section is no text.

    Example:
        >>> from ncprior import fit
        >>> class Run:  # in place of wandb.init(project="priors", mode="offline")
        ...     def define_metric(self, name, step_metric):
        ...         print(name, "over", step_metric)
        ...     def log(self, values):
        ...         print(list(values)[:2])
        >>> log = log_to_wandb(Run())
        nce/* over nce/step
        >>> _ = fit(prior, torch.randn(500, 3), steps=20, callback=log, progress=False)
        ['nce/step', 'nce/group_0/loss']
    """
    _require_methods("run", run, ["log", "define_metric"], "wandb.init()")
    require_instance("section", section, str, "Pass a text such as 'nce'.")
    run.define_metric(f"{section}/*", step_metric=f"{section}/step")

    def log(row: Any) -> None:  # noqa: ANN401
        run.log({f"{section}/step": row.step, **_scalars(row, section)})

    return log


def _scalars(row: Any, section: str) -> dict[str, float]:  # noqa: ANN401
    """Returns the numbers of a row by name, those of each group apart."""
    fields = _fields(row)
    stage = fields.pop("stage", 1)
    place = section if stage == 1 else f"{section}/stage_{stage}"
    named: dict[str, float] = {}
    for name, value in fields.items():
        if isinstance(value, list):
            named |= {f"{place}/group_{k}/{name}": each for k, each in enumerate(value)}
        elif name != "step" and value is not None:
            named[f"{place}/{name}"] = value
    return named


def _fields(row: Any) -> dict[str, Any]:  # noqa: ANN401
    if not hasattr(row, "_asdict") or not hasattr(row, "step"):
        raise TypeError(f"A row must be one of a history; got {described(row)}. Pass a Row(...).")
    fields: dict[str, Any] = row._asdict()
    return fields


def _finite(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _known(fields: dict[str, Any]) -> str:
    """Returns the content of a row without the seconds, which differ when it is repeated."""
    return json.dumps({name: value for name, value in fields.items() if name != "seconds"})


def _rows(file: Path, whole: bytes, cut: bytes) -> list[dict[str, Any]]:
    """Returns the rows in the whole lines of a file, which may end with a part of one more."""
    rows = [_row(line) for line in whole.splitlines()]
    if None in rows or not (cut.startswith(_START) or _START.startswith(cut)):
        number = rows.index(None) + 1 if None in rows else len(rows) + 1
        raise ValueError(
            f"path must be a file of rows in JSON; got {file}, whose line {number} is none. Pass "
            f"another path."
        )
    return [row for row in rows if row is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    """Returns the fields of a row, or ``None`` if a line is none."""
    try:
        row = json.loads(line) if line.startswith(_START) else None
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _require_methods(name: str, value: Any, methods: list[str], remedy: str) -> None:  # noqa: ANN401
    missing = [method for method in methods if not callable(getattr(value, method, None))]
    if missing or isinstance(value, type):
        raise TypeError(
            f"{name} must have the methods {', '.join(methods)}; got {described(value)}. Pass "
            f"{remedy}."
        )
