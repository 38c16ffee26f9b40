"""Frequencies and networks over codes: exact probabilities, exact draws, saving, errors."""

from __future__ import annotations

import itertools
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Independent

from ncprior.bases.code_network import CodeNetwork, fit_code_network
from ncprior.bases.codes import CodeFrequencies, NoCodePrior, fit_code_frequencies
from ncprior.bases.masked_conv import MaskedConvNet
from ncprior.distributions import num_categories_of

SHAPES: tuple[tuple[int, ...], ...] = ((), (5,), (3, 4), (2, 3, 3))


def moved(net: MaskedConvNet) -> MaskedConvNet:
    """A network whose every parameter has been moved."""
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return net.eval()


def small(event: tuple[int, ...], context: tuple[int, ...] | None = None) -> MaskedConvNet:
    sizes = {"width": 8, "depth": 2, "kernel_size": 3}
    return moved(MaskedConvNet(event, 7, context_shape=context, **sizes))


def all_codes(count: int, places: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(count), repeat=places)))


# --- frequencies


def test_frequencies_are_shares_with_pseudo_counts() -> None:
    """Two places, four rows: the leave-one-out likelihood is compared by hand."""
    codes = torch.tensor([[0, 1], [0, 1], [0, 1], [1, 1]])
    base = fit_code_frequencies(codes, num_categories=3)
    pooled = torch.tensor([4.0, 6.0, 1.0]) / 11  # (3 + 5 + 0 of 8, plus one each)
    counts = torch.tensor([[3.0, 1, 0], [0, 4, 0]])
    fits = {}
    for pseudo in (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0):
        left = [
            ((counts[i, codes[n, i]] - 1 + pseudo * pooled[codes[n, i]]) / (3 + pseudo)).log()
            for n in range(4)
            for i in range(2)
        ]
        fits[sum(left).item()] = (counts + pseudo * pooled) / (4 + pseudo)
    torch.testing.assert_close(base.logits.exp(), fits[max(fits)])


@pytest.mark.parametrize("shape", SHAPES)
def test_frequencies_are_a_distribution_of_independent_codes(shape: tuple[int, ...]) -> None:
    logits = torch.randn(*shape, 7)
    base, known = CodeFrequencies(logits), Independent(Categorical(logits=logits), len(shape))
    z = base.expand((3,)).sample((5,))
    assert z.shape == (5, 3, *shape)
    torch.testing.assert_close(base.log_prob(z), known.log_prob(z))
    assert base.num_categories == num_categories_of(base.expand((3,))) == 7
    assert base.support.is_discrete
    assert base.sample((0,)).shape == (0, *shape)


def test_frequencies_are_drawn_as_often_as_they_say() -> None:
    base, n = CodeFrequencies(torch.randn(2, 3)), 20_000
    z = base.sample((n,))
    for place, p in enumerate(base.logits.softmax(-1)):
        shares = z[:, place].bincount(minlength=3) / n
        assert ((shares - p).abs() < 4 * (p * (1 - p) / n).sqrt()).all()


# --- network


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_depend_on_the_codes_before_alone(shape: tuple[int, ...]) -> None:
    net, z = small(shape), torch.randint(7, (4, *shape))
    logits, places = net(z).flatten(1, -2) if shape else net(z)[:, None], z[0].numel()
    for place in range(places):
        other = z.clone().reshape(4, -1)
        other[:, place:] = torch.randint(7, (4, places - place))
        changed = net(other.reshape(z.shape))
        changed = changed.flatten(1, -2) if shape else changed[:, None]
        torch.testing.assert_close(changed[:, : place + 1], logits[:, : place + 1])


