"""Logging callbacks: what each writes, that nothing is written twice, and the real libraries."""

from __future__ import annotations

import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.toys import ladder_prior
from torch import Tensor

from ncprior import fit
from ncprior.training import Row, log_to_json, log_to_tensorboard, log_to_wandb

ROW = Row(100, [1.2, 1.3], [1.25, 1.35], 1e-3, 2.0)
SETTINGS: dict[str, Any] = {"steps": 12, "eval_every": 2, "checkpoint_every": 5, "progress": False}
NAMES = [f"nce/group_{k}/{name}" for name in ("loss", "held_out") for k in (0, 1)]


@pytest.fixture(autouse=True)
def few_held_out_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ncprior.training.held_out._HELD_OUT_DRAWS", 32)


class Stop(Exception):
    pass


def data() -> Tensor:
    return torch.randn(200, 3, generator=torch.Generator().manual_seed(12))


def train(log: Callable[[Row], Any], seed: int = 1, **options: Any) -> list[Row]:
    """The rows of a short training, with stages in the same order."""
    torch.manual_seed(seed)
    history = fit(ladder_prior(2), data(), callback=log, **SETTINGS, **options)
    return [row for each in (history, *history.stages) for row in each.rows]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- JSON ---


def test_a_line_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    rows = train(log_to_json(path))
    assert len(rows) == 6 and lines(path) == [row._asdict() for row in rows]


@pytest.mark.parametrize("crash", [4, 8, 12])
def test_a_resumed_training_writes_every_row_once(crash: int, tmp_path: Path) -> None:
    path, log = tmp_path / "log.jsonl", log_to_json(tmp_path / "log.jsonl")

    def interrupt(row: Row) -> None:
        log(row)
        if row.step == crash:
            raise Stop

    with pytest.raises(Stop):
        train(interrupt, checkpoint=tmp_path / "checkpoint")
    before = path.read_text()
    rows = train(log_to_json(path), checkpoint=tmp_path / "checkpoint")
    assert path.read_text().startswith(before)
    assert [line["step"] for line in lines(path)] == [2, 4, 6, 8, 10, 12]
    assert [line["loss"] for line in lines(path)] == [row.loss for row in rows]


def test_another_training_adds_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    rows = [row for seed in (1, 2) for row in train(log_to_json(path), seed)]
    assert lines(path) == [row._asdict() for row in rows]


def test_stages_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    rows = train(log_to_json(path), stages=2)
    assert [(line["stage"], line["step"]) for line in lines(path)] == [
        (stage, step) for stage in (1, 2) for step in range(2, 13, 2)
    ]
    assert lines(path) == [row._asdict() for row in rows]


@pytest.mark.parametrize("kept", [0, 1, 9, 20, 10**6])
def test_a_line_that_was_cut_off_is_written_again(kept: int, tmp_path: Path) -> None:
    path, rows = tmp_path / "log.jsonl", [ROW, ROW._replace(step=200)]
    log = log_to_json(path)
    for row in rows:
        log(row)
    whole = path.read_text()
    first, second = whole.splitlines()
    path.write_text(f"{first}\n{second[:kept]}")
    log = log_to_json(path)
    log(rows[1])
    log(rows[1])
    assert path.read_text() == whole


def test_values_without_a_number_are_null(tmp_path: Path) -> None:
    log_to_json(tmp_path / "log")(ROW._replace(loss=[math.nan, 1.0], seconds=math.inf))
    (line,) = lines(tmp_path / "log")
    assert line["loss"] == [None, 1.0] and line["seconds"] is None


@pytest.mark.parametrize(
    "content",
    ["mine", "mine\n", '{"a": 1}\n', '{"a": 1}', '{"step": 1\n', '{"step": ' + "[" * 10**5],
)
def test_a_file_of_something_else_is_left_alone(content: str, tmp_path: Path) -> None:
    path = tmp_path / "mine"
    path.write_text(content + "\n" * content.endswith("["))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="file of rows in JSON; got .*mine, whose line 1 is none"):
        log_to_json(path)
    assert path.read_bytes() == before


def test_nothing_is_made_before_the_first_row(tmp_path: Path) -> None:
    log_to_json(tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_paths_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="path must be a file; got the directory"):
        log_to_json(tmp_path)
    with pytest.raises(OSError, match="path must be a file that can be written"):
        log_to_json(tmp_path / "file" / "log")
    with pytest.raises(TypeError, match="path must be of type str or PathLike"):
        log_to_json(3)  # type: ignore[arg-type]


