"""Heads of wrong sizes, outputs and modes, and heads that are part of the VAE."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers.problems import GaussianPair
from helpers.toys import VAE, Ladder, base, everything, flat, ladder_prior, stir
from torch import Tensor, nn

from ncprior import Group, NCETrainer, NCPrior, SingleGroup, fit, langevin, sir
from ncprior.distributions import expand
from ncprior.heads import (
    CategoricalHead,
    ConvHead,
    MLPHead,
    ProductHead,
    head_input,
    make_head,
    prepare_head,
)
from ncprior.source import contrastive_pairs, posterior_of, sample_posterior, visit
from ncprior.utils.fingerprints import module_fingerprint
from ncprior.utils.precision import at_precision
from ncprior.utils.visible import visible_tensors

SIR = partial(sir, num_proposals=20)


class Wraps(nn.Module):
    """A head around a function of its own output."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.head, self.change = MLPHead((2,), width=8), change

    def forward(self, z: Tensor, context: Tensor | None = None) -> Any:
        return self.change(self.head(z, context))


WRONG = {
    "a column": (lambda log_r: log_r[..., None], ValueError, r"log r of shape \(\*, B\).*squeeze"),
    "a scalar": (lambda log_r: log_r.mean(), ValueError, r"got \(\) from an input"),
    "a float": (lambda log_r: 0.5, TypeError, "must return log r, a tensor of floats.*got 0.5"),
    "codes": (lambda log_r: log_r.long(), TypeError, "must return log r, a tensor of floats"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("use", ["loss", "step", "log_ratio", "log_r", "sample"])
def test_F13_M7_a_head_that_returns_something_else_raises_everywhere(name: str, use: str) -> None:
    change, kind, match = WRONG[name]
    prior = NCPrior(flat(), Wraps(change))
    x, z = torch.randn(8, 3), torch.randn(8, 2)
    if use == "sample" and name != "a column":
        pytest.skip("samplers have a check of their own")
    uses: dict[str, Callable[[], Any]] = {
        "loss": lambda: prior.nce_loss(x),
        "step": lambda: NCETrainer(prior, torch.optim.AdamW(prior.parameters())).step(x),
        "log_ratio": lambda: prior.log_ratio([z]),
        "log_r": lambda: prior.log_r(0, z, None),
        "sample": lambda: prior.sample(8, SIR),
    }
    match = r"log_ratio must map z" if use == "sample" else f"Head 0 .*{match}"
    with pytest.raises(kind if use != "sample" else ValueError, match=match):
        uses[use]()


def test_F13_a_column_of_one_latent_raises_too() -> None:
    source = SingleGroup(base(1), lambda x: base(1).expand((len(x),)), lambda z: z)
    head = nn.Sequential(nn.Linear(1, 1))
    head.forward = lambda z, context=None: head[0](z)  # type: ignore[method-assign]
    prior = NCPrior(source, head)
    with pytest.raises(ValueError, match="squeeze"):
        prior.nce_loss(torch.randn(8, 1))
    with pytest.raises(ValueError, match="squeeze"):
        prior.log_ratio([torch.randn(8, 1)])


class Inside(nn.Module):
    """A head that holds layers of a VAE."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.out = layers, nn.Linear(8, 1)

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.out(self.layers(z)).squeeze(-1)


def sources_of(vae: VAE) -> dict[str, SingleGroup]:
    return {
        "module": flat(vae),
        "bound methods": SingleGroup(base(), vae.posterior, vae.decode),
        "partial": SingleGroup(
            base(), partial(vae.posterior), partial(lambda v, z: v.decode(z), vae)
        ),
    }


@pytest.mark.parametrize("name", sources_of(VAE()))
def test_F6_a_head_that_holds_a_layer_of_the_vae_raises(name: str) -> None:
    vae = VAE()
    source, before = sources_of(vae)[name], everything(vae)
    with pytest.raises(ValueError, match=r"Heads must not share.*0.layers.0.weight.*features"):
        NCPrior(source, Inside(vae.decoder[:2]))
    tied = nn.Linear(2, 8)
    tied.weight = nn.Parameter(vae.decoder[0].weight.detach())  # another parameter of one memory
    with pytest.raises(ValueError, match="Heads must not share"):
        NCPrior(source, Inside(tied))
    assert everything(vae) == before
    NCPrior(source, Inside(VAE().decoder[:2]))


@pytest.mark.parametrize("wrap", [list, nn.ModuleList, lambda parts: parts[0]])
def test_F6_a_part_of_the_vae_is_no_head(wrap: Callable[[list[nn.Module]], Any]) -> None:
    vae = VAE()
    source = SingleGroup(base(), vae.posterior, vae.decode, module=vae)
    with pytest.raises(ValueError, match="Heads must not share"):
        NCPrior(source, wrap([vae.encoder]))


def test_F6_a_source_that_is_a_module_is_looked_into() -> None:
    source = Ladder(1)
    with pytest.raises(ValueError, match="Heads must not share"):
        NCPrior(source, Inside(source.cells[0]))


class Model(nn.Module):
    """A user's model that holds a VAE and a head, with methods that use the VAE."""

    def __init__(self, *, registers: bool) -> None:
        super().__init__()
        vae, head = VAE(), MLPHead((2,), width=8)
        self.vae, self.head = (vae, head) if registers else ((vae,), (head,))
        self.eval()

    @property
    def own(self) -> VAE:
        return self.vae if isinstance(self.vae, VAE) else self.vae[0]

    def posterior(self, x: Tensor) -> Any:
        return self.encoded(x)

    @torch.no_grad()
    def encoded(self, x: Tensor) -> Any:
        return self.own.posterior(x)

    def decode(self, z: Tensor) -> Tensor:
        return self.own.decode(z)

    def with_self(self, z: Tensor) -> Tensor:
        return type(self).decode(self, z)


@pytest.mark.parametrize("registers", [True, False])
def test_F6_a_model_that_holds_vae_and_prior_is_no_false_alarm(registers: bool) -> None:
    model = Model(registers=registers)
    head = model.head if registers else model.head[0]
    source = SingleGroup(base(), model.posterior, lambda z: model.decode(z))
    model.prior = NCPrior(source, head)
    methods = SingleGroup(base(), model.posterior, model.decode)
    prior = NCPrior(methods, head)
    fit(prior, torch.randn(32, 3), steps=2)
    with pytest.raises(ValueError, match="Heads must not share"):
        NCPrior(source, Inside(model.own.decoder[:2]))


def test_F6_a_prior_inside_of_the_vaes_module_is_left_out() -> None:
    model = Model(registers=True)
    model.head = None
    whole = SingleGroup(base(), model.posterior, model.with_self, module=model)
    model.prior = NCPrior(whole, MLPHead((2,), width=8))
    NCPrior(whole, model.prior.heads)
    with pytest.raises(ValueError, match="Heads must not share"):
        NCPrior(whole, Inside(model.vae.decoder[:2]))


def test_visible_tensors_of_containers() -> None:
    t = [torch.zeros(k) for k in range(1, 5)]
    held = {"a": [t[0], (t[1],)]}
    assert [len(x) for x in visible_tensors((held, partial(max, t[2]), t[3]))] == [1, 2, 3, 4]
    loop: list[Any] = []
    loop.append(loop)
    assert list(visible_tensors((loop, torch.nn.functional.linear, torch, 3, VAE, None))) == []


def test_F19_for_source_returns_a_prior_in_evaluation_mode() -> None:
    prior = NCPrior.for_source(GaussianPair().source(), GaussianPair().data(64), dropout=0.5)
    assert not any(module.training for module in prior.modules())


def test_F19_W12_dropout_in_training_mode_raises_where_log_r_is_used() -> None:
    prior = ladder_prior(dropout=0.5).train()
    latents, x = [torch.randn(5, 2)] * 3, torch.randn(5, 3)
    uses: list[Callable[[], Any]] = [
        lambda: prior.sample(5, SIR),
        lambda: prior.log_ratio(latents),
        lambda: prior.log_r(0, latents[0], torch.randn(5, 8)),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=r"training mode and has Dropout.*prior.eval\(\)"):
            use()
    prior.nce_loss(x)  # training is as it was
    prior.eval()
    assert torch.equal(prior.log_ratio(latents), prior.log_ratio(latents))
    prior.sample(5, SIR)


def test_F19_batch_statistics_of_a_head_raise_too() -> None:
    head = Inside(nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8)))
    with pytest.raises(ValueError, match="has BatchNorm1d"):
        NCPrior(flat(), head).log_ratio([torch.randn(5, 2)])


