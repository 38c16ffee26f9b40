"""Saved priors come back bit for bit: heads and bases of every kind, and of one's own."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hub_problems import edit, equal_draws, gaussian, trained
from helpers.problems import CorrelatedPair, around, standard_normal
from helpers.toys import Unfinished
from helpers.vqvae2_standin import TwoLevels
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal

from ncprior import Group, NCPrior, SingleGroup, sir
from ncprior.adapters.vq import VQVAE2Source
from ncprior.bases.code_bases import fit_code_bases
from ncprior.bases.mixture_em import fit_mixture
from ncprior.bases.rebase import rebase
from ncprior.heads.codes import CategoricalHead
from ncprior.heads.networks import ConvHead, MLPHead
from ncprior.saving.heads import FILE, inspect
from ncprior.training.stages import nested


def conditional() -> SingleGroup:
    vae = nn.Linear(2, 3).eval()

    def posterior(x: Tensor, c: Tensor) -> Distribution:
        return around(0.5)(x[:, :2] + c[:, :2])

    return SingleGroup(
        standard_normal(2), posterior, lambda z, _: vae(z), module=vae, condition=lambda x: x
    )


def maps() -> SingleGroup:
    base = Independent(Normal(torch.zeros(3, 4, 4), torch.ones(3, 4, 4)), 3)
    vae = nn.Identity().eval()
    return SingleGroup(
        base, lambda x: Independent(Normal(x, 1.0 + 0 * x), 3), lambda z: z, module=vae
    )


def codes() -> SingleGroup:
    base = Independent(Categorical(logits=torch.zeros(2, 2, 5)), 2)

    def posterior(x: Tensor) -> Distribution:
        return Independent(Categorical(logits=nn.functional.one_hot(x, 5).float()), 2)

    return SingleGroup(base, posterior, lambda z: z.float(), module=nn.Identity().eval())


class Bowl(nn.Module):
    """A head of a user's own: log r = a |z|²."""

    def __init__(self, a: float = 0.0) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a))

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.a * (z**2).sum(-1)


CASES: dict[str, Callable[[], tuple[NCPrior, dict[str, Tensor]]]] = {
    "vector": lambda: (trained(gaussian()), {}),
    "condition": lambda: (
        trained(conditional(), MLPHead((2,), context_shape=(4,), width=8, dropout=0.5)),
        {"condition": torch.rand(8, 4)},
    ),
    "map": lambda: (trained(maps(), ConvHead((3, 4, 4), width=8, depth=1)), {}),
    "codes": lambda: (trained(codes(), CategoricalHead((2, 2), 5, width=8)), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_saved_prior_comes_back_bit_for_bit(case: str, tmp_path: Path) -> None:
    prior, condition = CASES[case]()
    prior.strength = 0.1 + 0.2  # no short decimal
    prior.save_pretrained(tmp_path)
    loaded = NCPrior.from_pretrained(prior.source, tmp_path)
    assert loaded.strength == prior.strength
    assert type(loaded.heads[0]) is type(prior.heads[0])
    assert prior.training and not any(module.training for module in loaded.modules())
    assert equal_draws(prior.eval(), loaded, **condition)
    assert all(p.requires_grad for p in loaded.parameters())


def test_groups_that_are_off_stay_off(tmp_path: Path) -> None:
    heads = [MLPHead((1,), width=8), MLPHead((1,), context_shape=(1,), width=8)]
    prior = trained(CorrelatedPair(), *heads)
    prior.active[0] = False
    prior.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="The file has no fingerprint of the VAE"):
        loaded = NCPrior.from_pretrained(CorrelatedPair(), tmp_path)
    assert loaded.active == [False, True]
    assert equal_draws(prior.eval(), loaded)


def test_the_file_holds_only_what_was_trained(prior: NCPrior, saved: Path) -> None:
    with safe_open(saved / FILE, framework="pt") as file:
        names = set(file.keys())
        numbers = sum(file.get_tensor(name).numel() for name in names)
    heads = {f"heads.{name}": t for name, t in prior.heads.state_dict().items()}
    assert names == heads.keys()
    assert numbers == sum(t.numel() for t in heads.values())
    assert {path.name for path in saved.iterdir()} == {FILE, "ncprior.json", "README.md"}


def test_inspecting_tells_what_is_in_the_file(saved: Path) -> None:
    found = inspect(saved)
    fingerprint = found.pop("fingerprint")
    version = found.pop("ncprior")
    config = {"event_shape": [2], "context_shape": None, "width": 8, "depth": 1, "dropout": 0.0}
    assert found == {
        "format": 1,
        "num_groups": 1,
        "heads": [{"kind": "MLPHead", "config": config}],
        "base": None,
        "strength": 1.0,
        "active": [True],
    }
    assert re.fullmatch(r"\d+\.\d+.*", version)
    assert re.fullmatch(r"float32:[0-9a-f]{64}", fingerprint["vae"])
    assert re.fullmatch(r"Independent:[0-9a-f]{64}", fingerprint["base"])


def test_wider_numbers_stay_wide(tmp_path: Path) -> None:
    prior = trained(gaussian()).double()
    prior.save_pretrained(tmp_path)
    loaded = NCPrior.from_pretrained(prior.source, tmp_path)
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float64
        assert torch.equal(tensor, prior.state_dict()[name])


def test_loaded_heads_are_where_the_source_is(prior: NCPrior, tmp_path: Path) -> None:
    """The meta device stands for any other than the heads'."""
    prior.save_pretrained(tmp_path)
    elsewhere = Independent(Normal(torch.zeros(2, device="meta"), 1.0, validate_args=False), 1)
    source = gaussian(base=elsewhere)
    loaded = NCPrior.from_pretrained(source, tmp_path, check_fingerprint=False)
    assert {p.device.type for p in loaded.parameters()} == {"meta"}


class Conditioned(Unfinished):
    """A source of one group that cannot start without a condition, and shows no prior of its own."""

    num_groups = 1

    def fingerprint(self) -> str:
        return "float32:0"

    def start(self, batch_size: int, encoding: object = None, condition: Any = None) -> Tensor:
        return torch.zeros(batch_size) + condition

    def group(self, state: Tensor) -> Group:
        return Group(standard_normal(2).expand(state.shape))

    def advance(self, state: Tensor, z: Tensor) -> Tensor:
        return state


def test_a_source_that_cannot_start_gets_its_heads_on_the_cpu(tmp_path: Path) -> None:
    source: Any = Conditioned()
    prior = trained(source)
    prior.save_pretrained(tmp_path)
    loaded = NCPrior.from_pretrained(source, tmp_path)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}


