"""Faults of bases that were found by trying hard, under their numbers."""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zuko
from helpers.toys import VAE, base, everything, flat
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from ncprior import NCPrior, SingleGroup
from ncprior.bases import (
    Empirical,
    Flow,
    FlowMatching,
    GaussianMixture,
    NoPrior,
    fit_flow,
    fit_flow_matching,
    fit_gaussian,
    fit_mixture,
    fit_vamp,
    latents_of,
    rebase,
    stored_numbers,
)
from ncprior.bases.flow_matching import VelocityNet
from ncprior.heads import MLPHead

Z = torch.randn(60, 2)
ONE, MEAN, SD = torch.zeros(1), torch.zeros(1, 2), torch.ones(1, 2)
QUICK = {"steps": 1, "progress": False}


def vamp(data: Any = None, num_components: Any = 5, **options: Any) -> GaussianMixture:
    x = torch.randn(60, 3) if data is None else data
    return fit_vamp(flat(), x, num_components, **(QUICK | options))


def matched(z: Any, **options: Any) -> FlowMatching:
    return fit_flow_matching(z, **({"width": 4, "depth": 1} | QUICK | options))


def flowed(z: Any, **options: Any) -> Flow:
    return fit_flow(z, **(QUICK | options))


def broken(x: Tensor, value: float = math.nan) -> Tensor:
    x = x.clone()
    x[3, 1] = value
    return x


FITS: list[Any] = [fit_gaussian, partial(fit_mixture, num_components=2), matched, flowed]


def validating(x: Tensor) -> Independent:
    return Independent(Normal(x[:, :2], 1.0, validate_args=True), 1)


@pytest.mark.parametrize("of", ["samples", "means"])
def test_F15_a_row_with_nan_is_named_by_latents_of(of: str) -> None:
    x = broken(torch.randn(20, 3))
    for source in (flat(), SingleGroup(base(), validating, lambda z: z)):
        with pytest.raises(ValueError, match="must be finite; got NaN or infinity in 1 of 20"):
            latents_of(source, x, of=of)
        with pytest.raises(ValueError, match="must be finite; got NaN or infinity in 1 of 20"):
            latents_of(source, broken(torch.randn(20, 3), -math.inf), of=of)
    with pytest.raises(ValueError, match="must be finite; got NaN or infinity in 1 of 20"):
        latents_of(SingleGroup(base(), validating, lambda z: z), broken(x, math.inf), of=of)


def test_F15_an_encoder_that_gives_nan_is_named() -> None:
    def posterior(x: Tensor) -> Independent:
        sd = torch.full((len(x), 2), math.nan)
        return Independent(Normal(x[:, :2], sd, validate_args=False), 1)

    source = SingleGroup(base(), posterior, lambda z: z)
    with pytest.raises(ValueError, match=r"q\(z \| x\) cannot be sampled .*NaN or infinity in x"):
        latents_of(source, torch.randn(4, 3))


def test_F15_a_row_with_nan_is_named_by_fit_vamp() -> None:
    x, bad = torch.randn(60, 3), broken(torch.randn(60, 3))
    for data, held_out in ((bad, x), (x, bad), (bad, None)):
        with pytest.raises(ValueError, match="x must be finite; got NaN or infinity in 1 of"):
            vamp(data, num_components=50, held_out=held_out)


@pytest.mark.parametrize("fitted", FITS)
def test_F25_arrays_and_lists_are_latents(fitted: Any) -> None:
    draws = []
    for z in (Z, Z.numpy(), Z.numpy().astype(np.float64), Z.tolist()):
        torch.manual_seed(0)
        draws.append(fitted(z).sample((5,)))
    assert all(torch.equal(draws[0], other) for other in draws)
    pool = Empirical(Z.numpy())
    assert torch.equal(pool.z, Z) and Empirical(Z.tolist()).sample((3,)).shape == (3, 2)


@pytest.mark.parametrize("fitted", [*FITS, Empirical])
@pytest.mark.parametrize(
    "z",
    [None, "z", [["a"]], Z + 0j, Z > 0, Z.to_sparse(), {"z": Z}, [[1.0], [1.0, 2.0]]],
)
def test_F35_what_is_no_tensor_of_real_numbers_raises(fitted: Any, z: Any) -> None:
    with pytest.raises(TypeError, match=r"(z|latents) must be .*; got"):
        fitted(z)