def test_F19_a_trainer_turns_dropout_on() -> None:
    prior = NCPrior.for_source(GaussianPair().source(), GaussianPair().data(64), dropout=0.5)
    NCETrainer(prior, torch.optim.AdamW(prior.parameters()))
    assert prior.heads[0].training


@pytest.mark.parametrize(
    ("make", "kind", "match"),
    [
        (
            lambda: MLPHead((2,), width=0),
            ValueError,
            r"width must be a whole number in \[1, inf\)",
        ),
        (lambda: MLPHead((2,), width=8.0), TypeError, "width must be a whole number.*got 8.0"),
        (
            lambda: MLPHead((2,), depth=-1),
            ValueError,
            r"depth must be a whole number in \[0, inf\)",
        ),
        (lambda: MLPHead((2,), depth="2"), TypeError, "depth must be a whole number"),
        (
            lambda: MLPHead((2,), dropout=float("nan")),
            ValueError,
            r"dropout must be a number in \[0, 1\)",
        ),
        (lambda: MLPHead((2,), dropout=1.5), ValueError, "dropout must be a number"),
        (lambda: MLPHead(2), TypeError, r"event_shape must be a list of whole numbers.*got 2"),
        (lambda: MLPHead((0,)), ValueError, r"event_shape\[0\] must be"),
        (lambda: MLPHead((2,), context_shape=3), TypeError, "context_shape must be a list"),
        (lambda: ConvHead((2, 4, 4), width=0), ValueError, "width must be a whole number"),
        (lambda: ConvHead((2, 4, 4), width=12), ValueError, "multiple of 8; got .* and 12"),
        (lambda: ConvHead((4,)), ValueError, r"event shape \(C, H, W\)"),
        (lambda: CategoricalHead((), 0), ValueError, "num_categories must be a whole number"),
        (lambda: CategoricalHead((), 2.5), TypeError, "num_categories must be a whole number"),
        (lambda: CategoricalHead((3, 2, 2, 2), 5), ValueError, r"\(H, W\) or \(D, H, W\)"),
        (lambda: ProductHead([]), ValueError, "at least one head"),
        (lambda: ProductHead([MLPHead]), TypeError, "got the class MLPHead"),
        (lambda: make_head(base()), TypeError, "group must be of type Group"),
        (
            lambda: make_head(Group(base().expand((9,))), widht=8),
            TypeError,
            "depth, dropout, width; got widht",
        ),
        (
            lambda: make_head(Group(base().expand((9,))), kind="mlp"),
            TypeError,
            "kind must be MLPHead",
        ),
        (lambda: make_head(Group(base().expand((0,)))), ValueError, "must have rows; got none"),
        (lambda: NCPrior(flat(), None), TypeError, "A head must be of type Module; got None"),
        (lambda: NCPrior(flat(), MLPHead), TypeError, "got the class MLPHead"),
        (lambda: NCPrior(flat(), [sir]), TypeError, "A head must be of type Module"),
        (
            lambda: NCPrior(VAE(), MLPHead((2,))),
            TypeError,
            "got an object of type VAE. Subclass it",
        ),
    ],
)
def test_F26_F36_sizes_and_kinds_of_heads(make: Callable[[], Any], kind: type, match: str) -> None:
    with pytest.raises(kind, match=match):
        make()


