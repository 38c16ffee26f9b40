from __future__ import annotations

import copy
import math
import weakref
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from helpers.problems import CorrelatedPair, GaussianPair
from helpers.toys import Ladder, Rung, everything, flat, ladder_prior, same, stir, weights
from torch import Tensor, nn

from ncprior import Group, NCETrainer, NCPrior
from ncprior.heads.networks import MLPHead
from ncprior.utils.distributed import average_over_ranks


def sgd(prior: NCPrior, lr: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(prior.parameters(), lr)


def gradients(prior: NCPrior) -> list[Tensor]:
    return [p.grad.clone() for p in prior.parameters()]


# --- what a step does ---


def test_a_step_is_the_optimizer_step_of_the_summed_loss() -> None:
    """Group by group or in one backward, with dropout: the same gradients and weights."""
    x = torch.randn(32, 3)
    prior = stir(ladder_prior(dropout=0.3)).train()
    other = copy.deepcopy(prior)
    trainer = NCETrainer(prior, sgd(prior), max_grad_norm=None)
    torch.manual_seed(4)
    metrics = trainer.step(x)
    torch.manual_seed(4)
    losses = other(x)
    losses.sum().backward()
    assert torch.equal(metrics.loss, losses.detach())
    for ours, theirs in zip(gradients(prior), gradients(other), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    sgd(other).step()
    for ours, theirs in zip(prior.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    for k, head in enumerate(other.heads):
        norm = torch.stack([p.grad.norm() for p in head.parameters()]).norm()
        torch.testing.assert_close(metrics.grad_norm[k], norm)


def test_steps_do_not_accumulate_gradients() -> None:
    prior, x = stir(ladder_prior()), torch.randn(32, 3)
    trainer = NCETrainer(prior, sgd(prior, 0.0), max_grad_norm=None)
    seen = []
    for _ in range(2):
        torch.manual_seed(4)
        trainer.step(x)
        seen.append(gradients(prior))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))
    assert trainer.steps == 2


def test_metrics_are_per_group_and_detached() -> None:
    prior = ladder_prior()
    metrics = NCETrainer(prior, sgd(prior)).step(torch.randn(32, 3))
    assert metrics.loss.shape == metrics.grad_norm.shape == (3,)
    torch.testing.assert_close(metrics.loss, torch.full((3,), 2 * math.log(2)))
    assert (metrics.grad_norm > 0).all()
    assert not metrics.loss.requires_grad and not metrics.grad_norm.requires_grad


def test_the_gradient_of_every_head_is_clipped_by_itself() -> None:
    prior, x = stir(ladder_prior(), 2.0), torch.randn(32, 3)
    torch.manual_seed(4)
    NCETrainer(prior, sgd(prior, 0.0), max_grad_norm=None).step(x)
    free = [[p.grad.clone() for p in head.parameters()] for head in prior.heads]
    norms = torch.stack([torch.stack([g.norm() for g in head]).norm() for head in free])
    limit = norms.sort().values[1].item() * 1.0001  # one head above it, two below
    torch.manual_seed(4)
    metrics = NCETrainer(prior, sgd(prior, 0.0), max_grad_norm=limit).step(x)
    torch.testing.assert_close(metrics.grad_norm, norms)  # before clipping
    for head, before, norm in zip(prior.heads, free, norms.tolist(), strict=True):
        factor = min(1.0, limit / norm)
        for p, g in zip(head.parameters(), before, strict=True):
            torch.testing.assert_close(p.grad, factor * g, rtol=1e-4, atol=1e-9)


def test_noise_weight_is_used() -> None:
    prior, losses = ladder_prior(), []

    def backward(loss: Tensor) -> None:
        losses.append(loss.item())
        loss.backward()

    trainer = NCETrainer(prior, sgd(prior), backward=backward, noise_weight=3.0)
    reported = trainer.step(torch.randn(32, 3)).loss
    # log r = 0: softplus(log 3) + 3 softplus(-log 3) = log 4 + 3 log(4/3)
    assert losses == pytest.approx([math.log(4) + 3 * math.log(4 / 3)] * 3)
    torch.testing.assert_close(
        reported, torch.full((3,), 2 * math.log(2))
    )  # beside held-out losses


def test_another_backward_is_called_once_per_group() -> None:
    prior, seen = ladder_prior(), []

    def backward(loss: Tensor) -> None:
        grad = prior.heads[len(seen)].out.weight.grad
        seen.append((loss.shape, grad is not None and grad.any()))
        (2 * loss).backward()

    x = torch.randn(32, 3)
    torch.manual_seed(4)
    NCETrainer(prior, sgd(prior, 0.0), backward=backward, max_grad_norm=None).step(x)
    assert [shape for shape, _ in seen] == [(), (), ()]
    assert not any(reached for _, reached in seen)  # each loss is of a head not seen before
    doubled = gradients(prior)
    torch.manual_seed(4)
    NCETrainer(prior, sgd(prior, 0.0), max_grad_norm=None).step(x)
    for a, b in zip(doubled, gradients(prior), strict=True):
        torch.testing.assert_close(a, 2 * b)


class Kept:
    """A tensor that a graph keeps for its backward pass."""

    alive: ClassVar[weakref.WeakSet[Kept]] = weakref.WeakSet()

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.alive.add(self)


def test_the_graph_of_a_head_is_gone_before_the_next_is_made() -> None:
    prior, counts = ladder_prior(5), []
    for head in prior.heads:
        head.register_forward_pre_hook(lambda *_: counts.append(len(Kept.alive)))
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        NCETrainer(prior, sgd(prior)).step(torch.randn(8, 3))
        assert counts == [0] * 5
        counts.clear()
        losses = prior.nce_loss(torch.randn(8, 3))  # what it would be otherwise
        assert counts[0] == 0 and counts == sorted(set(counts))
        del losses


def test_training_recovers_an_exact_ratio() -> None:
    """log r = μ·z - KL of a Gaussian pair by a step loop of one's own."""
    problem = GaussianPair(kl=0.5)
    prior = NCPrior.for_source(problem.source(), problem.data(256), width=32, depth=1)
    optimizer = torch.optim.AdamW(prior.parameters(), 3e-3)
    trainer = NCETrainer(prior, optimizer)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / 300)
        trainer.step(problem.data(512))
    z = problem.target.sample((2000,))
    truth = problem.log_r(z)
    residual = prior.log_ratio([z])[:, 0].detach() - truth
    assert residual.var() / truth.var() < 0.05  # R² above 0.95


