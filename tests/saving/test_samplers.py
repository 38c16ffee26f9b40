"""A prior's sampler is saved with its heads, from a fixed table of kinds, and checked when loaded."""

from __future__ import annotations

import inspect as python
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.hub_problems import edit, gaussian, trained

from ncprior import NCPrior, langevin, samplers, sir
from ncprior.bases import GaussianMixture, rebase
from ncprior.samplers import (
    Draw,
    Sampler,
    at_temperature,
    budgeted_rejection,
    describe,
    independence,
    rejection,
    sequence,
    tempered_smc,
    within_components,
)
from ncprior.saving import inspect
from ncprior.saving.heads import FILE
from ncprior.saving.samplers import _ARGUMENTS, _NOT_SAVED, KINDS
from ncprior.vaebm import VAEBM

SIR = partial(sir, num_proposals=20)
MALA = partial(langevin, num_steps=2, step_size=0.1, adjusted=True)

SAMPLERS: dict[str, Sampler] = {
    "sir": partial(sir, num_proposals=20, chunk_size=30, share_proposals=True),
    "langevin": MALA,
    "tempered_smc": partial(
        tempered_smc, num_particles=5, num_moves=1, num_leapfrogs=2, ess_fraction=0.3
    ),
    "pool": partial(budgeted_rejection, num_proposals=3, share_proposals=True),
    "rejection": partial(rejection, log_bound=-0.25, max_tries=7),
    "independence": partial(independence, num_steps=6),
    "sequence": sequence(SIR, MALA, partial(independence, num_steps=2)),
    "at_temperature": at_temperature(SIR, temperature=0.1 + 0.2),
    "nested": sequence(at_temperature(partial(SIR, chunk_size=7), 0.5), MALA),
    "numpy": partial(langevin, num_steps=np.int64(2), step_size=np.float32(0.1)),
}


def saved_with(sampler: Any, folder: Path, source: Any = None) -> NCPrior:
    prior = trained(gaussian() if source is None else source).eval()
    prior.sampler = sampler
    prior.save_pretrained(folder)
    return prior


def same_samples(a: NCPrior, b: NCPrior) -> bool:
    draws = []
    for prior in (a, b):
        torch.manual_seed(3)
        draws.append(prior.sample(16))
    return torch.equal(draws[0].x, draws[1].x)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_sampler_comes_back_with_the_heads(kind: str, tmp_path: Path) -> None:
    prior = saved_with(SAMPLERS[kind], tmp_path)
    loaded = NCPrior.from_pretrained(prior.source, tmp_path)
    assert loaded.sampler is not None and prior.sampler is not None
    if kind != "numpy":  # its numbers are those of Python now
        assert describe(loaded.sampler) == describe(prior.sampler)
    assert same_samples(prior, loaded)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert inspect(again)["sampler"] == inspect(tmp_path)["sampler"]


def test_a_sampler_within_components_comes_back_with_the_mixture(tmp_path: Path) -> None:
    base = GaussianMixture(torch.zeros(3), torch.randn(3, 2), torch.ones(3, 2))
    prior = saved_with(within_components(SIR), tmp_path, rebase(gaussian(), base))
    loaded = NCPrior.from_pretrained(gaussian(), tmp_path)
    assert same_samples(prior, loaded)
    sir_entry = {"kind": "sir", "config": {"num_proposals": 20}}
    entry = {"kind": "within_components", "config": {"sampler": sir_entry}}
    assert inspect(tmp_path)["sampler"] == entry


def test_a_fresh_process_draws_the_same(tmp_path: Path) -> None:
    prior = saved_with(sequence(SIR, MALA), tmp_path)
    torch.manual_seed(5)
    here = prior.sample(64).x
    code = """
import sys, torch
from helpers.hub_problems import gaussian
from ncprior import NCPrior
torch.set_num_threads(1)
prior = NCPrior.from_pretrained(gaussian(), sys.argv[1])
torch.manual_seed(5)
torch.save(prior.sample(64).x, sys.argv[2])
"""
    path = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
    command = [sys.executable, "-c", f"import sys; sys.path[:0] = {path}\n{code}"]
    subprocess.run([*command, str(tmp_path), str(tmp_path / "x.pt")], check=True)
    assert torch.equal(here, torch.load(tmp_path / "x.pt", weights_only=True))


def test_the_table_has_every_public_sampler_with_all_its_arguments() -> None:
    others = {"Draw", "LogRatio", "Sampler", "describe", "supports_langevin"}
    assert KINDS.keys() == set(samplers.__all__) - others
    for function in KINDS.values():
        names = python.signature(function).parameters.keys() - {*_NOT_SAVED}
        assert names - {"sampler", "first", "then"} <= _ARGUMENTS.keys()


def test_a_prior_without_a_sampler_has_no_entry(prior: NCPrior, saved: Path) -> None:
    assert "sampler" not in inspect(saved)
    assert NCPrior.from_pretrained(prior.source, saved).sampler is None


def my_sampler(prior: Any, log_ratio: Any) -> Draw:
    return sir(prior, log_ratio, num_proposals=3)


UNSAVED: dict[str, Sampler] = {
    "my_sampler": my_sampler,
    "sir(num_proposals=2000000)": partial(sir, num_proposals=2 * 10**6),
    "langevin(init=tensor": partial(langevin, num_steps=1, step_size=0.1, init=torch.zeros(8, 2)),
    "within_components(my_sampler)": within_components(my_sampler),
    "step_size=inf": partial(langevin, num_steps=1, step_size=float("inf")),
}


