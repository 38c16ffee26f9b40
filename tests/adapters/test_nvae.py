"""NVAE: the walk is the model's own to the last bit, wrong models and inputs are refused by name."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.equality import identical
from helpers.nvae_standin import AutoEncoder, arguments, images, nvae, randomly
from helpers.toys import everything
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from ncprior import NCETrainer, NCPrior, sir
from ncprior.adapters.logistics import LogisticMixture
from ncprior.adapters.nvae import source as adapter
from ncprior.adapters.nvae.checkpoints import (
    load_checkpoint,
    on_cpu,
    readjust_batchnorm,
    without_cuda,
)
from ncprior.adapters.nvae.laws import FlowedNormal, clamped
from ncprior.adapters.nvae.source import NVAESource
from ncprior.source import posterior_of, sample_posterior
from ncprior.testing import check_source
from ncprior.utils.random_state import random_state

KINDS: list[dict[str, Any]] = [
    {},
    {"num_scales": 2},
    {"num_scales": 3, "num_groups": 1, "res_dist": False},
    {"num_flows": 1},
    {"num_flows": 2, "num_scales": 2, "num_groups": 1},
    {"num_groups": 1},
    {"num_groups": 1, "num_flows": 1},
    {"decoder": "gaussian"},
    {"decoder": "gaussian", "vaebm": True, "num_flows": 1},
    {"decoder": "mixture", "res_dist": False},
    {"decoder": "mixture", "num_x_bits": 5},
]


def ready(decoder: str = "bernoulli", *, temperature: float = 1.0, **options: Any) -> NVAESource:
    """A source on a small model that runs on the CPU, with nothing at its initial value."""
    model = randomly(nvae(decoder, **options), 0.1)
    on_cpu(model)
    return NVAESource(model, temperature=temperature)


def batch(source: NVAESource, count: int = 4) -> Tensor:
    """Images that the source takes."""
    x = images(source.module.decoder, count)
    bits = source.module.num_bits
    return x if bits == 8 or x.shape[1] == 1 else (x * (2**bits - 1)).round() / (2**bits - 1)


def drawn(source: NVAESource, count: int = 4) -> NVAESource.State:
    """The state behind the base prior's own draws."""
    state = source.start(count)
    for _ in range(source.num_groups):
        state = source.advance(state, source.group(state).prior.sample())
    return state


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_the_walk_is_the_models_own_and_keeps_the_laws_of_a_source(
    options: dict[str, Any],
) -> None:
    source = ready(**options)
    x = batch(source)
    assert source.self_check(x) == 0.0
    check_source(source, x)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_self_check_holds_for_every_row_and_seed_of_the_caller(options: dict[str, Any]) -> None:
    """The caller's generator neither matters nor moves; a tempered source is checked at 1."""
    source = ready(temperature=0.7, **options)
    x = batch(source, 2)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert source.self_check([x, torch.zeros(2)]) == 0.0
    assert torch.equal(torch.get_rng_state(), state)


def _not_relative(patch: pytest.MonkeyPatch, source: NVAESource) -> None:
    """Has the model's own forward, and it alone, take q as it is."""
    model: Any = source.module
    forward = model.forward

    def other(x: Tensor) -> Any:
        with pytest.MonkeyPatch.context() as inside:
            inside.setattr(model, "res_dist", False)
            return forward(x)

    patch.setattr(model, "forward", other)


def _without_clamp(patch: pytest.MonkeyPatch, source: NVAESource) -> None:
    patch.setattr(adapter, "clamped", lambda loc, log_scale: (loc, clamped(loc, log_scale)[1]))