def test_the_second_group_learns_what_the_base_misses() -> None:
    problem = CorrelatedPair()
    prior = NCPrior.for_source(problem, problem.data(256), width=32, depth=1)
    trainer = NCETrainer(prior, torch.optim.AdamW(prior.parameters(), 3e-3))
    losses = torch.stack([trainer.step(problem.data(512)).loss for _ in range(200)])
    last = losses[-50:].mean(0)
    # L* = 2 log 2 - 2 JSD: nothing to learn in group 0; group 1 comes close to its least.
    assert abs(last[0].item() - 2 * math.log(2)) < 0.01
    least = 2 * math.log(2) - 2 * problem.jsd
    assert least - 0.02 < last[1].item() < least + 0.05


# --- only the heads ---


def test_only_the_heads_change() -> None:
    prior = stir(ladder_prior())
    source = prior.source
    source.decoder.weight.grad = torch.ones_like(source.decoder.weight)
    before, heads = everything(source), weights(prior)
    trainer = NCETrainer(prior, torch.optim.AdamW(prior.parameters()))
    for _ in range(3):
        trainer.step(torch.randn(16, 3))
    assert everything(source) == before
    assert not any(torch.equal(p, heads[name]) for name, p in prior.named_parameters())


def test_an_optimizer_of_other_parameters_is_refused() -> None:
    prior = ladder_prior()
    for extra in (list(prior.source.parameters()), [nn.Parameter(torch.zeros(1))]):
        optimizer = torch.optim.SGD([*prior.parameters(), *extra], 0.1)
        with pytest.raises(ValueError, match="not the heads'.*Make it from prior.parameters"):
            NCETrainer(prior, optimizer)
    two = torch.optim.SGD([{"params": prior.heads[0].parameters()}], 0.1)
    two.add_param_group({"params": prior.source.decoder.parameters()})
    with pytest.raises(ValueError, match="not the heads'"):
        NCETrainer(prior, two)