# --- TensorBoard and Weights & Biases ---


class Recorder:
    """A writer and a run that keep what they are given."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.logged: list[dict[str, float]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("nce/*", "nce/step")

    def log(self, values: dict[str, float]) -> None:
        self.logged.append(values)


def test_scalars_have_documented_names() -> None:
    seen = Recorder()
    log_to_tensorboard(seen)(ROW)
    values = [*ROW.loss, *(ROW.held_out or []), ROW.learning_rate, ROW.seconds]
    names = [*NAMES, "nce/learning_rate", "nce/seconds"]
    assert seen.scalars == [(n, v, 100) for n, v in zip(names, values, strict=True)]
    log_to_wandb(seen)(ROW)
    assert seen.logged == [{"nce/step": 100, **dict(zip(names, values, strict=True))}]


def test_what_was_not_measured_is_left_out_and_later_stages_have_their_names() -> None:
    seen = Recorder()
    log_to_tensorboard(seen, section="mine")(ROW._replace(held_out=None, stage=2, loss=[1.0]))
    names = [name for name, _, _ in seen.scalars]
    place = "mine/stage_2"
    assert names == [f"{place}/group_0/loss", f"{place}/learning_rate", f"{place}/seconds"]


def test_rows_of_energies_are_logged_too() -> None:
    from ncprior.vaebm import EnergyRow

    seen = Recorder()
    log_to_tensorboard(seen, section="energy")(EnergyRow(5, 1.0, 2.0, 3.0, 4.0, 1e-3, 6.0))
    assert [name for name, _, _ in seen.scalars][:2] == ["energy/gap", "energy/energy"]


@pytest.mark.parametrize("wrong", [None, "runs", Recorder, object()])
def test_what_cannot_log_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"writer must have .*SummaryWriter\(\)"):
        log_to_tensorboard(wrong)
    with pytest.raises(TypeError, match=r"run must have .*wandb.init\(\)"):
        log_to_wandb(wrong)
    with pytest.raises(TypeError, match="section must be of type str"):
        log_to_tensorboard(Recorder(), section=wrong if wrong != "runs" else 3)
    with pytest.raises(TypeError, match="A row must be one of a history"):
        log_to_tensorboard(Recorder())(wrong)


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        rows = train(log_to_tensorboard(writer))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == sorted([*NAMES, "nce/learning_rate", "nce/seconds"])
    for k in (0, 1):
        found = events.Scalars(f"nce/group_{k}/held_out")
        assert [event.step for event in found] == [row.step for row in rows]
        expected = [row.held_out[k] for row in rows if row.held_out is not None]
        assert [event.value for event in found] == pytest.approx(expected, rel=1e-6)


def records(file: Path) -> Iterator[bytes]:
    """The records of a run that W&B has kept on disk: a log in blocks of 32 KiB, as LevelDB's."""
    content, at, record = file.read_bytes(), 7, b""
    while at + 7 < len(content):
        if (left := 2**15 - at % 2**15) < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", content, at + 4)  # behind a checksum
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


OFFLINE = """
import wandb
from ncprior.training import Row, log_to_wandb
with wandb.init(mode="offline", settings={"silent": True}) as run:
    log = log_to_wandb(run)
    for step in (100, 200, 300):
        log(Row(step, [1.2, 1 / step], [1.25, 1.35], 1e-3, 2.0))
"""


def test_weights_and_biases_keeps_what_was_logged_without_a_network(tmp_path: Path) -> None:
    """In a process of its own: the run is on disk when that has ended."""
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    nobody = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    quiet = {"WANDB_ERROR_REPORTING": "false", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment = {**os.environ, **nobody, **quiet}
    command = [sys.executable, "-c", OFFLINE]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, timeout=300)
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    history, axes = [], {}
    for record in map(Record.FromString, records(file)):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            history.append({item.nested_key[0]: json.loads(item.value_json) for item in items})
        elif record.WhichOneof("record_type") == "metric":
            axes[record.metric.glob_name] = record.metric.step_metric
    assert axes["nce/*"] == "nce/step"
    assert [entry["nce/step"] for entry in history] == [100, 200, 300]
    assert [entry["nce/group_1/loss"] for entry in history] == [1 / 100, 1 / 200, 1 / 300]
