"""The gap closed, against closed forms and on toys."""

import math
from typing import Any

import pytest
import torch
from helpers.toys import exactly, within
from scipy import stats
from torch import Tensor

from ncprior.evaluation.gap import GapClosed, _student_quantile, gap_closed, gap_difference


def arm(shifts: list[float], count: int = 100) -> list[Tensor]:
    """Generations of one feature with variance exactly 1: shift² from the standard reference."""
    one = torch.ones(1, 1, dtype=torch.float64)
    return [exactly(torch.tensor([shift], dtype=torch.float64), one, count) for shift in shifts]


BASE, OURS, POSTERIOR = (
    [2.0, 2.1, 1.9, 2.2, 1.8],
    [0.5, 0.6, 0.7, 0.8, 0.9],
    [0.1, 0.2, 0, 0.3, 0.4],
)


def gap(reference: Tensor, **changes: list[Tensor] | float) -> GapClosed:
    arms: dict[str, Any] = {"base": arm(BASE), "ours": arm(OURS), "posterior": arm(POSTERIOR)}
    return gap_closed(reference, **{**arms, **changes})


def mean_square(shifts: list[float]) -> float:
    return sum(s**2 for s in shifts) / len(shifts)


def test_gap_closed_is_a_ratio_of_mean_distances_to_the_full_reference() -> None:
    d_base, d_ours, d_post = map(mean_square, (BASE, OURS, POSTERIOR))
    result = gap(arm([0])[0])
    assert result.gap_closed == pytest.approx((d_base - d_ours) / (d_base - d_post))
    assert (result.d_base, result.d_ours, result.d_post) == pytest.approx((d_base, d_ours, d_post))
    assert result.low < result.gap_closed < result.high
    squares = torch.tensor([BASE, OURS, POSTERIOR], dtype=torch.float64).square()
    torch.testing.assert_close(result.distances, squares)
    assert result.resampled.shape == (3, 200)


def test_gap_closed_in_words() -> None:
    none = torch.empty(0)
    result = GapClosed(0.934, 0.8751, 0.9702, 247.0, 17.7, 33.0, none, none)
    assert str(result) == "gap in samples closed: 93 % (88–97)"


@pytest.mark.parametrize(("shift", "is_said"), [(1.3, False), (1.6, True)])
def test_a_decoder_that_is_most_of_the_distance_is_said(shift: float, is_said: bool) -> None:
    """D is shift²: 0.42 or 0.64 of 2² is left by the decoder, whatever the prior."""
    shifts = [shift, shift + 0.001, shift - 0.001, shift + 0.002, shift - 0.002]
    result = gap(arm([0])[0], posterior=arm(shifts), ours=arm([1.9, 1.91, 1.92, 1.93, 1.94]))
    assert result.floor == pytest.approx(mean_square(shifts) / mean_square(BASE))
    said = f"decoded encodings have {result.floor:.0%} of the base's distance: take decoded"
    assert (said in str(result)) == is_said


def test_another_reference_removes_what_the_decoder_leaves() -> None:
    """A decoder that loses one of two features: from data, D is 1 + shift², from decodings shift²."""
    torch.manual_seed(0)
    data = torch.randn(20_000, 2)

    def decoded(shift: float) -> Tensor:  # the second feature is lost
        return torch.stack([shift + torch.randn(5, 4000), 1e-3 * torch.randn(5, 4000)], -1)

    arms = {"base": decoded(0.5), "ours": decoded(0.25), "posterior": decoded(0.0)}
    of_data = gap_closed(data, **arms)
    of_decoded = gap_closed(decoded(0.0).flatten(0, 1), **arms)
    assert of_data.floor == pytest.approx(1 / 1.25, abs=0.02)
    assert of_decoded.floor < 0.02
    for result in (of_data, of_decoded):
        assert result.low < 0.75 < result.high


