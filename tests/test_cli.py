"""The command line: what it prints, where, and with which exit status."""

import io
import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled

import ncprior
from ncprior import NCPrior, SingleGroup, sir
from ncprior.__main__ import main
from ncprior.heads.networks import MLPHead
from ncprior.jobs import read_parts, sample_parts
from ncprior.recipe.files import OWN_FILES, arguments_file, base_file, heads_file, joint_file
from ncprior.recipe.report import Improvement
from ncprior.saving.folders import WorkFolder

MY_VAE = """
import random
import torch
from torch import nn
from torch.distributions import Independent, Normal
from ncprior import SingleGroup

torch.manual_seed(0)
vae = nn.Linear(2, 2).eval()
base = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
source = SingleGroup(base, lambda x: Independent(Normal(x, 0.1), 1), vae, module=vae)
imports = 0

def held_out():
    global imports
    imports += random.randint(1, 1)
    return torch.ones(100, 2) + torch.randn(100, 2)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a user's VAE in a file and a saved prior for it."""
    monkeypatch.chdir(tmp_path)
    Path("my_vae_of_test.py").write_text(MY_VAE)
    names: dict[str, SingleGroup] = {}
    exec(MY_VAE, names)  # noqa: S102
    NCPrior(names["source"], MLPHead((2,), width=8)).save_pretrained("saved")
    yield tmp_path
    sys.modules.pop("my_vae_of_test", None)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["demo"], ["diagnose"], ["sample"], ["inspect"]):
        arguments = [*command, "--help"]
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "ncprior demo --data mnist" in out  # an example of every command
    assert "Example my_vae.py, with vae, base and posterior as in the README:" in out
    assert "ncprior sample my-prior --source my_vae.py:source -n 1000 --out samples" in out
    assert "run it again: it draws the missing parts only" in out


@pytest.mark.parametrize("command", ["--help", "--version", "sample --help", "sample --seed x"])
def test_help_and_errors_in_options_need_no_torch(command: str) -> None:
    code = f"""
import sys
sys.modules["torch"] = None  # importing it fails
from ncprior.__main__ import main
main({command.split()!r})
"""
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True
    )
    assert (done.returncode, "ncprior" in done.stdout + done.stderr) == (
        2 * ("x" in command),
        True,
    )
    assert "Traceback" not in done.stderr


def test_inspect_prints_the_configuration(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "saved"]) == 0
    configuration = json.loads(capsys.readouterr().out)
    assert configuration["heads"][0]["config"]["width"] == 8


def test_diagnose_reports_on_the_users_objects(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["diagnose", "saved", "--source", "my_vae_of_test.py:source"]
    arguments += ["--data", "my_vae_of_test.py:held_out", "--train", "my_vae_of_test.py:held_out"]
    before, others = torch.get_rng_state(), random.getstate()
    assert main([*arguments, "--json", "--plot", "report.png"]) == 0
    assert torch.equal(before, torch.get_rng_state())
    assert others == random.getstate()
    report = json.loads(capsys.readouterr().out)
    assert report["groups"][0]["kl"] == 0  # an untrained head: log r = 0
    assert Path("report.png").read_bytes().startswith(b"\x89PNG")
    assert sys.modules["my_vae_of_test"].imports == 2  # called twice, imported once
    assert main(arguments) == 0
    assert "untrained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("my_vae_of_test.py", "Expected FILE.py:NAME"),
        ("no_such_file.py:source", "There is no file no_such_file.py"),
        ("my_vae_of_test.py:sauce", "my_vae_of_test.py has no sauce"),
        ("no_such_module:source", "No module named 'no_such_module'"),
    ],
)
def test_a_wrong_place_is_said(
    place: Path, capsys: pytest.CaptureFixture[str], where: str, message: str
) -> None:
    assert main(["diagnose", "saved", "--source", where, "--data", where]) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert not captured.out


