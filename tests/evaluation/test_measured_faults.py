"""Measures of half-precision VAEs, energies in training mode, images without density, small batches and tables."""

from __future__ import annotations

import math
from collections import UserDict
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, Normal, Uniform
from torch.utils.data import DataLoader, TensorDataset

from ncprior import NCPrior, SingleGroup, sir
from ncprior.bases import JointSource
from ncprior.data.batches import of_size, spread_rows
from ncprior.data.checked import log_prob_of_data
from ncprior.diagnostics import diagnose
from ncprior.evaluation import (
    auroc,
    frechet_distance,
    log_likelihood,
    near_copies,
    ood_score,
    two_sample_test,
)
from ncprior.evaluation.tables import features_of
from ncprior.heads import MLPHead, fast
from ncprior.source import num_rows
from ncprior.utils.optimise import standardise
from ncprior.vaebm import VAEBM, GaussianDecoder

pytestmark = pytest.mark.filterwarnings("ignore:Reconstructions of a row")  # of untrained VAEs


def normal(mean: Tensor, scale: float) -> Independent:
    return Independent(Normal(mean, scale), 1)


def linear(dtype: torch.dtype = torch.float32, size: int = 12) -> SingleGroup:
    """A linear VAE with two latents, in one dtype."""
    torch.manual_seed(0)
    vae = nn.ModuleList([nn.Linear(size, 2), nn.Linear(2, size)]).to(dtype).eval()
    base = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    encode, decode = vae
    return SingleGroup(
        base,
        lambda x: normal(encode(x.to(dtype)).float(), 0.5),
        decode,
        module=vae,
        likelihood=lambda z: normal(decode(z), 0.5),
    )


def test_log_densities_of_half_precision_decoders_are_not_rounded() -> None:
    """log p(x | z) of 784 pixels came in steps of 4 nats."""
    source, x = linear(torch.bfloat16, 784), torch.rand(50, 784).bfloat16()
    p = source.likelihood(source.advance(source.start(50), torch.zeros(50, 2)))
    assert (p.log_prob(x) == p.log_prob(x).round()).all()
    mean = p.base_dist.loc.double()  # type: ignore[attr-defined]
    exact = normal(mean, 0.5).log_prob(x.double())
    torch.testing.assert_close(log_prob_of_data(p, x).double(), exact, atol=1e-2, rtol=0)


class Noisy(nn.Module):
    """E(x) with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 16), nn.Dropout(0.5), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).squeeze(-1)  # type: ignore[no-any-return]


def test_an_energy_in_training_mode_is_named() -> None:
    model, x = VAEBM(linear(), Noisy()), torch.rand(5, 12)
    for measure in (partial(ood_score, model, x, num_samples=4), partial(model.sample, 3)):
        with pytest.raises(ValueError, match="The energy is in training mode and has Dropout"):
            measure()
    model.eval()
    assert torch.equal(*(model(x) for _ in range(2)))
    assert ood_score(model, x, num_samples=4).energy.isfinite().all()
    assert model.sample(3).x.shape == (3, 12)


@pytest.mark.parametrize("with_heads", [False, True])
def test_an_image_outside_of_the_support_has_the_lowest_score(with_heads: bool) -> None:
    base = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    source = SingleGroup(
        base,
        lambda x: normal(x / 2, 0.5),
        lambda z: z,
        likelihood=lambda z: Independent(
            Uniform(z - 2, z + 2, validate_args=False), 1, validate_args=False
        ),
    )
    model = NCPrior(source, MLPHead((2,))).eval() if with_heads else source
    found = ood_score(model, torch.tensor([[0.0, 0.0], [50.0, 0.0]]), num_samples=16).total
    assert found.isfinite().tolist() == [True, False] and found[1] == -math.inf
    assert auroc(found[:1].expand(3), found[1:].expand(3)).value == 1


def test_without_an_upper_estimate_nothing_is_two_sided() -> None:
    source, x = linear(), torch.rand(4, 12)
    few, many = (log_likelihood(source, x, num_samples=s)["base"] for s in (6, 64))
    assert few.upper.isnan().all() and not few.is_two_sided
    assert many.is_two_sided
    assert not many._replace(ess=torch.full((4,), math.nan)).is_two_sided


def test_pools_are_measured_by_the_folded_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """It embeds a context once, and not for every chunk of proposals."""
    source, x = linear(), torch.rand(30, 12)
    prior = NCPrior.for_source(source, x, width=16)
    nn.init.normal_(prior.heads[0].out.weight)  # type: ignore[union-attr, arg-type]
    calls = []
    folded = fast._Folded.block
    monkeypatch.setattr(
        fast._Folded,
        "block",
        lambda *a: calls.append(1) or folded(*a),  # type: ignore[func-returns-value]
    )
    measure = partial(log_likelihood, prior, x, num_samples=8, num_proposals=20)
    torch.manual_seed(1)
    found = measure()["sir"].lower
    assert calls
    monkeypatch.setattr(fast, "is_unmodified", lambda head: False)
    torch.manual_seed(1)
    torch.testing.assert_close(measure()["sir"].lower, found, atol=1e-4, rtol=1e-5)


def test_every_draw_of_an_encoder_that_draws_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """A joint source draws z when it encodes: 2,040 draws were 60."""
    import sys

    source, x = linear(), torch.rand(60, 12)
    prior = NCPrior.for_source(source, x)
    prior.sampler = partial(sir, num_proposals=2)
    whole = NCPrior.for_source(JointSource(prior), x)
    seen: list[Tensor] = []
    module = sys.modules["ncprior.diagnostics.diagnose"]
    contrast = module._contrast  # type: ignore[attr-defined]

    def watched(prior: NCPrior, k: int, group: Any, z: Tensor) -> Tensor:
        seen.append(z)
        return contrast(prior, k, group, z)  # type: ignore[no-any-return]

    monkeypatch.setattr(module, "_contrast", watched)
    report = diagnose(whole, x, num_draws=600, num_proposals=(2, 3), fresh_steps=0)
    z = torch.cat(seen)
    assert len(z.unique(dim=0)) == len(z) >= report.num_draws == 600


def test_small_batches_are_joined_to_measure_what_is_missing() -> None:
    base = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    source = SingleGroup(base, lambda x: normal(x, 0.5), lambda z: z)
    prior, x = NCPrior(source, MLPHead((2,))).eval(), torch.randn(200, 2) + 1
    for batch_size in (3, 8):
        loader = DataLoader(TensorDataset(x), batch_size)
        report = diagnose(prior, loader, num_draws=200, num_proposals=(2, 3), fresh_steps=30)
        assert report.groups[0].missing > 0


def test_joined_batches_have_all_rows_in_order() -> None:
    x = torch.arange(20)
    for size in (1, 3, 7, 50):
        found = list(of_size(zip(x.split(3), (-x).split(3), strict=True), size))
        assert torch.cat([a for a, _ in found]).equal(x)
        assert all(torch.equal(a, -b) for a, b in found)
        assert all(len(a) >= size for a, _ in found[:-1])


class Table:
    """A table with names, as of pandas."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.columns = rows.numpy(), ["a", "b"]

    def to_numpy(self) -> np.ndarray[Any, Any]:
        return self.rows

    def __len__(self) -> int:
        return len(self.rows)