def test_gap_closed_shows_near_copies_beside_the_gap() -> None:
    reference, train = torch.randn(2, 200, 2)
    arms = {
        "base": 2 + torch.randn(5, 100, 2),
        "ours": train.unflatten(0, (2, 100))[[0, 1] * 3][:5],
    }
    noise = 0.1 * torch.randn(5, 100, 2)
    arms["ours"] = arms["ours"] + 1e-4 * noise  # a prior that stores its training data
    arms["posterior"] = torch.randn(5, 100, 2)
    result = gap_closed(reference, **arms, num_resamples=5, train=train)
    assert {name: found.copies for name, found in result.copies.items()} == {
        "base": False,
        "ours": True,
        "posterior": False,
    }
    assert str(result).endswith("); " + str(result.copies["ours"]))
    assert result.copies["ours"].share == 1
    assert gap_closed(reference, **arms, num_resamples=5).copies == {}


@pytest.mark.parametrize("level", [0.8, 0.95, 0.99])
def test_the_interval_of_few_generations_is_fiellers(level: float) -> None:
    # With a reference this large, only the five generations vary.
    result = gap(arm([0], 200_000)[0], level=level, num_resamples=20)
    base, ours, posterior = result.distances.numpy()
    for end in (result.low, result.high):
        terms = (base - ours) - end * (base - posterior)
        t = terms.mean() / (terms.std(ddof=1) / math.sqrt(5))
        assert abs(t) == pytest.approx(stats.t.ppf(0.5 + level / 2, 4), rel=0.01)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_interval_of_a_small_reference_is_that_of_its_resamples(level: float) -> None:
    def steady(shift: float) -> list[Tensor]:
        return arm([shift + 1e-5 * i for i in range(5)])

    arms = {"base": steady(2), "ours": steady(0.7), "posterior": steady(0.2)}
    result = gap(arm([0])[0], **arms, level=level, num_resamples=500)
    base, ours, posterior = result.resampled.numpy()
    for end in (result.low, result.high):
        terms = (base - ours) - end * (base - posterior)
        d = (result.d_base - result.d_ours) - end * (result.d_base - result.d_post)
        assert abs(d) / terms.std(ddof=1) == pytest.approx(
            stats.norm.ppf(0.5 + level / 2), rel=0.01
        )


def test_the_resampled_references_vary_as_references_do() -> None:
    result = gap(arm([0], 400)[0], num_resamples=1000)
    # D_base - D_post moves by -2 (shift difference) times the reference's mean, of variance 1/N.
    shifts = sum(BASE) / 5 - sum(POSTERIOR) / 5
    expected = 4 * shifts**2 / 400
    measured = (result.resampled[0] - result.resampled[2]).var().item()
    assert measured == pytest.approx(expected, rel=4 * math.sqrt(2 / 1000))
    # Duplicates put E[(Δ mean)² + (Δ sd)²] = 1/N + 1/2N on top of every distance.
    added = result.resampled - result.distances.mean(1, keepdim=True)
    assert all(within(row, 1.5 / 400) for row in added)
    assert not within(added[2], 0)


SHIFT, SCALE = {"base": 0.8, "ours": 0.3, "posterior": 0.1}, {"base": 1.4, "ours": 1.1}


def toy(count: int, num_features: int = 2) -> dict[str, Tensor]:
    """Five generations of Gaussians N(shift, scale² I), to be held against N(0, I)."""
    noise = torch.randn(3, 5, count, num_features)
    names = zip(SHIFT, noise, strict=True)
    return {name: SHIFT[name] + SCALE.get(name, 1.0) * x for name, x in names}


def truth(name: str) -> float:
    """The gap that an arm closes: D = F (shift² + (scale - 1)²)."""
    d = {n: SHIFT[n] ** 2 + (SCALE.get(n, 1.0) - 1) ** 2 for n in SHIFT}
    return (d["base"] - d[name]) / (d["base"] - d["posterior"])


