"""VAEBM under bad arguments, cut gradients and shared weights: an error of ours, or the result."""

from __future__ import annotations

import copy
import math
from collections import UserDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.problems import standard_normal
from helpers.toys import VAE, base, everything, same, weights
from helpers.vaebm_problems import LinearGaussian, Quadratic, Slope, nothing
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal

from ncprior import NCPrior, SingleGroup, sir
from ncprior.heads.networks import MLPHead
from ncprior.vaebm.energy_net import EnergyNet
from ncprior.vaebm.fit import fit_vaebm
from ncprior.vaebm.gaussian_decoder import GaussianDecoder
from ncprior.vaebm.model import VAEBM
from ncprior.vaebm.replay import ReplayBuffer
from ncprior.vaebm.settings import EnergySettings
from ncprior.vaebm.trainer import VAEBMTrainer

PROBLEM = LinearGaussian()
QUIET = {"progress": False}


def data(n: int = 40) -> Tensor:
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(12))


def model(energy: Any = None, **options: Any) -> VAEBM:
    torch.manual_seed(11)
    net = MLPHead((3,), width=8, depth=1) if energy is None else energy
    return VAEBM(PROBLEM.source(), net, **{"num_steps": 2, "step_size": 0.1, **options})


def adam(of: VAEBM) -> torch.optim.Adam:
    return torch.optim.Adam(of.parameters(), 1e-3)


def test_a_model_keeps_its_prior_and_its_vae() -> None:
    """Another prior was registered, and the next training changed its heads."""
    prior = NCPrior(PROBLEM.source(), MLPHead((2,), width=8, depth=1))
    of = VAEBM(prior, MLPHead((3,), width=8, depth=1))
    for name, other in (("prior", NCPrior(PROBLEM.source(), MLPHead((2,)))), ("source", 3)):
        with pytest.raises(AttributeError, match=rf"keeps the {name} that it was made with"):
            setattr(of, name, other)
    assert of.prior is prior and of.source is prior.source
    assert all(name.startswith("energy.") for name, _ in of.named_parameters())


def test_a_copy_has_hooks_of_its_own() -> None:
    of, calls = model(), []
    other = copy.deepcopy(of)
    other.register_forward_hook(lambda *_: calls.append(1))
    of(data())
    assert not calls
    other(data())
    assert calls == [1] and other.source is of.source


def test_chains_in_a_prior_of_the_users_own_are_checked_where_they_begin() -> None:
    """Every step drew from the prior to look at its support."""

    calls = []

    class Own(MultivariateNormal):
        def rsample(self, sample_shape: Any = ()) -> Tensor:
            calls.append(1)
            return super().rsample(sample_shape)

    source = SingleGroup(
        Own(torch.zeros(2), torch.eye(2)), None, PROBLEM.decode, likelihood=PROBLEM.likelihood
    )
    of = VAEBM(source, Quadratic(3))
    calls.clear()
    of.sample(4, num_steps=20)
    assert 1 <= len(calls) < 5


# --- training without gradients ---


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_F3_W2_training_takes_gradients_of_its_own(context: Callable[[], Any]) -> None:
    of, under = model(), model()
    torch.manual_seed(1)
    expected = fit_vaebm(of, data(), steps=3, batch_size=8, **QUIET)
    torch.manual_seed(1)
    with context():
        history = fit_vaebm(under, data(), steps=3, batch_size=8, **QUIET)
    assert same(weights(of), weights(under)) and not same(weights(of), weights(model()))
    assert history.rows[0].grad_norm == expected.rows[0].grad_norm > 0
    with context():
        metrics = VAEBMTrainer(under, adam(under)).step(torch.randn(4, 3))
    assert metrics.grad_norm > 0