def _without_the_hundredth(patch: pytest.MonkeyPatch, source: NVAESource) -> None:
    def other(loc: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        loc, scale = clamped(loc, log_scale)
        return loc, scale - 0.01

    patch.setattr(adapter, "clamped", other)


def _bottom_up(patch: pytest.MonkeyPatch, source: NVAESource) -> None:
    patch.setattr(source, "_joins", source._joins[::-1])


def _one_flow_for_all(patch: pytest.MonkeyPatch, source: NVAESource) -> None:
    patch.setattr(source, "_flows", lambda k: list(source.module.nf_cells)[:1])


def _without_flows(patch: pytest.MonkeyPatch, source: NVAESource) -> None:
    patch.setattr(source, "_flows", lambda k: [])


BREAKAGES = [_not_relative, _without_clamp, _without_the_hundredth, _bottom_up]
BREAKAGES += [_one_flow_for_all, _without_flows]


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda f: f.__name__.strip("_"))
def test_self_check_refuses_another_walk(
    breakage: Callable[[pytest.MonkeyPatch, NVAESource], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ready(num_groups=3, num_flows=1)
    x = batch(source)
    assert source.self_check(x) == 0.0
    breakage(monkeypatch, source)
    with pytest.raises(ValueError, match=r"forward and this walk disagree: .* by up to"):
        source.self_check(x)


def test_a_forward_of_nan_is_refused() -> None:
    source = ready()
    x = batch(source)
    source.module.image_conditional[1].bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="disagree"):
        source.self_check(x)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_group_0_is_a_normal_of_scale_101_percent_times_the_temperature(
    temperature: float,
) -> None:
    source = ready(temperature=temperature)
    group = source.group(source.start(3))
    expected = Independent(Normal(torch.zeros(3, 2, 4, 4), 1.01 * temperature), 3)
    z = torch.randn(3, 2, 4, 4)
    assert torch.allclose(group.prior.log_prob(z), expected.log_prob(z), rtol=1e-6)
    assert group.context is None and group.posterior is None


def test_temperature_scales_every_prior_and_no_posterior() -> None:
    plain, tempered = ready(num_scales=2), ready(num_scales=2)
    tempered = NVAESource(plain.module, temperature=0.7)
    x = batch(plain)
    states = [s.start(4, s.encode(x)) for s in (plain, tempered)]
    for _ in range(plain.num_groups):
        one, other = (s.group(state) for s, state in zip((plain, tempered), states, strict=True))
        assert torch.equal(other.prior.base_dist.loc, one.prior.base_dist.loc)
        assert torch.equal(other.prior.base_dist.scale, 0.7 * one.prior.base_dist.scale)
        assert torch.equal(other.posterior.base_dist.scale, one.posterior.base_dist.scale)
        z = posterior_of(one).sample()
        states = [s.advance(state, z) for s, state in zip((plain, tempered), states, strict=True)]


def test_contexts_are_the_features_in_front_of_the_prior_heads() -> None:
    """The prior is the head of the context, but for group 0, which has no context."""
    source = ready(num_groups=3, num_scales=2)
    state = source.start(4)
    for k in range(source.num_groups):
        group = source.group(state)
        assert (group.context is None) == (k == 0)
        if k > 0:
            raw = source.module.dec_sampler[k - 1](group.context)
            assert torch.equal(group.prior.base_dist.loc, clamped(*raw.chunk(2, 1))[0])
        state = source.advance(state, group.prior.sample())


def test_the_posterior_adds_to_the_prior_before_the_clamps() -> None:
    """Far out both are near 5 alone; added behind the clamp they would be near 10."""
    source = ready()
    with torch.no_grad():
        for head in (source.module.enc_sampler[1], source.module.dec_sampler[0][1]):
            head.weight.zero_()
            head.bias.fill_(20.0)
    x = batch(source)
    state = source.start(4, source.encode(x))
    state = source.advance(state, posterior_of(source.group(state)).sample())
    assert source.group(state).posterior.base_dist.loc.max() <= 5


def test_a_flowed_posterior_draws_behind_its_flows_and_knows_the_density_of_its_draws() -> None:
    """Against the change of variables written out, with a flow that does not keep volume."""
    source = ready(num_flows=2, flow_log_scale=0.3)
    x = batch(source)
    state = source.start(4, source.encode(x))
    law = source.group(state).posterior
    assert isinstance(law, FlowedNormal) and law.support.event_dim == 3
    torch.manual_seed(1)
    z, log_q = law.sample_and_log_prob((5,))
    torch.manual_seed(1)
    z_0 = law.base.sample((5,))
    flowed = z_0.flatten(0, 1)
    for flow in source.module.nf_cells[:2]:
        flowed = flow(flowed, torch.empty(0))[0]
    log_det = 2 * 0.3 * z_0[0, 0].numel()
    assert z.shape == (5, 4, 2, 4, 4) and log_q.shape == (5, 4)
    assert torch.equal(z, flowed.view_as(z))
    assert torch.allclose(log_q, law.base.log_prob(z_0) - log_det, rtol=1e-5)
    torch.manual_seed(1)
    assert torch.equal(law.sample((5,)), z)
    with pytest.raises(NotImplementedError, match="sample_and_log_prob"):
        law.log_prob(z)


def test_each_group_has_flows_of_its_own() -> None:
    source = ready(num_groups=3, num_flows=2)
    flows = [flow for k in range(3) for flow in source._flows(k)]
    assert flows == list(source.module.nf_cells)
    assert [len(source._flows(k)) for k in range(3)] == [2, 2, 2]


def test_bernoulli_likelihoods_leave_the_border_out() -> None:
    source = ready(crop_output=True)
    state, x = drawn(source), batch(source)
    logits = source._logits(state)
    pixels = x * logits - nn.functional.softplus(logits)
    law = source.likelihood(state)
    assert law.event_shape == x.shape[1:] and law.sample((3,)).shape == (3, *x.shape)
    assert law.support.check(law.sample()).tolist() == [True] * 4
    assert torch.allclose(law.log_prob(x), pixels[:, 0, 2:6, 2:6].sum((1, 2)), rtol=1e-5)
    assert torch.equal(source.decode(state), logits.sigmoid()) and torch.equal(
        law.mean, logits.sigmoid()
    )
    whole = ready()
    state = drawn(whole)
    logits = whole._logits(state)
    pixels = x * logits - nn.functional.softplus(logits)
    assert torch.allclose(whole.likelihood(state).log_prob(x), pixels.sum((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("vaebm", [False, True])
def test_gaussian_likelihoods_are_densities_in_x(vaebm: bool) -> None:
    """In 2x - 1 the density is 2 times less per dimension; VAEBM bounds log σ at -2."""
    source = ready("gaussian", vaebm=vaebm)
    with torch.no_grad():
        source.module.image_conditional[1].bias[3:] -= 3
    state, x = drawn(source), batch(source)
    official = source.module.decoder_output(source._logits(state))
    normal = official.dist1 if vaebm else official.dist
    expected = normal.log_p(2 * x - 1).sum((1, 2, 3)) + x[0].numel() * torch.tensor(2.0).log()
    assert torch.allclose(source.likelihood(state).log_prob(x), expected, rtol=1e-5)
    assert torch.allclose(source.decode(state), ((official.dist.mu + 1) / 2).clamp(0, 1))
    assert torch.equal(source.likelihood(state).base_dist.drawn_scale, official.dist.sigma / 2)


@pytest.mark.parametrize("bits", [5, 8])
def test_mixture_likelihoods_have_the_models_bits(bits: int) -> None:
    source = ready("mixture", num_x_bits=bits)
    state = drawn(source)
    law = source.likelihood(state)
    assert isinstance(law, LogisticMixture) and law.levels == 2**bits - 1
    assert torch.equal(source.decode(state), law.mean)
    assert law.log_prob(batch(source)).shape == (4,)


def test_half_precision_models_have_float32_laws() -> None:
    model = nvae(num_flows=1, num_scales=2).bfloat16()
    for layer in model.modules():
        if isinstance(getattr(layer, "mask", None), Tensor):
            layer.mask = layer.mask.bfloat16()
    on_cpu(model)
    source = NVAESource(model)
    latents, state = sample_posterior(source, images().bfloat16())
    assert {z.dtype for z in latents} == {torch.float32}
    assert source.decode(state).dtype == torch.float32
    check_source(source, images().bfloat16())


def test_thirty_groups_train_in_one_walk_and_the_model_stays_bit_identical() -> None:
    source = ready(num_groups=10, num_scales=3, num_flows=1, size=16)
    source.module.stem.weight.requires_grad_(False)
    source.module.stem.bias.grad = torch.ones_like(source.module.stem.bias)
    x = images(size=16, count=6)
    before = everything(source.module)
    prior = NCPrior.for_source(source, x, width=8)
    assert len(prior.heads) == 30
    trainer = NCETrainer(prior, torch.optim.AdamW(prior.parameters(), lr=1e-2))
    stems = []
    handle = source.module.stem.register_forward_hook(lambda *_: stems.append(1))
    losses = [trainer.step(x).loss for _ in range(5)]
    handle.remove()
    assert len(stems) == 5  # one walk per batch
    assert losses[-1].shape == (30,) and losses[-1].mean() < losses[0].mean()
    prior.sample(2, partial(sir, num_proposals=4))
    assert everything(source.module) == before


def test_the_source_takes_a_wrapped_model_and_knows_it_by_its_weights() -> None:
    model = nvae()
    on_cpu(model)
    source = NVAESource(nn.DataParallel(model))
    assert source.module is model
    before = source.fingerprint()
    assert before == NVAESource(model).fingerprint() and before.startswith("float32")
    model.prior_ftr0.data.add_(1)
    assert source.fingerprint() != before


# Errors


def _without(name: str) -> nn.Module:
    model = nvae()
    delattr(model, name)
    return model


def _with(change: Callable[[Any], object], **options: Any) -> nn.Module:
    model = nvae(**options)
    change(model)
    return model


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: {"state_dict": {}},
            TypeError,
            "got an object of type dict, which lacks stem.* not its checkpoint",
        ),
        (
            lambda: nn.Linear(1, 1),
            TypeError,
            "got an object of type Linear, which lacks stem, pre_process",
        ),
        (lambda: _without("enc0"), TypeError, "lacks enc0"),
        (
            lambda: _with(lambda m: setattr(m, "dataset", "stacked_mnist")),
            ValueError,
            "does not support the data set 'stacked_mnist'",
        ),
        (
            lambda: _with(lambda m: m.dec_sampler.append(nn.Identity())),
            ValueError,
            "With 2 groups in enc_sampler, NVAE has 1 dec_sampler; got 2",
        ),
        (
            lambda: _with(lambda m: m.nf_cells.append(nn.Identity())),
            ValueError,
            "has 0 nf_cells; got 1",
        ),
        (
            lambda: _with(lambda m: m.dec_tower.append(m.dec_tower[0])),
            ValueError,
            "2 combiners in dec_tower; got 3",
        ),
        (
            lambda: _with(lambda m: m.enc_tower.append(m.enc_tower[1])),
            ValueError,
            "1 combiners in enc_tower; got 2",
        ),
        (
            lambda: _with(lambda m: m.dec_tower.insert(0, m.dec_tower[1])),
            ValueError,
            "1 combiners in front of dec_tower; got 0",
        ),
        (
            lambda: _with(lambda m: m.stem.__dict__.update(data_init=True, init_done=False)),
            ValueError,
            "initialise its ELUConv layers",
        ),
    ],
)
def test_a_model_that_the_walk_would_not_fit_is_refused(
    make: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        NVAESource(make())


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_temperatures_are_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match=r"temperature must be a number in \(0, inf\)"):
        NVAESource(nvae(), temperature=temperature)


@pytest.mark.parametrize("wrong", [None, 3, AutoEncoder])
def test_F32_what_is_no_model_is_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="NVAESource takes NVAE's AutoEncoder; got"):
        NVAESource(wrong)
    with pytest.raises(TypeError, match="model must be of type Module"):
        on_cpu(wrong)
    with pytest.raises(TypeError, match="A source is a subclass"), readjust_batchnorm(wrong):
        pass


