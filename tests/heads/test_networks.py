from __future__ import annotations

import json
import math

import pytest
import torch
from helpers.head_cases import CASES, CODES, ROWS, Case, trained
from helpers.problems import SampleOnly
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    Normal,
    OneHotCategorical,
    Uniform,
)

from ncprior import Group
from ncprior.heads.codes import CategoricalHead
from ncprior.heads.make import make_head
from ncprior.heads.networks import ConvHead, MLPHead


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def test_log_r_starts_at_exactly_zero_and_can_learn(case: Case) -> None:
    head, z, c = case.make(), case.z(4), case.c()
    log_r = head(z, c)
    assert log_r.shape == (4, ROWS)
    assert log_r.dtype == torch.float32
    assert (log_r == 0).all()
    assert (head(100 * z if z.is_floating_point() else z, c) == 0).all()
    (z_new, optimizer) = case.z(4), torch.optim.SGD(head.parameters(), 0.1)
    for _ in range(2):  # the last layer first, then everything before it
        optimizer.zero_grad()
        (head(z, c) - head(z_new, c)).sum().backward()
        optimizer.step()
    assert all(p.grad is not None for p in head.parameters())
    assert head(z, c).std() > 0


def test_shapes_of_any_number_of_leading_axes(case: Case) -> None:
    head, c = trained(case.make()), case.c()
    z = case.z(2, 5)
    log_r = head(z, c)
    assert log_r.shape == (2, 5, ROWS)
    torch.testing.assert_close(log_r[1, 2], head(z[1, 2], c), rtol=1e-4, atol=1e-5)


def test_a_ratio_does_not_depend_on_its_company(case: Case) -> None:
    head, c = trained(case.make()), case.c()
    z = case.z(8)
    together = head(z, c)
    scale = together.abs().max()
    for row in range(ROWS):
        alone = head(z[:1, row : row + 1], None if c is None else c[row : row + 1])
        assert (alone[0, 0] - together[0, row]).abs() <= 1e-6 * (1 + scale)
    if not case.codes:
        crowd = torch.cat([z[:1], 1e3 * z[1:]])
        assert (head(crowd, c)[0] - together[0]).abs().max() <= 1e-6 * (1 + scale)
    head.train()
    assert (head(z, c)[0] - together[0]).abs().max() <= 1e-6 * (1 + scale)


def test_log_r_changes_with_z_and_context(case: Case) -> None:
    head = trained(case.make())
    c = case.c()
    assert head(case.z(64), c).std(0).min() > 1e-3
    if c is not None:
        z = case.z(1)
        others = torch.stack([head(z, case.c())[0] for _ in range(64)])
        assert others.std(0).min() > 1e-3


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("width", [8, 16])
def test_a_narrow_head_of_small_maps_is_no_constant(size: int, width: int) -> None:
    """Group normalisation of single values would return its bias, whatever z is."""
    head = trained(ConvHead((4, size, size), width=width))
    assert head(torch.randn(256, 4, size, size)).std() > 0.05
    assert head(torch.randn(1, 4, size, size)).shape == (1,)


def test_the_context_is_embedded_once_and_broadcast(case: Case) -> None:
    head, c = trained(case.make()), case.c()
    if c is None:
        pytest.skip("no context")
    calls = []
    embedding = next(m for m in head.modules() if type(m).__name__.endswith("Context"))
    embedding.register_forward_hook(lambda module, inputs, output: calls.append(output.shape))
    z = case.z(50)
    together = head(z, c)
    assert [shape[0] for shape in calls] == [ROWS]
    one_by_one = torch.stack([head(proposal, c) for proposal in z])
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-5)
    repeated = case.make()
    repeated.load_state_dict(head.state_dict())
    flat_z, flat_c = z.flatten(0, 1), c.repeat(50, *[1] * (c.ndim - 1))
    torch.testing.assert_close(repeated(flat_z, flat_c), together.flatten(), rtol=1e-5, atol=1e-5)