@pytest.mark.parametrize(("count", "references"), [(300, 300), (3000, 150), (150, 3000)])
def test_the_interval_covers_the_truth(count: int, references: int) -> None:
    repetitions, level = 120, 0.9
    results = [
        gap_closed(torch.randn(references, 2), **toy(count), num_resamples=60, level=level)
        for _ in range(repetitions)
    ]
    estimate, low, high = torch.tensor([result[:3] for result in results]).T
    covered = ((low < truth("ours")) & (truth("ours") < high)).double().mean().item()
    assert abs(covered - level) < 4 * math.sqrt(level * (1 - level) / repetitions)
    # Half the width is 1.64 (normal) to 2.13 (Student's t of four degrees) standard deviations,
    # of which the measured one has a relative standard error of 1/√(2·120).
    ratio = (0.5 * (high - low).mean() / estimate.std()).item()
    slack = 4 / math.sqrt(2 * repetitions)
    assert 1.64 * (1 - slack) < ratio < 2.13 * (1 + slack)


def test_the_difference_of_two_methods_is_paired_and_covered() -> None:
    repetitions, level, covered, wide, narrow = 120, 0.9, 0, 0.0, 0.0
    # Two methods that share their seeds; the second lies between the first and the base.
    for seed in range(repetitions):
        reference, arms = torch.randn(300, 2), toy(300)
        base, posterior = arms["base"], arms["posterior"]
        noise = arms["ours"] - SHIFT["ours"]
        first, second = (
            gap_closed(
                reference, base=base, ours=x, posterior=posterior, num_resamples=60, seed=seed
            )
            for x in (arms["ours"], noise + 0.4)
        )
        difference = gap_difference(first, second, level=level)
        assert difference.difference == pytest.approx(first.gap_closed - second.gap_closed)
        exact = (0.4**2 - SHIFT["ours"] ** 2) * truth("ours")
        exact /= SHIFT["base"] ** 2 + 0.4**2 - SHIFT["ours"] ** 2 - 0.1**2
        covered += difference.low < exact < difference.high
        narrow += difference.high - difference.low
        wide += math.hypot(first.high - first.low, second.high - second.low)
    assert abs(covered / repetitions - level) < 4 * math.sqrt(level * (1 - level) / repetitions)
    assert narrow < 0.5 * wide


def test_a_method_is_no_better_than_itself() -> None:
    result = gap(torch.randn(200, 1))
    assert gap_difference(result, result) == (0, 0, 0)


def test_the_base_itself_closes_nothing() -> None:
    base = arm(BASE)
    assert gap(torch.randn(200, 1), base=base, ours=base)[:3] == (0, 0, 0)


def test_a_difference_is_refused_unless_paired() -> None:
    reference = torch.randn(200, 1)
    result = gap(reference)
    for other in (
        gap(reference, seed=1),
        gap(reference, num_resamples=100),
        gap(reference, base=arm([s + 0.1 for s in BASE])),
        gap(reference, posterior=arm([s + 0.1 for s in POSTERIOR])),
        gap(reference + 0.1),
    ):
        with pytest.raises(ValueError, match="two results of one reference, base, posterior"):
            gap_difference(result, other)


def test_the_resampled_references_have_a_seed_of_their_own() -> None:
    reference = torch.randn(200, 1)
    arms = toy(100, 1)
    state = torch.get_rng_state()
    first = gap_closed(reference, **arms)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(gap_closed(reference, **arms).resampled, first.resampled)
    assert not torch.equal(gap_closed(reference, **arms, seed=1).resampled, first.resampled)