def test_F26_counts_and_numbers() -> None:
    source = ready()
    for options in ({"iterations": 2.0}, {"batch_size": "4"}, {"draw": 3}):
        with pytest.raises(TypeError, match="must be a"), readjust_batchnorm(source, **options):
            pass
    with pytest.raises(TypeError, match="tolerance must be a number"):
        source.self_check(images(), tolerance="1")
    with pytest.raises(TypeError, match="temperature must be a number"):
        NVAESource(nvae(), temperature="1")


def test_F25_arrays_are_images() -> None:
    source, x = ready(), images()
    for array in (x.numpy(), x.double().numpy()):
        assert torch.equal(source.encode(array).features, source.encode(x).features)


def test_GS2_a_check_leaves_all_generators_as_they_were() -> None:
    """fork_rng of one device would leave those of others reseeded: `seeded` keeps all."""
    source, x = ready(), images()
    seen: list[Any] = []
    before = random_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.random, "fork_rng", lambda *_, **__: seen.append(1))
        assert source.self_check(x) == 0
    assert not seen
    assert identical(random_state(), before)


def _in_training(source: NVAESource) -> Tensor:
    source.module.dec_tower[0].train()
    return images()


def _masks_elsewhere(source: NVAESource) -> Tensor:
    flow = next(m for m in source.module.modules() if hasattr(m, "mask"))
    flow.mask = flow.mask.to("meta")
    return images()