def test_some_heads_may_be_trained_alone() -> None:
    prior = stir(ladder_prior())
    before = weights(prior)
    trainer = NCETrainer(prior, torch.optim.SGD(prior.heads[1].parameters(), 0.1))
    trainer.step(torch.randn(16, 3))
    changed = {name for name, p in prior.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(name.startswith("heads.1.") for name in changed)


def test_gradients_of_heads_that_the_optimizer_has_not_do_not_pile_up() -> None:
    prior, x, norms = stir(ladder_prior()), torch.randn(16, 3), []
    trainer = NCETrainer(prior, torch.optim.SGD(prior.heads[1].parameters(), 0.0))
    for _ in range(3):
        torch.manual_seed(4)
        norms.append(trainer.step(x).grad_norm)
    torch.testing.assert_close(norms[1], norms[0])
    torch.testing.assert_close(norms[2], norms[0])


def test_a_head_without_gradients_is_no_obstacle() -> None:
    """A frozen head, or an exact one without parameters, has a loss and nothing to train."""
    prior = stir(ladder_prior())
    prior.heads[1].requires_grad_(False)
    before = weights(prior)
    metrics = NCETrainer(prior, sgd(prior)).step(torch.randn(16, 3))
    assert metrics.loss.isfinite().all()
    assert metrics.grad_norm[1] == 0
    assert same(weights(prior.heads[1]), {n[8:]: t for n, t in before.items() if n[6] == "1"})


# --- non-finite ---


class Poisoned(Ladder):
    """A source whose posterior of group 1 is not finite for x above 100."""

    def group(self, state: Rung) -> Group:
        group = super().group(state)
        if state.encoding is None or len(state.latents) != 1 or not self.poison:
            return group
        q = group.posterior
        bad = type(q.base_dist)(torch.full_like(q.mean, torch.nan), q.stddev, validate_args=False)
        return group._replace(posterior=type(q)(bad, 1, validate_args=False))

    poison = False


def test_a_non_finite_loss_names_group_and_step_and_leaves_the_heads() -> None:
    prior = ladder_prior()
    prior = stir(NCPrior(Poisoned(), prior.heads))
    optimizer = torch.optim.AdamW(prior.parameters())
    trainer = NCETrainer(prior, optimizer)
    for _ in range(2):
        trainer.step(torch.randn(16, 3))
    before, moments = weights(prior), copy.deepcopy(optimizer.state_dict()["state"])
    prior.source.poison = True
    with pytest.raises(FloatingPointError, match=r"loss of group 1 is nan .* at step 2\b"):
        trainer.step(torch.randn(16, 3))
    assert same(weights(prior), before)
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[i][n], moments[i][n]) for i in moments for n in moments[i])
    assert all(p.grad is None for p in prior.parameters())
    assert trainer.steps == 2
    prior.source.poison = False
    assert trainer.step(torch.randn(16, 3)).loss.isfinite().all()


def test_an_infinite_gradient_is_refused_too() -> None:
    prior = ladder_prior()

    def backward(loss: Tensor) -> None:
        loss.backward()
        if prior.heads[2].out.weight.grad is not None:
            prior.heads[2].out.weight.grad[0, 0] = torch.inf

    before = weights(prior)
    trainer = NCETrainer(prior, sgd(prior), backward=backward)
    with pytest.raises(FloatingPointError, match="group 2 is 1.386 with a gradient norm of inf"):
        trainer.step(torch.randn(16, 3))
    assert same(weights(prior), before)


def test_a_bad_noise_weight_is_refused() -> None:
    prior = ladder_prior()
    with pytest.raises(ValueError, match=r"noise_weight must be a number in \(0, inf\)"):
        NCETrainer(prior, sgd(prior), noise_weight=0.0)