@pytest.mark.parametrize("fitted", [*FITS, Empirical])
def test_F35_latents_are_finite(fitted: Any) -> None:
    with pytest.raises(ValueError, match="must be finite; got NaN or infinity in 1 of 60"):
        fitted(broken(Z))
    with pytest.raises(ValueError, match="must have values; got a meta tensor"):
        fitted(Z.to("meta"))


@pytest.mark.parametrize("fitted", FITS)
def test_D1_N7_codes_are_no_numbers(fitted: Any) -> None:
    for codes in (torch.randint(5, (60, 2)), np.arange(60).reshape(30, 2), [[1, 2], [3, 4]]):
        with pytest.raises(TypeError, match=r"floating-point numbers; got .*int64.*\.float\(\)"):
            fitted(codes)


def test_D1_codes_can_be_stored() -> None:
    codes = torch.randint(5, (60, 2))
    assert Empirical(codes).sample((9,)).dtype == torch.int64


COUNTS: list[tuple[Any, list[str]]] = [
    (lambda **o: latents_of(flat(), torch.randn(4, 3), **o), ["k", "batch_size"]),
    (
        partial(fit_mixture, Z),
        ["num_components", "max_steps", "starts"],
    ),
    (partial(flowed, Z), ["steps", "batch_size", "patience"]),
    (
        partial(matched, Z),
        ["width", "depth", "num_steps", "steps", "batch_size", "patience"],
    ),
    (vamp, ["num_components", "steps", "batch_size", "patience"]),
    (lambda **o: VelocityNet(**({"features": 2} | o)), ["features", "width", "depth"]),
    (
        lambda **o: FlowMatching(VelocityNet(2), torch.zeros(2), torch.ones(2), **o),
        ["num_steps"],
    ),
]


@pytest.mark.parametrize(("call", "name"), [(call, n) for call, names in COUNTS for n in names])
def test_F26_counts_are_whole_numbers(call: Any, name: str) -> None:
    for value in (math.nan, math.inf, 1.5, "3", True):
        with pytest.raises(TypeError, match=rf"{name} must be a whole number .* Pass an int"):
            call(**{name: value})
    with pytest.raises(ValueError, match=f"{name} must be .* got -1"):
        call(**{name: -1})
    call(**{name: np.int64(1 if name != "k" else 0)})
    if name not in ("k", "steps", "depth"):
        with pytest.raises(ValueError, match=f"{name} must be .* got 0"):
            call(**{name: 0})


def test_F26_data_without_rows_raise() -> None:
    for data in (torch.empty(0, 3), []):
        with pytest.raises(ValueError, match="data have no rows"):
            latents_of(flat(), data)
    with pytest.raises(ValueError, match="data have no rows"):
        vamp(held_out=torch.empty(0, 3))


@pytest.mark.parametrize("value", [math.nan, math.inf, -1])
def test_F27_F35_fits_end_at_any_setting(value: float) -> None:
    for name in ("regularisation", "tolerance"):
        with pytest.raises(ValueError, match=f"{name} must be a number in"):
            fit_mixture(Z, 2, **{name: value})  # type: ignore[arg-type]
    for call, name in (
        (vamp, "learning_rate"),
        (partial(flowed, Z), "learning_rate"),
        (partial(flowed, Z), "weight_decay"),
        (partial(matched, Z), "learning_rate"),
    ):
        with pytest.raises(ValueError, match=f"{name} must be a number in"):
            call(**{name: value})
    with pytest.raises(ValueError, match="too large|finite"):
        fit_mixture(1e38 * Z, 2)
    with pytest.raises(ValueError, match="finite parameters"):
        fit_mixture(Z, 2, regularisation=1e300)


@pytest.mark.parametrize(
    "wrong", [(1, 0), (0, 0), (math.nan, 1), (0, None), (0,), 3, "01", ("0", "1")]
)
def test_F35_bounds_are_a_pair_of_numbers_in_order(wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="(bounds|least|largest) must be"):
        vamp(bounds=wrong)


LOWER = torch.tensor([[[1.0, 0.0], [0.5, 1.0]]])


