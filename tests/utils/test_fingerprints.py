import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import zuko
from helpers.problems import SampleOnly, standard_normal
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Distribution,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    OneHotCategorical,
    TransformedDistribution,
)
from torch.distributions.transforms import AffineTransform

from ncprior.bases.flow import Flow as FittedFlow
from ncprior.bases.flow import spline_flow
from ncprior.utils.fingerprints import base_fingerprint, module_fingerprint


def mixture(mean: float) -> Distribution:
    parts = Independent(Normal(torch.full((3, 2), mean), torch.ones(3, 2)), 1)
    return MixtureSameFamily(Categorical(probs=torch.ones(3) / 3), parts)


def shifted(shift: Tensor | float) -> Distribution:
    return TransformedDistribution(standard_normal(2), [AffineTransform(shift, 2.0, cache_size=1)])


class Flow(AffineTransform):
    """A transform with a network inside."""

    def __init__(self, bias: float) -> None:
        super().__init__(0.0, 1.0)
        self.net = nn.Linear(1, 1)
        nn.init.constant_(self.net.weight, 1.0)
        nn.init.constant_(self.net.bias, bias)


BASES: dict[str, Callable[[float], Distribution]] = {
    "normal": lambda a: Normal(torch.tensor(a), torch.tensor(1.0)),
    "independent": lambda a: Independent(Normal(torch.full((2,), a), torch.ones(2)), 1),
    "full": lambda a: MultivariateNormal(torch.zeros(2), torch.eye(2) * a),
    "codes": lambda a: Independent(Categorical(probs=torch.tensor([[a, 1.0]])), 1),
    "mixture": mixture,
    "shifted": shifted,
    "shifted by a tensor": lambda a: shifted(torch.full((2,), a)),
    "shifted by an integer": lambda a: shifted(round(10 * a)),
    "one-hot": lambda a: OneHotCategorical(probs=torch.tensor([a, 1.0])),
    "inverse": lambda a: TransformedDistribution(
        standard_normal(2), [AffineTransform(a, 2.0).inv]
    ),
    "flow": lambda a: TransformedDistribution(standard_normal(2), [Flow(a)]),
}


class Held(Independent):
    """A distribution that holds a parameter in one of several ways."""

    def __init__(self, way: str, value: float) -> None:
        super().__init__(Normal(torch.zeros(2), torch.ones(2)), 1)
        one, net = torch.full((1,), value), nn.Linear(1, 1)
        nn.init.constant_(net.weight, value)
        nn.init.zeros_(net.bias)
        held: Any = {
            "dict": {"a": [one]},
            "array": one.numpy(),
            "private network": net,
            "partial": partial(torch.add, alpha=value),
            "bound": net.forward,
            "closure": lambda z: z + one,
            "default": _with_default(one),
        }[way]
        setattr(self, "_held" if way in PRIVATE else "held", held)


def _with_default(value: Tensor) -> Any:
    def add(z: Tensor, to: Tensor = value) -> Tensor:
        return z + to

    return add


PRIVATE = ("array", "private network", "partial", "bound", "closure", "default")


@pytest.mark.parametrize("way", ["dict", *PRIVATE])
def test_parameters_are_found_wherever_a_distribution_holds_them(way: str) -> None:
    assert base_fingerprint(Held(way, 0.5)) == base_fingerprint(Held(way, 0.5))
    assert base_fingerprint(Held(way, 0.5)) != base_fingerprint(Held(way, 0.6))


def test_a_function_of_a_base_may_lack_a_value_that_it_does_not_use() -> None:
    def shift(z: Tensor) -> Tensor:
        return z if z.ndim else z + other

    base = standard_normal(2)
    base.shift = shift  # type: ignore[attr-defined]
    assert base_fingerprint(base) is not None
    other = 1.0


def test_counters_and_memos_of_a_base_do_not_count() -> None:
    base, before = standard_normal(2), base_fingerprint(standard_normal(2))
    base._calls, base._memo = 3, {"z": torch.ones(2)}  # type: ignore[attr-defined]
    assert base_fingerprint(base) == before
    odd = SampleOnly(base)
    odd.tensors = (torch.ones(2),)  # type: ignore[attr-defined]
    assert base_fingerprint(odd) is None


@pytest.mark.parametrize("kind", ["MAF", "NSF"])
def test_a_flow_of_zuko_is_known_by_its_weights(kind: str) -> None:
    """Its networks are bound to functions that its transforms call."""
    first, second = (getattr(zuko.flows, kind)(2)() for _ in range(2))
    before = base_fingerprint(first)
    first.log_prob(first.sample((3,)))
    assert base_fingerprint(first) == before != base_fingerprint(second)


@pytest.mark.parametrize("kind", BASES)
def test_a_base_is_known_by_what_it_was_made_with(kind: str) -> None:
    base = BASES[kind](0.5)
    before = base_fingerprint(base)
    z = base.sample((3,))
    base.log_prob(z)
    for name in ("probs", "logits", "precision_matrix", "covariance_matrix"):
        getattr(base, name, None)  # what is derived, and then kept in the distribution
    assert base_fingerprint(base) == before == base_fingerprint(BASES[kind](0.5))
    assert base_fingerprint(BASES[kind](0.6)) != before