def test_config_rebuilds_an_equal_module(case: Case) -> None:
    head, z, c = trained(case.make()), case.z(4), case.c()
    config = json.loads(json.dumps(head.config()))
    rebuilt = type(head)(**config)
    assert rebuilt.config() == head.config()
    assert str(rebuilt) == str(head)
    rebuilt.load_state_dict(head.state_dict())
    assert torch.equal(rebuilt(z, c), head(z, c))


def test_config_has_every_argument() -> None:
    head = CategoricalHead((2, 2), 5, context_shape=(3,), width=24, depth=3, dropout=0.25)
    assert head.config() == {
        "event_shape": [2, 2],
        "num_categories": 5,
        "one_hot": False,
        "context_shape": [3],
        "width": 24,
        "depth": 3,
        "dropout": 0.25,
    }


@pytest.mark.parametrize("kind", [MLPHead, ConvHead])
def test_config_of_continuous_heads_has_every_argument(kind: type[MLPHead | ConvHead]) -> None:
    event = [5] if kind is MLPHead else [5, 2, 2]
    options = {"context_shape": [3], "width": 24, "depth": 3, "dropout": 0.25}
    assert kind(event, **options).config() == {"event_shape": event, **options}


def test_maps_above_8_are_halved_until_they_are_not() -> None:
    head, seen = ConvHead((2, 17, 9), width=8, depth=3), []
    for cell in head.blocks:
        cell.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape[-2:])))
    head(torch.randn(1, 2, 17, 9))
    assert seen == [(5, 3), (5, 3), (5, 3)]
    mapped = ConvHead((2, 17, 9), context_shape=(4, 17, 9), width=8)
    assert mapped(torch.randn(3, 5, 2, 17, 9), torch.randn(5, 4, 17, 9)).shape == (3, 5)
    seen.clear()
    small = ConvHead((2, 8, 8), width=8, depth=1)
    small.blocks[0].register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape[-2:])))
    small(torch.randn(1, 2, 8, 8))
    assert seen == [(8, 8)]


def test_depth_zero_and_odd_widths() -> None:
    assert MLPHead((3,), width=1, depth=0)(torch.randn(2, 3)).shape == (2,)
    assert ConvHead((3, 5, 5), width=8, depth=0)(torch.randn(2, 3, 5, 5)).shape == (2,)


def test_dropout_is_for_training_only() -> None:
    heads = (MLPHead((3,), dropout=0.5), ConvHead((3, 1, 1), dropout=0.5))
    for head in heads:
        z = torch.randn(64, *head.event_shape)
        trained(head)
        assert not torch.equal(head(z), head(z))
        head.eval()
        assert torch.equal(head(z), head(z))


def test_heads_take_any_float_and_compute_in_their_own() -> None:
    head = trained(MLPHead((3,), context_shape=(2,)))
    z, c = torch.randn(4, 3), torch.randn(4, 2)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        log_r = head(z.to(dtype), c.to(dtype))
        assert log_r.dtype == torch.float32
        torch.testing.assert_close(log_r, head(z.to(dtype).float(), c.to(dtype).float()))
    assert head.double()(z, c).dtype == torch.float64
    assert head(z, torch.randint(3, (4, 2))).shape == (4,)


def test_gradients_reach_z_and_match_finite_differences() -> None:
    for head, z in (
        (MLPHead((3,), context_shape=(2,), width=8), torch.randn(2, 3)),
        (ConvHead((2, 3, 2), context_shape=(2,), width=8), torch.randn(2, 2, 3, 2)),
    ):
        trained(head.double())
        c = torch.randn(2, 2, dtype=torch.float64)
        z = z.double().requires_grad_()
        assert torch.autograd.gradcheck(lambda z, c=c, head=head: head(z, c), (z,))


# --- errors ---


