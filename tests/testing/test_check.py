"""`check_source` on sources that are right in unusual ways, and wrong in ways that were not seen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.toys import VAE, Ladder, base
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal

from ncprior import Group, SingleGroup
from ncprior.testing import check_source

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(1))


def near(x: Tensor) -> Independent:
    return Independent(Normal(x[:, :2], 0.1, validate_args=False), 1)


def test_N5_a_decoder_that_gives_tokens_is_right() -> None:
    source = SingleGroup(base(), near, lambda z: (z @ torch.ones(2, 5)).round().long())
    check_source(source, X)


def test_N5_a_decoder_that_detaches_is_still_wrong() -> None:
    source = SingleGroup(base(), near, lambda z: (z @ torch.ones(2, 5)).detach())
    with pytest.raises(AssertionError, match="no gradient reaches z"):
        check_source(source, X)


def test_draws_of_a_likelihood_look_like_x() -> None:
    decoder = nn.Linear(2, 5).eval()

    class Transposed(Independent):
        def sample(self, sample_shape: Any = ()) -> Tensor:
            return super().sample(sample_shape).mT

    for kind, wrong in ((Independent, False), (Transposed, True)):
        source = SingleGroup(
            base(), near, decoder, likelihood=lambda z, kind=kind: kind(Normal(decoder(z), 1.0), 1)
        )
        if wrong:
            with pytest.raises(AssertionError, match=r"shape of x, \(8, 5\); got \(5, 8\)"):
                check_source(source, X)
        else:
            check_source(source, X)


def test_D4_an_encoder_that_draws_is_not_said_to_use_batch_statistics() -> None:
    class Bottom(Ladder):
        """Draws a latent bottom-up, before the order of the prior."""

        def encode(self, x: Any) -> Tensor:
            return super().encode(x + torch.randn_like(x))

    check_source(Bottom(2, features=5), X)


def test_D4_batch_statistics_are_still_seen() -> None:
    source = SingleGroup(base(), lambda x: near(x - x.mean(0)), nn.Linear(2, 5).eval())
    with pytest.raises(AssertionError, match="no batch statistics"):
        check_source(source, X)


def test_D1_numbers_for_codes_raise() -> None:
    codes = Categorical(logits=torch.zeros(8, 4), validate_args=False)
    p = Normal(torch.zeros(()), torch.ones(()), validate_args=False)
    source = SingleGroup(
        p, lambda x: codes.expand((len(x),)), lambda z: nn.functional.one_hot(z, 4)
    )
    with pytest.raises(
        AssertionError, match=r"Group 0: prior and posterior .*float32.*int64.*codes"
    ):
        check_source(source, X)


def test_D1_a_draw_of_the_base_is_decoded() -> None:
    def decode(z: Tensor) -> Tensor:
        if (z.abs() > 50).any():
            raise IndexError("index out of range in self")
        return z @ torch.ones(2, 5)

    far = Independent(Normal(torch.full((2,), 100.0), torch.ones(2), validate_args=False), 1)
    with pytest.raises(
        AssertionError, match=r"decode\(state\) fails for draws of the prior.*out of range"
    ):
        check_source(SingleGroup(far, near, decode), X)


@pytest.mark.parametrize("draw", [np.random.rand, lambda: torch.rand(())])
def test_G_S4_draws_of_any_generator_are_seen(draw: Any) -> None:
    class Draws(SingleGroup):
        def group(self, state: Any) -> Group:
            draw()
            return super().group(state)

    with pytest.raises(AssertionError, match=r"group\(state\) draws"):
        check_source(Draws(base(), near, nn.Linear(2, 5).eval()), X)


def test_G_S4_generators_are_left_as_they_were() -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(2), np.random.rand(2)
    torch.manual_seed(3)
    np.random.seed(3)
    check_source(SingleGroup(base(), near, nn.Linear(2, 5).eval()), X.numpy())
    drawn = torch.rand(2), np.random.rand(2)
    # The layer has drawn its weights; only NumPy's numbers are the same.
    assert np.array_equal(drawn[1], expected[1])


def test_convolutions_are_compared_without_tf32() -> None:
    cudnn, seen = torch.backends.cudnn, set()
    vae = VAE(features=5)

    def decode(z: Tensor) -> Tensor:
        seen.add((cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark))
        return vae.decode(z)

    before = cudnn.enabled, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark
    check_source(SingleGroup(base(), near, decode), X)
    assert seen == {(False, True, False)}
    assert (cudnn.enabled, cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark) == before


@pytest.mark.parametrize("x", [None, "x", 3])
def test_F36_what_is_no_batch_raises(x: Any) -> None:
    with pytest.raises(TypeError, match="x must be one batch"):
        check_source(SingleGroup(base(), near, nn.Linear(2, 5).eval()), x)