# Heads of the user's own


def test_own_heads_are_passed_in(tmp_path: Path) -> None:
    prior = trained(gaussian(), Bowl())
    prior.save_pretrained(tmp_path)
    head = Bowl()
    loaded = NCPrior.from_pretrained(prior.source, tmp_path, heads=head)
    assert loaded.heads[0] is head
    assert equal_draws(prior.eval(), loaded)
    assert inspect(tmp_path)["heads"] == [{"kind": "custom", "config": {"class": "Bowl"}}]
    assert "from_pretrained(source, " in (card := (tmp_path / "README.md").read_text())
    assert "heads=..." in card
    with pytest.raises(
        ValueError, match="head 0 is a Bowl, which ncprior cannot build. Pass heads="
    ):
        NCPrior.from_pretrained(prior.source, tmp_path)


def test_a_subclass_of_a_head_of_ours_is_ones_own(tmp_path: Path) -> None:
    class Mine(MLPHead):
        pass

    trained(gaussian(), Mine((2,), width=8)).save_pretrained(tmp_path)
    assert inspect(tmp_path)["heads"][0] == {"kind": "custom", "config": {"class": "Mine"}}


@pytest.mark.parametrize("heads", [[Bowl(), Bowl()], []])
def test_one_head_per_group(heads: list[nn.Module], prior: NCPrior, saved: Path) -> None:
    with pytest.raises(ValueError, match="One ratio head per latent group"):
        NCPrior.from_pretrained(prior.source, saved, heads=heads)


HEADS: dict[str, object] = {
    "head 0 must be one of MLPHead, ConvHead, CategoricalHead": {
        "kind": "os.system",
        "config": {},
    },
    "head 0 must be one": {"kind": "torch.nn.Linear", "config": {"in_features": 1}},
    "head 0 must be one of": "MLPHead",
    "must be one of": {"kind": "MLPHead"},
    "must be one of MLPHead": {"kind": ["MLPHead"], "config": {}},
    "cannot be built as a MLPHead .*code": {
        "kind": "MLPHead",
        "config": {"event_shape": [2], "code": 1},
    },
    "cannot be built as a MLPHead": {"kind": "MLPHead", "config": {}},
    "cannot be built as a MLPHead \\(no valid width": {
        "kind": "MLPHead",
        "config": {"event_shape": [2], "width": "8"},
    },
    "cannot be built as a ConvHead": {"kind": "ConvHead", "config": {"event_shape": [2]}},
    "tensors do not fit the heads .*of another shape": {
        "kind": "MLPHead",
        "config": {"event_shape": [2], "width": 16, "depth": 1},
    },
    r"missing: heads.0.blocks.1": {
        "kind": "MLPHead",
        "config": {"event_shape": [2], "width": 8, "depth": 2},
    },
}


@pytest.mark.parametrize("match", HEADS)
def test_heads_come_from_a_fixed_table(match: str, prior: NCPrior, saved: Path) -> None:
    edit(saved / FILE, lambda config, _: config.update(heads=[HEADS[match]]))
    with pytest.raises(ValueError, match=match) as caught:
        NCPrior.from_pretrained(prior.source, saved)
    assert str(saved) in str(caught.value)


def rebased(seed: int = 0) -> tuple[SingleGroup, NCPrior]:
    """A VAE, and a trained prior on a mixture fitted to it."""
    source = gaussian()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = fit_mixture(torch.randn(200, 2) + 1, 3)
    return source, trained(rebase(source, base))