def test_wrong_shapes_are_named() -> None:
    head = MLPHead((3,), context_shape=(2,))
    with pytest.raises(ValueError, match=r"z of shape \(\*, B, 3\); got \(4, 5\)"):
        head(torch.zeros(4, 5), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"z of shape \(\*, B, 3\); got \(3,\)"):
        head(torch.zeros(3), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"context of shape .*= \(2,\); got None"):
        head(torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"= \(2,\); got \(5,\)"):
        head(torch.zeros(4, 3), torch.zeros(4, 5))
    for made, z in (
        (MLPHead((3,)), torch.zeros(4, 3)),
        (ConvHead((3, 2, 2)), torch.zeros(4, 3, 2, 2)),
        (CategoricalHead((), 5), torch.zeros(4).long()),
    ):
        with pytest.raises(ValueError, match=r"= None; got \(2,\)"):
            made(z, torch.zeros(4, 2))
    spatial = ConvHead((3, 2, 2), context_shape=(4, 2, 2))
    with pytest.raises(ValueError, match=r"= \(4, 2, 2\); got \(4, 1, 1\)"):
        spatial(torch.zeros(4, 3, 2, 2), torch.zeros(4, 4, 1, 1))


@pytest.mark.parametrize("rows", [1, 2])
def test_a_context_of_another_number_of_rows_is_refused(rows: int) -> None:
    """One row would broadcast in silence."""
    for head, z in (
        (MLPHead((3,), context_shape=(2,)), torch.zeros(4, 3)),
        (ConvHead((3, 2, 2), context_shape=(2,)), torch.zeros(4, 3, 2, 2)),
    ):
        with pytest.raises((ValueError, RuntimeError)):
            head(z, torch.zeros(rows, 2))


def test_heads_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(ValueError, match=r"event shape \(C, H, W\).*got \(3,\) and 64"):
        ConvHead((3,))
    with pytest.raises(ValueError, match=r"multiple of 8; got \(3, 2, 2\) and 12"):
        ConvHead((3, 2, 2), width=12)
    with pytest.raises(ValueError, match=r"\(H, W\) or \(D, H, W\); got \(4, 3, 2, 2\)"):
        CategoricalHead((4, 3, 2, 2), 5)
    with pytest.raises(ValueError, match=r"One-hot vectors of 5 .*\(..., 5\); got \(4, 6\)"):
        CategoricalHead((4, 6), 5, one_hot=True)


# --- make_head ---


def rows_of(distribution: Distribution, rows: int = 64) -> Distribution:
    return distribution.expand((rows,))


@pytest.mark.parametrize(
    ("prior", "kind"),
    [
        (Independent(Normal(torch.zeros(5), 1.0), 1), MLPHead),
        (Normal(torch.tensor(0.0), 1.0), MLPHead),
        (Independent(Normal(torch.zeros(4, 3), 1.0), 2), MLPHead),
        (Independent(Normal(torch.zeros(5, 5, 4), 1.0), 3), ConvHead),
        (Independent(Normal(torch.zeros(5, 4, 4), 1.0), 3), MLPHead),
        (Categorical(logits=torch.zeros(CODES)), CategoricalHead),
        (Independent(Categorical(logits=torch.zeros(4, 4, CODES)), 2), CategoricalHead),
        (Independent(Categorical(logits=torch.zeros(7, CODES)), 1), CategoricalHead),
        (Independent(Categorical(logits=torch.zeros(2, 3, 3, CODES)), 3), CategoricalHead),
        (OneHotCategorical(logits=torch.zeros(CODES)), CategoricalHead),
        (Independent(OneHotCategorical(logits=torch.zeros(4, CODES)), 1), CategoricalHead),
        (Independent(Bernoulli(logits=torch.zeros(CODES)), 1), MLPHead),
        (Independent(Bernoulli(logits=torch.zeros(2, 8, 8)), 3), ConvHead),
    ],
    ids=str,
)
@pytest.mark.parametrize("context_shape", [None, (3,)])
def test_make_head_picks_the_kind(
    prior: Distribution, kind: type, context_shape: tuple[int, ...] | None
) -> None:
    prior = rows_of(prior)
    context = None if context_shape is None else torch.randn(64, *context_shape)
    head = make_head(Group(prior, prior, context), width=16, depth=1)
    assert type(head) is kind
    z = prior.sample()
    assert (head(z, context) == 0).all()
    config = head.config()
    assert config["event_shape"] == list(prior.event_shape)
    assert config["width"] == 16
    assert config.get("num_categories", CODES) == CODES
    assert config["context_shape"] == (None if context_shape is None else list(context_shape))


