"""VQ-VAEs as sources: the laws of a source, the models' own numbers, refusals."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from helpers.problems import SampleOnly
from helpers.toys import everything
from helpers.vqvae2_standin import TwoLevels
from torch import Tensor, nn
from torch.distributions import Categorical, Independent
from torch.utils.data import DataLoader, TensorDataset

from ncprior import NCPrior, fit, sir
from ncprior.adapters.vq import VQModelSource, VQSource, VQVAE2Source
from ncprior.bases.code_bases import fit_code_bases
from ncprior.bases.code_network import CodeNetwork
from ncprior.bases.codes import CodeFrequencies
from ncprior.bases.rebase import rebase
from ncprior.heads.codes import CategoricalHead
from ncprior.source import posterior_of, sample_posterior
from ncprior.testing import check_source
from ncprior.training.settings import FitSettings

CODEBOOK = torch.linspace(-1, 1, 8)


def nearest(x: Tensor) -> Tensor:
    return (x.unsqueeze(-1) - CODEBOOK).abs().argmin(-1)


def scalar() -> VQSource:
    """A codebook of eight numbers, applied to every number of x."""
    return VQSource(nearest, lambda z: CODEBOOK[z], num_categories=8)


def vq_model(**config: Any) -> Any:
    sizes = {"norm_num_groups": 4, "block_out_channels": (8, 8), "latent_channels": 2}
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }
    model = diffusers.VQModel(**{**sizes, **blocks, "num_vq_embeddings": 16, **config}).eval()
    nn.init.normal_(model.quantize.embedding.weight)  # so that not all codes are one
    return model


def images(count: int = 6) -> Tensor:
    return 2 * torch.rand(count, 3, 8, 8) - 1


@pytest.mark.parametrize(
    ("make", "x"),
    [
        (scalar, torch.rand(5, 2, 3)),
        (lambda: VQModelSource(vq_model()), images()),
        (lambda: VQVAE2Source(TwoLevels().eval()), images()),
    ],
    ids=("pair", "VQModel", "VQ-VAE-2"),
)
@pytest.mark.parametrize("kind", ("frequencies", "network"))
def test_sources_keep_the_laws_on_every_base(
    make: Callable[[], VQSource], x: Tensor, kind: str
) -> None:
    source = make()
    options = {"steps": 2, "width": 8, "progress": False} if kind == "network" else {}
    source = rebase(source, fit_code_bases(source, x, kind=kind, **options))  # type: ignore[assignment]
    check_source(source, x)
    prior = NCPrior.for_source(source, x, width=8)
    assert all(type(head) is CategoricalHead for head in prior.heads)
    sample = prior.sample(3, partial(sir, num_proposals=4))
    assert sample.x.shape == (3, *x.shape[1:])


@pytest.mark.parametrize("norm", ("group", "spatial"))
def test_a_walk_is_the_forward_pass_of_a_vq_model(norm: str) -> None:
    extra = {"block_out_channels": (32, 32)} if norm == "spatial" else {}
    model, x = vq_model(norm_type=norm, **extra), images()
    source = VQModelSource(model)
    (codes,), state = sample_posterior(source, x)
    assert codes.shape == (6, 4, 4)
    assert codes.unique().numel() > 1
    torch.testing.assert_close(source.decode(state), model(x).sample.detach())


def test_a_vq_model_in_half_precision_is_cast_in_and_out() -> None:
    source = VQModelSource(vq_model().to(torch.bfloat16))
    _, state = sample_posterior(source, images())
    assert source.decode(state).dtype == torch.float32


def check_two_levels(model: Any, x: Tensor) -> None:
    """A walk has the codes and the images of the model's own forward pass."""
    source = VQVAE2Source(model)
    with torch.no_grad():
        _, _, _, top, bottom = model.encode(x)
        forward, _ = model(x)
    latents, state = sample_posterior(source, x)
    assert torch.equal(latents[0], top)
    assert torch.equal(latents[1], bottom)
    torch.testing.assert_close(source.decode(state), forward)
    second = source.group(source.advance(source.start(len(x)), top))
    assert second.context is not None
    assert second.context.shape[2:] == bottom.shape[1:]
    torch.testing.assert_close(second.context, model.dec_t(source_vectors(model, top)))


def source_vectors(model: Any, top: Tensor) -> Tensor:
    vectors: Tensor = model.quantize_t.embed_code(top).permute(0, 3, 1, 2)
    return vectors