def test_a_fitted_base_is_saved_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    source, prior = rebased()
    prior.save_pretrained(tmp_path)
    assert inspect(tmp_path)["base"] == {
        "kind": "GaussianMixture",
        "config": {"event_shape": [2]},
    }
    assert "fitted GaussianMixture" in (tmp_path / "README.md").read_text()
    loaded = NCPrior.from_pretrained(source, tmp_path)
    assert equal_draws(prior.eval(), loaded)
    again = NCPrior.from_pretrained(prior.source, tmp_path)  # put on already
    assert equal_draws(prior, again)


def test_another_fitted_base_is_refused(tmp_path: Path) -> None:
    _, prior = rebased()
    prior.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="trained on the base prior GaussianMixture:"):
        NCPrior.from_pretrained(rebased(seed=1)[1].source, tmp_path)


def test_heads_on_a_base_of_ones_own_need_that_base(tmp_path: Path) -> None:
    """A function of the group, as nested stages are: on the bare VAE, the heads would be wrong."""
    first = trained(gaussian()).eval()
    source = nested(first, partial(sir, num_proposals=3))
    second = trained(source).eval()
    second.save_pretrained(tmp_path)
    assert inspect(tmp_path)["base"] == {"kind": "custom", "config": {}}
    with pytest.raises(ValueError, match=r"nested\(prior, sampler\)"):
        NCPrior.from_pretrained(gaussian(), tmp_path)
    loaded = NCPrior.from_pretrained(nested(first, partial(sir, num_proposals=3)), tmp_path)
    assert equal_draws(loaded, second)
    assert "The base prior is not in here" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("match", "change"),
    {
        "its base must be one of GaussianMixture": lambda c, t: c.update(
            base={"kind": "os.system"}
        ),
        "its base cannot be built as": lambda c, t: t.pop("base.scale"),
        "base cannot be built as a GaussianMixture": lambda c, t: t.update(
            {"base.loc": torch.ones(2)}
        ),
        "has no valid base": lambda c, t: c.update(base=3),
    }.items(),
)
def test_a_base_comes_from_a_fixed_table(match: str, change: Any, tmp_path: Path) -> None:
    source, prior = rebased()
    prior.save_pretrained(tmp_path)
    edit(tmp_path / FILE, change)
    with pytest.raises(ValueError, match=match):
        NCPrior.from_pretrained(source, tmp_path)


def of_codes(seed: int = 0) -> tuple[VQVAE2Source, NCPrior]:
    """Two grids of codes, frequencies for the top and a network given it for the bottom."""
    torch.manual_seed(0)
    source, x = VQVAE2Source(TwoLevels().eval()), torch.randn(20, 3, 8, 8)
    torch.manual_seed(seed)
    top, _ = fit_code_bases(source, x, kind="frequencies")
    _, bottom = fit_code_bases(source, x, width=8, depth=1, steps=1, progress=False)
    based = rebase(source, [top, bottom])
    heads = (
        CategoricalHead((2, 2), 9, width=8),
        CategoricalHead((4, 4), 10, context_shape=(4, 4, 4), width=8),
    )
    return source, trained(based, *heads)


def test_bases_of_several_groups_come_with_the_heads(tmp_path: Path) -> None:
    source, prior = of_codes()
    prior.save_pretrained(tmp_path)
    entry = inspect(tmp_path)["base"]
    assert [one["kind"] for one in entry["config"]["bases"]] == ["CodeFrequencies", "CodeNetwork"]
    assert "fitted CodeFrequencies, CodeNetwork" in (tmp_path / "README.md").read_text()
    loaded = NCPrior.from_pretrained(source, tmp_path)
    assert equal_draws(prior.eval(), loaded)
    assert equal_draws(prior, NCPrior.from_pretrained(prior.source, tmp_path))
    with pytest.raises(ValueError, match="trained on the base prior several:"):
        NCPrior.from_pretrained(of_codes(seed=1)[1].source, tmp_path)


@pytest.mark.parametrize(
    ("match", "change"),
    {
        "base 1 must be one of": lambda c, t: c["base"]["config"]["bases"][1].update(kind="x"),
        "base 1 cannot be built as a CodeNetwork": lambda c, t: t.pop("base.1.out.bias"),
        "has no bases for 2 groups": lambda c, t: c["base"]["config"]["bases"].pop(),
        "bases that belong to no group": lambda c, t: t.update({"base.2.logits": torch.ones(2)}),
        "no valid kernel_size": lambda c, t: c["base"]["config"]["bases"][1]["config"].update(
            kernel_size=10**9
        ),
        "too few tensors for so many layers": lambda c, t: c["base"]["config"]["bases"][1][
            "config"
        ].update(depth=10**6),
    }.items(),
)
def test_bases_of_several_groups_are_checked(match: str, change: Any, tmp_path: Path) -> None:
    source, prior = of_codes()
    prior.save_pretrained(tmp_path)
    edit(tmp_path / FILE, change)
    with pytest.raises(ValueError, match=match):
        NCPrior.from_pretrained(source, tmp_path)