def test_F3_W2_an_energy_that_cannot_learn_raises() -> None:
    frozen = model()
    frozen.requires_grad_(False)
    with torch.inference_mode():
        made_inside = MLPHead((3,))
    for of in (frozen, VAEBM(PROBLEM.source(), made_inside)):
        with pytest.raises(ValueError, match=r"must be trainable.*requires_grad_\(True\)"):
            fit_vaebm(of, data(), steps=3, **QUIET)
    with pytest.raises(TypeError, match="Only a network can be trained; got an energy without"):
        fit_vaebm(model(nothing), data(), steps=3, **QUIET)

    class Cut(MLPHead):
        @torch.no_grad()
        def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
            return super().forward(z, context)

    cut = model(Cut((3,)))
    with pytest.raises(ValueError, match="would learn nothing. Remove torch.no_grad"):
        fit_vaebm(cut, data(), steps=3, **QUIET)
    assert not cut.training


# --- chains without gradients ---


def without_gradients(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.no_grad()(function)


def detached(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda z: function(z.detach())


@pytest.mark.parametrize("cut", [without_gradients, detached])
@pytest.mark.parametrize("trainable", [True, False])
def test_F5_a_cut_gradient_raises(cut: Any, trainable: bool) -> None:
    decoder, energy, head = nn.Linear(2, 3).eval(), nn.Linear(3, 1), Slope(0.8, 0.5)
    for net in (decoder, energy, head):
        net.requires_grad_(trainable)

    def source(decode: Any = decoder, **options: Any) -> SingleGroup:
        def likelihood(z: Tensor) -> Independent:
            return Independent(Normal(decode(z), 0.5), 1)

        return SingleGroup(
            standard_normal(2),
            lambda x: Independent(Normal(x[:, :2], 1.0), 1),
            decode,
            likelihood=likelihood,
            **options,
        )

    def value(x: Tensor) -> Tensor:
        return energy(x).squeeze(1)  # type: ignore[no-any-return]

    VAEBM(NCPrior(source(features=lambda z: z), head), value).sample(3)
    message = "has no gradient with respect to it: .* Remove torch.no_grad"
    with pytest.raises(ValueError, match=f"The energy changes with x, but {message}"):
        VAEBM(source(), cut(value)).sample(3)
    with pytest.raises(
        ValueError, match=f"The decoder, or the likelihood changes with z.*{message}"
    ):
        VAEBM(source(cut(decoder)), value).sample(3)
    with pytest.raises(
        ValueError, match="The (log-ratio of the heads|features).* no gradient with"
    ):
        VAEBM(NCPrior(source(features=cut(lambda z: 1 * z)), head), value).sample(3)


def test_F5_a_constant_needs_no_gradient_and_the_check_is_made_once() -> None:
    calls = []

    def constant(x: Tensor) -> Tensor:
        calls.append(len(x))
        return torch.zeros(len(x))

    constant_decoder = PROBLEM.source(
        likelihood=lambda z: Independent(Normal(torch.ones(len(z), 3), 0.5), 1)
    )
    of = VAEBM(constant_decoder, constant, num_steps=4)
    of.sample(3)
    first = len(calls)
    of.sample(3)
    assert len(calls) - first < first


# --- shared weights ---


def test_F6_an_energy_of_the_vaes_own_layers_raises() -> None:
    vae = VAE().eval()
    source = SingleGroup(
        *(base(), vae.posterior, vae.decode),
        module=vae,
        likelihood=lambda z: Independent(Normal(vae.decode(z), 0.3), 1),
    )
    prior = NCPrior(source, MLPHead((2,)))
    before = everything(vae)
    shared = nn.Sequential(vae.decoder[0], nn.Linear(8, 1))
    view = nn.Linear(1, 1)
    view.weight = nn.Parameter(next(vae.decoder.parameters()).data)
    for energy in (shared, view, nn.Sequential(prior.heads[0])):
        with pytest.raises(ValueError, match=r"must not share .*copy.deepcopy\(layer\)"):
            VAEBM(prior, energy)
    alone = SingleGroup(*(base(), vae.posterior, vae.decode), likelihood=source.likelihood)
    with pytest.raises(ValueError, match="must not share"):
        VAEBM(alone, shared)  # without module=
    VAEBM(prior, copy.deepcopy(shared))
    assert everything(vae) == before


# --- arguments ---


WRONG = [2.5, "3", True, math.nan, 1j, [3]]


@pytest.mark.parametrize("name", ["steps", "batch_size", "eval_every", "checkpoint_every"])
def test_F4_F26_counts_of_a_training_are_whole_numbers(name: str) -> None:
    of = model()
    before = everything(of)
    for value in (*WRONG, None, 28.6):
        with pytest.raises(TypeError, match=f"{name} must be a whole number in"):
            fit_vaebm(of, data(), **{name: value}, **QUIET)
    for value in (0, -1):
        with pytest.raises(ValueError, match=f"{name} must be a whole number in"):
            fit_vaebm(of, data(), **{name: value}, **QUIET)
    assert everything(of) == before


def test_F16_what_cannot_work_is_found_before_training() -> None:
    of = model()
    before = everything(of)
    for options in (
        {"callback": 3},
        {"condition": "labels"},
        {"sampler": sir},  # without heads
        {"settings": EnergySettings},
        {"learning_rate": math.inf},
        {"learning_rate": "fast"},
        {"progress": 1},
        {"callback": VAE()},  # a module without forward
    ):
        with pytest.raises((TypeError, ValueError), match="must be|must take|needs ratio heads"):
            fit_vaebm(of, data(), **{**QUIET, **options})
    assert everything(of) == before


def test_F16_F8_a_checkpoint_is_of_a_path_and_of_the_data(tmp_path: Path) -> None:
    of = model()
    before = everything(of)
    for wrong in (tmp_path, 3, "nu\0ll", tmp_path / "file" / "checkpoint"):
        (tmp_path / "file").touch()
        with pytest.raises((TypeError, ValueError, OSError), match="checkpoint must be"):
            fit_vaebm(of, data(), steps=2, checkpoint=wrong, **QUIET)  # type: ignore[arg-type]
    assert everything(of) == before
    path = tmp_path / "checkpoint"
    fit_vaebm(of, data(), steps=2, checkpoint=path, **QUIET)
    with pytest.raises(ValueError, match="belongs to a training with data="):
        fit_vaebm(model(), 5 + 9 * data(), steps=2, checkpoint=path, **QUIET)


def test_F16_a_divergence_before_the_first_row_leaves_the_energy_as_it_was() -> None:
    of = model()
    before = weights(of)
    history = fit_vaebm(of, data(), steps=50, learning_rate=1e30, eval_every=50, **QUIET)
    assert history.diverged and history.kept_step == 0
    assert same(weights(of), before) and not of.training


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("max_gap", ["100", None, math.nan, -1]),
        ("buffer_size", [1.5, None, -1, "5"]),
        ("replay_fraction", [2, math.nan, None]),
        ("spectral_weight", [-1, math.inf, "x"]),
        ("contrast", ["y", None, 1]),
    ],
)
def test_F17_settings_without_effect_raise(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises((TypeError, ValueError), match=f"{name} must be"):
            EnergySettings(**{name: value})


def test_F17_a_trainers_options_are_checked() -> None:
    of = model()
    for options in (
        {"max_grad_norm": -1},
        {"max_grad_norm": math.nan},
        {"backward": None},
        {"buffer": 100},
        {"condition": 3},
        {"sampler": "sir"},
        {"spectral_weight": None},
    ):
        with pytest.raises((TypeError, ValueError), match=f"{next(iter(options))} must be"):
            VAEBMTrainer(of, adam(of), **options)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer must be of type Optimizer"):
        VAEBMTrainer(of, of.parameters())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        *[({"num_steps": value}, TypeError) for value in (*WRONG, None)],
        *[({"step_size": value}, TypeError) for value in ("x", None, 1j)],
        *[({"data_noise": value}, TypeError) for value in ("x", None, 1j)],
        *[({"precision": value}, ValueError) for value in ("bf16", None, torch.float16)],
        *[({"langevin_target": value}, ValueError) for value in (None, 1, "officially")],
    ],
)
def test_F26_F17_arguments_of_a_model_are_checked(options: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=f"{next(iter(options))} must be"):
        model(**options)