def test_two_levels_have_the_numbers_of_the_model() -> None:
    check_two_levels(TwoLevels().eval(), images())


@pytest.mark.skipif("NCPRIOR_VQVAE2" not in os.environ, reason="needs the published code")
def test_two_levels_have_the_numbers_of_the_published_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NCPRIOR_VQVAE2 is a checkout of rosinality/vq-vae-2-pytorch."""
    monkeypatch.syspath_prepend(os.environ["NCPRIOR_VQVAE2"])
    assert Path(os.environ["NCPRIOR_VQVAE2"], "vqvae.py").is_file()
    sys.modules.pop("distributed", None)
    import vqvae  # type: ignore[import-not-found]

    model = vqvae.VQVAE(channel=16, n_res_channel=4, embed_dim=8, n_embed=20).eval()
    x = 2 * torch.rand(4, 3, 32, 32) - 1
    check_two_levels(model, x)
    source = VQVAE2Source(model)
    check_source(rebase(source, fit_code_bases(source, x, kind="frequencies")), x)


def test_q_has_all_its_mass_on_the_codes_of_the_encoder() -> None:
    source, x = scalar(), torch.rand(5, 3)
    q = posterior_of(source.group(source.start(5, source.encode(x))))
    codes = nearest(x)
    assert torch.equal(q.sample(), codes)
    assert torch.equal(q.log_prob(codes), torch.zeros(5))
    assert (q.log_prob((codes + 1) % 8) == -torch.inf).all()


def test_the_prior_has_to_be_fitted_first() -> None:
    source, x = scalar(), torch.rand(20, 3)
    message = (
        r"codes of this model have no prior. Fit one: rebase\(source, fit_code_bases\(source, x"
    )
    with pytest.raises(ValueError, match=message):
        NCPrior.for_source(source, x)


@pytest.mark.filterwarnings("ignore:Reconstructions of a row")  # untrained models
@pytest.mark.parametrize("levels", (1, 2))
def test_heads_on_a_network_train_from_cached_proposals(levels: int) -> None:
    """The base is drawn from once per row, and the model stays as it was."""
    model: Any = TwoLevels().eval() if levels == 2 else vq_model()
    source, x = (VQVAE2Source if levels == 2 else VQModelSource)(model), images(40)
    bases = fit_code_bases(source, x, width=8, depth=1, steps=2, progress=False)
    before = everything(model)
    prior = NCPrior.for_source(rebase(source, bases), x, width=8, depth=1)
    cached = {"num_cached_proposals": 20} if levels == 1 else {"cache_epochs": float("inf")}
    settings = FitSettings(**cached)
    history = fit(prior, x, steps=5, batch_size=10, settings=settings, progress=False)
    assert len(history.rows[-1].loss) == levels
    assert everything(model) == before


def test_other_objects_are_refused() -> None:
    with pytest.raises(TypeError, match=r"must be a VQModel.*got a Linear without encode, decode"):
        VQModelSource(nn.Linear(1, 1))
    with pytest.raises(TypeError, match=r"rosinality.*got a VQModel without decode_code"):
        VQVAE2Source(vq_model())
    for wrong in (None, 3, TwoLevels):
        with pytest.raises(TypeError, match="model must be of type Module"):
            VQVAE2Source(wrong)
    for source in (VQModelSource, VQVAE2Source):
        with pytest.raises(ValueError, match="training mode"):
            source((vq_model() if source is VQModelSource else TwoLevels()).train())


@pytest.mark.parametrize(
    "make", (lambda: VQModelSource(vq_model()), lambda: VQVAE2Source(TwoLevels().eval()))
)
def test_bytes_are_refused(make: Callable[[], VQSource]) -> None:
    for wrong in (255 * torch.rand(4, 3, 8, 8), torch.zeros(4, 3, 8, 8, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"takes x .*Scale images"):
            make().encode(wrong)


def test_encoders_that_return_something_else_are_refused() -> None:
    def source(encode: Callable[[Tensor], Any], **options: Any) -> VQSource:
        return VQSource(encode, lambda *z: z[0].float(), **{"num_categories": 3, **options})

    x = torch.zeros(4, 2)
    with pytest.raises(TypeError, match=r"whole numbers .*got a tensor of float32, \(4, 2\)"):
        source(lambda x: x).encode(x)
    with pytest.raises(ValueError, match=r"level 0 must be from 0 to num_categories - 1 = 2"):
        source(lambda x: x.long() + 3).encode(x)
    with pytest.raises(ValueError, match="codes of 1 levels; got 2"):
        source(lambda x: (x.long(), x.long())).encode(x)
    with pytest.raises(ValueError, match="2 levels, no condition and no context"):
        source(lambda x: (x.long(), x.long()), num_categories=[3, 3])
    with pytest.raises(ValueError, match="1 levels, no condition and a context"):
        source(lambda x: x.long(), context=lambda z: z)
    with pytest.raises(ValueError, match="1 levels, a condition and no context"):
        source(lambda x: x.long(), condition=lambda batch: batch[1])
    with pytest.raises(ValueError, match="takes no condition"):
        source(lambda x: x.long()).start(4, condition=x)


PROBS = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6]])  # p(z | label)


def labelled(rows: int) -> tuple[Tensor, Tensor]:
    """Codes of shape (1,), and labels that they depend on."""
    label = torch.randint(2, (rows,))
    return torch.multinomial(PROBS[label], 1), label


def of_label(label: Tensor) -> Tensor:
    return nn.functional.one_hot(label, 2).float()


def given_label(**options: Any) -> VQSource:
    parts: dict[str, Any] = {"condition": lambda batch: batch[1], "context": of_label}
    return VQSource(lambda x: x, lambda z: z.float(), num_categories=3, **parts | options)


def shares(z: Tensor) -> Tensor:
    return nn.functional.one_hot(z.flatten(), 3).float().mean(0)


def test_bases_and_heads_see_a_label() -> None:
    """p(z | label) is a table: the network learns it, and so do heads on frequencies without it."""
    torch.manual_seed(0)
    data = TensorDataset(*labelled(4000))
    source = given_label()
    (network,) = fit_code_bases(source, data, width=8, depth=1, steps=400, progress=False)
    (frequencies,) = fit_code_bases(source, data, kind="frequencies")
    assert isinstance(network, CodeNetwork)
    log_p = network.given(of_label(torch.arange(2))).log_prob(
        torch.arange(3).view(3, 1, 1).expand(3, 2, 1)
    )
    noise = 4 * (PROBS * (1 - PROBS) / 2000).sqrt()  # of the shares in the data
    assert ((log_p.exp().T - PROBS).abs() < noise + 0.02).all()
    batch = next(iter(DataLoader(data, 256)))
    for base in (network, frequencies):
        based = rebase(source, base)
        check_source(based, batch, condition=batch[1])
        prior = NCPrior.for_source(based, batch, width=16, depth=1)
        cache = {"cache_epochs": float("inf")} if base is network else {}
        fit(prior, data, steps=300, progress=False, settings=FitSettings(**cache))
        for label in range(2):
            c = torch.full((4000,), label)
            drawn = prior.sample(4000, partial(sir, num_proposals=20), condition=c)
            error = 4 * (PROBS[label] * (1 - PROBS[label]) / 2000).sqrt()  # of data and draws
            assert ((shares(drawn.latents[0]) - PROBS[label]).abs() < error + 0.03).all()


def test_a_vq_model_takes_a_condition() -> None:
    options: dict[str, Any] = {"condition": lambda batch: batch[1], "context": of_label}
    source, batch = VQModelSource(vq_model(), **options), (images(), torch.arange(6) % 2)
    based = rebase(source, fit_code_bases(source, [batch], width=8, steps=2, progress=False))
    check_source(based, batch, condition=batch[1])
    prior = NCPrior.for_source(based, batch, width=8)
    sample = prior.sample(2, partial(sir, num_proposals=2), condition=torch.arange(2))
    assert sample.x.shape == (2, 3, 8, 8)


def test_all_levels_see_a_condition_and_the_levels_before() -> None:
    seen: list[tuple[Tensor, ...]] = []

    def context(label: Tensor, *before: Tensor) -> Tensor:
        seen.append((label, *before))
        return torch.cat([of_label(label), *(z.float() for z in before)], 1)

    source = given_label(context=context)
    two = VQSource(
        lambda x: (x, 2 - x),
        lambda top, bottom: (top + bottom).float(),
        num_categories=[3, 3],
        condition=lambda batch: batch[1],
        context=context,
    )
    z, label = labelled(6)
    bases = fit_code_bases(two, [(z, label)], width=8, depth=1, steps=2, progress=False)
    assert [base.context_shape for base in bases if isinstance(base, CodeNetwork)] == [(2,), (3,)]
    check_source(rebase(two, bases), (z, label), condition=label)
    seen.clear()
    sample_posterior(two, (z, label))
    assert [len(arguments) for arguments in seen] == [1, 2]
    assert torch.equal(seen[1][0], label)
    assert torch.equal(seen[1][1], z)
    with pytest.raises(ValueError, match="needs a condition; got none"):
        source.start(4)
    with pytest.raises(ValueError, match="walk has 4 rows; got 6 rows of condition"):
        source.start(4, condition=label)
    with pytest.raises(ValueError, match="one row per row of x; got 5 rows for 6 of x"):
        source.encode((z, label[:5]))
    for wrong, message in ((label + 7, "failed on a condition"), (label.float(), "labels.long")):
        with pytest.raises(ValueError, match=message):
            source.group(source.start(6, condition=wrong))
    short = given_label(context=lambda c: of_label(c)[:5])
    with pytest.raises(ValueError, match=r"one row for each of the 6 rows of c; got .*\(5, 2\)"):
        short.group(short.start(6, condition=label))
    with pytest.raises(TypeError, match="A condition must be a tensor"):
        given_label(condition=lambda batch: "label").encode((z, label))


def test_bases_of_all_levels_see_the_levels_before() -> None:
    """The bottom codes are a copy of the top ones: given them they cost almost nothing."""
    x = torch.randint(4, (2000, 2, 2))
    source = VQSource(
        lambda x: (x, x),
        lambda top, bottom: bottom.float(),
        num_categories=[4, 5],
        context=lambda top: nn.functional.one_hot(top, 4).movedim(-1, 1).float(),
    )
    top, bottom = fit_code_bases(source, x, width=16, depth=1, steps=300, progress=False)
    assert (top.num_categories, bottom.num_categories) == (4, 5)
    assert isinstance(bottom, CodeNetwork)
    exact = 4 * torch.tensor(4.0).log()
    assert exact - 0.1 < -top.log_prob(x).mean() < exact + 0.3
    context = nn.functional.one_hot(x, 4).movedim(-1, 1).float()
    assert -bottom.given(context).log_prob(x).mean() < 0.5
    silent = rebase(source, [SampleOnly(top), SampleOnly(CodeFrequencies(torch.zeros(2, 2, 5)))])
    counts = fit_code_bases(silent, x, kind="frequencies")
    assert [base.num_categories for base in counts] == [4, 5]  # as the VQ-VAE says
    with pytest.raises(TypeError, match="Frequencies have no options; got steps"):
        fit_code_bases(source, x, kind="frequencies", steps=3)
    with pytest.raises(ValueError, match="kind must be one of 'network', 'frequencies'"):
        fit_code_bases(source, x, kind="mixture")


class MyPixelCNN:
    """Somebody's network over one grid of codes, with no interface but what is asked for."""

    num_categories = 8

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return torch.randint(8, (*sample_shape, 2, 3))


