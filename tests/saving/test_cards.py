"""Model cards: metadata, report, and an example that runs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.hub_problems import equal_draws

from ncprior import NCPrior
from ncprior.diagnostics.diagnose import diagnose


def test_the_model_card_is_filled(prior: NCPrior, tmp_path: Path) -> None:
    report = diagnose(prior, torch.rand(64, 2), num_draws=64, num_proposals=(5, 25), fresh_steps=0)
    prior.save_pretrained(tmp_path, report=report, base_model="someone/vae")
    _, front, text = (tmp_path / "README.md").read_text().split("---\n", 2)
    data = yaml.safe_load(front)
    assert data == {
        "library_name": "ncprior",
        "base_model": "someone/vae",
        "tags": ["ncprior", "vae", "noise-contrastive-prior"],
    }
    assert str(report) in text and str(report.groups[0].verdict) in text
    parameters = sum(p.numel() for p in prior.parameters())
    assert f"| 0 | MLPHead | {parameters:,} | yes |" in text
    assert "[someone/vae](https://huggingface.co/someone/vae)" in text


def test_the_model_cards_snippet_loads_the_prior(
    prior: NCPrior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prior.save_pretrained(tmp_path / "mine")
    (code,) = re.findall(
        r"```python\n(.*?)```", (tmp_path / "mine/README.md").read_text(), re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"vae": prior.source}
    exec(re.sub(r"source = .*", "source = vae", code), names)  # noqa: S102
    assert names["x"].shape == (16, 3)
    assert equal_draws(prior.eval(), names["prior"])


def test_the_license_is_the_users(prior: NCPrior, tmp_path: Path) -> None:
    prior.save_pretrained(tmp_path, card_data={"license": "mit", "tags": ["faces"]})
    data = yaml.safe_load((tmp_path / "README.md").read_text().split("---\n")[1])
    assert data["license"] == "mit" and data["tags"][-1] == "faces" and "ncprior" in data["tags"]
    assert "base_model" not in data