def test_F26_numbers_of_chains_and_steps_are_whole_numbers() -> None:
    of = model()
    for value in (*WRONG, None):
        with pytest.raises(TypeError, match="batch_size must be a whole number"):
            of.sample(value)
    for value in (0, -1):
        with pytest.raises(ValueError, match="batch_size must be a whole number"):
            of.sample(value)
    for options in ({"num_steps": 2.5}, {"num_steps": -1}, {"step_size": 0}, {"adjusted": 1}):
        with pytest.raises((TypeError, ValueError), match=f"{next(iter(options))} must be"):
            of.sample(2, **options)
    with pytest.raises(TypeError, match="sampler must be a function"):
        VAEBM(NCPrior(PROBLEM.source(), MLPHead((2,))), nothing).sample(2, sampler=100)  # type: ignore[arg-type]


def test_noise_is_checked() -> None:
    of, (z, x) = model(), model().draw_noise(4)
    for wrong in (None, 3, "ab", [None], [z, "x"], [z.int(), x]):
        with pytest.raises(TypeError, match="noise must be a list of tensors of floats"):
            of.run_chains(wrong)  # type: ignore[arg-type]
    for parts in ([], [z, x[:2]], [z[:0], x[:0]], [z[:, :1], x], [z, x / 0]):
        with pytest.raises(ValueError, match=r"noise.* must|noise of group 0 must"):
            of.run_chains(parts)
    with pytest.raises(
        ValueError, match=r"noise is that of the decoder, .*\(4, 3\); got \(4, 2\)"
    ):
        of.run_chains([z])


