"""What the benchmarks share: their options, rows that survive an interruption, tables, networks.

Not a benchmark itself. Finished rows are read back from --json FILE and finished networks from
--cache, so that a run that was cut short goes on where it stopped.
"""

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ncprior.demo import read_images
from ncprior.saving import load_tensors, save_tensors, write_atomically

Row = dict[str, Any]


def parser(doc: str) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--quick", action="store_true", help="minutes: same columns and signs")
    made.add_argument("--seed", type=int, nargs="+", default=[0], metavar="N")
    made.add_argument(
        "--json", type=Path, metavar="FILE", help="write all rows here, and go on from those there"
    )
    made.add_argument(
        "--cache",
        type=Path,
        default=Path("~/.cache/ncprior").expanduser(),
        metavar="DIR",
        help="where trained networks are kept (%(default)s)",
    )
    return made


def with_settings(kind: type[Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of fit or fit_vaebm; those that are fields of their settings are put into one."""
    names = {part.name for part in fields(kind)}
    rest = {name: value for name, value in options.items() if name not in names}
    given = {name: value for name, value in options.items() if name in names}
    return {**rest, "settings": kind(**given)}


def machine() -> str:
    """What the numbers were made on."""
    cpu = f"{platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
    return ", ".join(
        (
            f"{cpu} with {os.cpu_count()} cores, {torch.get_num_threads()} used",
            platform.system(),
            f"python {platform.python_version()}",
            f"torch {torch.__version__}",
        )
    )


class Bench:
    """Rows of one benchmark with these settings, in --json FILE as soon as they are finished."""

    def __init__(self, options: argparse.Namespace, settings: Row) -> None:
        self.path: Path | None = options.json
        self.cache: Path = options.cache
        self.settings = {"quick": options.quick, **settings}
        self.rows: list[Row] = []
        self.machines: list[str] = []  # all that rows were made on
        if self.path is not None and self.path.exists():
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if found["meta"]["settings"] != self.settings:
                raise SystemExit(
                    f"{self.path} holds rows of other settings, {found['meta']['settings']}; now "
                    f"they are {self.settings}. Pass another --json FILE, or the same settings."
                )
            self.rows, self.machines = found["rows"], found["meta"]["machine"].split("; ")

    def add(self, make: Callable[[], Sequence[Row]], **key: object) -> list[Row]:
        """Returns the rows with this key, such as method and seed; makes them if there are none."""
        found = [row for row in self.rows if all(row[name] == key[name] for name in key)]
        if found:
            return found
        made = [{**key, **{name: _known(value) for name, value in row.items()}} for row in make()]
        self.rows += made
        if self.path is not None:
            self.machines = list(dict.fromkeys([*self.machines, machine()]))
            meta = {"settings": self.settings, "machine": "; ".join(self.machines)}
            with write_atomically(self.path) as temporary:
                text = json.dumps({"meta": meta, "rows": self.rows}, indent=2)
                temporary.write_text(text + "\n", encoding="utf-8")
        return made

    def tensors(
        self, name: str, make: Callable[[], Mapping[str, Tensor]], **key: object
    ) -> tuple[Mapping[str, Tensor], float]:
        """Makes tensors, or reads those that were made with this key; with the seconds it took."""
        kind = "-quick" if self.settings["quick"] else ""
        path = self.cache / f"{name}{kind}.safetensors"
        if path.exists():
            tensors, found = load_tensors(path)
            if found["key"] == key:
                return tensors, found["seconds"]
        started = time.perf_counter()
        made = make()
        seconds = time.perf_counter() - started
        save_tensors(path, made, {"key": key, "seconds": seconds})
        return made, seconds

    def network(
        self, name: str, module: nn.Module, train: Callable[[], Any], **key: object
    ) -> float:
        """Trains a network, or reads the one that was trained so; returns its training seconds."""

        def make() -> Mapping[str, Tensor]:
            train()
            return module.state_dict()

        tensors, seconds = self.tensors(name, make, **key)
        module.load_state_dict(tensors)
        module.eval()
        return seconds


def with_methods(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds --methods to the options, see :func:`chosen`."""
    made.add_argument(
        "--methods",
        nargs="+",
        default=[],
        metavar="TEXT",
        help="only methods of such a name, or with such a text in it",
    )
    return made


def chosen(names: Sequence[str], only: Sequence[str]) -> list[str]:
    """Those that are in `only` or contain one of its texts that is no name itself; all if it is empty."""

    def is_chosen(name: str) -> bool:
        return any(name == text if text in names else text in name for text in only)

    return [name for name in names if not only or is_chosen(name)]


def _known(value: Any) -> Any:  # noqa: ANN401
    """A value as JSON has it, which knows no NaN: None stands for what was not measured."""
    return None if isinstance(value, float) and math.isnan(value) else value


class BinaryMNIST:
    """Grey training images; binary images to stop by, and to measure on. The same for every seed."""

    def __init__(self, num_test: int) -> None:
        torch.manual_seed(0)
        try:
            grey, test = (read_images("ylecun/mnist", part).images for part in ("train", "test"))
        except FileNotFoundError as error:
            raise SystemExit(str(error)) from None
        grey = grey[torch.randperm(len(grey))]
        self.train, self.held_out = grey[:50_000], grey[50_000:].bernoulli()
        self.test = test[torch.randperm(len(test))[:num_test]].bernoulli()


def table(rows: Sequence[Row], columns: dict[str, str]) -> str:
    """Rows under headings; `columns` maps each key to its format, such as '>8.2f' or '<24'."""
    widths = {key: form.partition(".")[0].rstrip("dfs,") for key, form in columns.items()}
    lines = [" ".join(f"{key:{width}}" for key, width in widths.items())]
    for row in rows:
        cells = []
        for key, form in columns.items():
            is_missing = row.get(key) is None
            cells.append(f"{'':{widths[key]}}" if is_missing else f"{row[key]:{form}}")
        lines.append(" ".join(cells).rstrip())
    return "\n".join(lines)