Z, HEAD = torch.randn(4, 2), MLPHead((2,), width=8)
CODES = CategoricalHead((), 5, width=8)
SHORT: Any = lambda p, r: sir(p, r, num_proposals=3)._replace(z=torch.randn(1, 2))

WRONG_CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "source": (lambda: sample_posterior(None, Z), TypeError, "A source is a subclass"),
    "group": (lambda: posterior_of(None), TypeError, "group must be of type Group"),
    "pairs": (lambda: next(contrastive_pairs(None, Z)), TypeError, "A source is a subclass"),
    "choose": (lambda: visit(flat(), flat().start(2), None), TypeError, "choose must be"),
    "no z": (lambda: visit(flat(), flat().start(2), lambda *_: None), TypeError, "got None"),
    "expand": (lambda: expand(2.5, 3), TypeError, "prior must draw z; got 2.5"),
    "rows": (lambda: expand(base(), 2.5), TypeError, "batch_size must be a whole number"),
    "empty": (lambda: flat().encode([]), ValueError, "got an empty list"),
    "modules": (lambda: SingleGroup(base(), abs, abs, module=[]), TypeError, "module must be"),
    "input": (lambda: head_input(None, 0, Z), TypeError, "A source is a subclass"),
    "k": (lambda: head_input(flat(), 1, Z), ValueError, "k must be a whole number in"),
    "z": (lambda: head_input(flat(), 0, [1.0]), TypeError, "z must be of type Tensor"),
    "complex": (lambda: HEAD(Z.to(torch.complex64)), TypeError, "z as real numbers or codes"),
    "bool": (lambda: CODES(Z[:, 0] > 0), TypeError, "z as real numbers or codes"),
    "codes": (lambda: CODES(torch.tensor([7])), ValueError, "codes from 0 to 4; got others"),
    "array": (lambda: HEAD(Z, Z.numpy()), TypeError, "context must be a tensor of real numbers"),
    "scalar": (lambda: HEAD(Z, torch.tensor(3.0)), TypeError, "context must be a tensor"),
    "log_r": (lambda: flat_prior().log_r(0, Z, 2.5), TypeError, "context must be a tensor"),
    "latents": (lambda: flat_prior().log_ratio([None]), TypeError, "A latent must be"),
    "slope": (lambda: HEAD.rescale(math.nan, 0.0), ValueError, "slope must be a number"),
    "offset": (lambda: ProductHead([HEAD]).rescale(1.0, None), TypeError, "offset must be"),
    "factors": (lambda: ProductHead(HEAD), TypeError, "heads must be of type list"),
    "prepared": (lambda: prepare_head(None), TypeError, "head must be of type Module"),
    "a mapping": (lambda: MLPHead({}), TypeError, "event_shape must be a list of whole numbers"),
    "bytes": (lambda: MLPHead(b"ab"), TypeError, "event_shape must be a list"),
    "a number": (lambda: MLPHead(np.array(3)), TypeError, "event_shape must be a list"),
    "0-d": (lambda: NCPrior(flat(), np.array(3)), TypeError, "A head must be of type Module"),
    "draw": (lambda: flat_prior().sample(4, SHORT), ValueError, r"must have shape \(B, \*event\)"),
    "module": (lambda: module_fingerprint(True), TypeError, "module must be of type Module"),
    "device": (lambda: at_precision("", torch.float32), ValueError, "device_type must be"),
    "dtype": (lambda: at_precision("cpu", 2.5), TypeError, "precision must be of type dtype"),
    "width": (lambda: NCPrior.for_source(flat(), torch.randn(8, 3), width=0), ValueError, "width"),
    "nu": (lambda: flat_prior().nce_loss(torch.randn(8, 3), 0.0), ValueError, "noise_weight"),
}


