"""Model cards: metadata, report, and an example that runs."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.hub_problems import equal_draws, trained

from ncprior import NCPrior, sir
from ncprior.bases import GaussianMixture, rebase
from ncprior.diagnostics.diagnose import diagnose
from ncprior.recipe import Improvement


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


REPOSITORIES = [
    "someone/vae](https://evil) [x",
    "<script>",
    "a/b/c",
    "",
    3,
    ["a/b"],
    "a b",
    "a\nb/c",
]


@pytest.mark.parametrize("base_model", REPOSITORIES)
def test_F30_a_base_model_is_the_name_of_a_repository(
    base_model: Any, prior: NCPrior, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="base_model must be a Hub repository, such as"):
        prior.save_pretrained(tmp_path / "x", base_model=base_model)
    assert not (tmp_path / "x").exists()


def test_F30_the_name_of_a_directory_stays_in_its_place(prior: NCPrior, tmp_path: Path) -> None:
    folder = tmp_path / 'mi`n*e [x](y) <b>\n```\n# "owned" é'
    prior.save_pretrained(folder)
    card = (folder / "README.md").read_text()
    heading = next(line for line in card.splitlines() if line.startswith("# "))
    assert heading == r'# mi\`n\*e \[x\](y) \<b\>\\n\`\`\`\\n\# "owned" é'
    assert card.count("\n```") == 2  # one block of code and its end
    (code,) = re.findall(r"```python\n(.*?)\n```", card, re.DOTALL)
    compile(code, "card", "exec")
    assert "\n# " not in card.split("# mi", 1)[1]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        ({"tags": "abc"}, TypeError),
        ({"tags": [1]}, TypeError),
        ({"license": object()}, TypeError),
        ({"x": {"y": [torch.zeros(1)]}}, TypeError),
        ({"x": {1: 2}}, TypeError),
        ([("license", "mit")], TypeError),
        ("mit", TypeError),
        ({"self": 1}, ValueError),
        ({"eval_results": "x"}, ValueError),
    ],
)
def test_F30_metadata_is_plain(
    data: Any, error: type[Exception], prior: NCPrior, tmp_path: Path
) -> None:
    with pytest.raises(error, match="card_data"):
        prior.save_pretrained(tmp_path / "x", card_data=data)
    assert not (tmp_path / "x").exists()


def test_F30_plain_metadata_is_kept_and_no_tags_are_none(prior: NCPrior, tmp_path: Path) -> None:
    data = {"tags": None, "x": [1, 2.5, {"y": None}], "evil": "a\n---\n!!python/object:os"}
    prior.save_pretrained(tmp_path, card_data=data)
    _, front, _ = (tmp_path / "README.md").read_text().split("\n---\n", 2)[0].partition("---\n")
    front = (tmp_path / "README.md").read_text().removeprefix("---\n").split("\n---\n\n")[0]
    read = yaml.safe_load(front)
    assert read["tags"] == ["ncprior", "vae", "noise-contrastive-prior"]
    assert read["x"] == data["x"] and read["evil"] == data["evil"]


class Report:
    num_proposals = (5, 25)

    def __str__(self) -> str:
        return "fine\n```\n<script>\n````"


def test_F30_a_report_stays_in_its_block(prior: NCPrior, tmp_path: Path) -> None:
    prior.save_pretrained(tmp_path, report=Report())
    assert (tmp_path / "README.md").read_text().endswith(f"`````text\n{Report()}\n`````\n")
    with pytest.raises(
        TypeError, match="report must be the report of diagnose or improve; got 'fine'"
    ):
        prior.save_pretrained(tmp_path, report="fine")  # type: ignore[arg-type]


def test_a_report_of_improve_gives_its_diagnosis(prior: NCPrior, tmp_path: Path) -> None:
    def saved(**report: Any) -> str:
        prior.save_pretrained(tmp_path, **report)
        return (tmp_path / "README.md").read_text()

    plain, diagnosed = saved(), saved(report=Report())
    assert "It was saved without a report." in plain and str(Report()) in diagnosed
    improvement = Improvement("Better.", diagnosis=Report())  # type: ignore[arg-type]
    assert saved(report=improvement) == diagnosed
    assert saved(report=Improvement("Better.")) == plain
    prior.report = improvement
    assert saved() == diagnosed
    for other in ("notes", Improvement("Better."), Improvement("Better.", diagnosis="notes")):  # type: ignore[arg-type]
        prior.report = other
        assert saved() == plain


@pytest.mark.parametrize("settings", [{"active": [False]}, {"strength": 0.0}])
@pytest.mark.parametrize("sampler", [None, partial(sir, num_proposals=5)])
@pytest.mark.parametrize("mixture", [True, False])
def test_a_card_of_heads_that_are_off_says_so(
    settings: dict[str, Any], sampler: Any, mixture: bool, prior: NCPrior, tmp_path: Path
) -> None:
    base = GaussianMixture(torch.zeros(3), torch.randn(3, 2), torch.ones(3, 2))
    off = trained(rebase(prior.source, base) if mixture else prior.source).eval()
    off.sampler = sampler
    for name, value in settings.items():
        setattr(off, name, value)
    off.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    which = "the fitted base" if mixture else "its base"
    assert f"the prior is {which} alone, as all ratio heads are off." in card
    assert "reweigh" not in card and "The ratio is used" not in card
    assert "It needs no sampler" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {"vae": prior.source}
    code = code.replace(f'"{tmp_path.name}"', repr(str(tmp_path)))
    exec(re.sub(r"source = .*", "source = vae", code), names)  # noqa: S102
    assert names["x"].shape == (64, 3)
    assert equal_draws(off, names["prior"])


def test_N9_the_card_names_a_sampler_that_fits_the_base(prior: NCPrior, tmp_path: Path) -> None:
    base = GaussianMixture(torch.zeros(3), torch.randn(3, 2), torch.ones(3, 2))
    on_mixture = trained(rebase(prior.source, base))
    on_mixture.save_pretrained(tmp_path / "mixture")
    card = (tmp_path / "mixture" / "README.md").read_text()
    assert "within_components(partial(sir, num_proposals=500))).x" in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {"vae": prior.source}
    code = code.replace('"mixture"', repr(str(tmp_path / "mixture")))
    exec(re.sub(r"source = .*", "source = vae", code), names)  # noqa: S102
    assert names["x"].shape == (16, 3)
    prior.save_pretrained(tmp_path / "normal")
    normal = (tmp_path / "normal" / "README.md").read_text()
    assert "prior.sample(16, partial(sir, num_proposals=500)).x" in normal
    for text in (card, normal):
        assert "`recommend_sampler(diagnose(prior, x_test), budget=500)`" in text