def test_F36_objects_of_the_wrong_kind_are_named() -> None:
    vae = nn.Linear(1, 1)
    for wrong in (vae, VAEBM, NCPrior, None):
        with pytest.raises(TypeError, match="A source is a subclass of ncprior.LatentSource; got"):
            VAEBM(wrong, nothing)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="A source is a subclass of ncprior.LatentSource; got"):
            GaussianDecoder(wrong, 0.1)  # type: ignore[arg-type]
    for wrong in (None, "net", nn.Linear, 3):
        with pytest.raises(TypeError, match="energy must be a function; got"):
            VAEBM(PROBLEM.source(), wrong)
    for wrong in (PROBLEM.source(), vae, VAEBM, None):
        with pytest.raises(TypeError, match="model must be of type VAEBM; got"):
            fit_vaebm(wrong, data())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="The energy must return a tensor of floats; got None"):
        VAEBM(PROBLEM.source(), lambda x: None).sample(2)
    with pytest.raises(TypeError, match=r"likelihood\(state\) must return p\(x \| z\)"):
        VAEBM(PROBLEM.source(likelihood=PROBLEM.decode), nothing)


def test_GC6_an_energy_on_another_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda:1")
    monkeypatch.setattr("ncprior.vaebm.checks.device_of", lambda source: cuda)
    with pytest.raises(
        ValueError, match=r"on cuda:1, and energy is on cpu. Call energy.to\('cuda:1'"
    ):
        VAEBM(PROBLEM.source(), Quadratic(3))
    with pytest.raises(ValueError, match="prior is on cpu"):
        VAEBM(NCPrior(PROBLEM.source(), Slope(0.1, 0.1)), nothing)


@pytest.mark.parametrize("size", [0, -1, 2.5, "3", None, True, math.nan])
def test_F26_sizes_of_an_energy_are_whole_numbers(size: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="width must be a whole number"):
        EnergyNet((1, 8, 8), width=size)
    with pytest.raises((TypeError, ValueError), match="H of image_shape must be a whole number"):
        EnergyNet((1, size, 8))
    for wrong in (None, 8, "888", torch.zeros(3)):
        with pytest.raises(ValueError, match="image_shape must be a shape"):
            EnergyNet(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, 2.5, None])
