"""Calls of bases, diagnostics, evaluation and the demonstration."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from fuzz.calls import call
from fuzz.kinds import (
    BASE,
    BASE_OR_FUNCTION,
    DATA,
    FEATURES,
    FLAG,
    INNER,
    MODULE,
    NO_CONDITION,
    OPTIONAL_DATA,
    OPTIONAL_SHAPE,
    OPTIONAL_TEXT,
    PRIOR,
    PRIOR_OR_SOURCE,
    SAMPLER,
    SEED,
    SOURCE,
    TEXT,
    Kind,
    X,
    choice,
    count,
    function,
    instance,
    number,
    only_invalid,
    opened,
    tensor,
    unsure,
)
from fuzz.values import LAYERS, Value, constant
from fuzz.world import World
from torch import nn

from ncprior import bases, demo, diagnostics, evaluation, vaebm

Built = tuple[Any, dict[str, Any]]
SLOW = {"slow": True, "limit": 6.0}
ROWS = tensor(rank=None)
FITTED = tensor(array=True, rank=None, whole=None)  # latents to fit a base to
FEW = count(huge=False)
RATE = number(0, open_low=True)
PROGRESS = only_invalid(FLAG)

# --- bases


@call("ncprior.bases.JointSource", prior=PRIOR)
def _(w: World) -> Built:
    def use(**arguments: Any) -> None:
        source = bases.JointSource(**arguments)
        source.group(source.start(3)).prior.sample()

    w.prior.sampler = w.sampler
    return use, {"prior": w.prior}


def _joint(w: World) -> bases.JointSource:
    w.prior.sampler = w.sampler
    return bases.JointSource(w.prior)


@call("ncprior.bases.JointSource.encode", x=opened(X))
def _(w: World) -> Built:
    return _joint(w).encode, {"x": w.x}


@call("ncprior.bases.JointSource.start", batch_size=count())
def _(w: World) -> Built:
    return _joint(w).start, {"batch_size": 3}


@call("ncprior.bases.JointSource.latents")
def _(w: World) -> Built:
    source = _joint(w)
    return source.latents, {"z": source.encode(w.x)}


@call("ncprior.bases.JointSource.features")
def _(w: World) -> Built:
    source = _joint(w)
    return source.features, {"k": 0, "z": source.encode(w.x)}


for _name in ("group", "advance", "decode", "likelihood"):

    @call(f"ncprior.bases.JointSource.{_name}")
    def _(w: World, name: str = _name) -> Built:
        source = _joint(w)
        z = source.encode(w.x)
        state = source.advance(source.start(24), z)
        return getattr(source, name), {"state": state, **({"z": z} if name == "advance" else {})}


@call("ncprior.bases.Empirical", z=FITTED)
def _(w: World) -> Built:
    return bases.Empirical, {"z": w.z}


@call("ncprior.bases.NoPrior", reason=TEXT, event_shape=OPTIONAL_SHAPE)
def _(w: World) -> Built:
    return bases.NoPrior, {"reason": "An AE has no prior.", "event_shape": (2,)}


@call("ncprior.bases.NoPrior.sample", options={"valid": False})
def _(w: World) -> Built:
    return bases.NoPrior("An AE has no prior.").sample, {}


SAMPLE_SHAPE = Kind(
    "a sample shape",
    lambda v: None,
    (constant("()", ()), constant("(2, 3)", (2, 3)), constant("torch.Size([0])", torch.Size([0]))),
)


def _mixture(w: World) -> Any:
    return bases.GaussianMixture(torch.zeros(3), torch.randn(3, 2), torch.ones(3, 2))


def _flow(w: World) -> Any:
    import zuko

    return bases.Flow(zuko.flows.NSF(2, hidden_features=(4,)), torch.zeros(2), torch.ones(2))


def _matching(w: World) -> Any:
    net = bases.VelocityNet(2, width=4, depth=1)
    return bases.FlowMatching(net, torch.zeros(2), torch.ones(2), num_steps=2)


BASES = {
    "Empirical": lambda w: bases.Empirical(w.z),
    "GaussianMixture": _mixture,
    "Flow": _flow,
    "FlowMatching": _matching,
}
for _kind, _make in BASES.items():
    _owner = f"ncprior.bases.{_kind}"

    @call(f"{_owner}.sample", sample_shape=SAMPLE_SHAPE)
    def _(w: World, make: Any = _make) -> Built:
        return make(w).sample, {"sample_shape": (4,)}

    @call(f"{_owner}.tensors")
    def _(w: World, make: Any = _make) -> Built:
        return make(w).tensors, {}

    if _kind != "Empirical":

        @call(f"{_owner}.config")
        def _(w: World, make: Any = _make) -> Built:
            return make(w).config, {}

        @call(f"{_owner}.to")
        def _(w: World, make: Any = _make) -> Built:
            return make(w).to, {"device": "cpu"}

    if _kind in ("GaussianMixture", "Flow"):

        @call(f"{_owner}.log_prob", value=INNER)
        def _(w: World, make: Any = _make) -> Built:
            return make(w).log_prob, {"value": w.z}

        @call(f"{_owner}.expand")
        def _(w: World, make: Any = _make) -> Built:
            return make(w).expand, {"batch_shape": (3,)}


@call("ncprior.bases.GaussianMixture.independent_latents")
def _(w: World) -> Built:
    return _mixture(w).independent_latents, {}


for _name in ("log_joint", "whiten", "unwhiten"):

    @call(f"ncprior.bases.GaussianMixture.{_name}")
    def _(w: World, name: str = _name) -> Built:
        mixture = bases.GaussianMixture(torch.zeros(1), torch.zeros(1, 2), torch.ones(1, 2))
        return partial(getattr(mixture, name), w.z), {}


MIXTURES = Kind(
    "mixtures",
    lambda v: None if isinstance(v, list | tuple) and len(v) else False,
    (
        Value("none", lambda w, v: [], False),
        Value("of another width", lambda w, v: [*v, bases.fit_gaussian(w.x)], False),
        Value("one of them", lambda w, v: v[0], False),
        Value("with None", lambda w, v: [*v, None], False),
        *BASE.pool,
    ),
)


@call("ncprior.bases.GaussianMixture.average", mixtures=MIXTURES)
def _(w: World) -> Built:
    return bases.GaussianMixture.average, {"mixtures": [_mixture(w), _mixture(w)]}


@call("ncprior.bases.GaussianMixture.from_sklearn", mixture=only_invalid(instance(type)))
def _(w: World) -> Built:
    from sklearn.mixture import GaussianMixture

    fitted = GaussianMixture(2, random_state=0).fit(w.z.numpy())
    return bases.GaussianMixture.from_sklearn, {"mixture": fitted}


PARAMETERS = tensor(array=None, whole=None)


@call(
    "ncprior.bases.GaussianMixture",
    logits=PARAMETERS,
    loc=PARAMETERS,
    scale=PARAMETERS.also(
        Value("zeros", lambda w, v: 0 * v, False),
        Value("negative", lambda w, v: -v, False),
        Value("full and upper triangular", lambda w, v: torch.ones(3, 2, 2).triu(), False),
    ),
    event_shape=OPTIONAL_SHAPE,
)
def _(w: World) -> Built:
    arguments = {"logits": torch.zeros(3), "loc": torch.randn(3, 2), "scale": torch.ones(3, 2)}
    return bases.GaussianMixture, arguments


LOC_AND_SCALE = {
    "loc": PARAMETERS,
    "scale": PARAMETERS.also(
        Value("zeros", lambda w, v: 0 * v, False), Value("negative", lambda w, v: -v, False)
    ),
    "event_shape": OPTIONAL_SHAPE,
}


@call("ncprior.bases.Flow", flow=MODULE, **LOC_AND_SCALE, is_relative=FLAG)
def _(w: World) -> Built:
    import zuko

    flow = zuko.flows.NSF(2, hidden_features=(4,))
    return bases.Flow, {"flow": flow, "loc": torch.zeros(2), "scale": torch.ones(2)}


@call("ncprior.bases.VelocityNet", features=FEW, width=FEW, depth=count(0, huge=False))
def _(w: World) -> Built:
    return bases.VelocityNet, {"features": 2, "width": 4, "depth": 1}


@call("ncprior.bases.VelocityNet.forward")
def _(w: World) -> Built:
    network = bases.VelocityNet(2, width=4, depth=1)
    return network.forward, {"z": torch.zeros(3, 2), "t": torch.zeros(3, 1)}


@call("ncprior.bases.FlowMatching", network=MODULE, **LOC_AND_SCALE, num_steps=FEW)
def _(w: World) -> Built:
    net = bases.VelocityNet(2, width=4, depth=1)
    return bases.FlowMatching, {"network": net, "loc": torch.zeros(2), "scale": torch.ones(2)}


for _kind in ("GaussianMixture", "Flow", "FlowMatching"):

    @call(f"ncprior.bases.{_kind}.rebuild")
    def _(w: World, kind: str = _kind) -> Built:
        base = bases.fit_flow(w.z, steps=1, progress=False) if kind == "Flow" else BASES[kind](w)
        return base.rebuild, {"tensors": base.tensors(), "config": base.config()}


TRAINING = {
    "steps": count(0, huge=False),
    "batch_size": count(),
    "learning_rate": RATE,
    "patience": count(none=True),
    "progress": PROGRESS,
}


@call(
    "ncprior.bases.fit_flow",
    options=SLOW,
    latents=FITTED,
    flow=instance(nn.Module, none=True),
    weight_decay=number(0),
    **TRAINING,
)
def _(w: World) -> Built:
    return bases.fit_flow, {"latents": w.z, "steps": 2, "batch_size": 8, "progress": False}


@call("ncprior.bases.fit_flows", options=SLOW, source=SOURCE, data=DATA, flow=function(none=True))
def _(w: World) -> Built:
    arguments = {"source": w.source, "data": w.x, "steps": 1, "batch_size": 8}
    return bases.fit_flows, {**arguments, "progress": False}


@call("ncprior.bases.Flow.given", context=INNER)
def _(w: World) -> Built:
    import zuko

    flow = zuko.flows.NSF(2, 3, hidden_features=(4,))
    base = bases.Flow(flow, torch.zeros(2), torch.ones(2), context_shape=(3,))
    return base.given, {"context": torch.randn(4, 3)}


@call(
    "ncprior.bases.fit_flow_matching",
    options=SLOW,
    latents=FITTED,
    width=count(),
    depth=unsure(count(0)),
    num_steps=FEW,
    **TRAINING,
)
def _(w: World) -> Built:
    return bases.fit_flow_matching, {
        "latents": w.z,
        "width": 4,
        "depth": 1,
        "steps": 2,
        "batch_size": 8,
        "progress": False,
    }


COVARIANCE = choice("full", "diagonal")


MASK = Kind(
    "a mask or None",
    lambda v: True if v is None else None,
    (
        Value("one latent", lambda w, v: torch.tensor([True, False]), True),
        Value("no latent", lambda w, v: [False, False], True),
        Value("numbers", lambda w, v: torch.ones(2), False),
        Value("of another shape", lambda w, v: torch.ones(3, dtype=torch.bool), False),
        Value("text", lambda w, v: "all", False),
    ),
)


HELD_OUT = replace(  # None, or latents like the others
    opened(FITTED), verdict=lambda v: True if v is None else opened(FITTED).verdict(v)
)


@call(
    "ncprior.bases.fit_gaussian", z=FITTED, covariance=COVARIANCE, active=MASK, held_out=HELD_OUT
)
def _(w: World) -> Built:
    return bases.fit_gaussian, {"z": w.z}


@call(
    "ncprior.bases.fit_mixture",
    z=FITTED,
    num_components=unsure(count()),
    covariance=COVARIANCE,
    max_steps=FEW,
    tolerance=number(0),
    regularisation=number(0),
    starts=FEW,
    active=MASK,
    held_out=HELD_OUT,
    options={"limit": 6.0},
)
def _(w: World) -> Built:
    return bases.fit_mixture, {"z": w.z, "num_components": 2, "max_steps": 5, "starts": 1}


BOUNDS = Kind(
    "bounds",
    lambda v: (
        True
        if v is None
        else None
        if isinstance(v, tuple | list | torch.Tensor) and len(v) == 2
        else False
    ),
    (
        constant("(1, 0)", (1, 0), False),
        constant("(0, 0)", (0, 0), False),
        constant("(nan, 1)", (math.nan, 1.0), False),
        constant("('a', 'b')", ("a", "b"), False),
        constant("(0, 1, 2)", (0, 1, 2), False),
        *(v for v in OPTIONAL_TEXT.pool if "tensor" not in v.name and v.name != "[1.0, 2.0]"),
    ),
)


@call(
    "ncprior.bases.fit_vamp",
    options=SLOW,
    source=SOURCE,
    data=DATA,
    num_components=unsure(count()),
    held_out=OPTIONAL_DATA,
    bounds=BOUNDS,
    **TRAINING,
)
def _(w: World) -> Built:
    arguments = {"source": w.source, "data": w.x, "num_components": 3, "steps": 2}
    return bases.fit_vamp, {**arguments, "batch_size": 8, "progress": False}


@call(
    "ncprior.bases.active_latents",
    source=SOURCE,
    data=DATA,
    threshold=number(0),
    batch_size=count(),
)
def _(w: World) -> Built:
    return bases.active_latents, {"source": w.source, "data": w.x}


@call("ncprior.bases.kl_per_latent", source=SOURCE, data=DATA, batch_size=count())
def _(w: World) -> Built:
    return bases.kl_per_latent, {"source": w.source, "data": w.x}


@call(
    "ncprior.bases.latents_of",
    source=SOURCE,
    data=DATA,
    k=count(0, 0),
    of=choice("samples", "means"),
    batch_size=count(),
)
def _(w: World) -> Built:
    return bases.latents_of, {"source": w.source, "data": w.x}


@call("ncprior.bases.rebase", source=SOURCE, base=BASE_OR_FUNCTION)
def _(w: World) -> Built:
    return bases.rebase, {"source": w.source, "base": bases.fit_gaussian(w.z)}


@call("ncprior.bases.Rebased", source=SOURCE, base=BASE_OR_FUNCTION)
def _(w: World) -> Built:
    return bases.Rebased, {"source": w.source, "base": bases.fit_gaussian(w.z)}


def _rebased(w: World) -> Any:
    return bases.rebase(w.source, bases.fit_gaussian(w.z))


@call("ncprior.bases.Rebased.start", batch_size=count())
def _(w: World) -> Built:
    return _rebased(w).start, {"batch_size": 3}


@call("ncprior.bases.Rebased.advance")
def _(w: World) -> Built:
    return partial(_rebased(w).advance, _rebased(w).start(24)), {"z": w.z}


@call("ncprior.bases.Rebased.shared_prior")
def _(w: World) -> Built:
    return _rebased(w).shared_prior, {}


for _name in ("group", "decode", "likelihood"):

    @call(f"ncprior.bases.Rebased.{_name}")
    def _(w: World, name: str = _name) -> Built:
        source = _rebased(w)
        state = source.start(24)
        return getattr(source, name), {
            "state": state if name == "group" else source.advance(state, w.z)
        }


@call("ncprior.bases.stored_numbers", base=opened(BASE))
def _(w: World) -> Built:
    return bases.stored_numbers, {"base": bases.fit_gaussian(w.z)}


# --- diagnostics

PAIR = Kind(
    "two numbers of proposals",
    lambda v: (
        None
        if isinstance(v, tuple | list | torch.Tensor)
        and len(v) == 2
        and all(float(n) == int(n) >= 1 for n in v)
        else False
    ),
    (
        constant("(0, 5)", (0, 5), False),
        constant("(5, 2.5)", (5, 2.5), False),
        constant("('a', 5)", ("a", 5), False),
        constant("(5,)", (5,), False),
        constant("(nan, 5)", (math.nan, 5), False),
        constant("(10, 5)", (10, 5), None),
        *(v for v in BASE.pool if "tensor" not in v.name and v.name != "[1.0, 2.0]"),
    ),
)


@call(
    "ncprior.diagnostics.diagnose",
    options=SLOW,
    prior=PRIOR,
    held_out=DATA,
    train=OPTIONAL_DATA,
    num_proposals=PAIR,
    num_draws=count(),
    batch_size=only_invalid(count()),
)
def _(w: World) -> Built:
    return diagnostics.diagnose, {
        "prior": w.prior,
        "held_out": w.x,
        "num_proposals": (5, 10),
        "num_draws": 100,
    }


@call(
    "ncprior.diagnostics.match_strength",
    options=SLOW,
    prior=PRIOR,
    held_out=DATA,
    sampler=SAMPLER,
    max_strength=number(1),
    batch_size=only_invalid(count()),
    progress=PROGRESS,
)
def _(w: World) -> Built:
    return diagnostics.match_strength, {
        "prior": w.prior,
        "held_out": w.x,
        "sampler": w.sampler,
        "progress": False,
    }


@call("ncprior.diagnostics.pareto_k", log_weights=tensor(array=True, rank=None, infinite=None))
def _(w: World) -> Built:
    return diagnostics.pareto_k, {"log_weights": torch.randn(100)}


LOG_R = tensor(array=None, rank=None)
PAIR_OF_LOG_R = {"log_q": LOG_R, "log_p": LOG_R}


def _log_r(w: World) -> dict[str, Any]:
    return {"log_q": torch.randn(2, 20) + 1, "log_p": torch.randn(2, 20) - 1}


@call("ncprior.diagnostics.recalibrate", **PAIR_OF_LOG_R)
def _(w: World) -> Built:
    return diagnostics.recalibrate, _log_r(w)


@call("ncprior.diagnostics.reliability", **PAIR_OF_LOG_R, num_bins=count())
def _(w: World) -> Built:
    return diagnostics.reliability, _log_r(w)


def _report() -> diagnostics.Report:
    off = diagnostics.GroupReport(0, diagnostics.Verdict.OFF)
    return diagnostics.Report((off,), 100, 8200, (50, 500))


@call("ncprior.diagnostics.recommend_sampler", report=instance(diagnostics.Report), budget=count())
def _(w: World) -> Built:
    return diagnostics.recommend_sampler, {"report": _report(), "budget": 100}


for _name in ("to_dict", "to_json"):

    @call(f"ncprior.diagnostics.Report.{_name}")
    def _(w: World, name: str = _name) -> Built:
        return getattr(_report(), name), {}


@call("ncprior.diagnostics.Report.plot", options={"slow": True, "limit": 20.0})
def _(w: World) -> Built:
    return _report().plot, {}


# --- evaluation

VECTOR = tensor(array=True, whole=True, rank=None, infinite=None)
LEVEL = number(0, 1, open_low=True, open_high=True)


@call("ncprior.evaluation.auroc", inside=VECTOR, outside=VECTOR, level=LEVEL)
def _(w: World) -> Built:
    return evaluation.auroc, {"inside": w.x[:, 0], "outside": w.x[:, 1]}


LIST_OF_SCORES = Kind(
    "a list of scores",
    lambda v: None if isinstance(v, list | tuple | torch.Tensor) and len(v) else False,
    (
        Value("with NaN", lambda w, v: [v[0] * math.nan], False),
        Value("with None", lambda w, v: [None], False),
        Value("of no rows", lambda w, v: [v[0][:0]], False),
        *(v for v in BASE.pool if "tensor(" not in v.name),
    ),
    gated=False,
)


@call("ncprior.evaluation.auroc_gain", inside=VECTOR, outside=LIST_OF_SCORES, level=LEVEL)
def _(w: World) -> Built:
    inside, outside = w.x[:, 0], [w.x[:, 1]]
    return evaluation.auroc_gain, {"inside": inside, "outside": outside, "than": (inside, outside)}


@call("ncprior.evaluation.bounds", log_w=tensor(array=True, nan=None, whole=None))
def _(w: World) -> Built:
    return evaluation.bounds, {"log_w": torch.randn(8, 5)}


@call("ncprior.evaluation.frechet_distance", a=FEATURES, b=FEATURES, strict=FLAG)
def _(w: World) -> Built:
    return evaluation.frechet_distance, {"a": w.z, "b": w.z + 1, "strict": False}


@call(
    "ncprior.evaluation.mmd",
    a=FEATURES,
    b=FEATURES,
    bandwidth=number(0, open_low=True, none=True),
    chunk_size=count(),
)
def _(w: World) -> Built:
    return evaluation.mmd, {"a": w.z, "b": w.z + 1}


@call(
    "ncprior.evaluation.precision_recall",
    real=FEATURES,
    generated=FEATURES,
    neighbours=unsure(count()),
    chunk_size=count(),
)
def _(w: World) -> Built:
    return evaluation.precision_recall, {"real": w.z, "generated": w.z + 1}


TABLE_ROWS = Kind(  # texts, objects and truth values may be categories
    "rows of a table",
    lambda v: None if isinstance(v, np.ndarray) else FEATURES.verdict(v),
    tuple(
        value._replace(valid=None) if value.name in ("as bool", "as strings") else value
        for value in tensor(array=True, whole=True, rank=None).pool
    ),
    tensors=True,
    gated=False,
)


@call(
    "ncprior.evaluation.near_copies",
    train=TABLE_ROWS,
    held_out=TABLE_ROWS,
    drawn=TABLE_ROWS,
    quantile=unsure(LEVEL),
    level=LEVEL,
    chunk_size=count(),
)
def _(w: World) -> Built:
    rows = {"train": w.z, "held_out": w.z + 1, "drawn": w.z + 2}
    return evaluation.near_copies, {**rows, "quantile": 0.5}


@call(
    "ncprior.evaluation.two_sample_test",
    options={"slow": True, "limit": 20.0},  # the first call imports scikit-learn
    real=TABLE_ROWS,
    drawn=TABLE_ROWS,
    classifier=choice("network", "trees"),
    folds=unsure(count(2)),
    level=LEVEL,
    seed=SEED,
)
def _(w: World) -> Built:
    rows = {"real": torch.randn(20, 2), "drawn": torch.randn(20, 2)}
    return evaluation.two_sample_test, {**rows, "classifier": "trees", "folds": 2}


GENERATIONS = Kind(
    "generations",
    lambda v: None if isinstance(v, list | tuple | torch.Tensor) and len(v) else False,
    (
        Value("one generation", lambda w, v: v[:1], None),
        Value("none", lambda w, v: v[:0], False),
        Value("with NaN", lambda w, v: v * math.nan, False),
        Value("as an array", lambda w, v: v.numpy(), True),
        Value("as a list of arrays", lambda w, v: [part.numpy() for part in v], True),
        Value("of another width", lambda w, v: v[..., :1], False),
        Value("complex", lambda w, v: v.to(torch.complex64), False),
        *(v for v in BASE.pool if "array" not in v.name),
    ),
    gated=False,
)


def _gap(w: World) -> dict[str, Any]:
    torch.manual_seed(0)
    base, ours, posterior = torch.tensor([2.0, 1.2, 1.0]).view(3, 1, 1, 1) * torch.randn(
        3, 5, 30, 2
    )
    return {"reference": torch.randn(30, 2), "base": base, "ours": ours, "posterior": posterior}


@call(
    "ncprior.evaluation.gap_closed",
    reference=tensor(array=True),
    base=GENERATIONS,
    ours=GENERATIONS,
    posterior=GENERATIONS,
    train=tensor(array=True, none=True),
    num_resamples=count(2),
    level=LEVEL,
    seed=SEED,
)
def _(w: World) -> Built:
    arguments = {**_gap(w), "num_resamples": 5}
    return evaluation.gap_closed, {**arguments, "train": arguments["reference"] + 1}


GAP = instance(evaluation.GapClosed)


@call("ncprior.evaluation.gap_difference", a=GAP, b=GAP, level=LEVEL)
def _(w: World) -> Built:
    closed = evaluation.gap_closed(**_gap(w), num_resamples=5)
    return evaluation.gap_difference, {"a": closed, "b": closed}


@call(
    "ncprior.evaluation.inception_features",
    options={"valid": False},
    dimension=only_invalid(choice(64, 192, 768, 2048)),
    weights=only_invalid(OPTIONAL_TEXT),
    batch_size=only_invalid(count()),
)
def _(w: World) -> Built:
    return evaluation.inception_features, {"weights": "nowhere.pt"}


@call(
    "ncprior.evaluation.log_likelihood",
    options=SLOW,
    prior=PRIOR_OR_SOURCE,
    data=DATA,
    num_samples=count(),
    num_proposals=count(none=True),
    num_pools=unsure(count(0)),
    share_pools=FLAG,
    batch_size=count(),
    chunk_size=count(),
    progress=PROGRESS,
)
def _(w: World) -> Built:
    arguments = {"prior": w.prior, "data": w.x[:8], "num_samples": 4, "num_proposals": 5}
    return evaluation.log_likelihood, arguments


def _likelihood() -> evaluation.Likelihood:
    x = torch.tensor([-85.0, -83.0])
    return evaluation.Likelihood("base", "local", x - 0.1, x, x + 0.1, -x, 100, 0)


@call("ncprior.evaluation.Likelihood.bits_per_dim", num_dims=count())
def _(w: World) -> Built:
    return _likelihood().bits_per_dim, {"num_dims": 8}


@call("ncprior.evaluation.Likelihood.gain_over", other=instance(evaluation.Likelihood))
def _(w: World) -> Built:
    return _likelihood().gain_over, {"other": _likelihood()}


@call(
    "ncprior.evaluation.log_normaliser",
    options=SLOW,
    prior=PRIOR,
    num_particles=count(2),
    num_temperatures=FEW,
    step_size=RATE,
    replicates=count(2, huge=False),
    condition=NO_CONDITION,
    progress=PROGRESS,
)
def _(w: World) -> Built:
    return evaluation.log_normaliser, {"prior": w.prior, "num_particles": 20, "replicates": 2}


@call(
    "ncprior.evaluation.ood_score",
    options=SLOW,
    model=Kind(
        "a model", lambda v: None if isinstance(v, vaebm.VAEBM) else PRIOR_OR_SOURCE.verdict(v)
    ),
    data=DATA,
    num_samples=count(),
    batch_size=count(),
    chunk_size=count(),
    progress=PROGRESS,
)
def _(w: World) -> Built:
    return evaluation.ood_score, {"model": w.model, "data": w.x[:8], "num_samples": 4}


# --- the demonstration


@call("ncprior.demo.VAE", size=unsure(count()), latents=count(), counts=count())
def _(w: World) -> Built:
    return demo.VAE, {"size": 8, "latents": 3, "counts": 16}


@call("ncprior.demo.Classifier", size=unsure(count()), num_features=count())
def _(w: World) -> Built:
    return demo.Classifier, {"size": 8, "num_features": 4}


IMAGES = tensor(nan=None, rank=None, empty=None)
for _name in ("posterior", "negative_elbo"):

    @call(f"ncprior.demo.VAE.{_name}")
    def _(w: World, name: str = _name) -> Built:
        return getattr(demo.VAE(8, latents=3, counts=16).eval(), name), {
            "x": torch.rand(4, 1, 8, 8)
        }


@call("ncprior.demo.VAE.decode")
def _(w: World) -> Built:
    return demo.VAE(8, latents=3, counts=16).eval().decode, {"z": torch.randn(4, 3)}


for _name in ("prior", "source"):

    @call(f"ncprior.demo.VAE.{_name}")
    def _(w: World, name: str = _name) -> Built:
        return getattr(demo.VAE(8, latents=3, counts=16).eval(), name), {}


@call("ncprior.demo.Classifier.forward")
def _(w: World) -> Built:
    return demo.Classifier(8, num_features=4), {"x": torch.rand(4, 1, 8, 8)}


def _labelled() -> demo.Labelled:
    return demo.Labelled(torch.rand(20, 1, 8, 8), torch.arange(20) % 2)


@call("ncprior.demo.Labelled.rows")
def _(w: World) -> Built:
    return _labelled().rows, {"index": slice(3)}


@call("ncprior.demo.split", data=instance(demo.Labelled), held_out=unsure(count(0)), seed=SEED)
def _(w: World) -> Built:
    return demo.split, {"data": _labelled(), "held_out": 5, "seed": 0}


@call("ncprior.demo.discriminant_axes", z=FITTED, labels=opened(FITTED))
def _(w: World) -> Built:
    return demo.discriminant_axes, {"z": torch.randn(24, 3), "labels": torch.arange(24) % 4}


@call(
    "ncprior.demo.draw_arms",
    options=SLOW,
    prior=PRIOR,
    sampler=SAMPLER,
    x=X,
    features=function(*LAYERS),
    num_samples=count(),
    generations=count(huge=False),
    base=replace(SOURCE, verdict=lambda v: True if v is None else SOURCE.verdict(v)),
    condition=function(*LAYERS[:1]),
    progress=PROGRESS,
)
def _(w: World) -> Built:
    return demo.draw_arms, {
        "prior": w.prior,
        "sampler": w.sampler,
        "x": w.x,
        "features": torch.sin,
        "num_samples": 5,
        "generations": 2,
        "progress": False,
    }


@call("ncprior.demo.in_batches", function=function(*LAYERS[:1]), x=opened(ROWS))
def _(w: World) -> Built:
    return demo.in_batches, {"function": torch.exp, "x": w.x}


@call("ncprior.demo.plot_latents", options={"slow": True, "limit": 20.0})
def _(w: World) -> Built:
    return demo.plot_latents, {"clouds": {"prior": torch.randn(9, 3)}, "axes": torch.eye(3)[:, :2]}


@call("ncprior.demo.plot_samples", options={"slow": True, "limit": 20.0})
def _(w: World) -> Built:
    return demo.plot_samples, {"samples": {"data": torch.rand(5, 1, 8, 8)}}


@call(
    "ncprior.demo.run_demo",
    options={"valid": False},
    data=only_invalid(choice("digits", "mnist")),
    seed=only_invalid(SEED),
)
def _(w: World) -> Built:
    return demo.run_demo, {"out": w.folder / "demo", "progress": False}