class MyTransformer(MyPixelCNN):
    """Somebody's network over the codes of a level, given those before."""

    def given(self, context: Tensor) -> Any:
        return Independent(Categorical(logits=context[:, None, None] * torch.ones(2, 3, 1)), 2)


def test_networks_of_ones_own_are_bases() -> None:
    source, x = scalar(), torch.rand(20, 2, 3)
    prior = NCPrior.for_source(rebase(source, MyPixelCNN()), x, width=8)
    history = fit(prior, x, steps=3, batch_size=8, progress=False)
    assert len(history.best_step) == 1
    assert prior.sample(5, partial(sir, num_proposals=4)).latents[0].shape == (5, 2, 3)
    two = VQSource(
        lambda x: (nearest(x), nearest(x)),
        lambda top, bottom: CODEBOOK[bottom],
        num_categories=[8, 8],
        context=lambda top: nn.functional.one_hot(top.flatten(1).sum(1) % 8, 8).float(),
    )
    based = rebase(two, [MyPixelCNN(), MyTransformer()])
    check_source(based, x)
    prior = NCPrior.for_source(based, x, width=8)
    assert [head.config()["num_categories"] for head in prior.heads] == [8, 8]
    assert prior.sample(5, partial(sir, num_proposals=4)).x.shape == (5, 2, 3)


def test_flat_indices_are_no_rows() -> None:
    """Bases and heads of single codes were fitted, in silence."""
    source = VQSource(lambda x: x.long().flatten(), lambda z: z.float(), num_categories=3)
    with pytest.raises(ValueError, match=r"one row of codes per row of x; got 8 rows for 4"):
        source.encode(torch.zeros(4, 2))