@pytest.mark.parametrize("name", UNSAVED)
def test_a_sampler_outside_of_the_table_is_left_out_with_a_warning(
    name: str, tmp_path: Path
) -> None:
    match = rf"saved without its sampler, .*{re.escape(name)}.* Set prior.sampler again after load"
    with pytest.warns(UserWarning, match=match) as caught:
        prior = saved_with(UNSAVED[name], tmp_path)
    assert caught[0].filename == __file__
    assert prior.sampler is UNSAVED[name]
    assert NCPrior.from_pretrained(prior.source, tmp_path).sampler is None
    assert "recommend_sampler" in (tmp_path / "README.md").read_text()


def entry(kind: Any, **config: Any) -> dict[str, Any]:
    return {"kind": kind, "config": config}


def deep(depth: int) -> dict[str, Any]:
    found = entry("sir", num_proposals=2)
    for _ in range(depth):
        found = entry("within_components", sampler=found)
    return found


HOSTILE: list[tuple[Any, str]] = [
    (3, "has no valid sampler"),
    (None, "has no valid sampler"),
    (
        {},
        "its sampler must be one of sir, budgeted_rejection, langevin, tempered_smc, rejection, independence, seq",
    ),
    (entry("os.system", command="true"), "its sampler must be one of sir"),
    (entry("describe", sampler="x"), "its sampler must be one of sir"),
    (entry(["sir"], num_proposals=2), "its sampler must be one of sir"),
    ({"kind": "sir", "config": []}, "its sampler must be one of sir"),
    ({**entry("sir", num_proposals=2), "more": 1}, "its sampler must be one of sir"),
    (entry("sir"), "its sampler sir lacks its num_proposals"),
    (entry("sir", num_proposals=2, code="x"), "sir has unknown arguments: code"),
    (entry("langevin", num_steps=2, step_size=0.1, init=[0.0]), "unknown arguments: init"),
    (entry("sir", num_proposals=0), "its sampler has no valid num_proposals; got 0"),
    (entry("sir", num_proposals=True), "no valid num_proposals; got True"),
    (entry("sir", num_proposals=10**12), "no valid num_proposals"),
    (entry("sir", num_proposals=2.0), "no valid num_proposals"),
    (entry("sir", num_proposals=deep(0)), "no valid num_proposals"),
    (entry("sir", num_proposals=2, share_proposals=1), "no valid share_proposals"),
    (entry("langevin", num_steps=2, step_size=0), "no valid step_size"),
    (entry("langevin", num_steps=2, step_size="0.1"), "no valid step_size"),
    (entry("tempered_smc", num_particles=2, ess_fraction=1), "no valid ess_fraction"),
    (entry("rejection", log_bound=[]), "no valid log_bound"),
    (entry("within_components"), "within_components lacks its sampler"),
    (entry("within_components", sampler=2), "its sampler must be one of sir"),
    (entry("at_temperature", sampler=deep(0), temperature=-1), "no valid temperature"),
    (entry("sequence", first=deep(0), then=deep(0)), "no valid then"),
    (entry("sequence", first=deep(0), then=[deep(0)]), "Samplers after the first start from init"),
    (entry("sequence", first=deep(0), then=15 * [deep(0)]), "its sampler has more than 16 parts"),
    (deep(16), "its sampler has more than 16 parts"),
]


@pytest.mark.parametrize(("hostile", "match"), HOSTILE)
def test_an_entry_is_checked_before_anything_is_built(
    hostile: Any, match: str, prior: NCPrior, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(saved / FILE, lambda config, _: config.update(sampler=hostile))
    monkeypatch.setattr(NCPrior, "__init__", None)  # never called
    with pytest.raises(ValueError, match=match) as caught:
        NCPrior.from_pretrained(prior.source, saved)
    assert str(saved) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_fifteen_compositions_of_one_sampler_are_loaded(prior: NCPrior, saved: Path) -> None:
    edit(saved / FILE, lambda config, _: config.update(sampler=deep(15)))
    assert NCPrior.from_pretrained(prior.source, saved).sampler is not None


def test_N9_the_card_shows_the_sampler_and_its_example_runs(tmp_path: Path) -> None:
    prior = saved_with(sequence(SIR, MALA), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"draws by its own sampler, `{describe(sequence(SIR, MALA))}`." in card
    assert "num_proposals=500" not in card and "recommend_sampler" not in card
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert "x = prior.sample(64).x\n" in code
    names: dict[str, Any] = {"vae": prior.source}
    code = re.sub(r'(?<=source, )".*"', repr(str(tmp_path)), code)
    exec(re.sub(r"source = .*", "source = vae", code), names)  # noqa: S102
    assert names["x"].shape == (64, 3)


def test_the_card_of_an_energy_leaves_the_sampler_to_the_prior(tmp_path: Path) -> None:
    from ncprior.heads import MLPHead
    from ncprior.vaebm import GaussianDecoder

    prior = trained(GaussianDecoder(gaussian(), 0.1))
    model = VAEBM(prior, MLPHead((3,), width=4, depth=1))
    for sampler, example in ((None, "sampler=partial(sir"), (SIR, "x = model.sample(16).mean")):
        prior.sampler = sampler
        model.save_pretrained(tmp_path)
        assert example in (tmp_path / "README.md").read_text()
