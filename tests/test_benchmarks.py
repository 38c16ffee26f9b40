"""What the benchmarks share: rows and networks that survive an interruption, tables, options."""

import argparse
import importlib.util
import json
import math
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.problems import GaussianPair
from torch import Tensor, nn

from ncprior import NCPrior, SingleGroup, langevin, sir
from ncprior.bases import rebase
from ncprior.demo.networks import VAE
from ncprior.distributions import PointMass
from ncprior.heads import MLPHead
from ncprior.heads.product import ProductHead
from ncprior.training.stages import nested

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "benchmarks"
SCRIPTS = [
    "mnist_nll.py",
    "hierarchical_nll.py",
    "loss_ess.py",
    "sampler_cost.py",
    "prior_hole.py",
    "any_vae.py",
    "equal_budget.py",
    "vaebm.py",
    "sampling_speed.py",
    "training_speed.py",
    "table8.py",
    "wide_gaps.py",
    "best_prior.py",
    "judges.py",
]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def bench() -> ModuleType:
    return load("bench")


@pytest.fixture
def tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script that fills tables in, in a folder with results and a README of its own."""
    module = load("tables")
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    monkeypatch.setattr(module, "PAGES", [tmp_path / "README.md"])
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text(
        "# Ours\n\n<!-- table mnist_nll -->\n<!-- end -->\n\nEnd.\n"
    )
    write_results(tmp_path, gain=2.5)
    return module


def write_results(folder: Path, *, gain: float, quick: bool = False) -> None:
    common = {"model": "NCP", "nll_lower": 84.1, "nll_upper": 84.2, "gain_se": 0.06}
    rows = [
        {**common, "method": "NCP, paper's head", "seed": seed, "gain": g, "fit_seconds": 10.0}
        for seed, g in enumerate((gain, gain + 0.2))
    ]
    meta = {"settings": {"quick": quick}, "machine": "a machine"}
    path = folder / "results" / "mnist_nll.json"
    path.write_text(json.dumps({"rows": rows, "meta": meta}))


def options(folder: Path, **changes: Any) -> argparse.Namespace:
    values = {"json": folder / "rows.json", "cache": folder, "quick": False, **changes}
    return argparse.Namespace(**values)


def test_finished_rows_are_not_made_again(bench: ModuleType, tmp_path: Path) -> None:
    calls = []

    def make() -> list[dict[str, Any]]:
        calls.append(1)
        return [{"model": "SIR(4)", "gain": 1.5}, {"model": "NCP", "gain": 2.0}]

    for _ in range(2):  # the second stands for the run after an interruption
        rows = bench.Bench(options(tmp_path), {"steps": 3}).add(make, method="NCP", seed=1)
        assert [row["model"] for row in rows] == ["SIR(4)", "NCP"]
        assert {(row["method"], row["seed"]) for row in rows} == {("NCP", 1)}
    assert len(calls) == 1
    again = bench.Bench(options(tmp_path), {"steps": 3})
    again.add(make, method="NCP", seed=2)
    assert len(calls) == 2
    written = json.loads((tmp_path / "rows.json").read_text())
    assert [row["seed"] for row in written["rows"]] == [1, 1, 2, 2]
    assert written["meta"]["settings"] == {"quick": False, "steps": 3}
    assert "torch" in written["meta"]["machine"]


def test_rows_of_two_machines_name_both(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.json"
    for seed, name in enumerate(("one", "two", "one")):
        monkeypatch.setattr(bench, "machine", lambda name=name: f"machine {name}, torch")
        bench.Bench(options(tmp_path), {}).add(lambda: [{"nll": 1.0}], seed=seed)
    assert (
        json.loads(file.read_text())["meta"]["machine"] == "machine one, torch; machine two, torch"
    )


def test_what_was_not_measured_is_null(bench: ModuleType, tmp_path: Path) -> None:
    made = bench.Bench(options(tmp_path), {})
    made.add(lambda: [{"peak_mib": float("nan"), "fd": 2.0}], method="NCP")
    assert "NaN" not in (tmp_path / "rows.json").read_text()
    again = bench.Bench(options(tmp_path), {}).rows
    assert again == made.rows == [{"method": "NCP", "peak_mib": None, "fd": 2.0}]


def test_rows_of_other_settings_are_not_mixed_in(bench: ModuleType, tmp_path: Path) -> None:
    bench.Bench(options(tmp_path), {"steps": 3}).add(lambda: [{}], method="NCP", seed=0)
    with pytest.raises(SystemExit, match="other settings"):
        bench.Bench(options(tmp_path), {"steps": 4})
    with pytest.raises(SystemExit, match="other settings"):
        bench.Bench(options(tmp_path, quick=True), {"steps": 3})


def test_networks_are_trained_once_per_key(bench: ModuleType, tmp_path: Path) -> None:
    trained, weights = [], []
    for steps in (1, 1, 2):
        net = nn.Linear(2, 2)
        seconds = bench.Bench(options(tmp_path, json=None), {}).network(
            "net", net, lambda: trained.append(1), steps=steps
        )
        assert seconds >= 0
        assert not net.training
        weights.append(net.weight)
    assert len(trained) == 2
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_table_leaves_gaps_where_a_row_knows_nothing(bench: ModuleType) -> None:
    rows = [{"method": "VAE", "nll": 87.123, "n": 3456}, {"method": "NCP", "nll": None}]
    assert bench.table(rows, {"method": "<8", "nll": ">7.2f", "n": ">6,.0f"}).splitlines() == [
        "method       nll      n",
        "VAE        87.12  3,456",
        "NCP",
    ]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_teaches(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(FOLDER / script), run_name="__main__")
    assert done.value.code == 0
    shown = capsys.readouterr().out
    for word in ("--quick", "--seed", "--json", "--cache"):
        assert word in shown


def test_a_script_runs_from_anywhere(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "prior_hole.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout


def test_seeds_with_other_verdicts_share_a_line(tables: ModuleType) -> None:
    verdicts = ["good", "good", "too flat"]
    rows = [
        {"pair": "shift", "seed": seed, "rmse": 0.5, "verdict": verdict}
        for seed, verdict in enumerate(verdicts)
    ]
    assert tables.domain(rows)[2:] == ["| shift | 3 | 0.500 ± 0.000 | 2 × good; 1 × too flat |"]
    assert tables.domain(rows[:2])[2:] == ["| shift | 2 | 0.500 ± 0.000 | good |"]


def test_counts_are_printed_whole(tables: ModuleType) -> None:
    assert f"{1.0:{tables.decimals('stored_numbers', 1.0)}}" == "1"
    assert f"{1.0:{tables.decimals('latent_nn_copy', 1.0)}}" == "1.00"


def run_tables(tables: ModuleType, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tables.py", *arguments])
    status: int = tables.main()
    return status


def test_tables_are_filled_in_and_a_changed_number_is_noticed(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = partial(run_tables, tables, monkeypatch)
    assert run("--check") == 1
    assert "2.6" not in (tmp_path / "README.md").read_text()
    assert run() == 0
    text = (tmp_path / "README.md").read_text()
    assert "| NCP, paper's head | NCP | 2 | 84.10 to 84.20 | 2.60 ± 0.14 | 0.06 | 2.00 |" in text
    assert text.startswith("# Ours\n") and text.endswith("\nEnd.\n")
    assert "`mnist_nll.py`, on a machine." in text
    assert run("--check") == 0
    write_results(tmp_path, gain=2.4)
    assert run("--check") == 1


def test_a_table_may_show_some_methods_alone(tables: ModuleType, tmp_path: Path) -> None:
    costs = dict.fromkeys(tables.COSTS, 1.0)
    gap = {"gap_closed": 0.9, "gap_low": 0.85, "gap_high": 0.95, **costs}
    over = {"over_rival": 0.1, "over_low": 0.05, "over_high": 0.15}
    rows = [
        {"method": "mixture of 10", "family": "peer", "seed": 0, **gap},
        {"method": "NCP, SIR(50)", "family": "ours", "seed": 0, **gap, **over},
        {"method": "flow", "family": "peer", "seed": 0, **gap},
    ]
    meta = {"settings": {"quick": False}, "machine": "a machine"}
    path = tmp_path / "results" / "hole_mnist.json"
    path.write_text(json.dumps({"rows": rows, "meta": meta}))
    whole = tables.filled("<!-- table hole_mnist -->\n<!-- end -->")
    assert whole.count("\n| ") == 4 and "| flow |" in whole
    marked = "<!-- table hole_mnist: NCP, SIR(50); mixture of 10 -->\n<!-- end -->"
    some = tables.filled(marked)
    assert tables.filled(some) == some
    assert "0.900 (0.850 to 0.950) | 0.100 (0.050 to 0.150) | 1.00 |" in some
    assert some.count("\n| ") == 3 and "flow" not in some
    with pytest.raises(SystemExit, match="no rows"):
        tables.filled(marked.replace("50", "51"))


def test_the_summary_has_rows_of_several_files(tables: ModuleType, tmp_path: Path) -> None:
    values = {
        "precision": 0.8,
        "recall": 0.7,
        "fit_seconds": 60.0,
        "gap_low": 0.5,
        "gap_high": 1.0,
    }
    for name, gap in (("hole_mnist", 0.9), ("hole_cifar10", 0.6)):
        rows = [
            {"method": method, "seed": seed, "gap_closed": gap + 0.1 * seed, **values}
            for method in ("flow", "NCP, SIR(50)")
            for seed in (0, 1)
        ]
        meta = {"settings": {"quick": False}, "machine": "a machine"}
        path = tmp_path / "results" / f"{name}.json"
        path.write_text(json.dumps({"rows": rows, "meta": meta}))
    words = ": hole_cifar10/NCP, SIR(50); hole_mnist/NCP, SIR(50); hole_mnist/flow"
    assert tables.render("summary", words).splitlines()[2:] == [
        "| CIFAR-10, 128 latents | NCP, SIR(50) | 0.650 ± 0.071 (0.500 to 1.000) | 0.80 | 0.70 | 60 |",
        "| MNIST, 16 latents | NCP, SIR(50) | 0.950 ± 0.071 (0.500 to 1.000) | 0.80 | 0.70 | 60 |",
        "| MNIST, 16 latents | flow | 0.950 ± 0.071 (0.500 to 1.000) | 0.80 | 0.70 | 60 |",
        "",
        "`prior_hole.py`, on a machine.",
    ]
    with pytest.raises(SystemExit, match="no rows"):
        tables.render("summary", ": hole_mnist/mixture of 10")


def test_a_table_of_speed_has_a_line_per_row(tables: ModuleType, tmp_path: Path) -> None:
    rows = [
        {"name": "sir-mlp-fp32", "ms": 369.7, "ratio": 2.22, "roofline_fraction": 0.74},
        {"name": "batch-4", "ms": 21.0, "ratio": None, "peak_mib": 6.04},
    ]
    meta = {"settings": {"quick": False}, "machine": "a machine"}
    path = tmp_path / "results" / "sampling_speed.json"
    path.write_text(json.dumps({"rows": rows, "meta": meta}))
    some = tables.filled("<!-- table sampling_speed: batch-4 -->\n<!-- end -->")
    assert "| batch-4 |  |  | 21.0 |  |  | 6.0 |  |  |" in some and "sir-mlp" not in some
    assert "| sir-mlp-fp32 |  |  | 369.7 | 2.22 | 74% |" in tables.filled(
        "<!-- table sampling_speed -->\n<!-- end -->"
    )


def test_a_table_of_a_domain_has_its_own_columns(tables: ModuleType, tmp_path: Path) -> None:
    rows = [
        {"method": "NCP", "cells": cells, "seed": seed, "auc": auc + 0.02 * seed, "seconds": 9.8}
        | ({"auc_low": auc - 0.1, "auc_high": auc + 0.1} if cells == "control" else {})
        for cells, auc in (("control", 0.56), ("stimulated", 0.5))
        for seed in (0, 1)
    ]
    rows.append({"method": "real", "cells": "control", "seed": 0, "auc": 0.5, "seconds": None})
    meta = {"settings": {"quick": False}, "machine": "a machine"}
    path = tmp_path / "results" / "domain_cells.json"
    path.write_text(json.dumps({"rows": rows, "meta": meta}))
    assert tables.render("domain_cells", "").splitlines()[:5] == [
        "| method | cells | seeds | auc | seconds |",
        "|---|---|---|---|---|",
        "| NCP | control | 2 | 0.570 ± 0.014 (0.460 to 0.660) | 10 |",
        "| NCP | stimulated | 2 | 0.510 ± 0.014 | 10 |",
        "| real | control | 1 | 0.500 |  |",
    ]


def test_a_table_of_equal_budgets_has_no_choices(tables: ModuleType) -> None:
    rows = [{"kind": "choice", "name": "flow, width 8", "seed": 0, "score": -3.0, "seconds": 9.0}]
    for seed, over in ((0, -0.1), (1, -0.3)):
        ends = {"over_improve_low": over - 0.1, "over_improve_high": over + 0.1}
        row = {"kind": "method", "name": "", "seed": seed, "method": "flow", "size": "width 8"}
        rows.append({**row, "over_improve": over, **ends})
    assert tables.equal(rows) == [
        "| method | size | seeds | over improve |",
        "|---|---|---|---|",
        "| flow | width 8 | 2 | -0.200 ± 0.141 (-0.300 to -0.100) |",
    ]


def test_a_table_of_energies_has_a_line_per_length_and_the_areas_of_one(
    tables: ModuleType, tmp_path: Path
) -> None:
    common = {"fd": 20.0, "fd_cut": 0.5, "precision": 0.8, "recall": 0.7, "fit_seconds": 60.0}
    common |= {"gap_closed": 0.6, "gap_low": 0.5, "gap_high": 0.7, "seconds_per_1k": 2.0}
    rows = [
        {"method": "NCP×VAEBM", "steps": steps, "seed": seed, **common} for seed in (0, 1)
        for steps in (4, 16)
    ]  # fmt: skip
    for row in rows:
        row |= {"over_alone": 0.1 * row["seed"], "over_low": -0.1, "over_high": 0.2}
        if row["steps"] == 16:
            row["auroc"] = {
                "noise": [0.8 + 0.1 * row["seed"], 0.7, 1.0],
                "digits": [0.4, 0.3, 0.5],
            }
            row["auroc_gain"] = [0.05 + 0.1 * row["seed"], -0.1, 0.2]
    meta = {"settings": {"quick": False}, "machine": "a machine"}
    (tmp_path / "results" / "vaebm_mnist.json").write_text(
        json.dumps({"rows": rows, "meta": meta})
    )
    lines = tables.render("vaebm_mnist", "").splitlines()
    assert [line.split(" | ")[:3] for line in lines[2:4]] == [
        ["| NCP×VAEBM", steps, "2"] for steps in ("4", "16")
    ]
    assert "| 20.00 ± 0.00 | 50% | 0.600 ± 0.000 (0.500 to 0.700) | 0.050 ± 0.071" in lines[2]
    assert lines[5] == "| model | noise | digits | mean | gain over the VAE |"
    numbers = "0.850 (0.700 to 1.000) | 0.400 (0.300 to 0.500) | 0.625 | 0.100 (-0.100 to 0.200)"
    assert lines[7] == f"| NCP×VAEBM | {numbers} |"


def test_numbers_of_a_quick_run_raise(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_results(tmp_path, gain=2.5, quick=True)
    with pytest.raises(SystemExit, match="full one"):
        run_tables(tables, monkeypatch)


def test_the_tables_of_the_pages_are_up_to_date() -> None:
    command = [sys.executable, str(FOLDER / "tables.py"), "--check"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def hole(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The methods of prior_hole.py, imported as the script imports them."""
    pytest.importorskip("zuko")
    monkeypatch.syspath_prepend(str(FOLDER))
    module = importlib.import_module("hole_methods")
    for name in ("hole_methods", "hole_cases", "bench", "clock"):
        monkeypatch.delitem(sys.modules, name)
    return module


