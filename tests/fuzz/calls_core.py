"""Calls of the core: sources, NCPrior, samplers, heads, NCE, the trainer, jobs."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from fuzz.calls import call
from fuzz.kinds import (
    ANYTHING,
    BASE,
    DROPOUT,
    FLAG,
    INNER,
    LIST_OF_LATENTS,
    LOG_RATIO,
    MAX_NORM,
    MODULE,
    NETWORK,
    NO_CONDITION,
    OPTIONAL_MODULE,
    OPTIONAL_NETWORK,
    OPTIONAL_SAMPLER,
    OPTIONAL_SHAPE,
    OPTIONAL_TO_DISTRIBUTION,
    PATH,
    PRECISION,
    PRIOR,
    SAMPLER,
    SEED,
    SHAPE,
    SOURCE,
    TO_DISTRIBUTION,
    Kind,
    X,
    count,
    function,
    instance,
    number,
    opened,
    steps,
    tensor,
    unsure,
)
from fuzz.values import LAYERS, Value, constant
from fuzz.world import World
from torch import nn

import ncprior
from ncprior import Group, NCETrainer, NCPrior, SingleGroup, distributions, jobs, nce, source
from ncprior import samplers as s
from ncprior.__main__ import main
from ncprior.heads import CategoricalHead, ConvHead, MLPHead, ProductHead
from ncprior.testing import check_source

Built = tuple[Any, dict[str, Any]]
TRAINS = {"trains": True}
GROUP = instance(Group)
INDEX = count(0, 0)

# --- sources

# A sample of NaN is returned with a warning.
DECODER = replace(
    NETWORK, pool=tuple(v._replace(valid=None) if v.name == "to NaN" else v for v in NETWORK.pool)
)


@call(
    "ncprior.SingleGroup",
    prior=BASE,
    posterior=TO_DISTRIBUTION,
    decoder=DECODER,
    module=OPTIONAL_MODULE,
    likelihood=OPTIONAL_TO_DISTRIBUTION,
    condition=function(*LAYERS, none=True),
    context=function(*LAYERS, none=True),
    features=OPTIONAL_NETWORK,
)
def _(w: World) -> Built:
    """Made, and used as every user does."""

    def make(**parts: Any) -> None:
        made = SingleGroup(**parts)
        _, state = source.sample_posterior(made, w.x)
        made.decode(state)
        if parts["likelihood"] is not None:
            made.likelihood(state)
        NCPrior.for_source(made, w.x, width=4, depth=1).sample(3, w.sampler)

    parts = {"prior": w.base, "posterior": w.vae.posterior, "decoder": w.vae.decode}
    return make, {**parts, "module": w.vae, "likelihood": w.likelihood}


def _state(w: World) -> Any:
    return w.source.advance(w.source.start(24, w.source.encode(w.x)), w.z)


METHODS: dict[str, tuple[dict[str, Kind], Any]] = {
    "encode": ({"x": opened(X)}, lambda w: {"x": w.x}),
    "start": (
        {"batch_size": unsure(count()), "condition": NO_CONDITION},
        lambda w: {"batch_size": 24, "encoding": w.source.encode(w.x)},
    ),
    "group": ({}, lambda w: {"state": w.source.start(24)}),
    "advance": ({}, lambda w: {"state": w.source.start(24), "z": w.z}),
    "decode": ({}, lambda w: {"state": _state(w)}),
    "likelihood": ({}, lambda w: {"state": _state(w)}),
    "observed": ({"batch": opened(X)}, lambda w: {"batch": w.x}),
    "features": ({}, lambda w: {"k": 0, "z": w.z}),
    "shared_prior": ({}, lambda w: {}),
    "facts": ({}, lambda w: {}),
}


def _method(owner: str, make: Any, name: str) -> None:
    kinds, arguments = METHODS[name]
    call(f"{owner}.{name}", **kinds)(lambda w: (getattr(make(w), name), arguments(w)))


for _name in METHODS:
    _method("ncprior.SingleGroup", lambda w: w.source, _name)
for _name in METHODS:
    _method("ncprior.source.WrappedSource", lambda w: source.WrappedSource(w.source), _name)


@call("ncprior.source.WrappedSource.fingerprint")
def _(w: World) -> Built:
    return source.WrappedSource(w.source).fingerprint, {}


@call("ncprior.source.WrappedSource", source=SOURCE)
def _(w: World) -> Built:
    return source.WrappedSource, {"source": w.source}


@call("ncprior.source.require_source", source=SOURCE)
def _(w: World) -> Built:
    return source.require_source, {"source": w.source}


@call("ncprior.source.visit", source=SOURCE, choose=function(*LAYERS[:4]))
def _(w: World) -> Built:
    return source.visit, {
        "source": w.source,
        "state": w.source.start(4),
        "choose": lambda k, group: group.prior.sample(),
    }


@call("ncprior.source.sample_posterior", source=SOURCE, x=X)
def _(w: World) -> Built:
    return source.sample_posterior, {"source": w.source, "x": w.x}


@call("ncprior.source.posterior_of", group=GROUP)
def _(w: World) -> Built:
    return source.posterior_of, {"group": Group(w.base, w.base)}


@call("ncprior.source.num_rows", tree=ANYTHING)
def _(w: World) -> Built:
    return source.num_rows, {"tree": w.x}


@call("ncprior.source.device_of", source=SOURCE)
def _(w: World) -> Built:
    return source.device_of, {"source": w.source}


# No rows have no draws, and rows of NaN may have draws of NaN.
OR_NO_ROWS = replace(
    X,
    pool=tuple(
        v._replace(valid=None) if "NaN" in v.name or v.name == "no rows" else v for v in X.pool
    ),
)


@call("ncprior.source.contrastive_pairs", source=SOURCE, x=OR_NO_ROWS, num_draws=count())
def _(w: World) -> Built:
    return source.contrastive_pairs, {"source": w.source, "x": w.x}


@call(
    "ncprior.testing.check_source",
    source=SOURCE,
    x=X,
    condition=NO_CONDITION,
    options={"slow": True},
)
def _(w: World) -> Built:
    return check_source, {"source": w.source, "x": w.x}


# --- distributions


@call("ncprior.distributions.expand", prior=BASE, batch_size=count(0))
def _(w: World) -> Built:
    return distributions.expand, {"prior": w.base, "batch_size": 3}


@call("ncprior.distributions.is_expanded", prior=ANYTHING)
def _(w: World) -> Built:
    return distributions.is_expanded, {"prior": w.base}


@call("ncprior.distributions.is_parameters", tree=ANYTHING)
def _(w: World) -> Built:
    return distributions.is_parameters, {"tree": distributions.parameters(w.base)}


@call("ncprior.distributions.parameters", distribution=ANYTHING)
def _(w: World) -> Built:
    return distributions.parameters, {"distribution": w.base}


@call("ncprior.distributions.build")
def _(w: World) -> Built:
    return distributions.build, {"tree": distributions.parameters(w.base)}


# --- NCE

NOISE_WEIGHT = number(0, open_low=True)
LOG_R = replace(tensor(nan=None, rank=None), tensors=False)  # of any shape, also ()


@call("ncprior.nce_loss", log_r_posterior=LOG_R, log_r_prior=LOG_R, noise_weight=NOISE_WEIGHT)
def _(w: World) -> Built:
    return ncprior.nce_loss, {"log_r_posterior": w.x[:, 0], "log_r_prior": w.x[:, 1]}


@call("ncprior.nce.nce_terms", log_r_posterior=LOG_R, log_r_prior=LOG_R, noise_weight=NOISE_WEIGHT)
def _(w: World) -> Built:
    return nce.nce_terms, {"log_r_posterior": w.x[:, 0], "log_r_prior": w.x[:, 1]}


@call("ncprior.nce.score_loss", slope=LOG_R, posterior_score=LOG_R, prior_score=LOG_R)
def _(w: World) -> Built:
    names = ("slope", "posterior_score", "prior_score")
    return nce.score_loss, {name: w.x[None].clone() for name in names}


# --- the prior


def _heads(value: Any) -> bool | None:
    if isinstance(value, nn.Module):
        return None
    return None if isinstance(value, list | tuple) and len(value) == 1 else False


class Column(nn.Module):
    """A head of a wrong shape."""

    def forward(self, z: Any, context: Any = None) -> Any:
        """log r as a column."""
        return z[..., :1]


HEADS = Kind(
    "heads",
    _heads,
    (
        Value("two heads", lambda w, v: [v, v], False),
        Value("the VAE's encoder", lambda w, v: w.vae.encoder, False),
        Value("a class", lambda w, v: [MLPHead], False),
        Value("a head of another width", lambda w, v: MLPHead((5,)), None),
        Value("a head with a context", lambda w, v: MLPHead((2,), context_shape=(3,)), None),
        *(v for v in instance(nn.Module).pool if v.name != "[None]"),
        Value("[None]", lambda w, v: [None], False),
    ),
)


@call("ncprior.NCPrior", source=SOURCE, heads=HEADS)
def _(w: World) -> Built:
    return NCPrior, {"source": w.source, "heads": w.prior.heads[0]}


@call(
    "ncprior.NCPrior.for_source",
    source=SOURCE,
    x=X,
    width=count(),
    depth=count(0),
    dropout=DROPOUT,
    kind=instance(type, none=True),
)
def _(w: World) -> Built:
    return NCPrior.for_source, {"source": w.source, "x": w.x, "width": 4, "depth": 1}


LOSS = {"x": X, "noise_weight": NOISE_WEIGHT, "num_draws": count()}


@call("ncprior.NCPrior.nce_loss", **LOSS)
def _(w: World) -> Built:
    return w.prior.nce_loss, {"x": w.x}


@call("ncprior.NCPrior.forward", **LOSS)
def _(w: World) -> Built:
    return w.prior, {"x": w.x}


# A loss may be NaN: the trainer looks at the losses, once in many steps.
X_OR_NAN = replace(X, pool=tuple(v._replace(valid=None) if "NaN" in v.name else v for v in X.pool))


@call("ncprior.NCPrior.group_losses", **(LOSS | {"x": X_OR_NAN}), precision=PRECISION)
def _(w: World) -> Built:
    return w.prior.group_losses, {"x": w.x}


@call(
    "ncprior.NCPrior.sample",
    batch_size=count(),
    sampler=SAMPLER,
    condition=NO_CONDITION,
    draw_x=FLAG,
)
def _(w: World) -> Built:
    return w.prior.sample, {"batch_size": 3, "sampler": w.sampler}


@call("ncprior.NCPrior.log_ratio", latents=LIST_OF_LATENTS, condition=NO_CONDITION)
def _(w: World) -> Built:
    return w.prior.log_ratio, {"latents": [w.z]}


@call("ncprior.NCPrior.log_r", k=INDEX, z=INNER, context=NO_CONDITION, precision=PRECISION)
def _(w: World) -> Built:
    return w.prior.log_r, {"k": 0, "z": w.z, "context": None}


@call("ncprior.NCPrior.is_on", k=INDEX)
def _(w: World) -> Built:
    return w.prior.is_on, {"k": 0}


@call("ncprior.NCPrior.draw", k=INDEX, group=GROUP, sampler=SAMPLER)
def _(w: World) -> Built:
    return w.prior.draw, {"k": 0, "group": w.source.group(w.source.start(3)), "sampler": w.sampler}


@call("ncprior.NCPrior.disabled")
def _(w: World) -> Built:
    return w.prior.disabled, {}


@call("ncprior.NCPrior.extra_repr")
def _(w: World) -> Built:
    return w.prior.extra_repr, {}


MODULES = ("a VAE", "a prior", "a linear layer")  # torch registers them instead


def _set(prior: NCPrior, w: World, name: str, value: Any) -> None:
    before = getattr(prior, name)
    try:
        setattr(prior, name, value)
        prior.sample(3, w.sampler)
    finally:
        setattr(prior, name, before)


@call("ncprior.NCPrior.strength", value=number(0).without(*MODULES))
def _(w: World) -> Built:
    return partial(_set, w.prior, w, "strength"), {"value": 0.5}


@call(
    "ncprior.NCPrior.active",
    value=Kind(
        "a list of bools",
        lambda v: (
            v in ([True], [False])
            if isinstance(v, list)
            else None
            if hasattr(v, "__len__")
            else False
        ),
        (
            constant("[]", [], False),
            constant("[True, True]", [True, True], False),
            constant("['a']", ["a"], False),
            constant("[None]", [None], False),
            constant("None", None),
            constant("2.5", 2.5),
            constant("'text'", "text", False),
        ),
    ),
)
def _(w: World) -> Built:
    return partial(_set, w.prior, w, "active"), {"value": [True]}


def _set_sampler(prior: NCPrior, value: Any) -> None:
    try:
        prior.sampler = value
        if value is not None:
            prior.sample(3)
    finally:
        prior.sampler = None


@call("ncprior.NCPrior.sampler", value=OPTIONAL_SAMPLER)
def _(w: World) -> Built:
    return partial(_set_sampler, w.prior), {"value": w.sampler}


@call("ncprior.NCPrior.precision", value=PRECISION.without(*MODULES))
def _(w: World) -> Built:
    return partial(_set, w.prior, w, "precision"), {"value": torch.float32}


# --- the trainer


def _adam(w: World) -> torch.optim.Optimizer:
    return torch.optim.AdamW(w.prior.parameters(), 1e-3)


OPTIMIZER = instance(
    torch.optim.Optimizer,
    more=(
        Value(
            "an optimizer of the VAE", lambda w, v: torch.optim.SGD(w.vae.parameters(), 0.1), False
        ),
        Value("the class Adam", lambda w, v: torch.optim.Adam, False),
        Value(
            "an optimizer of other weights",
            lambda w, v: torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1),
            None,
        ),
    ),
)
TRAINER = {
    "backward": function(*LAYERS[:1]),
    "noise_weight": NOISE_WEIGHT,
    "num_draws": count(),
    "max_grad_norm": MAX_NORM,
    "precision": PRECISION,
    "group_parallel": FLAG,
}


@call("ncprior.NCETrainer", prior=PRIOR, optimizer=OPTIMIZER, **TRAINER, options=TRAINS)
def _(w: World) -> Built:
    def make(**arguments: Any) -> None:
        NCETrainer(**arguments).step(w.x)

    return make, {"prior": w.prior, "optimizer": _adam(w)}


@call("ncprior.NCETrainer.step", x=X, options=TRAINS)
def _(w: World) -> Built:
    return NCETrainer(w.prior, _adam(w)).step, {"x": w.x}


@call("ncprior.NCETrainer.owner", k=INDEX)
def _(w: World) -> Built:
    return NCETrainer(w.prior, _adam(w)).owner, {"k": 0}


# --- samplers

BASE_AND_RATIO = {"prior": BASE, "log_ratio": LOG_RATIO}
INIT = tensor(none=True)


def _sampling(w: World, sampler: Any, **options: Any) -> Built:
    prior = distributions.expand(w.base, 4)
    return sampler, {"prior": prior, "log_ratio": w.log_ratio, **options}


@call(
    "ncprior.sir",
    **BASE_AND_RATIO,
    num_proposals=count(),
    chunk_size=count(none=True),
    share_proposals=FLAG,
)
def _(w: World) -> Built:
    return _sampling(w, ncprior.sir, num_proposals=5)


@call(
    "ncprior.langevin",
    **BASE_AND_RATIO,
    num_steps=steps(),
    step_size=number(0, open_low=True),
    adjusted=FLAG,
    init=INIT,
)
def _(w: World) -> Built:
    return _sampling(w, ncprior.langevin, num_steps=2, step_size=0.1, init=w.z[:4])


@call(
    "ncprior.samplers.independence",
    **BASE_AND_RATIO,
    num_steps=steps(),
    init=INIT,
    chunk_size=count(none=True),
)
def _(w: World) -> Built:
    return _sampling(w, s.independence, num_steps=3, init=w.z[:4])


@call(
    "ncprior.samplers.budgeted_rejection",
    **BASE_AND_RATIO,
    num_proposals=count(),
    chunk_size=count(none=True),
    share_proposals=FLAG,
)
def _(w: World) -> Built:
    return _sampling(w, s.budgeted_rejection, num_proposals=5)


@call(
    "ncprior.samplers.rejection", **BASE_AND_RATIO, log_bound=number(), max_tries=count(huge=False)
)
def _(w: World) -> Built:
    sampler, arguments = _sampling(w, s.rejection, log_bound=1.0)
    return sampler, {**arguments, "log_ratio": lambda z: w.log_ratio(z).clamp(max=1.0)}


@call(
    "ncprior.samplers.tempered_smc",
    **BASE_AND_RATIO,
    num_particles=count(),
    num_moves=count(huge=False),
    num_leapfrogs=count(huge=False),
    step_size=number(0, open_low=True),
    ess_fraction=number(0, 1, open_low=True, open_high=True),
    share_particles=FLAG,
    max_temperatures=count(huge=False),
)
def _(w: World) -> Built:
    return _sampling(w, s.tempered_smc, num_particles=8)


def _sampler_of(w: World, make: Any, **options: Any) -> Built:
    def draw(**arguments: Any) -> None:
        w.prior.sample(4, make(**arguments))

    return draw, {**options}


@call("ncprior.samplers.at_temperature", sampler=SAMPLER, temperature=number(0, open_low=True))
def _(w: World) -> Built:
    return _sampler_of(w, s.at_temperature, sampler=w.sampler, temperature=0.9)


@call(
    "ncprior.samplers.sequence",
    **{"*first": SAMPLER.without("()"), "*then": function(*LAYERS[:4]).without("()")},
)
def _(w: World) -> Built:
    def draw(*parts: Any) -> None:
        w.prior.sample(4, s.sequence(*parts))

    then = partial(ncprior.langevin, num_steps=1, step_size=0.1)
    return draw, {"*first": w.sampler, "*then": then}


@call("ncprior.samplers.within_components", sampler=SAMPLER)
def _(w: World) -> Built:
    from ncprior.bases import fit_gaussian, rebase

    prior = NCPrior(rebase(w.source, fit_gaussian(w.z)), w.prior.heads)

    def draw(sampler: Any) -> None:
        prior.sample(4, s.within_components(sampler))

    return draw, {"sampler": w.sampler}


@call("ncprior.samplers.describe", sampler=ANYTHING)
def _(w: World) -> Built:
    return s.describe, {"sampler": w.sampler}


@call("ncprior.samplers.supports_langevin", prior=ANYTHING)
def _(w: World) -> Built:
    return s.supports_langevin, {"prior": w.base}


# --- heads

SIZES = {
    "event_shape": SHAPE,
    "context_shape": OPTIONAL_SHAPE,
    "width": count(),
    "depth": count(0),
    "dropout": DROPOUT,
}


@call("ncprior.heads.MLPHead", **SIZES)
def _(w: World) -> Built:
    return MLPHead, {"event_shape": (2,), "width": 4, "depth": 1}


@call("ncprior.heads.ConvHead", **SIZES | {"width": unsure(count())})
def _(w: World) -> Built:
    return ConvHead, {"event_shape": (2, 4, 4), "width": 8, "depth": 1}


@call("ncprior.heads.CategoricalHead", **SIZES, num_categories=count())
def _(w: World) -> Built:
    return CategoricalHead, {"event_shape": (), "num_categories": 4, "width": 4, "depth": 1}


CONTEXT = INNER


HIDDEN = Kind(
    "a mask",
    lambda v: None,
    (
        Value("all latents", lambda w, v: torch.ones(2, dtype=torch.bool), False),
        Value("numbers", lambda w, v: torch.ones(2), False),
        Value("of another shape", lambda w, v: torch.ones(3, dtype=torch.bool), False),
        Value("None", lambda w, v: None, False),
    ),
)


@call("ncprior.heads.MLPHead.left_out")
def _(w: World) -> Built:
    return MLPHead((2,), width=4, depth=1).left_out, {}


@call("ncprior.heads.MLPHead.leave_out", latents=HIDDEN)
def _(w: World) -> Built:
    return MLPHead((2,), width=4, depth=1).leave_out, {"latents": torch.tensor([True, False])}


@call("ncprior.heads.MLPHead.forward", z=INNER, context=CONTEXT)
def _(w: World) -> Built:
    return MLPHead((2,), context_shape=(3,), width=4, depth=1), {"z": w.z, "context": w.x}


@call("ncprior.heads.ConvHead.forward", z=INNER, context=CONTEXT)
def _(w: World) -> Built:
    head = ConvHead((2, 4, 4), context_shape=(3, 4, 4), width=8, depth=1)
    return head, {"z": torch.randn(5, 2, 4, 4), "context": torch.randn(5, 3, 4, 4)}


CODES = tensor(nan=None, rank=None, whole=None, empty=None)


@call("ncprior.heads.CategoricalHead.forward", z=CODES, context=CONTEXT)
def _(w: World) -> Built:
    head = CategoricalHead((), 4, context_shape=(3,), width=4, depth=1)
    return head, {"z": torch.randint(4, (24,)), "context": w.x}


for _kind in (MLPHead, ConvHead):

    @call(f"ncprior.heads.{_kind.__name__}.log_r")
    def _(w: World, kind: Any = _kind) -> Built:
        shape = (2,) if kind is MLPHead else (2, 4, 4)
        return kind(shape, width=8, depth=1).log_r, {"z": torch.randn(5, *shape), "embedded": 0.0}


@call("ncprior.heads.CategoricalHead.embed", z=CODES)
def _(w: World) -> Built:
    return CategoricalHead((), 4, width=4, depth=1).embed, {"z": torch.randint(4, (24,))}


@call("ncprior.heads.CategoricalHead.fit_scale")
def _(w: World) -> Built:
    head = CategoricalHead((), 4, width=4, depth=1)
    return head.fit_scale, {"z": torch.randint(4, (24,)), "context": None}


for _head in ("CategoricalHead", "ProductHead"):

    @call(f"ncprior.heads.{_head}.rescale", slope=number(), offset=number())
    def _(w: World, kind: str = _head) -> Built:
        head: Any = CategoricalHead((), 4, width=4)
        head = ProductHead([MLPHead((2,))]) if kind == "ProductHead" else head
        return head.rescale, {"slope": 1.0, "offset": 0.0}


@call("ncprior.heads.ProductHead", heads=HEADS)
def _(w: World) -> Built:
    return ProductHead, {"heads": [MLPHead((2,), width=4)]}


@call("ncprior.heads.ProductHead.forward", z=INNER, context=CONTEXT)
def _(w: World) -> Built:
    head = MLPHead((2,), context_shape=(3,), width=4, depth=1)
    return ProductHead([head]), {"z": w.z, "context": w.x}


@call("ncprior.heads.factors", head=ANYTHING)
def _(w: World) -> Built:
    from ncprior.heads import factors

    return factors, {"head": MLPHead((2,))}


@call("ncprior.heads.head_input", source=SOURCE, k=INDEX, z=INNER)
def _(w: World) -> Built:
    from ncprior.heads import head_input

    return head_input, {"source": w.source, "k": 0, "z": w.z}


@call(
    "ncprior.heads.make_head",
    group=GROUP,
    width=count(),
    depth=count(0),
    dropout=DROPOUT,
    kind=instance(type, none=True),
)
def _(w: World) -> Built:
    from ncprior.heads import make_head

    return make_head, {"group": w.source.group(w.source.start(3)), "width": 4, "depth": 1}


@call("ncprior.heads.prepare_head", head=MODULE, context=CONTEXT, precision=PRECISION)
def _(w: World) -> Built:
    from ncprior.heads import prepare_head

    def use(**arguments: Any) -> None:
        prepare_head(**arguments)(torch.randn(5, 24, 2))

    return use, {"head": MLPHead((2,), context_shape=(3,), width=4), "context": w.x}


# --- jobs and the command


@call(
    "ncprior.jobs.sample_parts",
    prior=PRIOR,
    folder=PATH,
    num_samples=count(huge=False),
    sampler=SAMPLER,
    part_size=count(),
    batch_size=count(none=True),
    draw_x=FLAG,
    progress=FLAG,
    seed=SEED,
    condition=NO_CONDITION,
    parts=Kind(
        "part numbers", lambda v: True if v is None else None if hasattr(v, "__iter__") else False
    ),
    options={"slow": True},
)
def _(w: World) -> Built:
    w.folder  # noqa: B018 (made before the call)
    return jobs.sample_parts, {
        "prior": w.prior,
        "folder": w.folder / "job",
        "sampler": w.sampler,
        "num_samples": 5,
        "part_size": 3,
    }


@call("ncprior.jobs.read_parts", folder=PATH)
def _(w: World) -> Built:
    jobs.sample_parts(w.prior, w.folder / "job", sampler=w.sampler, num_samples=5, part_size=3)
    return jobs.read_parts, {"folder": w.folder / "job"}


@call("ncprior.__main__.main", options={"valid": False})
def _(w: World) -> Built:
    return main, {"arguments": ["inspect", "nowhere"]}