def test_without_a_process_group_the_average_is_the_tensor() -> None:
    t = torch.randn(3)
    assert average_over_ranks(t) is t


def test_a_batch_is_what_the_loader_yields() -> None:
    prior = NCPrior(flat(), MLPHead((2,), width=8))
    trainer = NCETrainer(prior, sgd(prior))
    for batch in (torch.randn(1, 3), (torch.randn(8, 3), torch.arange(8)), [torch.randn(8, 3)]):
        assert trainer.step(batch).loss.shape == (1,)


def test_training_under_autocast() -> None:
    prior = stir(ladder_prior())
    trainer = NCETrainer(prior, sgd(prior))
    with torch.autocast("cpu", torch.bfloat16):
        metrics = trainer.step(torch.randn(16, 3))
    assert metrics.loss.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in prior.parameters())


def test_several_draws_are_of_one_walk_and_average() -> None:
    """The loss of n draws has its mean where one has, and less scatter; the VAE walks once."""
    problem = CorrelatedPair()
    prior, x = NCPrior(problem, problem.heads()), problem.data(50)
    calls = []
    encode = problem.encode
    object.__setattr__(problem, "encode", lambda x: calls.append(1) or encode(x))
    losses = {}
    for n in (1, 16):
        calls.clear()
        losses[n] = torch.stack([prior.nce_loss(x, num_draws=n) for _ in range(300)])
        assert len(calls) == 300
    exact = 2 * math.log(2) - 2 * problem.jsd
    for n in (1, 16):
        error = losses[n][:, 1].std() / 300**0.5
        # x is given: what is left of its own scatter is shared by all of them.
        assert abs(losses[n][:, 1].mean() - losses[1][:, 1].mean()) < 5 * error + 0.01
    assert losses[16][:, 1].std() < 0.7 * losses[1][:, 1].std()
    assert abs(losses[16][:, 1].mean() - exact) < 0.2


def test_one_draw_is_the_same_with_or_without_saying_so() -> None:
    problem = CorrelatedPair()
    prior, x = NCPrior(problem, problem.heads()), problem.data(50)
    torch.manual_seed(0)
    said = prior.nce_loss(x, num_draws=1)
    torch.manual_seed(0)
    assert torch.equal(prior.nce_loss(x), said)


def test_no_draws_are_refused() -> None:
    prior = ladder_prior()
    with pytest.raises(ValueError, match=r"num_draws must be a whole number in \[1, inf\); got 0"):
        NCETrainer(prior, torch.optim.SGD(prior.parameters(), 0.1), num_draws=0)


# --- what is validated ---


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("precision", torch.float16),
        ("precision", "bf16"),
        ("precision", None),
        ("max_grad_norm", -1.0),
        ("max_grad_norm", math.nan),
        ("noise_weight", math.nan),
        ("num_draws", 1.5),
        ("group_parallel", "yes"),
        ("backward", None),
    ],
)
def test_F17_F26_settings_without_effect_or_with_a_wrong_one_are_refused(
    name: str, value: Any
) -> None:
    prior = ladder_prior()
    with pytest.raises((TypeError, ValueError), match=f"{name} must be "):
        NCETrainer(prior, sgd(prior), **{name: value})


def test_F35_F36_what_is_no_prior_or_optimizer_is_refused() -> None:
    prior = ladder_prior()
    for wrong in (prior.source, prior.heads, NCPrior, None):
        with pytest.raises(TypeError, match="prior must be of type NCPrior.*for_source"):
            NCETrainer(wrong, sgd(prior))
    with pytest.raises(TypeError, match="optimizer must be of type Optimizer"):
        NCETrainer(prior, prior.parameters())


def test_M7_a_prior_in_data_parallel_is_refused() -> None:
    prior = ladder_prior()
    with pytest.raises(TypeError, match=r"not DataParallel\(prior\).*Pass prior.module"):
        NCETrainer(nn.DataParallel(prior), sgd(prior))


def test_M7_heads_in_half_precision_are_refused() -> None:
    prior = ladder_prior().half()
    with pytest.raises(ValueError, match="float32 or better"):
        NCETrainer(prior, sgd(prior))