def test_make_head_takes_a_context_of_one_number_per_row() -> None:
    prior = rows_of(Independent(Normal(torch.zeros(5), 1.0), 1))
    context = torch.randn(64)
    head = make_head(Group(prior, prior, context))
    assert head(prior.sample(), context).shape == (64,)


def test_make_head_joins_a_map_of_the_same_size_as_a_map() -> None:
    prior = rows_of(Independent(Normal(torch.zeros(5, 8, 8), 1.0), 3))
    as_map = make_head(Group(prior, None, torch.randn(64, 7, 8, 8)))
    as_vector = make_head(Group(prior, None, torch.randn(64, 7, 2, 2)))
    assert type(as_map.context).__name__ == "MapContext"
    assert type(as_vector.context).__name__ == "VectorContext"


def test_make_head_cannot_count_codes_of_a_sampler() -> None:
    group = Group(SampleOnly(rows_of(Categorical(logits=torch.zeros(5)))))
    with pytest.raises(
        ValueError, match="prior SampleOnly does not define the number.*CategoricalHead"
    ):
        make_head(group)
    assert type(make_head(Group(SampleOnly(rows_of(Uniform(0.0, 1.0)))))) is MLPHead
    group.prior.num_categories = 5  # type: ignore[attr-defined]
    assert make_head(group).config()["num_categories"] == 5  # type: ignore[operator]


def test_one_hot_vectors_have_the_log_r_of_their_codes() -> None:
    for grid in ((), (3,), (3, 2), (2, 3, 2)):
        of_codes = trained(CategoricalHead(grid, CODES, width=16))
        of_vectors = CategoricalHead((*grid, CODES), CODES, one_hot=True, width=16)
        of_vectors.load_state_dict(of_codes.state_dict())
        z = torch.randint(CODES, (4, ROWS, *grid))
        vectors = nn.functional.one_hot(z, CODES).float()
        torch.testing.assert_close(of_vectors(vectors), of_codes(z))


def test_levels_of_codes_have_tables_of_their_own() -> None:
    head = CategoricalHead((2, 1, 1), CODES, width=16)
    z = torch.tensor([3, 5]).reshape(1, 2, 1, 1)
    table = head.embedding.weight
    assert torch.equal(head.embed(z).flatten(), table[3] + table[CODES + 5])
    for wrong in (CODES, -1):  # not the next level's, or the last one's
        with pytest.raises(ValueError, match=f"codes from 0 to {CODES - 1}"):
            head.embed(z.clamp(max=wrong) if wrong < 0 else z.fill_(wrong))


def inputs_of_the_first_layer(
    head: nn.Module, z: Tensor, context: Tensor | None
) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    for name, module in head.named_modules():
        if type(module).__name__ == "Standardise":
            module.register_forward_hook(
                lambda m, i, output, name=name: seen.update({name: output})
            )
    head(z, context)
    return seen


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1.0, 1e6, 1e15])
@pytest.mark.parametrize("shift", [0.0, 3.0, -100.0])
@pytest.mark.parametrize("event", [(4,), (4, 3, 3), ()])
def test_inputs_of_any_scale_are_standardised(
    scale: float, shift: float, event: tuple[int, ...]
) -> None:
    rows = 512
    sizes = torch.logspace(0, 2, max(1, math.prod(event[:1])), dtype=torch.float64).float()
    axes = [1] * (len(event) - 1)
    sd = scale * (sizes.reshape(*event[:1], *axes) if event else sizes[0]).expand(event)
    prior = Independent(Normal(shift * sd, sd), len(event)).expand((rows,))
    context = scale * (torch.randn(rows, 3) + shift)
    head = make_head(Group(prior, prior, context))
    seen = inputs_of_the_first_layer(head, prior.sample(), context)
    assert len(seen) == 2
    for out in seen.values():
        # Mean and sd over 512 rows, fitted on 1024 others: within 6 standard errors.
        axes = [0] if out.ndim < 3 else [0, 2, 3]
        assert out.mean(axes).abs().max() < 6 * (1 / 512 + 1 / 1024) ** 0.5
        assert (out.std(axes) - 1).abs().max() < 6 * (0.5 / 512 + 0.5 / 1024) ** 0.5


