"""Heads in inference are the heads themselves, but for rounding; and what rounding does to draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.head_cases import CASES, Case, trained
from helpers.toys import ladder_prior, stir
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from ncprior import sir
from ncprior.heads import fast
from ncprior.heads.codes import CategoricalHead
from ncprior.heads.fast import InBlocks, prepare_head
from ncprior.heads.networks import ConvHead, MLPHead
from ncprior.heads.product import ProductHead
from ncprior.utils.precision import at_precision


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.mark.parametrize("cache", [1, 2**9, 2**19])
def test_it_is_the_head_itself(case: Case, cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks of one latent, of parts of the proposals, and in one."""
    monkeypatch.setattr(fast, "_CACHE", cache)
    head, c = trained(case.make()), case.c()
    with torch.no_grad():
        log_r = prepare_head(head, c)
        for z in (case.z(7, 3), case.z(5), case.z(1), case.z(), case.z(0)):
            expected = head(z, c)
            torch.testing.assert_close(log_r(z), expected, rtol=2e-5, atol=2e-5)
            assert log_r(z).dtype == torch.float32


def test_blocks_of_large_maps_hold_as_many_as_of_small_ones() -> None:
    """The first layers reduce maps of any size and of any number of channels to 64 maps of 8×8."""
    sizes = [
        math.prod(InBlocks(ConvHead(shape), None, torch.float32)._block_size(10**6, 1))
        for shape in ((20, 8, 8), (256, 8, 8), (3, 32, 32))
    ]
    assert sizes == [2**19 // (64 * 8 * 8) * torch.get_num_threads()] * 3


def test_selections_are_those_of_the_head_itself() -> None:
    for head, c in (
        (trained(MLPHead((5,), width=64)), None),
        (trained(MLPHead((5,), context_shape=(3,), width=64)), torch.randn(8, 3)),
    ):
        prior = Independent(Normal(torch.randn(8, 5), 1.0), 1)
        draws = []
        for log_r in (partial(head, context=c), prepare_head(head, c)):
            torch.manual_seed(1)
            draws.append(sir(prior, log_r, num_proposals=2000))
        assert torch.equal(draws[0].z, draws[1].z)
        torch.testing.assert_close(draws[0].ess, draws[1].ess, rtol=1e-3, atol=0)


def test_a_product_is_as_fast_as_its_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    product = ProductHead([trained(MLPHead((5,), context_shape=(3,), width=w)) for w in (64, 32)])
    z, c = torch.randn(40, 8, 5), torch.randn(8, 3)
    folded = []
    block = fast._Folded.block
    monkeypatch.setattr(fast._Folded, "block", lambda *args: folded.append(1) or block(*args))
    with torch.no_grad():
        torch.testing.assert_close(
            prepare_head(product, c)(z), product(z, c), rtol=2e-5, atol=2e-5
        )
        assert len(folded) == 2
        _hooked(product.heads[1])
        torch.testing.assert_close(
            prepare_head(product, c)(z), product(z, c), rtol=2e-5, atol=2e-5
        )


def test_a_folded_head_does_not_lose_digits_where_latents_are_far_from_zero() -> None:
    head = trained(MLPHead((3,), width=32).double())
    far = 1e5 + torch.randn(1000, 2, 3)
    head.fit_scale(far[0].double(), None)
    single = MLPHead((3,), width=32)
    single.load_state_dict(head.state_dict())
    with torch.no_grad():
        truth = head(far)
        own, folded = (
            (single(far) - truth).abs().max(),
            (prepare_head(single)(far) - truth).abs().max(),
        )
        assert prepare_head(head)(far).dtype == torch.float64
        torch.testing.assert_close(prepare_head(head)(far), truth, rtol=1e-9, atol=1e-9)
    assert folded < 2 * own + 1e-5


def _hooked(head: nn.Module) -> nn.Module:
    head.blocks[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    return head


def _rectified(head: nn.Module) -> nn.Module:
    head.blocks[0].layers[2] = nn.ReLU()
    return head


class _Doubled(MLPHead):
    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return 2 * super().forward(z, context)


@pytest.mark.parametrize(
    "head",
    [
        _hooked(MLPHead((3,), width=8)),
        _rectified(MLPHead((3,), width=8)),
        _Doubled((3,), width=8),
        MLPHead((3,), width=8, dropout=0.5),
        nn.Sequential(nn.Linear(3, 1), nn.Flatten(-2)),
    ],
    ids=["hook", "another module", "subclass", "dropout in training", "one's own"],
)
def test_a_head_that_is_more_than_its_weights_is_called_itself(
    head: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(head)
    if isinstance(head, nn.Sequential):
        linear = head[0]
        monkeypatch.setattr(head, "forward", lambda z, context=None: linear(z).squeeze(-1))
    z = torch.randn(50, 4, 3)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = head(z)
        torch.manual_seed(1)
        assert torch.equal(prepare_head(head)(z), expected)


def test_gradients_are_those_of_the_head() -> None:
    head, z = trained(MLPHead((3,), width=8)), torch.randn(50, 4, 3, requires_grad=True)
    (expected,) = torch.autograd.grad(head(z).sum(), z)
    (gradient,) = torch.autograd.grad(prepare_head(head)(z).sum(), z)
    assert torch.equal(gradient, expected)


def test_weights_are_read_anew_for_every_draw() -> None:
    prior = stir(ladder_prior(1, width=16))
    sampler, seen = partial(sir, num_proposals=300), []
    for _ in range(2):
        torch.manual_seed(1)
        seen.append(prior.sample(4, sampler).draws[0].log_mean_weight)
        with torch.no_grad():
            prior.heads[0].out.bias.add_(1.0)
    torch.testing.assert_close(seen[1], seen[0] + 1)


@pytest.mark.parametrize(
    "head",
    [
        MLPHead((6,), context_shape=(4,), width=16),
        ConvHead((6, 1, 1), context_shape=(4, 1, 1), width=16),
    ],
    ids=["vector", "map"],
)
def test_the_context_is_embedded_once_per_draw(head: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    trained(head)
    calls: list[int] = []
    embed = type(head.context).forward
    counted = lambda self, c: calls.append(len(c)) or embed(self, c)
    monkeypatch.setattr(type(head.context), "forward", counted)
    prior = Independent(Normal(torch.zeros(8, *head.event_shape), 1.0), len(head.event_shape))
    c = torch.randn(8, *head.config()["context_shape"])
    sir(prior, prepare_head(head, c), num_proposals=2000, chunk_size=64)
    assert len(calls) == 1


def test_wrong_shapes_are_refused_as_the_head_refuses_them() -> None:
    head = MLPHead((3,), context_shape=(2,), width=8)
    with torch.no_grad():
        for z, c, message in (
            (torch.randn(5, 4, 2), torch.randn(4, 2), "takes z of shape"),
            (torch.randn(5, 4, 3), torch.randn(3, 2), "same rows"),
            (torch.randn(5, 4, 3), torch.randn(4, 9), "made for a context"),
            (torch.randn(5, 4, 3), None, "made for a context"),
        ):
            with pytest.raises(ValueError, match=message):
                prepare_head(head, c)(z)
    with pytest.raises(ValueError, match="precision must be .* got torch.float16"):
        prepare_head(head, precision=torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(6,), (4, 8, 8)])
def test_heads_in_half_precision_keep_log_r_in_float32(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Of log r near 20, bfloat16 has steps of 0.125 nats."""
    head: Any = (MLPHead if len(shape) == 1 else ConvHead)(shape, width=16)
    torch.nn.init.normal_(head.out.weight)
    torch.nn.init.constant_(head.out.bias, 20.0)
    head = head.eval().to(dtype)
    z = torch.randn(20, 5, *shape)
    with torch.no_grad():
        found, expected = prepare_head(head)(z), head(z)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)


# --- bfloat16 ---


def kl_of_draws(log_r: Tensor, other: Tensor) -> float:
    """KL between the laws that SIR draws one of these proposals by, in nats."""
    log_w, log_v = (x.double().flatten().log_softmax(0) for x in (log_r, other))
    return float((log_w.exp() * (log_w - log_v)).sum())


def test_what_bfloat16_does_to_the_law_of_a_draw() -> None:
    """A head of 4 nats' spread: log r moves by hundredths, the law by less than 1e-3 nats.

    KL is half the variance of the error of log r, as far as the error is small.
    """
    head = trained(MLPHead((16,), width=256))
    z = torch.randn(4000, 4, 16)
    with torch.no_grad():
        log_r = head(z)
        head.rescale(4 / log_r.std().item(), 0.0)
        log_r, low = head(z), prepare_head(head, precision=torch.bfloat16)(z)
        in_whole = prepare_head(_hooked_nowhere(head), precision=torch.bfloat16)(z)
    error = low - log_r
    assert low.dtype == torch.float32
    assert 1e-3 < error.std() < 0.05
    assert 0 < kl_of_draws(log_r, low) < 1e-3
    # The stream in float32 is worth having: autocast alone rounds it at every step.
    assert error.std() < 0.7 * (in_whole - log_r).std()


def _hooked_nowhere(head: MLPHead) -> nn.Module:
    """The same head as a head of one's own."""
    own = nn.Module()
    own.head = head
    own.forward = head.forward
    return own


def test_bfloat16_is_asked_for_on_the_prior_and_moves_no_other_number() -> None:
    prior = stir(ladder_prior(2, width=16), 0.2)
    latents = [torch.randn(4, 2) for _ in range(2)]
    plain, sampler = prior.log_ratio(latents), partial(sir, num_proposals=500)
    torch.manual_seed(1)
    before = prior.sample(4, sampler).draws[0].log_mean_weight
    prior.precision = torch.bfloat16
    torch.manual_seed(1)
    after = prior.sample(4, sampler).draws[0].log_mean_weight
    assert before is not None
    assert after is not None
    assert 0 < (after - before).abs().max() < 0.02
    assert torch.equal(prior.log_ratio(latents), plain)


def test_autocast_outside_is_no_request() -> None:
    head, z = trained(MLPHead((3,), width=32)), torch.randn(50, 4, 3)
    with torch.no_grad():
        expected = prepare_head(head)(z)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(prepare_head(head)(z), expected)
            with at_precision("cpu", torch.float32):
                assert (z[0] @ z[0].mT).dtype == torch.float32


def test_the_mean_weight_of_draws_is_that_of_the_head() -> None:
    """Σ r / M is unbiased for Z = E_p r, whatever M is."""
    head, n, m = trained(MLPHead((2,), width=8)), 20_000, 20
    prior = Independent(Normal(torch.zeros(n, 2), 1.0), 1)
    draw = sir(prior, prepare_head(head), num_proposals=m)
    with torch.no_grad():
        log_r = head(torch.randn(200_000, 2)).double()
    assert draw.log_mean_weight is not None
    mean = draw.log_mean_weight.double().exp()
    truth = log_r.exp()
    error = math.sqrt(float(mean.var() / n + truth.var() / len(truth)))
    assert abs(mean.mean() - truth.mean()) < 4 * error


@pytest.mark.parametrize("make", [lambda: MLPHead((3,), width=32), lambda: ConvHead((3, 8, 8))])
def test_no_rows_have_no_log_r(make: Callable[[], Any]) -> None:
    head = trained(make())
    with torch.no_grad():
        assert prepare_head(head)(torch.zeros(5, 0, *head.event_shape)).shape == (5, 0)


def test_codes_are_embedded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of 32 × 32 codes and width 64 would need 1 GB for 4,096 of them."""
    head = CategoricalHead((4, 4), 5, width=8, depth=1, context_shape=(3,))
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(0.3 * torch.randn(p.shape))
    z, c = torch.randint(5, (50, 6, 4, 4)), torch.randn(6, 3)
    sizes: list[int] = []
    embed = head.embed
    monkeypatch.setattr(CategoricalHead, "embed", lambda _, z: sizes.append(len(z)) or embed(z))
    monkeypatch.setattr(fast, "_EMBEDDED", 4 * 6 * 8 * 16)
    with torch.no_grad():
        found = prepare_head(head, c)(z)
    assert max(sizes) == 4
    torch.testing.assert_close(found, head(z, c), rtol=1e-5, atol=1e-5)
