"""`SingleGroup` with parts that do not fit: rows, dtypes, conditions, modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.problems import SampleOnly
from helpers.toys import VAE, base, flat
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from ncprior import NCPrior, SingleGroup
from ncprior.source import sample_posterior
from ncprior.utils.visible import require_eval


def posterior(x: Tensor) -> Independent:
    return Independent(Normal(x[:, :2], 0.1, validate_args=False), 1)


@pytest.mark.parametrize("rows", [1, 33])
def test_F12_a_posterior_of_other_rows_than_x_raises(rows: int) -> None:
    vae = VAE()
    source = SingleGroup(base(), lambda x: posterior(torch.zeros(rows, 2)), vae.decode)
    for use in (source.encode, lambda x: NCPrior.for_source(source, x)):
        with pytest.raises(ValueError, match=f"one row per row of x; got {rows} rows for 32"):
            use(torch.randn(32, 3))


def test_F15_an_error_of_the_posterior_on_nan_names_x() -> None:
    vae = VAE()

    def validated(x: Tensor) -> Independent:
        return Independent(Normal(x[:, :2], 1.0, validate_args=True), 1)

    source = SingleGroup(base(), validated, vae.decode)
    x = torch.randn(32, 3)
    x[3, 0] = torch.nan
    with pytest.raises(ValueError, match="x has NaN or infinity. Remove or mend"):
        source.encode(x)


class Wrapped(nn.Module):
    """A VAE with a parameter of another dtype in front."""

    def __init__(self, first: Tensor) -> None:
        super().__init__()
        self.first, self.vae = nn.Parameter(first, requires_grad=False), VAE()
        self.eval()

    def decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(z.float())


FIRST = [
    torch.arange(5),
    torch.zeros(1).half(),
    torch.zeros(1).double(),
    torch.ones(1).to(torch.uint8),
]


@pytest.mark.parametrize("first", FIRST, ids=lambda t: str(t.dtype))
def test_W4_z_keeps_its_fraction_whatever_the_first_parameter_is(first: Tensor) -> None:
    w = Wrapped(first)
    seen = []
    source = SingleGroup(
        base(),
        posterior,
        lambda z: seen.append(z) or w.vae.decode(z),
        module=w,
        features=w.vae.decoder,
    )
    z = torch.randn(6, 2)
    state = source.advance(source.start(6), z)
    assert torch.equal(source.decode(state), w.vae.decode(z))
    assert torch.equal(seen[0], z)
    assert torch.equal(source.features(0, z), w.vae.decoder(z))


def test_W4_z_has_the_dtype_of_the_decoder() -> None:
    vae = VAE()
    vae.decoder.bfloat16()  # the encoder remains in float32
    source = SingleGroup(base(), posterior, vae.decoder, module=vae)
    assert (
        source.decode(source.advance(source.start(6), torch.randn(6, 2))).dtype == torch.bfloat16
    )
    source = SingleGroup(base(), posterior, VAE().bfloat16().decode)  # a bound method's module
    assert (
        source.decode(source.advance(source.start(6), torch.randn(6, 2))).dtype == torch.bfloat16
    )


def test_W12_labels_are_no_condition() -> None:
    vae = VAE(condition=1)
    source = flat(vae, condition=lambda batch: batch[1])
    with pytest.raises(ValueError, match=r"shape \(B, C\).*one_hot"):
        source.encode((torch.randn(5, 3), torch.arange(5)))
    with pytest.raises(ValueError, match=r"shape \(B, C\).*one_hot"):
        source.start(5, condition=torch.arange(5))


@pytest.mark.parametrize("module", ["vae", object(), VAE, 3, [VAE(), "encoder"]])
def test_N8_a_module_that_is_none_raises(module: Any) -> None:
    with pytest.raises(
        TypeError, match="module must be of type Module; got .* list of its modules"
    ):
        SingleGroup(base(), posterior, VAE().decode, module=module)


def test_N8_a_vae_in_several_modules() -> None:
    encoder, decoder = nn.Linear(3, 2).eval(), nn.Linear(2, 3).eval()
    for module in ([encoder, decoder], nn.ModuleList([encoder, decoder])):
        source = SingleGroup(
            base(), lambda x: posterior(encoder(x)), lambda z: decoder(z), module=module
        )
        source.encode(torch.randn(4, 3))
        assert source.fingerprint() is not None
        assert not encoder.training
        decoder.train()
        with pytest.raises(ValueError, match="1 is in training mode"):
            source.encode(torch.randn(4, 3))
        decoder.eval()


def test_N8_arrays_are_batches() -> None:
    source = SingleGroup(base(), posterior, nn.Linear(2, 3).eval())
    x = np.random.default_rng(0).normal(size=(16, 3))
    x.flags.writeable = False
    with pytest.warns(UserWarning, match="Reconstructions"):
        prior = NCPrior.for_source(source, x, width=8)
    assert prior.nce_loss(x).shape == (1,)
    assert sample_posterior(source, x)[0][0].dtype == torch.float32


def test_M2_a_module_without_eval_has_a_way_out() -> None:
    with pytest.raises(
        ValueError, match=r"leave out module= where that is impossible.*torch.export"
    ):
        require_eval(nn.Linear(1, 1))


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ((Normal, posterior, VAE().decode), "got the class Normal. Pass a distribution"),
        ((base(), 3, VAE().decode), "posterior must be a function; got 3"),
        ((base(), posterior, VAE), "decoder must be a function; got the class VAE"),
        ((base(), posterior, VAE().decode, {"features": 3}), "features must be a function; got 3"),
    ],
)
def test_F36_wrong_parts_are_named(parts: tuple[Any, ...], match: str) -> None:
    *args, options = parts if isinstance(parts[-1], dict) else (*parts, {})
    with pytest.raises(TypeError, match=match):
        SingleGroup(*args, **options)


def test_F36_features_of_other_rows_raise() -> None:
    source = flat(features=lambda z: z[:1])
    with pytest.raises(
        ValueError, match=r"one tensor of N rows, here 32; got a tensor of float32, \(1, 2\)"
    ):
        source.features(0, torch.randn(32, 2))


@pytest.mark.filterwarnings("ignore:Reconstructions of a row")
def test_F36_a_decoder_that_returns_a_scalar_raises() -> None:
    source = SingleGroup(base(), posterior, lambda z: z.sum())
    with pytest.raises(TypeError, match="one tensor of 32 rows; got a tensor of float32"):
        NCPrior.for_source(source, torch.randn(32, 3))


def test_F36_start_takes_whole_numbers() -> None:
    for wrong in (2.0, None, "2", -1):
        with pytest.raises((TypeError, ValueError), match="batch_size must be a whole number"):
            flat().start(wrong)


@pytest.mark.parametrize(
    ("posterior", "x"),
    [
        (
            lambda x: Independent(Normal(x, -1.0 + 0 * x, validate_args=True), 1),
            torch.randn(5, 2),
        ),
        (lambda x: Independent(Normal(x @ torch.zeros(3, 2), 1.0), 1), torch.randn(5, 2)),
        (lambda x: Independent(Normal(x @ torch.zeros(2, 2), 1.0), 1), torch.randn(5, 2).double()),
    ],
    ids=["negative scale", "shape", "dtype"],
)
def test_an_error_of_the_posterior_names_the_batch_and_the_remedy(
    posterior: Callable[[Tensor], Independent], x: Tensor
) -> None:
    source = SingleGroup(base(), posterior, lambda z: z)
    found = r"posterior\(x\) failed on a batch, a tensor of float.*, \(5, 2\).*exp\(\)"
    with pytest.raises((ValueError, RuntimeError), match=found) as error:
        source.encode(x)
    assert "\n" not in str(error.value)


def test_features_of_a_prior_given_c_wait_for_a_walk() -> None:
    """A map of shape (2, 4, 4) was taken for rows of vectors."""
    zeros = torch.zeros(2, 4, 4)
    source = SingleGroup(
        lambda c: Independent(Normal(zeros + c[:, :, None, None], 1.0), 3),
        lambda x, c: Independent(Normal(x, 1.0), 3),
        lambda z, c: z,
        condition=lambda batch: batch[1],
        features=nn.Conv2d(2, 3, 3),
    )
    z = torch.randn(7, 5, 2, 4, 4)
    with pytest.raises(ValueError, match=r"taken for a vector until .*Call source.group"):
        source.features(0, z)
    source.group(source.start(5, condition=torch.zeros(5, 2)))
    assert source.features(0, z).shape == (7, 5, 3, 2, 2)


def test_a_walk_draws_nothing_of_a_conditional_prior_without_density() -> None:
    """Its number of axes is needed for features alone, and looked up under a seed of its own."""
    vae = VAE()
    given: dict[str, Any] = {"condition": lambda x: x[:, :1]}
    for features in (None, nn.Linear(2, 4)):
        source = SingleGroup(
            lambda c: SampleOnly(Normal(c.expand(-1, 2), 1.0)),
            lambda x, c: posterior(x),
            lambda z, c: vae.decode(z),
            features=features,
            **given,
        )
        before = torch.get_rng_state()
        group = source.group(source.start(5, condition=torch.zeros(5, 1)))
        assert torch.equal(torch.get_rng_state(), before)
        assert group.prior.sample().shape == (5, 2)
        assert source.features(0, torch.zeros(9, 5, 2)).shape[:2] == (9, 5)