def test_the_figure_of_the_hole_names_few_points_and_shows_all() -> None:
    figure = load("hole_figure")
    rows = json.loads((FOLDER / "results" / "hole_mnist.json").read_text())["rows"]
    found = {point.method: point for point in figure.points(rows)}
    assert set(figure.NAMED) <= set(found)  # a method that is renamed keeps its name in the figure
    assert "N(0, I)" not in found and "posterior" not in found  # nothing is fitted
    seeds = [row for row in rows if row["method"] == "mixture of 10"]
    assert found["mixture of 10"].gap == pytest.approx(
        sum(row["gap_closed"] for row in seeds) / len(seeds)
    )
    assert not found["mixture of 10"].ours and found["improve(50)"].ours
    (axes,) = figure.draw(rows).axes
    marks = [line for line in axes.lines if len(line.get_xdata()) == 1]
    assert len(marks) == len(found)
    labels = {label for label, *_ in figure.NAMED.values()}
    assert labels <= {text.get_text() for text in axes.texts}


def test_the_figure_of_growth_has_every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    figure = load("growth_figure")
    rows = json.loads((FOLDER / "results" / "sampling_speed.json").read_text())["rows"]
    curves = {kind: figure.curve(rows, kind) for kind in figure.PANELS}
    assert all(len(points) > 1 for points in curves.values())
    assert [size for size, *_ in curves["proposals"]] == [1000, 10_000, 100_000, 1_000_000]
    for axes, points in zip(figure.draw(rows).axes, curves.values(), strict=True):
        assert axes.lines[1].get_ydata().tolist() == [seconds for _, seconds, _ in points]