def test_gap_closed_refuses_what_gives_no_interval() -> None:
    reference = torch.randn(200, 1)
    for name, shifts in (("base", BASE), ("ours", OURS), ("posterior", POSTERIOR)):
        with pytest.raises(ValueError, match="at least 5 generations of every arm; got 4"):
            gap(reference, **{name: arm(shifts[:4])})
        with pytest.raises(ValueError, match="equally many generations"):
            gap(reference, **{name: arm([*shifts, 0.35])})
        with pytest.raises(ValueError, match="all of one sample count.*'ours': "):
            gap(reference, **{name: [*arm(shifts[:4]), *arm(shifts[4:], 99)]})
        with pytest.raises(ValueError, match="all of one sample count"):
            gap(reference, **{name: arm(shifts, 99)})
        with pytest.raises(ValueError, match=rf"{name}\[4\] must be finite; got NaN"):
            gap(reference, **{name: [*arm(shifts[:4]), torch.full((100, 1), math.nan)]})
        with pytest.raises(ValueError, match=rf"expected 1 per sample, got 2 for {name}\[4\]"):
            gap(reference, **{name: [*arm(shifts[:4]), torch.randn(100, 2)]})
    uneven = {"base": BASE, "ours": OURS, "posterior": POSTERIOR}
    with pytest.raises(ValueError, match="all of one sample count"):
        gap(reference, **{k: [*arm(v[:4]), *arm(v[4:], 99)] for k, v in uneven.items()})
    with pytest.raises(ValueError, match="reference must have 2 dimensions"):
        gap(reference[0])


def test_gap_closed_wants_ten_samples_per_feature() -> None:
    arms = toy(40, 4)
    gap_closed(torch.randn(40, 4), **arms)
    with pytest.raises(ValueError, match="4 features needs at least 40 samples.*got 39"):
        gap_closed(torch.randn(39, 4), **arms)
    with pytest.raises(ValueError, match="4 features needs at least 40 samples.*got 39"):
        gap_closed(torch.randn(40, 4), **{k: x[:, :39] for k, x in arms.items()})


def test_generations_from_one_seed_are_refused() -> None:
    reference, arms = torch.randn(200, 2), toy(100)
    for name in ("base", "ours"):
        twice = torch.cat((arms[name][:4], arms[name][:1]))
        with pytest.raises(ValueError, match="Two generations of an arm are the same"):
            gap_closed(reference, **{**arms, name: twice})
    # A deterministic posterior gives the same five times.
    same = arms["posterior"][:1].expand(5, -1, -1)
    assert 0.8 < gap_closed(reference, **{**arms, "posterior": same}).gap_closed < 1


def test_no_measurable_hole_is_said() -> None:
    reference = torch.randn(200, 1)
    message = r"no measurable hole to close: D_base - D_post = .*± .*already match"
    with pytest.raises(ValueError, match=message):  # the base is better
        gap(reference, base=arm(POSTERIOR), posterior=arm(BASE))
    with pytest.raises(ValueError, match=message):  # the base is worse by no more than the noise
        gap(reference, base=arm([0.01 + s for s in POSTERIOR[::-1]]))
    gap(reference, base=arm([1 + s for s in POSTERIOR]))


@pytest.mark.parametrize("changes", [{"num_resamples": 1}, {"level": 0}, {"level": 95}])
def test_level_and_resamples_are_checked(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must be a .*number in"):
        gap(torch.randn(200, 1), **changes)


def test_F25_arrays_and_lists_are_converted() -> None:
    reference, arms = torch.randn(200, 1), toy(100, 1)
    expected = gap_closed(reference, **arms)
    found = gap_closed(
        reference.numpy(),
        base=arms["base"].numpy(),
        ours=[x.numpy() for x in arms["ours"]],
        posterior=arms["posterior"].tolist(),
    )
    assert found[:6] == expected[:6]


def test_F26_an_arm_that_is_no_list_of_features_is_said() -> None:
    arms = toy(100, 1)
    for wrong in (None, 3, "base", iter(arms["base"])):
        with pytest.raises(TypeError, match="base must be a list of features"):
            gap_closed(torch.randn(200, 1), **{**arms, "base": wrong})
    with pytest.raises(TypeError, match="a must be of type GapClosed; got None"):
        gap_difference(None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("level", [0.95, 0.99, 0.999])
@pytest.mark.parametrize("freedom", [1.0, 4.0, 9.5, 100.0])
def test_the_quantile_is_that_of_student(level: float, freedom: float) -> None:
    probability = 0.5 + level / 2
    assert _student_quantile(probability, freedom) == pytest.approx(
        stats.t.ppf(probability, freedom), rel=1e-4
    )