# Fingerprints of version 0.2.0, which are in saved files: these bases can still be loaded.
SAVED = {
    "normal": "1351953fe349",
    "independent": "bedd9ccb6d55",
    "full": "d22a2ecdb33d",
    "codes": "036067c84e9b",
    "mixture": "c328c225321d",
    "shifted": "b46a89437b24",
    "shifted by a tensor": "820d0730ecd1",
    "shifted by an integer": "ba6044c4794b",
    "one-hot": "780ca802b637",
    "flow": "0c5702d9c2b4",
}


@pytest.mark.parametrize("kind", SAVED)
def test_saved_fingerprints_stay(kind: str) -> None:
    found = base_fingerprint(BASES[kind](0.5))
    assert found is not None and found.split(":")[1][:12] == SAVED[kind]


def test_the_saved_fingerprint_of_a_fitted_flow_stays() -> None:
    sizes = {"transforms": 1, "width": 2, "bins": 2}
    flow = spline_flow(2, None, **sizes)
    for parameter in flow.parameters():
        nn.init.constant_(parameter, 0.5)
    base = FittedFlow(flow, torch.zeros(2), torch.ones(2), event_shape=(2,), spline=sizes)
    assert base_fingerprint(base).split(":")[1][:12] == "5e177d109a63"  # type: ignore[union-attr]


def test_all_kinds_of_bases_differ() -> None:
    assert len({base_fingerprint(base(0.5)) for base in BASES.values()}) == len(BASES)


def test_a_base_without_a_density_has_none() -> None:
    assert base_fingerprint(SampleOnly(standard_normal(2))) is None


def test_half_precision_is_told_apart_by_its_values_only() -> None:
    exact, rounded = torch.tensor(0.5), torch.tensor(0.1)
    same = {base_fingerprint(Normal(exact.to(t), exact.to(t))) for t in (torch.half, torch.double)}
    assert len(same) == 1
    assert base_fingerprint(Normal(rounded, exact)) != base_fingerprint(
        Normal(rounded.half(), exact)
    )


# Modules


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Conv1d(4, 2, 1).double())


class Holder(nn.Module):
    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


def test_fingerprints_of_earlier_files_stay() -> None:
    assert module_fingerprint(net()) == (
        "float32+float64:b4be6f963b78194b278f505e5a317133325609c0a58844619a5d1dc172318a0b"
    )
    assert base_fingerprint(Independent(Normal(torch.ones(3), 2.0), 1)) == (
        "Independent:04f6d39e4daed8fc647cd026ebdd7ad1084dc649b2fff7bc2c54ab9abde560eb"
    )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda vae: nn.DataParallel(vae),
        lambda vae: Holder(_orig_mod=vae),  # as torch.compile names it
        lambda vae: Holder(_orig_mod=nn.DataParallel(vae)),
        lambda vae: Holder(module=Holder(module=vae)),
    ],
)
def test_F33_M1_a_wrapper_of_torch_leaves_the_fingerprint(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    assert module_fingerprint(wrap(net())) == module_fingerprint(net())
    assert module_fingerprint(nn.Sequential(wrap(net()[0]), net()[1:])) is not None


def test_F33_one_of_several_modules_named_module_is_no_wrapper() -> None:
    assert module_fingerprint(Holder(module=net(), other=nn.Linear(1, 1))) != (
        module_fingerprint(Holder(other=nn.Linear(1, 1)))
    )


class WithState(nn.Module):
    def __init__(self, state: object) -> None:
        super().__init__()
        self.layer, self.state = nn.Linear(1, 1, bias=False), state
        nn.init.ones_(self.layer.weight)

    def get_extra_state(self) -> object:
        return self.state


def test_C3_extra_state_counts_and_is_the_same_in_every_process() -> None:
    states: list[object] = [{"a": 1}, {"a": 2}, {"a": torch.ones(1)}, [1, "x"], None, object()]
    found = [module_fingerprint(WithState(state)) for state in states]
    assert len(set(found)) == len(states)
    assert found == [module_fingerprint(WithState(state)) for state in states[:-1] + [object()]]


def test_C3_state_of_any_layout_has_a_fingerprint() -> None:
    for convert in (Tensor.to_sparse, Tensor.to_sparse_csr):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch: sparse CSR is in beta state
            sparse, dense = nn.Module(), nn.Module()
            sparse.register_buffer("graph", convert(torch.eye(3)))
            dense.register_buffer("graph", torch.eye(3))
            assert module_fingerprint(sparse) == module_fingerprint(dense)
    complex_valued = nn.Module()
    complex_valued.register_buffer("phase", torch.tensor([1j]))
    other = nn.Module()
    other.register_buffer("phase", torch.tensor([2j]))
    assert module_fingerprint(complex_valued) != module_fingerprint(other)


def test_C3_a_quantised_module_has_a_fingerprint() -> None:
    if not torch.backends.quantized.supported_engines:
        pytest.skip("no engine for quantised layers")
    torch.manual_seed(1)  # another than that of net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization is deprecated
        first, again, other = (
            torch.ao.quantization.quantize_dynamic(nn.Sequential(layer), {nn.Linear})
            for layer in (net()[0], net()[0], nn.Linear(3, 4))
        )
        assert module_fingerprint(first) == module_fingerprint(again)
        assert module_fingerprint(first) != module_fingerprint(other)


def test_C3_tensors_without_values_have_no_fingerprint() -> None:
    assert module_fingerprint(nn.Linear(2, 2, device="meta")) is None
    base = Independent(Normal(torch.zeros(2, device="meta"), 1.0, validate_args=False), 1)
    assert base_fingerprint(base) is None