def test_a_large_enough_window_sees_every_code_before() -> None:
    net, z = moved(MaskedConvNet((3, 4), 7, width=8, depth=1, kernel_size=7)), torch.zeros(1, 3, 4)
    z = z.long()
    for place in range(11):
        other = z.clone()
        other.view(-1)[place] = 3
        last = [net(codes).flatten(1, -2)[0, place + 1 :] for codes in (z, other)]
        assert ((last[0] - last[1]).abs().amax(1) > 0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("context", (None, "vector", "map"))
def test_draws_use_the_probabilities_of_the_whole_grid(
    shape: tuple[int, ...], context: str | None
) -> None:
    """Place by place, the probabilities are those of a pass over all codes that are drawn."""
    form = {None: None, "vector": (6,), "map": (2, *(shape or (1,)))}[context]
    net = small(shape, form)
    c = None if form is None else torch.randn(3, *form)
    seen: list[Tensor] = []

    def multinomial(p: Tensor, count: int) -> Tensor:
        seen.append(p)
        return p.multinomial(count)

    with patch("torch.multinomial", multinomial):
        z = net.draw(2, c)
    rows = 1 if c is None else 3
    assert z.shape == (2, rows, *shape)
    c = None if c is None else c.repeat(2, *[1] * (c.ndim - 1))
    p = net(z.flatten(0, 1), c).softmax(-1).reshape(2 * rows, -1, 7)
    torch.testing.assert_close(torch.stack(seen, 1), p)


def test_probabilities_of_all_grids_sum_to_one() -> None:
    net = moved(MaskedConvNet((2, 2), 3, width=8, depth=1, kernel_size=3))
    base, z = CodeNetwork(net), all_codes(3, 4).reshape(-1, 2, 2)
    log_p = base.log_prob(z)
    torch.testing.assert_close(log_p.exp().sum(), torch.tensor(1.0))
    n = 20_000
    drawn = base.sample((n,)).flatten(1) @ torch.tensor([27, 9, 3, 1])
    p = log_p.exp()
    shares = drawn.bincount(minlength=81) / n
    assert ((shares - p).abs() < 4.5 * (p * (1 - p) / n).sqrt() + 2 / n).all()


def test_rows_of_contexts_have_their_own_probabilities() -> None:
    base = CodeNetwork(small((2, 2), (3,)))
    c = torch.randn(4, 3)
    given = base.given(c)
    z = given.sample((5,))
    assert z.shape == (5, 4, 2, 2)
    alone = torch.stack(
        [base.given(c[b : b + 1]).log_prob(z[:, b : b + 1])[:, 0] for b in range(4)], 1
    )
    torch.testing.assert_close(given.log_prob(z), alone)
    assert given.expand((4,)) is given
    assert given.sample((0,)).shape == (0, 4, 2, 2)


def test_a_fitted_network_finds_dependence() -> None:
    """Codes that repeat their left neighbour: log 4 nats for the first, and little for the rest."""
    torch.manual_seed(0)
    z = torch.randint(4, (2000, 3, 1)).repeat(1, 1, 4)
    options: dict[str, Any] = {"width": 16, "depth": 1, "steps": 300, "progress": False}
    base = fit_code_network(z, **options)
    exact = 3 * torch.tensor(4.0).log()
    assert exact - 0.1 < -base.log_prob(z).mean() < exact + 0.5
    assert -fit_code_frequencies(z).log_prob(z).mean() > 3.9 * exact
    with_rows = fit_code_network(z, context=z[:, :, 0].float(), **options)
    assert with_rows.needs_context
    assert -with_rows.given(z[:, :, 0].float()).log_prob(z).mean() < exact / 2
    by_number = fit_code_network(z, context=lambda rows: z[rows, :, 0].float(), **options)
    assert -by_number.given(z[:, :, 0].float()).log_prob(z).mean() < exact / 2


@pytest.mark.parametrize(
    "base", [CodeFrequencies(torch.randn(2, 3, 5)), CodeNetwork(small((2, 3)))]
)
def test_bases_are_rebuilt_from_their_tensors(base: Any) -> None:
    again = type(base).rebuild(base.tensors(), base.config())
    z = base.sample((6,))
    assert torch.equal(again.log_prob(z), base.log_prob(z))
    assert torch.equal(base.to("cpu").log_prob(z), base.log_prob(z))
    with pytest.raises((KeyError, TypeError, ValueError)):
        type(base).rebuild({}, base.config())


# --- errors


@pytest.mark.parametrize("fit", (fit_code_frequencies, fit_code_network))
def test_codes_that_are_none_are_refused(fit: Any) -> None:
    options = {} if fit is fit_code_frequencies else {"steps": 0, "width": 8}
    with pytest.raises(
        TypeError, match=r"codes must be whole numbers; got a tensor of float32.*latents_of"
    ):
        fit(torch.randn(5, 2), **options)
    with pytest.raises(
        ValueError, match=r"from 0 to num_categories - 1 = 2; got codes from 1 to 3"
    ):
        fit(torch.tensor([[1], [3]]), num_categories=3, **options)
    with pytest.raises(ValueError, match=r"got codes from -1 to 0"):
        fit([[-1], [0]], **options)
    with pytest.raises(ValueError, match="2 or more rows"):
        fit(torch.zeros(1, 2).long(), **options)
    with pytest.raises(TypeError, match="num_categories must be a whole number"):
        fit([[1], [0]], num_categories=2.0, **options)


@pytest.mark.parametrize("base", [CodeFrequencies(torch.randn(3, 5)), CodeNetwork(small((3,)))])
def test_values_that_are_no_codes_are_refused(base: Any) -> None:
    with pytest.raises(TypeError, match="codes, whole numbers; got a tensor of float32"):
        base.log_prob(torch.zeros(3))
    with pytest.raises(ValueError, match=r"event shape \(3,\); got \(2,\)"):
        base.log_prob(torch.zeros(2).long())
    for wrong in (-1, base.num_categories):
        with pytest.raises(ValueError, match=r"must be codes from 0 to .*; got others"):
            base.log_prob(torch.full((3,), wrong))


def test_contexts_that_do_not_fit_are_refused() -> None:
    base, c = CodeNetwork(small((3,), (2,))), torch.randn(4, 2)
    for wrong in (None, torch.randn(4, 3)):
        with pytest.raises(
            ValueError, match=r"context of shape \(B, ...\) with ... = \(2,\); got"
        ):
            base.given(wrong)
    with pytest.raises(TypeError, match="context must be a tensor"):
        base.given([1.0])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="takes a context; got none"):
        base.sample()
    with pytest.raises(ValueError, match="row for each of the 4 contexts; got"):
        base.given(c).log_prob(torch.zeros(5, 3).long())
    with pytest.raises(ValueError, match="the 4 rows of its context; got a batch shape"):
        base.given(c).expand((5,))
    with pytest.raises(ValueError, match="one row for each row of latents; got 4 rows for 6"):
        fit_code_network(torch.zeros(6, 3).long(), context=c)


def test_sizes_that_cannot_be_are_refused() -> None:
    for shape, kernel in (((2, 2, 2, 2), 3), ((2,), 4)):
        with pytest.raises(ValueError, match="up to three axes and an odd kernel_size; got"):
            MaskedConvNet(shape, 5, kernel_size=kernel)
    with pytest.raises(TypeError, match="network must be of type MaskedConvNet"):
        CodeNetwork(nn.Linear(1, 1))  # type: ignore[arg-type]
    for wrong in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(
            ValueError, match=r"numbers of shape \(\*event, V\), one of each place"
        ):
            CodeFrequencies(torch.full((2, 3), wrong))
    with pytest.raises(ValueError, match=r"no prior. Fit one: rebase\(source, fit_code_bases"):
        NoCodePrior(5).sample()