def test_other_images_are_not_their_own_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images 0 to 4 are decoded, and measured to images 5 to 9."""
    pytest.importorskip("zuko")
    monkeypatch.syspath_prepend(FOLDER)
    hole = load("prior_hole")
    case = object.__new__(load("hole_cases").Case)
    p = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(1), 1.0), 1)
    case.source = SingleGroup(p, lambda x: PointMass(x), lambda z: z)
    case.binarise, case.train = False, torch.full((10, 1), -1.0)
    case.test_rows = case.reference = torch.arange(10.0)[:, None]
    x, _ = case.posterior(20, held_out=True)
    assert x.flatten().unique().tolist() == [0, 1, 2, 3, 4]
    assert case.posterior(20)[0].unique().tolist() == [-1]
    compared = object.__new__(hole.Comparison)
    compared.case = case
    assert compared._reference(hole.OTHERS).flatten().tolist() == [5, 6, 7, 8, 9]
    assert len(compared._reference("posterior")) == 10


def test_training_images_come_with_their_own_encodings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out rows, the last three of ten, are left out."""
    pytest.importorskip("zuko")
    monkeypatch.syspath_prepend(FOLDER)
    images = torch.arange(10.0)[:, None]
    case: Any = SimpleNamespace(images=images, encodings=-images[:7])
    x, z = load("hole_methods").training_images(case, 0).draw(5)
    assert torch.equal(z, -x)
    assert len(x.unique()) == 5
    assert x.max() < 7