def test_N8_the_package_runs_as_a_module_and_says_what_is_missing(place: Path) -> None:
    command = [sys.executable, "-m", "ncprior", "inspect", "nowhere/ncprior.safetensors"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("ncprior: There is no file")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("prior = NCPrior(source, MLPHead((2,)))", "got .*NCPrior"),
        ("prior = 3", "got (int|3)"),
        ("prior = SingleGroup", "got "),
        ("def prior(): return None", "got None"),
    ],
)
def test_F24_what_is_no_source_is_said(
    place: Path, capsys: pytest.CaptureFixture[str], code: str, message: str
) -> None:
    heads = "from ncprior import NCPrior\nfrom ncprior.heads import MLPHead\n"
    Path("my_vae_of_test.py").write_text(MY_VAE + heads + code)
    where = ["--source", "my_vae_of_test.py:prior", "--data", "my_vae_of_test.py:held_out"]
    assert main(["diagnose", "saved", *where]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"A source is a subclass of ncprior.LatentSource; {message}", line)


WRONG_POSTERIOR = """vae.forward = lambda z: z
def posterior(x):
    return x @ z
source = SingleGroup(base, posterior, vae, module=vae)"""


@pytest.mark.parametrize(
    ("code", "line", "message"),
    [
        ("x = (1,\ny = 2", 1, "SyntaxError: '(' was never closed"),
        ("x = 1\nraise RuntimeError('no\\nmemory')", 2, "RuntimeError: no memory"),
        ("def f():\n    raise AttributeError\nf()", 2, "AttributeError: "),
        ("import no_such_package", 1, "ModuleNotFoundError: No module named 'no_such_package'"),
        ("import sys\nsys.exit()", 2, "SystemExit: "),
        (WRONG_POSTERIOR, 3, "NameError: name 'z' is not defined"),
        ("def held_out():\n    return {}['a']", 2, "KeyError: 'a'"),
    ],
)
def test_F24_an_error_in_the_users_file_names_its_line(
    place: Path, capsys: pytest.CaptureFixture[str], code: str, line: int, message: str
) -> None:
    Path("my_vae_of_test.py").write_text(MY_VAE + code)
    where = ["--source", "my_vae_of_test.py:source", "--data", "my_vae_of_test.py:held_out"]
    for arguments in (where, [part.replace(".py:", ":") for part in where]):
        assert main(["diagnose", "saved", *arguments]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert f"my_vae_of_test.py:{MY_VAE.count(chr(10)) + line}: {message}" in said
        sys.modules.pop("my_vae_of_test", None)


def test_F24_a_file_is_read_again_after_an_error(place: Path) -> None:
    where = ["--source", "my_vae_of_test.py:source", "--data", "my_vae_of_test.py:held_out"]
    Path("my_vae_of_test.py").write_text("source = 1 / 0")
    assert main(["diagnose", "saved", *where]) == 2
    Path("my_vae_of_test.py").write_text(MY_VAE)
    assert main(["diagnose", "saved", *where]) == 0


def test_N8_modules_in_the_working_folder_and_neighbours_of_a_file_are_found(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sys.path.copy()
    where = ["--source", "my_vae_of_test:source", "--data", "my_vae_of_test:held_out"]
    assert main(["diagnose", "saved", *where]) == 0
    Path("deep").mkdir()
    Path("deep", "neighbour_of_test.py").write_text(MY_VAE)
    Path("deep", "vae_of_test.py").write_text("from neighbour_of_test import *")
    where = ["--source", "deep/vae_of_test.py:source", "--data", "deep/vae_of_test.py:held_out"]
    assert main(["diagnose", "saved", *where]) == 0
    assert sys.path == before
    del sys.modules["neighbour_of_test"], sys.modules["vae_of_test"]


TABLE = """
import numpy as np
class DataFrame:  # of pandas or polars
    def __init__(self, values): self.values = np.array(values)
    def to_numpy(self): return self.values
    def __getitem__(self, column): raise KeyError(column)
    def __len__(self): return len(self.values)
"""


@pytest.mark.parametrize(
    ("data", "status"),
    [
        *(("DataFrame(np.random.randn(100, 2))", 0), ("np.random.randn(100, 2)", 0)),
        *(("DataFrame([['a', 1], ['b', 2]])", 1), ("3", 1), ("SingleGroup", 1), ("None", 1)),
    ],
)
def test_N8_tables_and_arrays_are_data(
    place: Path, capsys: pytest.CaptureFixture[str], data: str, status: int
) -> None:
    Path("my_vae_of_test.py").write_text(f"{MY_VAE}{TABLE}\ntable = {data}")
    where = ["--source", "my_vae_of_test.py:source", "--data", "my_vae_of_test.py:table"]
    assert main(["diagnose", "saved", *where]) == status
    if status:
        assert "my_vae_of_test.py:table must be" in capsys.readouterr().err


def test_F26_the_seed_is_within_range(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--source", "my_vae_of_test.py:source", "--data", "my_vae_of_test.py:held_out"]
    assert main(["diagnose", "saved", *where, "--seed", str(2**80)]) == 1
    assert "seed must be a whole number" in capsys.readouterr().err


SAMPLE = ["sample", "with-sampler", "--source", "my_vae_of_test.py:source"]
JOB = ["-n", "1300", "--out", "drawn", "--part-size", "500", "--seed", "3"]


@pytest.fixture
def with_sampler(place: Path) -> NCPrior:
    """A saved prior with a sampler, in a folder of this name."""
    names: dict[str, SingleGroup] = {}
    exec(MY_VAE, names)  # noqa: S102
    prior = NCPrior(names["source"], MLPHead((2,), width=8)).eval()
    prior.sampler = partial(sir, num_proposals=5)
    prior.save_pretrained("with-sampler")
    return prior


def files(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_sample_draws_by_the_saved_sampler(
    with_sampler: NCPrior, capsys: pytest.CaptureFixture[str]
) -> None:
    before = torch.get_rng_state()
    assert main([*SAMPLE, *JOB]) == 0
    captured = capsys.readouterr()
    assert re.fullmatch(r"1,300 samples in drawn, 3 parts, \d+ s\n", captured.out)
    assert "1300/1300" in captured.err
    assert torch.equal(before, torch.get_rng_state())
    sample_parts(with_sampler, "expected", num_samples=1300, part_size=500, seed=3, progress=False)
    assert files("drawn") == files("expected")
    assert main([*SAMPLE, "-n", "1", "--out", "one"]) == 0
    assert capsys.readouterr().out.startswith("1 sample in one, 1 part, ")


def test_processes_share_a_job_by_their_numbers(
    with_sampler: NCPrior, capsys: pytest.CaptureFixture[str]
) -> None:
    for share, count, rows in (("1/2", 1, 500), ("0/2", 2, 800), ("5/9", 0, 0)):
        assert main([*SAMPLE, *JOB, "--parts", share]) == 0
        out = capsys.readouterr().out
        assert re.fullmatch(rf"{rows} samples in drawn, {count} of 3 parts, \d+ s\n", out)
    assert main([*SAMPLE, *JOB, "--out", "memory://shared"]) == 0
    sample_parts(with_sampler, "expected", num_samples=1300, part_size=500, seed=3, progress=False)
    assert files("drawn") == files("expected")
    assert len(list(read_parts("memory://shared"))) == 3
    for share in ("2/2", "1", "-1/2", "a/b", "0/0"):
        with pytest.raises(SystemExit):
            main([*SAMPLE, *JOB, f"--parts={share}"])
        assert "argument --parts: must be I/N with I < N" in capsys.readouterr().err


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.mark.slow
def test_torchrun_samples_by_the_numbers_of_its_ranks(with_sampler: NCPrior) -> None:
    line = (
        f"exec {sys.executable} -m ncprior {' '.join([*SAMPLE, *JOB])} --parts $RANK/$WORLD_SIZE"
    )
    command = [sys.executable, *TORCHRUN, "--no-python", "sh", "-c", line]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"(\d) of 3 parts", done.stdout)) == ["1", "2"]
    sample_parts(with_sampler, "expected", num_samples=1300, part_size=500, seed=3, progress=False)
    assert files("drawn") == files("expected")


def test_sample_goes_on_after_a_kill(with_sampler: NCPrior) -> None:
    """A process is killed as soon as it has one part; the next one completes the job."""
    code = f"""
import os, signal
from ncprior import jobs
from ncprior.__main__ import main
save = jobs._save
def save_and_die(*arguments):
    save(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
jobs._save = save_and_die
main({[*SAMPLE, *JOB]!r})
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    first = files("drawn")
    assert first.keys() == {"job.json", "part-00000.safetensors"}
    assert main([*SAMPLE, *JOB]) == 0
    assert len(files("drawn")) == 4 and first.items() <= files("drawn").items()
    sample_parts(with_sampler, "expected", num_samples=1300, part_size=500, seed=3, progress=False)
    assert files("drawn") == files("expected")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-n", "0"], "num_samples must be a whole number"),
        (["--part-size", "-1"], "part_size must be a whole number"),
        (["--batch-size", "0"], "batch_size must be a whole number"),
        (["--proposals", "0"], "num_proposals must be a whole number"),
        (["--seed", str(10**30)], "seed must be a whole number"),
        (["--draw-x"], "does not know p(x | z)"),
        (["--condition", "my_vae_of_test.py:held_out"], "one row per sample; got 100 rows for 10"),
    ],
)
def test_wrong_options_of_sample_are_said(
    arguments: list[str],
    message: str,
    with_sampler: NCPrior,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([*SAMPLE, "-n", "1000", *arguments]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not Path("samples").exists()


def test_a_prior_without_a_sampler_needs_a_number_of_proposals(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["sample", "saved", "--source", "my_vae_of_test.py:source", "-n", "10"]
    assert main(where) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ncprior: saved was saved without a sampler. Pass --proposals 500, or")
    assert main([*where, "--proposals", "7", "--batch-size", "4"]) == 0
    job = json.loads(Path("samples/job.json").read_text())
    assert job["sampler"] == "sir(num_proposals=7)" and job["batch_size"] == 4


def test_a_prior_whose_heads_are_off_needs_no_sampler(place: Path) -> None:
    """In Python it draws from the base; here it was an error."""
    names: dict[str, SingleGroup] = {}
    exec(MY_VAE, names)  # noqa: S102
    prior = NCPrior(names["source"], MLPHead((2,), width=8))
    prior.strength = 0.0
    prior.save_pretrained("weak")
    assert main(["sample", "weak", "--source", "my_vae_of_test.py:source", "-n", "10"]) == 0
    (part,) = read_parts("samples")
    assert len(part["x"]) == 10
    sample_parts(prior.eval(), "samples", num_samples=10)  # the same job


CONDITIONAL = """
def posterior(x, c):
    return Independent(Normal(x + c, 0.1), 1)
labels = torch.arange(20.0).reshape(10, 2)
source = SingleGroup(
    base, posterior, lambda z, c: c, module=vae, condition=lambda x: x,
    likelihood=lambda z, c: Independent(Normal(c, 0.001), 1),
)
"""


def test_sample_takes_conditions_and_draws_x(place: Path) -> None:
    Path("my_vae_of_test.py").write_text(MY_VAE + CONDITIONAL)
    names: dict[str, SingleGroup] = {}
    exec(MY_VAE + CONDITIONAL, names)  # noqa: S102
    NCPrior(names["source"], MLPHead((2,), context_shape=(2,), width=8)).save_pretrained("c")
    where = ["sample", "c", "--source", "my_vae_of_test.py:source", "-n", "10", "--proposals", "2"]
    where += ["--condition", "my_vae_of_test.py:labels", "--part-size", "4"]
    labels = torch.arange(20.0).reshape(10, 2)
    for more, largest in (([], 0.0), (["--draw-x", "--out", "drawn"], 0.01)):
        assert main([*where, *more]) == 0
        x = torch.cat([part["x"] for part in read_parts("drawn" if more else "samples")])
        difference = (x - labels).abs().max().item()
        assert 0 <= difference <= largest and (difference > 0) == bool(more)


def test_a_mistyped_folder_is_said_at_once(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ncprior.saving.hub.hf_hub_download", None)  # the Hub is not asked
    assert main(["sample", "savde", "--source", "my_vae_of_test.py:source"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ncprior: There is no file or folder savde")


SAMPLED = "sample saved --proposals 2 --source WHERE:source --out out"
IMPROVED = "improve WHERE:source --data WHERE:held_out --out out"


@pytest.mark.parametrize(
    ("where", "command", "kept"),
    [
        ("ncprior.saving.heads.inspect", "inspect saved", ""),
        ("ncprior.improve", IMPROVED, ""),
        ("ncprior.improve", IMPROVED, "out/.ncprior-improve"),
        ("ncprior.prior.NCPrior.sample", SAMPLED, ""),
        ("ncprior.jobs._save", SAMPLED, "out/job.json"),
    ],
)
def test_an_interrupt_is_said(
    where: str,
    command: str,
    kept: str,
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And that the command goes on when it is run again, if it has left something to go on from."""

    def interrupted(*_: object, checkpoint: Path | None = None, **__: object) -> None:
        if checkpoint is not None and kept:
            checkpoint.mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupted)
    assert main(command.replace("WHERE", "my_vae_of_test.py").split()) == 130
    assert Path(kept or "saved").exists()
    words = "interrupted; no incomplete file is left"
    words += ". Run the same command again to go on" if kept else ""
    assert capsys.readouterr().err.splitlines()[-1] == f"ncprior: {words}"


def test_a_condition_of_whole_numbers_stays_one(place: Path) -> None:
    """Labels of NumPy became floats, of which there is no one-hot code."""
    labelled = CONDITIONAL.replace("torch.arange(20.0).reshape(10, 2)", "np.arange(10)")
    labelled = labelled.replace(
        "lambda z, c: c, module", "lambda z, c: one_hot(c, 10).float(), module"
    )
    labelled = "import numpy as np\nfrom torch.nn.functional import one_hot\n" + labelled
    context = "condition=lambda x: x, context=lambda c: one_hot(c, 10).float(),"
    labelled = labelled.replace("condition=lambda x: x,", context)
    Path("my_vae_of_test.py").write_text(MY_VAE + labelled)
    names: dict[str, SingleGroup] = {}
    exec(MY_VAE + labelled, names)  # noqa: S102
    head = MLPHead((2,), context_shape=(10,), width=8)
    NCPrior(names["source"], head).save_pretrained("c")
    where = ["sample", "c", "--source", "my_vae_of_test.py:source", "-n", "10", "--proposals", "2"]
    assert main([*where, "--condition", "my_vae_of_test.py:labels"]) == 0
    assert torch.equal(next(iter(read_parts("samples")))["x"], torch.eye(10))


IMPROVE = ["improve", "my_vae_of_test.py:source", "--data", "my_vae_of_test.py:held_out"]


IDENTITY = f"""{MY_VAE}
source = SingleGroup(base, lambda x: Independent(Normal(x, 0.1), 1), lambda z: z)
"""


def quickly(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    """Lets `ncprior.improve` write the files of its folder, and return a saved prior at once."""
    names: dict[str, SingleGroup] = {}
    exec(MY_VAE, names)  # noqa: S102
    prior = NCPrior.from_pretrained(names["source"], place / "saved")
    prior.report = SimpleNamespace(
        verdict="The gap … is closed.",
        seconds=1.0,
        save_html=Improvement("Better.").save_html,
    )

    def improved(*_: object, checkpoint: Path, **__: object) -> NCPrior:
        checkpoint.mkdir(parents=True, exist_ok=True)
        for file in (
            arguments_file(checkpoint),
            *(base_file(checkpoint, name) for name in ("", "refit ")),
            *(heads_file(checkpoint, name, 12) for name in ("", "refit ")),
            joint_file(checkpoint, 64 * "a"),
        ):
            file.touch()
        (checkpoint / ".heads-1.0badcafe.tmp").touch()  # of an attempt that was killed
        return prior

    monkeypatch.setattr("ncprior.improve", improved)
    monkeypatch.setattr(
        NCPrior, "save_pretrained", lambda self, folder: folder.mkdir(exist_ok=True)
    )


def test_improve_deletes_no_file_of_the_user(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It wrote to `checkpoints`, and deleted that folder with all that was in it."""
    quickly(monkeypatch, place)
    Path("checkpoints").mkdir()
    Path("checkpoints/last.ckpt").write_text("weeks of work")
    assert main([*IMPROVE, "--out", "."]) == 0
    assert Path("checkpoints/last.ckpt").read_text() == "weeks of work"
    assert not Path(".ncprior-improve").exists()
    assert main([*IMPROVE, "--out", "new"]) == 0
    assert [path.name for path in Path("new").iterdir()] == ["report.html"]


@pytest.mark.parametrize("name", ["last.ckpt", "heads-0/weights"])
def test_improve_works_in_no_folder_of_the_user(
    name: str, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quickly(monkeypatch, place)
    file = Path("out/.ncprior-improve") / name
    file.parent.mkdir(parents=True)
    file.write_text("weeks of work")
    assert main([*IMPROVE, "--out", "out"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ncprior: out/.ncprior-improve is for unfinished work")
    assert file.read_text() == "weeks of work" and f"holds {name.split('/')[0]}. Move" in line


def test_a_report_of_the_user_is_not_replaced(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`improve --out .` and `report` replaced any report.html; their own ones may be written anew."""
    quickly(monkeypatch, place)
    page = Path("report.html")
    page.write_text("weeks of work")
    for command in ([*IMPROVE, "--out", "."], ["report", "prior", "--source", *IMPROVE[1:]]):
        assert main(command) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(
            "ncprior: report.html is no report of ncprior and would be replaced"
        )
        assert page.read_text() == "weeks of work"
    page.unlink()
    for _ in range(2):
        assert main([*IMPROVE, "--out", "."]) == 0
    assert "generator" in page.read_text()


def test_hidden_files_of_the_system_are_left_where_they_are(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quickly(monkeypatch, place)
    hidden = Path("out/.ncprior-improve/.DS_Store")
    hidden.parent.mkdir(parents=True)
    hidden.touch()
    assert main([*IMPROVE, "--out", "out"]) == 0
    assert hidden.exists()


def test_improve_keeps_files_that_were_put_into_its_folder_meanwhile(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quickly(monkeypatch, place)
    improved = ncprior.improve

    def and_something_else(*arguments: Any, checkpoint: Path, **options: Any) -> NCPrior:
        prior = improved(*arguments, checkpoint=checkpoint, **options)
        (checkpoint / "notes.txt").touch()
        return prior

    monkeypatch.setattr("ncprior.improve", and_something_else)
    assert main([*IMPROVE, "--out", "out"]) == 0
    assert files("out/.ncprior-improve").keys() == {"notes.txt"}


def test_improve_knows_the_files_of_its_folder(place: Path) -> None:
    """Of a whole run, which leaves none of them behind; the folder of one that stops holds no other."""
    Path("my_vae_of_test.py").write_text(IDENTITY)
    assert main([*IMPROVE, "--out", "out", "--max-seconds", "1", "--quiet"]) == 0
    assert files("out").keys() >= {"ncprior.safetensors", "report.html"}
    assert not [name for name in files("out") if name.startswith(".")]
    names: dict[str, Any] = {}
    exec(IDENTITY, names)  # noqa: S102
    data = names["held_out"]()
    options: dict[str, Any] = {"seed": 0, "max_seconds": 1, "progress": False}
    ncprior.improve(names["source"], data, checkpoint="kept", **options)
    assert files("kept").keys() >= {"seed.txt", "base.safetensors", "heads-0"}
    WorkFolder(Path("kept"), OWN_FILES).require_own()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_a_terminal_without_some_letters_shows_the_others(encoding: str, place: Path) -> None:
    for arguments, status in ((["sample", "--help"], 0), (["inspect", "no…where/a.file"], 1)):
        done = subprocess.run(
            [sys.executable, "-m", "ncprior", *arguments],
            env={**os.environ, "PYTHONIOENCODING": encoding},
            check=False,
            capture_output=True,
        )
        text = (done.stdout + done.stderr).decode(encoding)
        assert done.returncode == status and "Traceback" not in text
        assert ("in one of N processes; I is" in " ".join(text.split())) == (status == 0)


def test_improve_ends_well_where_its_verdict_cannot_be_shown(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quickly(monkeypatch, place)
    shown = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", shown)
    assert main([*IMPROVE, "--out", "out"]) == 0
    shown.seek(0)
    assert shown.read() == "The gap ? is closed. out, 1 s\n"


def test_quiet_shows_the_last_line_alone(
    with_sampler: NCPrior, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([*SAMPLE, *JOB, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert re.fullmatch(r"1,300 samples in drawn, 3 parts, \d+ s\n", captured.out)
    assert captured.err == ""
    Path("my_vae_of_test.py").write_text(IDENTITY)
    sys.modules.pop("my_vae_of_test")
    assert main([*IMPROVE, "--max-seconds", "1", "--out", "out", "--quiet"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and len(captured.out.splitlines()) == 1
    seen = []

    def run_demo(*_: object, progress: bool, **__: object) -> dict[str, str]:
        seen.append((progress, are_progress_bars_disabled()))
        return {"summary": "done"}

    monkeypatch.setattr("ncprior.demo.run.run_demo", run_demo)
    for more in (["--quiet"], []):
        assert main(["demo", *more]) == 0
        assert not are_progress_bars_disabled()  # again
    assert seen == [(False, True), (True, False)]