def test_W2_frozen_heads_are_refused() -> None:
    prior = ladder_prior()
    optimizer = sgd(prior)
    prior.requires_grad_(False)
    with pytest.raises(ValueError, match=r"Call prior.requires_grad_\(True\)"):
        NCETrainer(prior, optimizer)


def test_F3_a_head_frozen_in_parts_by_no_grad_is_named() -> None:
    """Group 1 detaches log r: its loss has no gradient, though it has parameters."""
    prior = stir(ladder_prior())
    prior.heads[1].register_forward_hook(lambda *args: args[2].detach())
    before = weights(prior)
    with pytest.raises(ValueError, match="loss of group 1 has no gradient"):
        NCETrainer(prior, torch.optim.AdamW(prior.parameters())).step(torch.randn(16, 3))
    assert same(weights(prior), before)


def test_groups_are_divided_among_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    prior = ladder_prior(5)
    monkeypatch.setattr("ncprior.trainer.num_ranks", lambda: 3)
    groups = []
    for rank in range(3):
        monkeypatch.setattr("ncprior.trainer.rank", lambda rank=rank: rank)
        groups.append(NCETrainer(prior, sgd(prior), group_parallel=True).groups)
    assert groups == [[0, 3], [1, 4], [2]]
    assert NCETrainer(prior, sgd(prior)).groups == [0, 1, 2, 3, 4]


def test_heads_of_other_ranks_are_not_moved_by_old_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prior = ladder_prior(2)
    x = torch.randn(20, 3)
    NCETrainer(prior, sgd(prior)).step(x)
    monkeypatch.setattr("ncprior.trainer.num_ranks", lambda: 2)
    monkeypatch.setattr("ncprior.trainer.rank", lambda: 0)
    monkeypatch.setattr("ncprior.trainer.sum_over_ranks", lambda t: t)
    trainer = NCETrainer(prior, sgd(prior), group_parallel=True)
    before = weights(prior.heads[1])
    norms = trainer.step(x).grad_norm
    assert trainer.groups == [0] and norms[0] > 0 and norms[1] == 0
    assert same(weights(prior.heads[1]), before)


def test_F26_an_empty_batch_is_refused() -> None:
    prior = ladder_prior()
    with pytest.raises(ValueError, match="A batch must have 1 or more rows; got 0"):
        NCETrainer(prior, sgd(prior)).step(torch.randn(0, 3))


def test_only_groups_of_the_prior_have_an_owner() -> None:
    prior = ladder_prior(2)
    trainer = NCETrainer(prior, torch.optim.AdamW(prior.parameters()), group_parallel=True)
    assert [trainer.owner(k) for k in (0, 1)] == [0, 0]
    for k, error in ((2, ValueError), (-1, ValueError), (0.5, TypeError)):
        with pytest.raises(error, match=r"k must be a whole number in \[0, 1\]"):
            trainer.owner(k)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"gradient_state": SimpleNamespace(num_steps=4)}, "accumulates gradients over 4 batches"),
        ({"scaler": object()}, "mixed_precision='fp16'"),
    ],
)
def test_optimizers_that_accumulate_or_scale_are_refused(state: Any, message: str) -> None:
    """Accelerate's would leave out all steps but every fourth, or clip scaled gradients."""
    prior = ladder_prior()
    optimizer = sgd(prior)
    for name, value in state.items():
        setattr(optimizer, name, value)
    with pytest.raises(ValueError, match=message):
        NCETrainer(prior, optimizer)


def test_accelerates_own_optimizer_that_accumulates_is_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    prior = ladder_prior()
    for steps in (1, 4):
        accelerator = accelerate.Accelerator(gradient_accumulation_steps=steps, cpu=True)
        optimizer = accelerator.prepare(sgd(prior))
        if steps == 1:
            NCETrainer(prior, optimizer, backward=accelerator.backward)
            continue
        with pytest.raises(ValueError, match="accumulates gradients over 4 batches"):
            NCETrainer(prior, optimizer, backward=accelerator.backward)