def test_all_ways_of_training_are_ways_of_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark of training takes its settings apart from those of `fit`: each must exist."""
    monkeypatch.syspath_prepend(FOLDER)
    speed = load("training_speed")
    source, images = VAE(28, latents=4, counts=1).eval().source(), torch.rand(64, 1, 28, 28)
    for train, more in speed.ways(torch.device("cpu")).values():
        prior = NCPrior(source, MLPHead((4,), width=8))
        curve = train(prior, images, images, steps=2, eval_every=1, batch=32, **more)
        assert len(curve) == 2 and curve[0][0] < curve[1][0]
    trainer, walk = speed.stepping(3, torch.device("cpu"))
    assert trainer.step(walk).loss.shape == (3,)


def test_measurements_are_counted_in_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    speed = load("sampling_speed")
    head = MLPHead((2,), width=8)
    base = torch.distributions.Normal(torch.zeros(3, 2), 1.0)
    draw = partial(sir, torch.distributions.Independent(base, 1), head, num_proposals=7)
    assert speed.evaluations(head, draw) == 3 * 7
    assert not head._forward_hooks  # of which the next call, which is timed, would be slower


def test_methods_are_chosen_by_their_name_or_a_text_in_it() -> None:
    chosen = load("bench").chosen
    names = ["mixture of 10", "mixture of 100", "NCP on mixture of 10, SIR(50)", "flow"]
    assert chosen(names, []) == names
    assert chosen(names, ["mixture of 10"]) == ["mixture of 10"]
    assert chosen(names, ["mixture of", "flow"]) == names
    assert chosen(names, ["NCP on"]) == [names[2]]


def test_evaluations_of_heads_are_counted_with_gradients_twice(hole: ModuleType) -> None:
    problem = GaussianPair()
    prior = NCPrior(problem.source(), problem.head())
    counted = {}
    samplers: dict[str, Any] = {
        "sir": partial(sir, num_proposals=50),
        "ula": partial(langevin, num_steps=10, step_size=0.1),
        "mala": partial(langevin, num_steps=10, step_size=0.1, adjusted=True),
    }
    for name, sampler in samplers.items():
        with hole.evaluations([prior]) as evaluated:
            hole.from_ncp(prior, sampler)(20)
            counted[name] = evaluated() / 20
    assert counted == {"sir": 50, "ula": 20, "mala": 22}
    prior.heads[0] = ProductHead([prior.heads[0], problem.head()])
    with hole.evaluations([prior]) as evaluated:
        hole.from_ncp(prior, samplers["sir"])(20)
    assert evaluated() / 20 == 100
    prior.heads[0] = problem.head()
    hole.from_ncp(prior, samplers["sir"])(20)
    assert evaluated() / 20 == 100  # and is no longer counted
    # Of a nested prior, both stages count: 5 draws of the first, and 5 weights of the second.
    source = nested(prior, partial(sir, num_proposals=7))
    second = NCPrior(source, problem.head())
    with hole.evaluations([prior, second]) as evaluated:
        hole.from_ncp(second, partial(sir, num_proposals=5))(20)
    assert evaluated() / 20 == 5 * 7 + 5


def test_the_peak_of_memory_is_that_of_what_is_held(hole: ModuleType) -> None:
    clock = importlib.import_module("clock")
    again = torch.ones(2**24)  # 64 MiB, free once more when the peak is looked for
    del again
    for _ in range(2):
        found = clock.peak_growth(lambda: torch.ones(2**24).sum())
        if sys.platform == "linux":
            assert 60 < found < 80


def test_pythaes_model_of_a_frozen_vae_is_that_vae(hole: ModuleType) -> None:
    pytest.importorskip("pythae")
    vae = VAE(8, latents=3, counts=16).eval()
    x = torch.rand(5, 1, 8, 8)
    case = SimpleNamespace(vae=vae, encodings=torch.zeros(5, 3), images=x)
    model = hole._pythae_model(case)
    q = vae.posterior(x)
    out = model.encoder(x)
    assert torch.allclose(out.embedding, q.mean)
    assert torch.allclose((0.5 * out.log_covariance).exp(), q.stddev)
    assert torch.equal(model.decoder(q.mean).reconstruction, vae.decode(q.mean))


def test_sets_outside_have_the_shape_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    module = load("ood_sets")

    def read(repo: str, part: str, label: str) -> Any:
        if repo != "ylecun/mnist":
            raise FileNotFoundError(repo)
        return SimpleNamespace(images=torch.rand(50, 1, 28, 28))

    def nowhere(repo: str, part: str, label: str) -> Any:
        raise FileNotFoundError(repo)

    monkeypatch.setattr(module, "read_images", nowhere)
    found = module.outside("cifar10", torch.rand(40, 3, 32, 32), 30)
    assert found.keys() == {"interpolations", "uniform noise", "constants", "digits"}
    monkeypatch.setattr(module, "read_images", read)
    for name, shape, sets in (
        ("digits", (1, 8, 8), set()),
        ("mnist", (1, 28, 28), {"digits"}),
        ("cifar10", (3, 32, 32), {"digits", "MNIST"}),
    ):
        inside = torch.rand(40, *shape)
        found = module.outside(name, inside, 30)
        assert found.keys() == {"interpolations", "uniform noise", "constants"} | sets
        for images in found.values():
            assert images.shape == (30, *shape)
            assert images.min() >= 0 and images.max() <= 1
        flat = found["constants"].flatten(2)
        assert torch.equal(flat.amax(2), flat.amin(2))
        again = module.outside(name, inside, 30)
        assert all(torch.equal(again[key], images) for key, images in found.items())


def test_the_table_of_areas_has_a_column_per_set(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("zuko")
    monkeypatch.syspath_prepend(str(FOLDER))
    module = load("vaebm")
    for name in ("hole_methods", "hole_cases", "bench", "clock", "ood_sets"):
        monkeypatch.delitem(sys.modules, name)
    rows = [
        {
            "method": "VAE",
            "seed": 0,
            "auroc": {"noise": [0.5, 0.4, 0.6], "MNIST": [0.7, 0.6, 0.8]},
            "auroc_gain": [0.1, -0.1, 0.3],
        },
        {"method": "VAE", "seed": 0, "steps": 4},
    ]
    lines = module.area_table(rows).splitlines()
    assert lines[0].split() == ["method", "seed", "noise", "MNIST", "mean", "over", "the", "VAE"]
    numbers = "0.500 (0.400 to 0.600) 0.700 (0.600 to 0.800) 0.600 0.100 (-0.100 to 0.300)"
    assert lines[1].split() == ["VAE", "0", *numbers.split()]
    assert len(lines) == 2


def test_peers_get_the_size_and_the_rate_that_are_best_by_held_out_latents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """q(z) = N(1, 1): the nearer the mean of a base, the better."""
    pytest.importorskip("zuko")
    monkeypatch.syspath_prepend(str(FOLDER))
    budget = load("equal_budget")
    tried = []

    def normal(mean: float) -> torch.distributions.Distribution:
        return torch.distributions.Normal(torch.full((1,), mean), 1.0)

    def base(mean: float) -> Any:
        return torch.distributions.Independent(normal(mean), 1)

    def fitted(means: dict[float, float]) -> Any:
        def fit(case: Any, *, steps: int, learning_rate: float) -> Any:
            tried.append(learning_rate)
            return rebase(case.source, base(means.get(learning_rate, 9.0)))

        return fit

    small, large = fitted({1e-3: 4.0, 3e-4: 1.0}), fitted({1e-3: 3.0, 3e-3: 2.0})
    mixture = {
        f"components {n}": lambda case, mean=mean: rebase(case.source, base(mean))
        for n, mean in ((10, 1.5), (100, 2.0))
    }
    peers = [
        budget.Peer("mixture", mixture, has_steps=False),
        budget.Peer("flow", {"width 8": small, "width 16": large}),
    ]
    monkeypatch.setattr(budget, "peers", lambda _: peers)
    options = argparse.Namespace(json=None, cache=Path(), quick=False)
    source = SingleGroup(base(0.0), lambda x: PointMass(x), lambda z: z)
    x = 1 + torch.randn(500, 1)
    case = SimpleNamespace(source=source, held_out=x, fresh_encodings=x)
    found = budget.Choices(budget.Bench(options, {}), case, 0.1).all()
    assert [(one.name, one.size) for one in found] == [
        ("mixture", "components 10"),
        ("flow", "width 16, rate 0.003"),  # rates are tried at the best size alone
    ]
    assert set(tried) == set(peers[1].rates)
    none_in_time = budget.Choices(budget.Bench(options, {}), case, 0.0).best_in_time(peers[0])
    assert none_in_time.size == "components 10"  # the least, whatever it takes
    assert budget.criterion(found[1].fit(case), case) == pytest.approx(
        -0.5 * math.log(2 * math.pi) - 0.5 * ((x - 2) ** 2).mean().item(), abs=1e-5
    )


@pytest.mark.parametrize("once", [0.0, 5.0, 60.0])
def test_the_steps_of_a_fit_fill_its_budget(once: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes 10 ms; whatever is done once, such as encoding, may take most of a few steps."""
    pytest.importorskip("zuko")
    monkeypatch.syspath_prepend(str(FOLDER))
    budget, clock = load("equal_budget"), [0.0]
    monkeypatch.setattr(budget, "now", lambda: clock[0])

    def fit(case: Any, *, steps: int) -> None:
        clock[0] += once + 0.01 * steps

    assert once + 0.01 * budget.steps_within(fit, None, 100.0) == pytest.approx(95, abs=0.1)
    assert budget.steps_within(fit, None, 0.1) == budget.FEW  # too little time for more


