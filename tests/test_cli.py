"""The command line: what it prints, where, and with which exit status."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ncprior import NCPrior, SingleGroup
from ncprior.cli import main
from ncprior.heads.networks import MLPHead

MY_VAE = """
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
    imports += 1
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
    for arguments in (["--help"], ["demo", "--help"], ["diagnose", "--help"], ["inspect", "-h"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "ncprior demo --data mnist" in out  # an example of every command
    assert "Example my_vae.py:" in out


def test_inspect_prints_the_configuration(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "saved"]) == 0
    configuration = json.loads(capsys.readouterr().out)
    assert configuration["heads"][0]["config"]["width"] == 8


def test_diagnose_reports_on_the_users_objects(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["diagnose", "saved", "--source", "my_vae_of_test.py:source"]
    arguments += ["--data", "my_vae_of_test.py:held_out", "--train", "my_vae_of_test.py:held_out"]
    before = torch.get_rng_state()
    assert main([*arguments, "--json", "--plot", "report.png"]) == 0
    assert torch.equal(before, torch.get_rng_state())
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


def test_a_missing_prior_is_said_without_a_traceback(place: Path) -> None:
    command = [sys.executable, "-m", "ncprior.cli", "inspect", "nowhere/ncprior.safetensors"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("ncprior: There is no file")
    assert "Traceback" not in done.stderr


def test_an_interrupt_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ncprior.saving.heads.inspect", interrupted)
    assert main(["inspect", "saved"]) == 130
