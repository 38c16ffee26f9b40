"""Heads at once are the heads in turn."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.head_cases import trained
from helpers.problems import ExactRatio
from helpers.toys import Ladder, ladder_prior, stir
from torch import Tensor, nn

from ncprior import NCETrainer, NCPrior, fit
from ncprior.heads import stacked as batched_module
from ncprior.heads.networks import CategoricalHead, ConvHead, MLPHead
from ncprior.heads.stacked import log_ratios
from ncprior.source import contrastive_pairs
from ncprior.training import FitSettings


def many() -> tuple[list[nn.Module], list[tuple[Tensor, Tensor | None]]]:
    """Heads of several shapes, in no order, some of them alone."""
    c = torch.randn(4, 3)
    heads: list[Any] = [
        (MLPHead((2,), width=8), torch.randn(2, 5, 4, 2), None),
        (MLPHead((2,), context_shape=(3,), width=8), torch.randn(2, 5, 4, 2), c),
        (ConvHead((2, 4, 4), context_shape=(3,), width=8), torch.randn(2, 5, 4, 2, 4, 4), c),
        (MLPHead((2,), width=8), torch.randn(2, 5, 4, 2), None),
        (ExactRatio(lambda z: 2 * z.sum(-1)), torch.randn(2, 5, 4, 2), None),
        (ExactRatio(lambda z: 3 * z.sum(-1)), torch.randn(2, 5, 4, 2), None),
        (ConvHead((2, 4, 4), context_shape=(3,), width=8), torch.randn(2, 5, 4, 2, 4, 4), 2 * c),
        (MLPHead((2,), width=16), torch.randn(2, 5, 4, 2), None),
        (CategoricalHead((), 7, width=8), torch.randint(7, (2, 5, 4)), None),
        (CategoricalHead((), 7, width=8), torch.randint(7, (2, 5, 4)), None),
        (MLPHead((2,), context_shape=(3,), width=8), torch.randn(2, 5, 4, 2), -c),
    ]
    for head, z, _ in heads:
        if hasattr(head, "fit_scale") and z.is_floating_point():
            head.fit_scale(z[0, 0] * torch.rand(()) + torch.rand(()), None)
    return [trained(head) for head, _, _ in heads], [(z, c) for _, z, c in heads]


def test_log_ratios_and_gradients_are_those_of_the_heads() -> None:
    heads, pairs = many()
    expected = [head(z, c) for head, (z, c) in zip(heads, pairs, strict=True)]
    sum(log_r.square().sum() for log_r in expected).backward()
    gradients = [p.grad.clone() for head in heads for p in head.parameters()]
    for head in heads:
        head.zero_grad()
    found = log_ratios(heads, pairs)
    sum(log_r.square().sum() for log_r in found).backward()
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    for one, two in zip(
        [p.grad for head in heads for p in head.parameters()], gradients, strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4 * two.abs().max().item())


def test_heads_of_one_shape_are_one_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, together = [], batched_module._together
    monkeypatch.setattr(
        batched_module, "_together", lambda h, c: sizes.append(len(h)) or together(h, c)
    )
    log_ratios(*many())
    assert sizes == [2, 2, 2, 2]


def test_a_head_in_training_is_not_thrown_in_with_one_that_is_not() -> None:
    heads = [trained(MLPHead((2,), width=64, dropout=0.5)) for _ in range(3)]
    heads[2].eval()
    z = torch.randn(100, 4, 2)
    pairs = [(z, None)] * 3
    first, second = log_ratios(heads, pairs), log_ratios(heads, pairs)
    assert not torch.equal(first[0], second[0])
    torch.testing.assert_close(first[2], heads[2](z))
    # Dropout is drawn for every head by itself.
    twins = [heads[0], copy.deepcopy(heads[0])]
    one, two = log_ratios(twins, pairs[:2])
    assert not torch.allclose(one, two)


def test_a_step_at_once_is_the_step_in_turn() -> None:
    x, weights = torch.randn(32, 3), []
    for batched in (False, True):
        torch.manual_seed(3)
        prior = stir(ladder_prior(3))
        optimizer = torch.optim.SGD(prior.parameters(), 0.1)
        trainer = NCETrainer(prior, optimizer, num_draws=2, batched=batched)
        metrics = [trainer.step(x) for _ in range(5)]
        weights.append(torch.cat([p.detach().flatten() for p in prior.parameters()]))
        weights.append(torch.stack([part for m in metrics for part in m]))
    torch.testing.assert_close(weights[0], weights[2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights[1], weights[3], rtol=1e-5, atol=1e-5)


def test_fit_at_once_in_bfloat16() -> None:
    prior, x = ladder_prior(3), torch.randn(1300, 3)
    history = fit(
        *(prior, x),
        steps=100,
        learning_rate=1e-2,
        batch_size=64,
        settings=FitSettings(batched=True, precision=torch.bfloat16),
        progress=False,
    )
    assert history.best_loss is not None
    assert max(history.best_loss) < 1.3863


def test_a_wrapped_source_gives_the_same_contrasts() -> None:
    source, x = Ladder(2), torch.randn(8, 3)
    prior = NCPrior(source, ladder_prior(2).heads)
    pairs = list(contrastive_pairs(source, x, 3))
    assert [z.shape for z, _ in pairs] == [(2, 3, 8, 2)] * 2
    assert len(log_ratios(list(prior.heads), pairs)) == 2


def _other_norm(head: Any) -> None:
    head.norm = nn.Identity()


def _hook(head: Any) -> None:
    head.register_forward_hook(lambda module, inputs, output: 2 * output)


@pytest.mark.parametrize("change", [_other_norm, _hook], ids=["another module", "a hook"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_head_that_is_no_longer_as_made_is_called_itself(which: int, change: Any) -> None:
    heads = [trained(MLPHead((2,), width=8)) for _ in range(3)]
    change(heads[which])
    pairs = [(torch.randn(2, 5, 4, 2), None) for _ in heads]
    expected = [head(z) for head, (z, _) in zip(heads, pairs, strict=True)]
    for one, two in zip(log_ratios(heads, pairs), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