def flat_prior() -> NCPrior:
    return NCPrior(flat(), MLPHead((2,), width=8))


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_wrong_argument_is_named(name: str) -> None:
    call, kind, match = WRONG_CALLS[name]
    with pytest.raises(kind, match=match):
        call()


def test_arguments_are_validated_before_anything_is_drawn() -> None:
    x, prior, source = torch.randn(8, 3), flat_prior(), flat()
    before = torch.get_rng_state()
    for call in (
        lambda: NCPrior.for_source(source, x, width=0),
        lambda: NCPrior.for_source(source, x, dropout=2.0),
        lambda: make_head(source.group(source.start(4)), depth=-1),
        lambda: prior.nce_loss(x, noise_weight=0.0),
        lambda: next(prior.group_losses(x, num_draws=0)),
    ):
        with pytest.raises(ValueError, match="must be a"):
            call()
    assert torch.equal(torch.get_rng_state(), before)


def test_sizes_may_be_tensors() -> None:
    head = MLPHead(torch.tensor([2]), width=torch.tensor(8), depth=torch.tensor(1))  # type: ignore[arg-type]
    assert head.config()["width"] == 8 and head(Z).shape == (4,)


def test_latents_of_no_rows_have_log_ratios_of_no_rows() -> None:
    assert HEAD(Z[:0]).shape == (0,)


def test_F35_codes_as_floats_raise() -> None:
    with pytest.raises(TypeError, match="codes, whole numbers; got a tensor of float32"):
        CategoricalHead((), 5, width=8)(torch.rand(3))


@pytest.mark.parametrize("adjusted", [True, False])
def test_F5_features_without_a_gradient_raise_in_langevin(adjusted: bool) -> None:
    vae = VAE()
    ula = partial(langevin, num_steps=2, step_size=0.1, adjusted=adjusted)
    cuts = (torch.no_grad()(vae.decoder[:2].forward), lambda z: vae.decoder[:2](z).detach())
    for features in cuts:
        prior = stir(NCPrior(flat(vae, features=features), MLPHead((8,))))
        with pytest.raises(ValueError, match=r"Group 0: log_ratio changes with z.*features="):
            prior.sample(5, ula)
        prior.sample(5, SIR)
        prior.nce_loss(torch.randn(5, 3))
    NCPrior(flat(vae, features=vae.decoder[:2]), MLPHead((8,))).sample(5, ula)


@pytest.mark.parametrize("rows", [1, 3])
def test_W12_few_rows_give_the_scales_of_many(rows: int) -> None:
    problem = GaussianPair()
    many = NCPrior.for_source(problem.source(), problem.data(4000), width=8).heads[0].scale.sd
    for _ in range(10):
        few = NCPrior.for_source(problem.source(), problem.data(rows), width=8).heads[0].scale.sd
        assert ((few / many).log().abs() < 0.7).all()


def test_W12_one_row_does_not_show_the_scale_of_a_context() -> None:
    group = Group(base().expand((1,)), context=torch.randn(1, 3))
    with pytest.warns(UserWarning, match="One row does not show the scales of a context"):
        make_head(group, width=8)


def test_C2_heads_made_under_inference_mode_can_be_trained() -> None:
    problem = GaussianPair()
    with torch.inference_mode():
        prior = NCPrior.for_source(problem.source(), problem.data(64), width=8)
        head = make_head(problem.source().group(problem.source().start(16)), width=8)
    prior.nce_loss(problem.data(64)).sum().backward()
    assert not any(p.is_inference() for p in (*prior.parameters(), *head.parameters()))