@pytest.mark.parametrize(
    ("options", "x", "message"),
    [
        ({}, lambda s: torch.zeros(2, 1, 4, 4), r"of shape \(B, 1, 8, 8\); got \(2, 1, 4, 4\)"),
        ({"crop_output": True}, lambda s: torch.zeros(2, 1, 4, 4), "Pad by 2 on every side"),
        ({}, lambda s: "an image", "x must be a tensor or an array"),
        ({}, lambda s: torch.zeros(1, 8, 8), r"got \(1, 8, 8\)"),
        ({}, lambda s: torch.rand(2, 1, 8, 8), "Bernoulli decoder: .* Binarise x"),
        ({}, lambda s: 255 * images(), "Divide bytes by 255"),
        ({}, lambda s: images() - 1, "Divide bytes by 255"),
        ({}, lambda s: torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "as floats"),
        (
            {"decoder": "mixture", "num_x_bits": 5},
            lambda s: images("mixture"),
            r"5 bits: x must be on the levels k/31. Use \(x \* 255 // 8\) / 31",
        ),
        ({}, _in_training, "evaluation mode; dec_tower.0 is"),
        ({"num_flows": 1}, _masks_elsewhere, "mask of the flows is on meta, the model on cpu"),
    ],
)
def test_wrong_images_and_models_that_cannot_run_are_refused_by_every_entrance(
    options: dict[str, Any], x: Callable[[NVAESource], Any], message: str
) -> None:
    source = ready(**options)
    bad = x(source)
    for entrance in (source.encode, source.self_check):
        with pytest.raises((TypeError, ValueError), match=message):
            entrance(bad)