@pytest.mark.parametrize("kind", [Table, lambda x: x, lambda x: x.numpy(), lambda x: x.tolist()])
def test_rows_beside_a_table_have_its_scale(kind: Any) -> None:
    torch.manual_seed(0)
    scale = torch.tensor([1.0, 1000.0])
    train, held_out = (torch.randn(300, 2) * scale for _ in range(2))
    copies = train + torch.randn(300, 2) * scale / 50
    assert near_copies(Table(train), Table(held_out), kind(copies)).share > 0.2


def test_whole_numbers_are_measured_in_float64() -> None:
    big = torch.arange(1_700_000_000, 1_700_000_200)[:, None]
    assert frechet_distance(big[:100], big[:100] + 3) == pytest.approx(9)
    assert auroc(big[:, 0], big[:, 0] - 100).value > auroc(big[:, 0], big[:, 0] - 10).value


def test_features_far_from_zero_are_told_apart() -> None:
    torch.manual_seed(0)
    real, drawn = (50 * torch.randn(500, 1, dtype=torch.float64) + shift for shift in (0, 100))
    near = two_sample_test(real, drawn, folds=2).auc
    far = two_sample_test(real + 1.7e9, drawn + 1.7e9, folds=2).auc
    assert far == pytest.approx(near, abs=0.005)


def test_images_as_bytes_are_named_or_scored() -> None:
    x = (255 * torch.rand(9, 12)).byte()
    inner = linear()
    source = SingleGroup(
        inner.prior,
        lambda x: normal(inner.module[0](x / 255), 0.5),  # type: ignore[index]
        lambda z: inner.module[1](z).sigmoid(),  # type: ignore[index]
        likelihood=lambda z: normal(inner.module[1](z).sigmoid(), 0.1),  # type: ignore[index]
    )
    with pytest.raises(ValueError, match="Data must have the range of images decoded by the VAE"):
        GaussianDecoder.fitted(source, x)
    model = VAEBM(GaussianDecoder(source, 0.1), MLPHead((12,)), data_noise=0.1).eval()
    assert ood_score(model, x, num_samples=4).total.isfinite().all()


def test_wrong_data_are_an_error_whatever_the_precision() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        p = Independent(Bernoulli(logits=torch.zeros(5, 3, dtype=dtype), validate_args=True), 1)
        with pytest.raises(ValueError, match="within the support"):
            log_prob_of_data(p, 255 * torch.rand(5, 3))
        assert log_prob_of_data(p, torch.ones(5, 3)).dtype == torch.float32


def test_batches_that_cannot_be_joined_stay_apart() -> None:
    x = torch.randn(2, 3)
    kinds: list[list[Any]] = [
        [(x, torch.tensor(0.5))] * 3,
        [torch.randn(2, 1, 8 + i, 8 + i) for i in range(3)],
        [x, (x, x), {"x": x}],
    ]
    joined, *apart = ([num_rows(batch) for batch in of_size(kind, 8)] for kind in kinds)
    assert joined == [6] and apart == [[2, 2, 2]] * 2


@pytest.mark.parametrize("wrap", [UserDict, lambda batch: {**batch, "name": ["a"] * 60}])
def test_batches_with_other_things_than_tensors_are_taken_whole(wrap: Any) -> None:
    batches = [wrap({"x": torch.full((60, 2), float(i))}) for i in range(70)]
    assert len(spread_rows(batches, 512)["x"]) == 60


def test_rows_beside_a_table_may_be_in_half_precision() -> None:
    found = features_of(real=Table(torch.randn(30, 2)), drawn=torch.randn(30, 2).bfloat16())
    assert [len(rows) for rows in found] == [30, 30]


def test_a_narrow_column_in_double_precision_is_no_constant() -> None:
    for mean, sd in ((1e9, 1e2), (1e3, 1e-4)):
        a, b = (mean + sd * (torch.randn(400, 1, dtype=torch.float64) + i) for i in (0, 2))
        found = two_sample_test(a, b, folds=2)
        assert found.auc > 0.85 and 0.2 < found.jsd < math.log(2)
    white, _, spread = standardise(torch.full((9, 1), 0.7))
    assert spread == 1 and white.abs().max() < 1e-6