@pytest.mark.parametrize(
    "wrong",
    [
        {"scale": -SD},
        {"scale": torch.tensor([[1.0, 0.0]])},
        {"scale": math.inf * SD},
        {"scale": LOWER.mT},
        {"scale": -LOWER},
        {"loc": math.nan * MEAN},
        {"logits": math.nan * torch.ones(1)},
        {"logits": torch.tensor([-math.inf])},
    ],
)
def test_F35_mixtures_have_positive_scales_and_lower_triangular_factors(wrong: Any) -> None:
    with pytest.raises(ValueError, match="finite parameters, with positive .* lower triangular"):
        GaussianMixture(**({"logits": ONE, "loc": MEAN, "scale": SD} | wrong))


def test_F35_mixtures_keep_what_is_right() -> None:
    GaussianMixture(ONE, MEAN, LOWER)
    empty = GaussianMixture(torch.tensor([0.0, -math.inf]), torch.zeros(2, 2), torch.ones(2, 2))
    assert torch.isfinite(empty.log_prob(empty.sample((5,)))).all()
    lists = GaussianMixture([0.0], [[0.0, 0.0]], [[1.0, 1.0]])  # type: ignore[arg-type]
    assert torch.equal(lists.loc, MEAN)
    with torch.device("meta"):
        assert GaussianMixture(torch.empty(1), torch.empty(1, 2), torch.empty(1, 2)).loc.is_meta
    with pytest.raises(TypeError, match="scale must be real numbers"):
        GaussianMixture(ONE, MEAN, SD + 0j)
    precise = fit_gaussian(Z).log_prob(torch.zeros(3, 2, dtype=torch.float64))
    assert precise.dtype == torch.float64


def test_F35_scales_of_flows_are_positive() -> None:
    loc = torch.zeros(2)
    for scale in (torch.zeros(2), -torch.ones(2), math.nan * torch.ones(2)):
        for make in (lambda s: Flow(zuko.flows.MAF(2), loc, s), lambda s: matching(s)):
            with pytest.raises(ValueError, match="scale must be positive and finite"):
                make(scale)


def matching(scale: Tensor) -> FlowMatching:
    return FlowMatching(VelocityNet(2), torch.zeros(2), scale)


@pytest.mark.parametrize("p", [fit_gaussian(Z), Empirical(Z), matching(torch.ones(2))])
def test_F35_shapes_of_draws_are_tuples(p: Any) -> None:
    with pytest.raises(TypeError, match=r"sample_shape must be a tuple .* got 5"):
        p.sample(5)
    with pytest.raises(ValueError, match=r"no negative number; got \(-1,\)"):
        p.sample((-1,))


def test_F35_densities_take_latents_of_their_shape() -> None:
    for z in (torch.zeros(3, 4), torch.zeros(4, 1), torch.zeros(())):
        with pytest.raises(ValueError, match=r"event shape \(2,\); got"):
            fit_gaussian(Z).log_prob(z)
    for wrong in (Z > 0, Z + 0j, Z.to_sparse(), None):
        with pytest.raises(TypeError, match="z must be a tensor of real numbers"):
            fit_gaussian(Z).log_prob(wrong)
    with pytest.raises(ValueError, match="z must be on cpu; got z on meta"):
        fit_gaussian(Z).log_prob(Z.to("meta"))
    no_rows = flowed(Z).log_prob(torch.zeros(0, 3, 2))
    assert no_rows.shape == (0, 3)
    for shape in (3, {}, (-1, -2), "2"):
        with pytest.raises((TypeError, ValueError), match="event_shape must"):
            GaussianMixture(ONE, MEAN, SD, event_shape=shape)  # type: ignore[arg-type]


def test_F36_what_is_no_base_is_named() -> None:
    source = flat()
    prior = NCPrior(source, MLPHead((2,)))
    for wrong in (None, Normal, 3, prior):
        with pytest.raises(TypeError, match="base must be a prior with a method sample"):
            rebase(source, wrong)  # type: ignore[arg-type]
    for wrong in (None, VAE(), prior):
        with pytest.raises(TypeError, match="A source is a subclass of ncprior.LatentSource"):
            rebase(wrong, base())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"empty batch shape; got batch shape \(2,\)"):
        rebase(source, Normal(torch.zeros(2), 1.0))
    none: Any = rebase(source, lambda k, group: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match=r"Group 0: base\(k, group\) must return a prior"):
        none.group(none.start(3))