def test_a_walk_without_x_needs_a_model_that_can_run_too() -> None:
    source = ready()
    _in_training(source)
    with pytest.raises(ValueError, match="evaluation mode"):
        source.start(2)


def test_misplaced_steps_are_refused() -> None:
    source = ready()
    state = source.start(2)
    with pytest.raises(ValueError, match=r"needs z of shape \(2, 2, 4, 4\); got \(2, 2\)"):
        source.advance(state, torch.zeros(2, 2))
    with pytest.raises(ValueError, match="in front of group 0 of 2"):
        source.decode(state)
    end = drawn(source, 2)
    with pytest.raises(ValueError, match="behind the last of 2 groups"):
        source.group(end)
    with pytest.raises(ValueError, match="needs z of shape none"):
        source.advance(end, torch.zeros(2, 2, 4, 4))
    with pytest.raises(ValueError, match="NVAE has no condition"):
        source.start(2, condition=torch.zeros(2, 1))


# Without a GPU


def test_on_cpu_lets_the_model_run_and_goes_without_a_trace() -> None:
    model = nvae(num_flows=1)
    with pytest.raises(ValueError, match=r"SyncBatchNormSwish runs on CUDA only.*on_cpu\(model\)"):
        NVAESource(model).encode(images())
    state = everything(model)
    before = [dict(vars(m)) for m in model.modules()]
    with on_cpu(model) as same:
        assert same is model
        assert NVAESource(model).self_check(images()) == 0.0
        inner = on_cpu(model)  # again: nothing to do, nothing to undo
        inner.remove()
        NVAESource(model).encode(images())
        assert everything(model) == state
    assert [vars(m).keys() for m in model.modules()] == [b.keys() for b in before]
    with pytest.raises(ValueError, match="runs on CUDA only"):
        NVAESource(model).start(2)