def test_bases_without_a_density_are_compared_by_their_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("zuko")
    monkeypatch.syspath_prepend(str(FOLDER))
    budget, peers = load("equal_budget"), load("hole_peers")
    p = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 1.0), 1)
    source = SingleGroup(p, lambda x: PointMass(x), lambda z: z)
    x = torch.randn(2000, 2)
    case = SimpleNamespace(source=source, held_out=x, fresh_encodings=x)

    def score(mean: float) -> float:
        drawn = peers.Drawn(lambda count: mean + torch.randn(count, 2))
        return budget.criterion(rebase(source, drawn), case)

    assert score(0.0) == pytest.approx(0, abs=0.02)
    assert score(1.0) == pytest.approx(-2, abs=0.2)  # the squared distance of the means


@pytest.mark.parametrize("name", ["flow matching", "diffusion"])
def test_a_longer_fit_without_a_density_has_a_lower_held_out_loss(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two narrow modes."""
    pytest.importorskip("zuko")
    monkeypatch.syspath_prepend(str(FOLDER))
    budget, peers = load("equal_budget"), load("hole_peers")
    p = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(1), 1.0), 1)
    torch.manual_seed(0)
    x = torch.randn(2000, 1).sign() + 0.1 * torch.randn(2000, 1)
    source = SingleGroup(p, lambda x: PointMass(x), lambda z: z)
    case = SimpleNamespace(source=source, encodings=x, held_out=x[:500], fresh_encodings=x[:500])
    (peer,) = (one for one in peers.flat_peers() if one.name == name)
    fit = peer.sizes["width 256"]
    short, long = (
        budget.criterion(fit(case, steps=steps, learning_rate=1e-3), case) for steps in (1, 200)
    )
    assert short < long - 0.2
    assert long < 0


def test_the_resnet_of_the_judges_has_the_published_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """He et al., table 6: 0.85 million parameters; a shortcut halves the map and pads channels."""
    monkeypatch.syspath_prepend(str(FOLDER))
    net = load("judges").ResNet56().eval()
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == 0.85
    assert net.features(torch.rand(2, 3, 32, 32)).shape == (2, 64)
    block = net.layer2[0]
    for conv in (block.conv1, block.conv2):
        nn.init.zeros_(conv.weight)
    x = torch.rand(1, 16, 4, 4)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert out[:, :8].abs().sum() + out[:, 24:].abs().sum() == 0


def test_judges_agree_where_the_order_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    judges = load("judges")
    rows = [
        {"method": name, "classifier": 0.1 * i, "resnet": 0.2 * i**2, "efficientnet": -0.3 * i}
        for i, name in enumerate("abcd")
    ]
    found = judges.agreement(rows)
    assert found["classifier and resnet"] == pytest.approx(1)
    assert found["classifier and efficientnet"] == pytest.approx(-1)
    assert judges.agreement(rows[:2]) == {}


def test_judges_of_decoded_images_do_not_see_what_the_decoder_leaves_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two pixels of variance 0.01, of which the decoder keeps the first; priors shift it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    judges, cases = load("judges"), load("hole_cases")

    def decoded(count: int, shift: float = 0.0) -> Tensor:
        x = 0.5 + 0.1 * torch.randn(count, 1, 1, 2)
        return x * torch.tensor([1.0, 0.0]) + torch.tensor([shift, 0.5])

    both = judges.Judge(lambda x: x.flatten(1), lambda _: 1.0)
    monkeypatch.setattr(judges, "resnet", lambda: both)
    monkeypatch.setattr(judges, "efficientnet", lambda _: both)
    case = SimpleNamespace(
        features=both.features,
        facts={"classifier's accuracy": 0.6},
        test_images=0.5 + 0.1 * torch.randn(2000, 1, 1, 2),
        posterior=lambda count, held_out: (decoded(count), None) if held_out else None,
    )
    for method, shift in ((judges.BASE, 0.1), (judges.POSTERIOR, 0.0), ("flow", 0.05)):
        parts = [decoded(500, shift) for _ in range(5)]
        cases.save_images(cases.image_file(tmp_path, "cifar10", method, 0), parts)
    panel = judges.Panel(case, 2000, tmp_path, 500)
    real, of_decoded = panel.measured("flow", 0)
    assert (real["reference"], of_decoded["reference"]) == ("test images", judges.DECODED)
    for judge in judges.JUDGES:
        assert real[f"{judge}_floor"] == pytest.approx(
            0.5, abs=0.05
        )  # 0.1² of details, 0.1² of the shift
        assert of_decoded[f"{judge}_floor"] < 0.05
        assert of_decoded[f"{judge}_low"] < 0.75 < of_decoded[f"{judge}_high"]


def test_judges_read_the_first_images_of_each_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    images = (torch.arange(2 * 3 * 3 * 4 * 4) % 256).reshape(2, 3, 3, 4, 4) / 255
    cases = load("hole_cases")
    file = cases.image_file(tmp_path / "new", "cifar10", "NCP on x, SIR(50)", 1)
    assert file.name == "cifar10-ncp-on-x--sir-50--1.npy"
    cases.save_images(file, [*images])
    found = load("judges").drawn(tmp_path / "new", "NCP on x, SIR(50)", 1, 2)
    assert torch.equal(torch.stack(found), images[:, :2])


def test_methods_of_equal_budget_are_drawn_from_once_for_all_judges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base, posterior and a method have a file of images each, in generations of their own seeds."""
    pytest.importorskip("zuko")
    monkeypatch.syspath_prepend(str(FOLDER))
    budget, judges = load("equal_budget"), load("judges")
    monkeypatch.setattr(budget, "BATCH", 200)

    def images(brightness: float, count: int) -> Tensor:
        return (brightness * torch.rand(count, 1, 2, 2)).clamp(0, 1)

    case = SimpleNamespace(
        name="cifar10",
        features=lambda x: x.flatten(1),
        images=images(1.0, 1000),
        reference=images(1.0, 1000).flatten(1),
        posterior=lambda count: (images(0.95, count), None),
    )
    monkeypatch.setattr(budget, "images_of", lambda _: partial(images, 0.3))
    case.source = None
    compared = budget.Comparison(case, 0, 400, tmp_path)
    gap, numbers = compared.measured("flow", partial(images, 0.8))
    assert 0.5 < gap.gap_closed < 1
    assert numbers["near_copies"] >= 0
    for method, mean in ((judges.BASE, 0.15), (judges.POSTERIOR, 0.475), ("flow", 0.4)):
        found = judges.drawn(tmp_path, method, 0, 400)
        assert len(found) == budget.GENERATIONS
        assert torch.stack(found).mean().item() == pytest.approx(mean, abs=0.02)
        assert not torch.equal(found[0], found[1])


def test_the_vae_s_own_prior_is_a_rival_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every lower temperature may be worse than no change at all."""
    monkeypatch.syspath_prepend(str(FOLDER))
    best_rival = load("prior_hole").best_rival
    families = {"base prior": "reference", "temperature 0.9": "peer", "NCP": "ours"}
    methods = [SimpleNamespace(name=name, family=family) for name, family in families.items()]

    def gaps(colder: float) -> dict[str, Any]:
        values = zip(families, (0.0, colder, 0.9), strict=True)
        return {name: SimpleNamespace(gap_closed=value) for name, value in values}

    assert best_rival(methods, gaps(-0.3)) == "base prior"
    assert best_rival(methods, gaps(0.2)) == "temperature 0.9"
    assert best_rival(methods[::2], gaps(0.2)) is None


def test_a_training_of_this_run_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads for 10 s and a joint head for 20 s: all of now, or the joint head resumed in 1 s."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = load("hole_methods")._trained_before
    histories = [SimpleNamespace(rows=[SimpleNamespace(seconds=s)]) for s in (10.0, 20.0)]
    for joint, expected in ((20.0, 0.0), (1.0, 19.0)):
        choices = [
            SimpleNamespace(part=part, seconds=seconds)
            for part, seconds in (("heads", 10.0), ("joint head", joint), ("keep", 5.0))
        ]
        assert before(SimpleNamespace(choices=choices, histories=histories)) == expected
