"""Energies saved and loaded: bit for bit, on what they were trained on, and on nothing else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from helpers.hub_problems import gaussian, trained
from helpers.problems import standard_normal
from helpers.toys import everything, same, weights
from helpers.vaebm_problems import Quadratic, nothing
from safetensors import safe_open
from torch import nn
from torch.distributions import Independent, Normal

from ncprior import NCPrior, SingleGroup
from ncprior.bases.rebase import rebase
from ncprior.heads.networks import MLPHead
from ncprior.saving.tensors import load_tensors, read_metadata, save_tensors
from ncprior.vaebm.energy_net import EnergyNet
from ncprior.vaebm.gaussian_decoder import GaussianDecoder
from ncprior.vaebm.model import VAEBM
from ncprior.vaebm.saved import FILE


def source(seed: int = 0, sigma: float = 0.1, base: Any = None) -> GaussianDecoder:
    return GaussianDecoder(gaussian(seed, base), sigma)


def stirred(energy: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in energy.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return energy


def model(prior: Any = None, **options: Any) -> VAEBM:
    energy = stirred(MLPHead((3,), width=8, depth=1))
    options = {"num_steps": 3, "step_size": 0.1 + 0.2, **options}
    return VAEBM(source() if prior is None else prior, energy, **options)


def equal_chains(a: VAEBM, b: VAEBM) -> bool:
    found = []
    for of in (a, b):
        torch.manual_seed(1)
        found.append(of.sample(5))
    return torch.equal(found[0].x, found[1].x)


def images(prior: Any = None) -> VAEBM:
    """Of a VAE whose decoder gives 8×8 images."""
    vae = nn.Linear(2, 64).eval()
    like = SingleGroup(
        standard_normal(2),
        lambda x: Independent(Normal(x.flatten(1)[:, :2], 1.0), 1),
        lambda z: vae(z).unflatten(1, (1, 8, 8)),
        module=vae,
    )
    return VAEBM(GaussianDecoder(like, 0.2), stirred(EnergyNet((1, 8, 8), width=2)))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model().save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


CASES: dict[str, Callable[[], VAEBM]] = {
    "a vector": model,
    "an image": images,
    "over NCP": lambda: model(trained(source()).eval()),
    "official": lambda: model(langevin_target="official"),
    "of noisy data": lambda: model(data_noise=0.3),
    "a base of its own": lambda: model(
        rebase(source(), Independent(Normal(torch.ones(2), torch.ones(2)), 1))
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_saved_energy_comes_back_bit_for_bit(case: str, tmp_path: Path) -> None:
    of = CASES[case]()
    of.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    loaded = VAEBM.from_pretrained(of.source if of.prior is None else of.prior, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert same(weights(loaded), weights(of)) and type(loaded.energy) is type(of.energy)
    settings = ("num_steps", "step_size", "langevin_target", "data_noise", "decoder_noise")
    assert all(getattr(loaded, name) == getattr(of, name) for name in settings)
    assert equal_chains(of, loaded)
    assert not loaded.training and all(p.requires_grad for p in loaded.parameters())


def test_the_file_holds_the_energy_and_nothing_else(tmp_path: Path) -> None:
    prior = trained(source())
    of = model(prior)
    before = everything(prior.source.module), everything(prior.heads), everything(of.energy)
    of.save_pretrained(tmp_path)
    assert (
        everything(prior.source.module),
        everything(prior.heads),
        everything(of.energy),
    ) == before
    with safe_open(tmp_path / FILE, framework="pt") as file:
        assert set(file.keys()) == of.energy.state_dict().keys()
    assert {path.name for path in tmp_path.iterdir()} == {FILE, "vaebm.json", "README.md"}
    config = json.loads((tmp_path / "vaebm.json").read_text())
    assert config == read_metadata(tmp_path / FILE)
    assert config["sigma"] == 0.1 and config["fingerprint"]["heads"].endswith(":1.0:1")
    (tmp_path / "vaebm.json").write_text("nonsense")
    assert equal_chains(of, VAEBM.from_pretrained(prior, tmp_path / FILE))


def test_the_card_tells_how_to_load_it(tmp_path: Path) -> None:
    of = model(trained(source()), data_noise=0.3)
    of.save_pretrained(
        tmp_path / "mine", base_model="user/vae", card_data={"license": "mit", "tags": ["digits"]}
    )
    card = (tmp_path / "mine" / "README.md").read_text()
    data = yaml.safe_load(card.split("---\n")[1])
    assert data["license"] == "mit" and data["base_model"] == "user/vae"
    assert {"vaebm", "digits", "ncprior"} <= set(data["tags"])
    for line in (
        "from ncprior import NCPrior, sir",
        "from ncprior.vaebm import VAEBM, GaussianDecoder",
        "x = model.sample(16, sampler=partial(sir, num_proposals=500)).mean",
        'model = VAEBM.from_pretrained(prior, "mine")',
        "source = GaussianDecoder(source, 0.1)",
        "The VAE and the ratio heads are not in here",
        "3 Langevin steps of 0.3",
        "one σ = 0.1",
        "Noise on data | σ = 0.3",
    ):
        assert line in card
    images().save_pretrained(tmp_path / "other")
    card = (tmp_path / "other" / "README.md").read_text()
    assert 'VAEBM.from_pretrained(source, "other")' in card and "EnergyNet, " in card
    assert "Noise on data | none" in card


class Verdict(NamedTuple):
    num_proposals: tuple[int, ...] = (5, 25)

    def __str__(self) -> str:
        return "all is well"


def test_the_card_takes_a_report(tmp_path: Path) -> None:
    model(trained(source())).save_pretrained(tmp_path, report=Verdict())
    card = (tmp_path / "README.md").read_text()
    assert card.endswith("## Diagnostics\n\n```text\nall is well\n```\n")
    assert "partial(sir, num_proposals=25)" in card


def refuses(match: str, prior: Any, path: Path, **options: Any) -> None:
    with pytest.raises(ValueError, match=match):
        VAEBM.from_pretrained(prior, path, **options)


def test_another_vae_base_noise_or_prior_is_refused(saved: Path) -> None:
    refuses("trained on the VAE float32:.*check_fingerprint=False", source(seed=1), saved)
    base = Independent(Normal(torch.zeros(2), torch.full((2,), 1.1)), 1)
    refuses("trained on the base prior", source(base=base), saved)
    refuses(
        r"decoder noise 0\.1, and the source has 0\.2\. Wrap it in GaussianDecoder",
        source(sigma=0.2),
        saved,
    )
    VAEBM.from_pretrained(source(sigma=0.1 + 1e-9), saved)  # fitted with other threads
    prior = trained(source())
    refuses("trained on the VAE alone; got heads float32:", prior, saved)
    for other in (source(seed=1), source(sigma=0.2), prior):
        VAEBM.from_pretrained(other, saved, check_fingerprint=False)


def test_other_heads_or_another_strength_are_refused(tmp_path: Path) -> None:
    prior = trained(source())
    model(prior).save_pretrained(tmp_path)
    VAEBM.from_pretrained(prior, tmp_path)
    refuses("trained on heads .*; got the VAE alone", prior.source, tmp_path)
    prior.strength = 0.5
    refuses("trained on heads .*:1.0:1; got heads .*:0.5:1", prior, tmp_path)
    prior.strength, prior.active = 1.0, [False]
    refuses("got heads .*:1.0:0", prior, tmp_path)
    prior.active = [True]
    with torch.no_grad():
        next(prior.parameters()).add_(1.0)
    refuses("trained on heads", prior, tmp_path)


def test_a_missing_fingerprint_is_warned_of(saved: Path) -> None:
    like = SingleGroup(
        standard_normal(2), lambda x: Independent(Normal(x, 1.0), 1), gaussian().module
    )
    with pytest.warns(UserWarning, match="The source has no fingerprint of the VAE") as caught:
        VAEBM.from_pretrained(GaussianDecoder(like, 0.1), saved)
    assert [warning.filename for warning in caught] == [__file__]


def test_a_net_of_ones_own_takes_the_saved_tensors(tmp_path: Path) -> None:
    of = VAEBM(source(), stirred(Quadratic(3)))
    of.save_pretrained(tmp_path)
    refuses(
        "its energy is a Quadratic, which ncprior cannot build. Pass energy=", source(), tmp_path
    )
    loaded = VAEBM.from_pretrained(source(), tmp_path, energy=Quadratic(3))
    assert equal_chains(of, loaded)
    other = stirred(Quadratic(4))
    before = weights(other)
    refuses(r"of another shape: h \(3,\) for \(4,\)", source(), tmp_path, energy=other)
    refuses("missing: .*unexpected: ", source(), tmp_path, energy=MLPHead((3,)))
    assert same(weights(other), before)
    with pytest.raises(TypeError, match="this energy is a function"):
        VAEBM(source(), nothing).save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_damaged_file_is_refused(saved: Path) -> None:
    whole = (saved / FILE).read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        (saved / FILE).write_bytes(whole[:length])
        refuses("Cannot read", source(), saved)
    flipped = bytearray(whole)
    flipped[-1] ^= 1
    (saved / FILE).write_bytes(flipped)
    refuses("the checksum differs", source(), saved)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": 2}, "it has format 2, and ncprior .* reads format 1"),
        ({"extra": 1}, "unknown keys: extra"),
        ({"num_steps": -1}, "has no valid num_steps"),
        ({"num_steps": 1.5}, "has no valid num_steps"),
        ({"step_size": 0}, "has no valid step_size"),
        ({"langevin_target": "other"}, "has no valid langevin_target"),
        ({"data_noise": -0.5}, "has no valid data_noise"),
        ({"data_noise": "much"}, "has no valid data_noise"),
        ({"sigma": "wide"}, "has no valid sigma"),
        ({"fingerprint": {"vae": None}}, "has no valid fingerprint"),
        ({"energy": {"kind": "os.system", "config": {}}}, "must be one of EnergyNet, MLPHead"),
        (
            {"energy": {"kind": "MLPHead", "config": {"width": "x"}}},
            "cannot be built as a MLPHead",
        ),
        ({"energy": {"kind": "EnergyNet", "config": {"image_shape": [3]}}}, "shape \\(C, H, W\\)"),
        (
            {
                "energy": {
                    "kind": "EnergyNet",
                    "config": {"image_shape": [1, 8, 8], "width": 10**9},
                }
            },
            "cannot be built as a EnergyNet .its sizes are too large.",
        ),
        (
            {
                "energy": {
                    "kind": "MLPHead",
                    "config": {"event_shape": [3], "width": 4, "depth": 1},
                }
            },
            "its tensors do not fit the energy",
        ),
    ],
)
def test_an_edited_configuration_is_refused(
    changes: dict[str, Any], match: str, saved: Path
) -> None:
    tensors, config = load_tensors(saved / FILE)
    save_tensors(saved / FILE, tensors, {**config, **changes})
    refuses(match, source(), saved)


def test_what_is_not_there_is_named(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no file"):
        VAEBM.from_pretrained(source(), tmp_path)
    with pytest.raises(ValueError, match="A revision belongs to a Hub repository"):
        VAEBM.from_pretrained(source(), saved, revision="main")
    trained(gaussian()).save_pretrained(tmp_path / "heads")
    with pytest.raises(FileNotFoundError, match=FILE):
        VAEBM.from_pretrained(source(), tmp_path / "heads")
    refuses("unknown keys", source(), tmp_path / "heads" / "ncprior.safetensors")


def test_saving_again_replaces(saved: Path) -> None:
    of = model()
    of.save_pretrained(saved)
    assert same(weights(VAEBM.from_pretrained(source(), saved)), weights(of))
    assert {path.name for path in saved.iterdir()} == {FILE, "vaebm.json", "README.md"}


def test_heads_loaded_from_a_file_are_the_same_to_an_energy(tmp_path: Path) -> None:
    prior = trained(source())
    prior.save_pretrained(tmp_path / "heads")
    of = model(prior.eval())
    of.save_pretrained(tmp_path / "energy")
    again = NCPrior.from_pretrained(source(), tmp_path / "heads")
    assert equal_chains(of, VAEBM.from_pretrained(again, tmp_path / "energy"))