def test_on_cpu_ends_after_an_exception() -> None:
    model = nvae()
    with pytest.raises(RuntimeError, match="stop"), on_cpu(model):
        raise RuntimeError("stop")
    assert all("forward" not in vars(m) for m in model.modules())


@pytest.mark.parametrize("training", [False, True])
def test_the_layers_on_cpu_are_batch_normalisation_and_silu(training: bool) -> None:
    model = nvae()
    layer = model.pre_process[0].conv[2]
    expected = nn.BatchNorm2d(4, momentum=0.05)
    expected.load_state_dict(layer.state_dict())
    layer.train(training)
    expected.train(training)
    x = torch.randn(3, 4, 5, 5)
    with on_cpu(layer):
        assert torch.equal(layer(x), nn.functional.silu(expected(x)))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor), name


def test_without_cuda_constructors_leave_their_tensors_where_they_are() -> None:
    own = vars(Tensor).get("cuda")
    with without_cuda():
        model = AutoEncoder(arguments(num_flows=1), None, {})
        with without_cuda():
            pass
        assert torch.zeros(1).cuda().device.type == "cpu"
    masks = [m.mask.device.type for m in model.modules() if hasattr(m, "mask")]
    assert masks == ["cpu", "cpu"]
    with pytest.raises(RuntimeError, match="stop"), without_cuda():
        raise RuntimeError("stop")
    assert vars(Tensor).get("cuda") is own


# BatchNorm


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    return {
        name: m
        for name, m in model.named_modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm)
        and name.startswith(("dec_tower", "post_process"))
    }


@pytest.mark.parametrize(
    "options", [{}, {"num_scales": 2, "num_flows": 1}, {"num_groups": 1}], ids=str
)
def test_readjusted_statistics_are_those_of_training_mode(options: dict[str, Any]) -> None:
    """The same draws, through a copy whose decoder layers are in training mode."""
    source, reference = ready(**options), ready(**options)
    reference.module.load_state_dict(source.module.state_dict())
    before = everything(source.module)
    torch.manual_seed(3)
    with readjust_batchnorm(source, batch_size=6, iterations=7):
        seen = {name: t.clone() for name, t in source.module.state_dict().items()}
        assert not any(m.training or m._forward_pre_hooks for m in source.module.modules())
    assert everything(source.module) == before
    layers = decoder_layers(reference.module)
    for layer in layers.values():
        layer.train()
    reference._require_ready = lambda: None  # type: ignore[method-assign] (it refuses training)
    torch.manual_seed(3)
    with torch.no_grad():
        for _ in range(7):
            reference.decode(drawn(reference, 6))
    for name, expected in reference.module.state_dict().items():
        layer_name, _, kind = name.rpartition(".")
        if layer_name in layers and kind.startswith("running"):
            assert torch.allclose(seen[name], expected, rtol=1e-5, atol=1e-6), name
            assert not torch.equal(seen[name], source.module.state_dict()[name]), name
        elif kind != "num_batches_tracked":
            assert torch.equal(seen[name], expected), name


def test_batches_to_readjust_by_can_be_drawn_by_the_caller() -> None:
    source, calls = ready(), []

    def draw() -> None:
        calls.append(1)
        source.decode(drawn(source, 8))

    torch.manual_seed(0)
    with readjust_batchnorm(source, draw, iterations=3):
        own = source.module.state_dict()["dec_tower.1.conv.2.running_mean"].clone()
    torch.manual_seed(0)
    with readjust_batchnorm(source, batch_size=8, iterations=3):
        assert torch.equal(source.module.state_dict()["dec_tower.1.conv.2.running_mean"], own)
    assert len(calls) == 3