def test_constant_inputs_are_only_shifted() -> None:
    """A latent that never moves says nothing; rounding must not blow it up."""
    loc = torch.tensor([5.3, 1e5 + 0.1, 1 / 3])
    prior = Independent(Normal(loc, 1e-7 * loc), 1).expand((63,))  # the last bit of float32
    context = torch.tensor([[7.1, 0.1, 0.0]]).expand(63, 3)
    head = make_head(Group(prior, prior, context))
    z = prior.sample()
    for a, b in ((z, context), (z * (1 + 8e-7), context * (1 + 8e-7))):
        for out in inputs_of_the_first_layer(head, a, b).values():
            assert out.abs().max() < 1


def test_the_scale_covers_prior_and_posterior() -> None:
    narrow = Independent(Normal(torch.full((2,), 3.0), 0.1), 1).expand((4096,))
    wide = Independent(Normal(torch.zeros(2), torch.ones(2)), 1).expand((4096,))
    head = make_head(Group(wide, narrow))
    # An equal mixture of N(0, 1) and N(3, 0.01): mean 1.5, variance 0.505 + 2.25.
    torch.testing.assert_close(head.scale.mean, torch.full((2,), 1.5), atol=0.07, rtol=0)
    torch.testing.assert_close(head.scale.sd, torch.full((2,), 2.755**0.5), atol=0.07, rtol=0)


def test_the_scale_is_saved_with_the_head() -> None:
    prior = Independent(Normal(torch.full((2,), 3.0), 0.1), 1).expand((64,))
    head = make_head(Group(prior, prior))
    other = MLPHead((2,))
    other.load_state_dict(head.state_dict())
    assert torch.equal(other.scale.mean, head.scale.mean)
    assert (other.scale.mean != 0).all()
    assert {n for n, _ in head.named_parameters()}.isdisjoint({"scale.mean", "scale.sd"})


def test_non_finite_latents_or_contexts_are_refused() -> None:
    good = Independent(Normal(torch.zeros(2), 1.0), 1).expand((64,))
    bad = Independent(Normal(torch.full((2,), torch.nan), 1.0, validate_args=False), 1).expand(
        (64,)
    )
    for group in (Group(bad), Group(good, bad), Group(good, good, torch.full((64, 2), torch.inf))):
        with pytest.raises(FloatingPointError, match="not finite"):
            make_head(group)


def test_every_head_can_be_given_a_scale() -> None:
    """`fit_scale` is a method of all three heads."""
    CategoricalHead((), 5, context_shape=(2,)).fit_scale(torch.randint(5, (8,)), torch.randn(8, 2))
    MLPHead((3,), context_shape=(2,)).fit_scale(torch.randn(8, 3), torch.randn(8, 2))
    ConvHead((3, 2, 2), context_shape=(2,)).fit_scale(torch.randn(8, 3, 2, 2), torch.randn(8, 2))


def test_the_kind_of_head_can_be_chosen() -> None:
    prior = Independent(Normal(torch.zeros(64, 2, 4, 4), 3.0), 3)
    group = Group(prior, None, torch.randn(64, 8, 4, 4))
    head = make_head(group, kind=MLPHead, width=16)
    assert isinstance(head, MLPHead)
    assert head(prior.sample((5,)), group.context).shape == (5, 64)
    assert (head.scale.sd - 3).abs().max() < 1.5  # standardised all the same