def test_F26_sizes_of_a_buffer_are_whole_numbers(size: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="size must be a whole number"):
        ReplayBuffer(size, 0.5)


# --- data ---


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_D3_batches_may_be_mappings(kind: Any) -> None:
    of, other = model(), model()
    torch.manual_seed(2)
    expected = VAEBMTrainer(of, adam(of)).step((data(8), torch.zeros(8)))
    torch.manual_seed(2)
    found = VAEBMTrainer(other, adam(other)).step(kind(image=data(8), label=torch.zeros(8)))
    assert found == expected
    history = fit_vaebm(of, [kind(image=data(8))], steps=2, **QUIET)
    assert history.stopped == "all 2 steps taken"


def test_F26_batches_without_images_are_named() -> None:
    of = model()
    for wrong in ([1.0, 2.0], {}, data(8) + 1j, "x", data(0), torch.ones(3)[0]):
        with pytest.raises((TypeError, ValueError), match="A batch must"):
            VAEBMTrainer(of, adam(of)).step(wrong)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_F15_a_row_that_is_not_finite_is_named(value: float) -> None:
    of, x = model(), data(9)
    x[6, 1] = value
    before = everything(of)
    for rows in (x, x.numpy()):
        with pytest.raises(ValueError, match="x in batch 1 of the data must be finite; .* 1 of 9"):
            fit_vaebm(of, rows, steps=3, **QUIET)
    assert everything(of) == before
    history = fit_vaebm(of, [x], steps=3, **QUIET)
    assert "x has NaN or infinity in 1 of 9 rows; remove or mend them" in history.stopped
    with pytest.raises(ValueError, match="The data must have 1 or more rows|1 or more rows of x"):
        fit_vaebm(of, x[:0], steps=3, **QUIET)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_F15_F26_data_of_a_gaussian_decoder_is_checked(value: float) -> None:
    source, x = PROBLEM.source(), data(9)
    x[6, 1] = value
    with pytest.raises(
        ValueError, match="batch 2 of the data must be finite; got .* in 1 of 4 rows"
    ):
        GaussianDecoder.fitted(source, x, batch_size=4)
    with pytest.raises(ValueError, match="The data must have 1 or more rows; got none"):
        GaussianDecoder.fitted(source, data(0))
    with pytest.raises((TypeError, ValueError), match="batch_size must be a whole number"):
        GaussianDecoder.fitted(source, data(9), batch_size=0 if math.isnan(value) else 2.5)  # type: ignore[arg-type]


def test_a_gaussian_decoder_keeps_double_precision() -> None:
    vae = SingleGroup(standard_normal(3), lambda x: Independent(Normal(x, 1.0), 1), Tensor.double)
    source = GaussianDecoder(vae, 1.0)
    state = source.advance(source.start(2), data(2))
    assert source.likelihood(state).mean.dtype == torch.float64


def test_a_gaussian_decoder_without_residuals_is_named() -> None:
    z = standard_normal(3)
    exact = SingleGroup(z, lambda x: Independent(Normal(x, 1e-9), 1), lambda z: z.round())
    with pytest.raises(ValueError, match="residuals x - x̂ must be finite and not all 0"):
        GaussianDecoder.fitted(exact, data(9).round())
    kind = [{"image": rows} for rows in data(9).split(3)]

    class OfBatches(GaussianDecoder):
        def encode(self, x: Any) -> Any:
            return self.source.encode(x["image"])

    of_batches = OfBatches(PROBLEM.source(), 1.0)
    assert "9 held-out rows" in GaussianDecoder.fitted(of_batches, kind).origin


def test_samplers_with_heads_still_start_the_chains() -> None:
    over = VAEBM(NCPrior(PROBLEM.source(), Slope(0.3, 0.1)), Quadratic(3))
    assert over.sample(4, sampler=partial(sir, num_proposals=3)).x.shape == (4, 3)