@pytest.mark.parametrize("where", ["drawing", "sampling"])
def test_statistics_come_back_after_an_exception(where: str) -> None:
    source = ready()
    before = everything(source.module)

    def draw() -> None:
        source.decode(drawn(source, 2))
        if where == "drawing":
            raise RuntimeError("stop")

    def use() -> None:
        with readjust_batchnorm(source, draw, iterations=2):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        use()
    assert everything(source.module) == before
    assert not any(m._forward_pre_hooks for m in source.module.modules())


def test_a_model_in_training_is_not_readjusted() -> None:
    source = ready()
    source.module.train()
    with pytest.raises(ValueError, match="evaluation mode"), readjust_batchnorm(source):
        pass


# Checkpoints


class Own:
    """A type that no checkpoint of tensors needs."""

    def __init__(self, value: int = 0) -> None:
        self.value = value


def checkpoint(model: nn.Module, path: Path, **changes: Any) -> Path:
    """What NVAE's training script saves."""
    args = arguments(num_groups=2, num_flows=1)
    optimizer = torch.optim.Adamax(model.parameters())
    contents = {
        "epoch": 3,
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "global_step": 12,
        "args": args,
        "arch_instance": {"normal_enc": ["a cell"]},
        "scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5).state_dict(),
        "grad_scalar": {},
    }
    torch.save({**contents, **changes}, path)
    return path


def build(args: argparse.Namespace, arch_instance: Any) -> AutoEncoder:
    return AutoEncoder(args, None, arch_instance)


def test_a_checkpoint_fills_the_model_that_its_arguments_describe(tmp_path: Path) -> None:
    model, seen = nvae(num_flows=1), []

    def build_and_see(args: argparse.Namespace, arch_instance: Any) -> AutoEncoder:
        seen.append((args, arch_instance))
        return build(args, arch_instance)

    allowed = set(torch.serialization.get_safe_globals())
    loaded = load_checkpoint(checkpoint(model, tmp_path / "checkpoint.pt"), build_and_see)
    assert allowed <= set(torch.serialization.get_safe_globals()) - {argparse.Namespace}
    ((args, arch_instance),) = seen
    assert (args.ada_groups, args.min_groups_per_scale, args.num_mixture_dec) == (False, 1, 10)
    assert arch_instance == {"normal_enc": ["a cell"]}
    assert not loaded.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_checkpoint_of_a_wrapped_model_loads(tmp_path: Path) -> None:
    model = nvae(num_flows=1)
    weights = nn.DataParallel(model).state_dict()
    loaded = load_checkpoint(checkpoint(model, tmp_path / "c.pt", state_dict=weights), build)
    assert torch.equal(loaded.prior_ftr0, model.prior_ftr0)


def test_only_normalised_copies_and_counters_may_be_missing(tmp_path: Path) -> None:
    model = nvae(num_flows=1)

    def build_with_copies(args: argparse.Namespace, arch_instance: Any) -> AutoEncoder:
        model = build(args, arch_instance)
        model.stem.weight_normalized = model.stem.weight  # NVAE's depthwise convolutions do so
        return model

    weights = {k: v for k, v in model.state_dict().items() if "num_batches" not in k}
    path = checkpoint(model, tmp_path / "c.pt", state_dict=weights)
    assert torch.equal(load_checkpoint(path, build_with_copies).stem.weight, model.stem.weight)
    del weights["stem.bias"]
    path = checkpoint(model, tmp_path / "c.pt", state_dict=weights)
    with pytest.raises(ValueError, match=r"1 weights .* missing and 0 .* \(stem.bias"):
        load_checkpoint(path, build)
    weights["stem.bias"], weights["stem.other"] = model.stem.bias, model.stem.bias
    path = checkpoint(model, tmp_path / "c.pt", state_dict=weights)
    with pytest.raises(ValueError, match=r"0 weights .* missing and 1 .* \(stem.other"):
        load_checkpoint(path, build)


def test_loaded_layers_are_not_initialised_from_data_again(tmp_path: Path) -> None:
    def build_elu(args: argparse.Namespace, arch_instance: Any) -> AutoEncoder:
        model = build(args, arch_instance)
        model.stem.data_init, model.stem.init_done = True, False
        model.enc0[1].data_init, model.enc0[1].init_done = False, False
        return model

    loaded = load_checkpoint(checkpoint(nvae(num_flows=1), tmp_path / "c.pt"), build_elu)
    assert loaded.stem.init_done and not loaded.enc0[1].init_done
    NVAESource(loaded)