def test_W12_the_docs_of_rebase_say_that_functions_are_not_identified() -> None:
    assert "The networks behind a function" in str(rebase.__doc__)


def test_F36_other_wrong_objects_are_named() -> None:
    for wrong in (None, GaussianMixture):
        with pytest.raises(TypeError, match="Cannot count .* got"):
            stored_numbers(wrong)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="mixture must be a fitted sklearn"):
            GaussianMixture.from_sklearn(wrong)
    for network in (None, nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="network.* must be of type .* VelocityNet"):
            FlowMatching(network, torch.zeros(2), torch.ones(2))  # type: ignore[arg-type]
    vae, prior = VAE(), NCPrior(flat(), MLPHead((2,)))
    before = [everything(vae), everything(prior)]
    for flow in (None, vae, prior, nn.Linear(2, 2)):
        with pytest.raises(TypeError, match="flow must be "):
            Flow(flow, torch.zeros(2), torch.ones(2))  # type: ignore[arg-type]
    assert [everything(vae), everything(prior)] == before
    with pytest.raises(TypeError, match="reason must be of type str"):
        NoPrior(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("call", [vamp, partial(flowed, Z), partial(matched, Z)])
def test_F3_fits_need_gradients_and_make_them(call: Any) -> None:
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode forbids"):
        call()
    torch.manual_seed(0)
    outside = call()
    torch.manual_seed(0)
    with torch.no_grad():
        inside = call()
    for name, tensor in outside.tensors().items():
        assert torch.equal(tensor, inside.tensors()[name])


def strided(x: Tensor) -> Tensor:
    """The same numbers in every second place of a longer tensor, with the last two axes swapped."""
    x = x.mT if x.ndim > 1 else x
    apart = torch.stack([x, x], -1)[..., 0]
    return apart.mT if x.ndim > 1 else apart


def as_fitted() -> GaussianMixture:
    z = torch.randn(600, 16) @ torch.randn(16, 16) + 20 * torch.randint(3, (600, 1))
    return fit_mixture(z, 3, starts=1, max_steps=5)


def as_sliced() -> GaussianMixture:
    longer = [torch.cat([t.new_zeros(1), t.flatten()]) for t in as_fitted().tensors().values()]
    return GaussianMixture(longer[0][1:], longer[1][1:].view(3, 16), longer[2][1:].view(3, 16, 16))


def as_strided() -> GaussianMixture:
    return GaussianMixture(*map(strided, as_fitted().tensors().values()))


def as_flow() -> Flow:
    p = flowed(torch.randn(100, 16))
    return Flow(p.flow, strided(p.loc), strided(p.scale), spline=p.spline)


def as_matched() -> FlowMatching:
    return FlowMatching(VelocityNet(16), strided(torch.randn(16)), strided(torch.rand(16)))


@pytest.mark.parametrize("base", [as_fitted, as_sliced, as_strided, as_flow, as_matched])
def test_a_loaded_base_is_the_saved_one_bit_for_bit(base: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    own = Independent(Normal(torch.zeros(16), torch.ones(16)), 1)
    source = SingleGroup(own, lambda x: Independent(Normal(x, 0.1), 1), lambda z: z)
    saved = base()
    NCPrior(rebase(source, saved), MLPHead((16,), width=8)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no fingerprint of the VAE"):
        rebased: Any = NCPrior.from_pretrained(source, tmp_path).source
    draws = []
    for p in (saved, rebased.prior):
        torch.manual_seed(5)
        z = [p.sample((n,)) for n in (1, 2, 300)]  # products of one row are special
        draws.append(z + [p.log_prob(some) for some in z if hasattr(p, "log_prob")])
    assert all(torch.equal(*pair) for pair in zip(*draws, strict=True))


@pytest.mark.parametrize("fit", [fit_flow, fit_flow_matching])
def test_bases_are_fitted_in_float32_whatever_the_default_is(fit: Any) -> None:
    z = torch.randn(100, 2, dtype=torch.float32)
    torch.set_default_dtype(torch.float64)
    try:
        drawn = fit(z, steps=2, progress=False).sample((3,))
    finally:
        torch.set_default_dtype(torch.float32)
    assert drawn.dtype == torch.float32