def test_other_types_are_unpickled_only_on_the_users_word(tmp_path: Path) -> None:
    model = nvae(num_flows=1)
    path = checkpoint(model, tmp_path / "c.pt", epoch=Own(3))
    with pytest.raises(
        ValueError, match=r"could run any code\. If you trust .* trust_pickle=True"
    ):
        load_checkpoint(path, build)
    assert torch.equal(
        load_checkpoint(path, build, trust_pickle=True).prior_ftr0, model.prior_ftr0
    )


@pytest.mark.parametrize("contents", [{"weight": torch.zeros(1)}, [torch.zeros(1)]])
def test_another_file_is_no_checkpoint(contents: Any, tmp_path: Path) -> None:
    torch.save(contents, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="lacks arch_instance, args, state_dict"):
        load_checkpoint(tmp_path / "c.pt", build)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "empty, damaged or no file of torch.save .EOFError"),
        (b"\x80\x02garbage", "Copy or download it again"),
        (b"PK\x03\x04garbage", "Copy or download it again"),
        (b"garbage", "Copy or download it again"),
        ({"state_dict": None}, "state_dict must map names to tensors; got .* and None"),
        ({"state_dict": [1]}, "state_dict must map names to tensors"),
        ({"state_dict": {"stem.weight": 3}}, "state_dict must map names to tensors"),
        ({"args": None}, "args must be an argparse.Namespace .* got None"),
        (
            {"state_dict": {"stem.weight": torch.zeros(1)}},
            "did not load: .*size mismatch.*`build`",
        ),
    ],
)
def test_F36_a_damaged_checkpoint_is_one_clear_error(
    contents: Any, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.pt"
    if isinstance(contents, bytes):
        path.write_bytes(contents)
    else:
        checkpoint(nvae(num_flows=1), path, **contents)
    for trust in (False, True):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            load_checkpoint(path, build, trust_pickle=trust)


def test_F36_a_truncated_checkpoint_is_one_clear_error(tmp_path: Path) -> None:
    path = checkpoint(nvae(num_flows=1), tmp_path / "c.pt")
    whole = path.read_bytes()
    for share in (0.01, 0.3, 0.7, 0.999):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(ValueError, match="Copy or download it again"):
            load_checkpoint(path, build)


def test_F36_build_makes_a_module(tmp_path: Path) -> None:
    path = checkpoint(nvae(num_flows=1), tmp_path / "c.pt")
    for wrong in (None, "AutoEncoder", AutoEncoder):
        with pytest.raises(TypeError, match="build must be a function"):
            load_checkpoint(path, wrong)
    with pytest.raises(TypeError, match="build.args, arch. must be of type Module; got None"):
        load_checkpoint(path, lambda args, arch: None)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "nowhere.pt", build)


# The published code


@pytest.mark.parametrize("variable", ["NCPRIOR_NVAE", "NCPRIOR_VAEBM"])
def test_the_walk_is_that_of_the_published_code(variable: str) -> None:
    """Latents, log p, log q, logits and samples to the last bit; likelihoods to rounding."""
    if variable not in os.environ:
        pytest.skip(f"{variable} names the folder of a checkout")
    script = Path(__file__).parents[1] / "helpers" / "nvae_official.py"
    command = [sys.executable, "-W", "ignore", str(script), os.environ[variable]]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == 22
    for result in results:
        assert result["self_check"] == 0.0 and result["walk"] == 0.0, result
        ours, theirs = (torch.tensor(t) for t in result["log p(x|z)"])
        if result["gaussian"]:
            theirs = theirs + result["numel"] * torch.tensor(2.0).log()
        assert torch.allclose(ours, theirs, rtol=1e-5), result


def test_a_model_without_layers_of_nvae_needs_no_cpu_forward() -> None:
    with pytest.raises(ValueError, match="must contain layers of NVAE's SyncBatchNormSwish"):
        on_cpu(nn.Linear(1, 1))
