"""Calls of training, VAEBM, data, saving and utilities."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from fuzz.calls import call
from fuzz.kinds import (
    ANYTHING,
    CALLBACK,
    DATA,
    FLAG,
    INNER,
    MAPPING,
    MAX_NORM,
    MODULE,
    NO_CONDITION,
    OPTIONAL_DATA,
    OPTIONAL_PATH,
    OPTIONAL_SAMPLER,
    OPTIONAL_TEXT,
    PATH,
    PRECISION,
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
    steps,
    unsure,
)
from fuzz.values import LAYERS, TO_LOG_R, Value, constant
from fuzz.world import Energy, World
from torch import nn

from ncprior import LatentSource, NCPrior, fit, training, vaebm
from ncprior.heads import MLPHead

Built = tuple[Any, dict[str, Any]]
TRAINS = {"trains": True, "slow": True, "limit": 15.0}

FEW = count(huge=False)  # numbers of steps
RATE = number(0, open_low=True)

# --- fit


@call(
    "ncprior.fit",
    options=TRAINS,
    prior=PRIOR,
    data=DATA,
    held_out=OPTIONAL_DATA,
    steps=count(none=True, huge=False),
    max_seconds=number(0, open_low=True, none=True),
    batch_size=count(),
    learning_rate=number(0),
    patience=count(none=True),
    stages=Kind(
        "stages",
        lambda v: None if isinstance(v, str) and v == "auto" else count().verdict(v),
        count(huge=False).pool,
    ),
    checkpoint=OPTIONAL_PATH,
    callback=CALLBACK,
    progress=only_invalid(FLAG),
    eval_every=count(none=True),
    checkpoint_every=count(),
    settings=instance(training.FitSettings),
)
def _(w: World) -> Built:
    return fit, {
        "prior": w.prior,
        "data": w.x,
        "held_out": w.x[:8],
        "steps": 2,
        "batch_size": 8,
        "patience": 3,
        "eval_every": 2,
        "checkpoint": w.folder / "run",
        "progress": False,
    }


OPTIMIZER_SETTINGS = {
    "weight_decay": number(0),
    "max_grad_norm": MAX_NORM,
    "ema_decay": number(0, 1, left_open=(1,)),
}


@call(
    "ncprior.training.FitSettings",
    **OPTIMIZER_SETTINGS,
    noise_weight=RATE,
    num_draws=count(),
    score_weight=number(0),
    importance_samples=count(2, none=True),
    num_cached_proposals=count(none=True),
    cache_epochs=unsure(number(0, none=True, also=("auto", math.inf))),
    cache_memory=number(0, left_open=(math.inf,)),
    precision=PRECISION,
    group_parallel=FLAG,
)
def _(w: World) -> Built:
    return training.FitSettings, {}


@call(
    "ncprior.vaebm.EnergySettings",
    **OPTIMIZER_SETTINGS,
    contrast=choice("x", "mean"),
    buffer_size=count(0),
    replay_fraction=number(0, 1),
    spectral_weight=number(0),
    max_gap=number(0, open_low=True, left_open=(math.inf,)),
)
def _(w: World) -> Built:
    return vaebm.EnergySettings, {}


class Log:
    """A writer and a run that take everything."""

    def add_scalar(self, *_: Any) -> None: ...
    def define_metric(self, *_: Any, **__: Any) -> None: ...
    def log(self, *_: Any) -> None: ...


@call("ncprior.training.log_to_json", path=PATH)
def _(w: World) -> Built:
    return training.log_to_json, {"path": w.folder / "log.jsonl"}


@call("ncprior.training.log_to_tensorboard", writer=only_invalid(instance(Log)), section=TEXT)
def _(w: World) -> Built:
    return training.log_to_tensorboard, {"writer": Log()}


@call("ncprior.training.log_to_wandb", run=only_invalid(instance(Log)), section=TEXT)
def _(w: World) -> Built:
    return training.log_to_wandb, {"run": Log()}


def _history(w: World) -> Any:
    return fit(w.prior, w.x, held_out=w.x[:8], steps=2, batch_size=8, progress=False)


@call("ncprior.training.gate", options=TRAINS, prior=PRIOR, history=instance(training.History))
def _(w: World) -> Built:
    return training.gate, {"prior": w.prior, "history": _history(w)}


@call("ncprior.training.History.has_learnt", options={"slow": True}, least=number(0))
def _(w: World) -> Built:
    return _history(w).has_learnt, {"least": 0.0}


@call("ncprior.training.Row.summary", options={"slow": True})
def _(w: World) -> Built:
    return _history(w).rows[-1].summary, {}


@call(
    "ncprior.training.calibrate_heads",
    options=TRAINS,
    prior=PRIOR,
    held_out=DATA,
    batch_size=only_invalid(count()),
)
def _(w: World) -> Built:
    return training.calibrate_heads, {"prior": w.prior, "held_out": w.x}


@call("ncprior.training.nested", prior=PRIOR, sampler=SAMPLER)
def _(w: World) -> Built:
    def use(**arguments: Any) -> None:
        source = training.nested(**arguments)
        source.group(source.start(3)).prior.sample()

    return use, {"prior": w.prior, "sampler": w.sampler}


# --- VAEBM

ENERGY = function(
    *LAYERS,
    *TO_LOG_R,
    Value("the VAE's encoder", lambda w, v: w.vae.encoder, False),
    Value("a class of networks", lambda w, v: MLPHead, False),
)
BASE_OF_MODEL = Kind(
    "a prior or a source",
    lambda v: None if isinstance(v, NCPrior) or LatentSource in type(v).__mro__ else False,
)


@call(
    "ncprior.vaebm.VAEBM",
    prior=BASE_OF_MODEL,
    energy=ENERGY,
    num_steps=steps(),
    step_size=RATE,
    langevin_target=choice("exact", "official"),
    data_noise=number(0),
    precision=PRECISION,
)
def _(w: World) -> Built:
    def use(**arguments: Any) -> None:
        vaebm.VAEBM(**arguments).sample(3)

    return use, {"prior": w.prior, "energy": Energy(), "num_steps": 2}


@call("ncprior.vaebm.VAEBM.forward", x=opened(X))
def _(w: World) -> Built:
    return w.model, {"x": w.x}


CHAINS = {
    "num_steps": steps(none=True),
    "step_size": number(0, open_low=True, none=True),
}


@call(
    "ncprior.vaebm.VAEBM.sample",
    batch_size=count(),
    sampler=OPTIONAL_SAMPLER,
    condition=NO_CONDITION,
    adjusted=FLAG,
    **CHAINS,
)
def _(w: World) -> Built:
    return w.model.sample, {"batch_size": 3}


@call(
    "ncprior.vaebm.VAEBM.draw_noise",
    batch_size=count(),
    sampler=OPTIONAL_SAMPLER,
    condition=NO_CONDITION,
)
def _(w: World) -> Built:
    return w.model.draw_noise, {"batch_size": 3}


NOISE = Kind(
    "noise",
    lambda v: None if isinstance(v, list | tuple) and len(v) == 2 else False,
    (
        Value("one too few", lambda w, v: v[:1], False),
        Value("one too many", lambda w, v: [*v, v[0]], False),
        Value("with None", lambda w, v: [None, None], False),
        Value("with NaN", lambda w, v: [v[0] * math.nan, v[1]], False),
        Value("of unlike rows", lambda w, v: [v[0][:1], v[1]], False),
        Value("of another width", lambda w, v: [v[0][:, :1], v[1]], False),
        Value("of no rows", lambda w, v: [part[:0] for part in v], False),
        *ANYTHING.pool,
    ),
    gated=False,
)


@call(
    "ncprior.vaebm.VAEBM.run_chains", noise=NOISE, condition=NO_CONDITION, adjusted=FLAG, **CHAINS
)
def _(w: World) -> Built:
    return w.model.run_chains, {"noise": [torch.randn(3, 2), torch.randn(3, 3)]}


@call("ncprior.vaebm.VAEBM.extra_repr")
def _(w: World) -> Built:
    return w.model.extra_repr, {}


def _adam(w: World) -> torch.optim.Optimizer:
    return torch.optim.Adam(w.model.parameters())


MODEL = instance(vaebm.VAEBM)
CONTRAST = choice("x", "mean")
OPTIMIZER = instance(
    torch.optim.Optimizer,
    more=(
        Value(
            "an optimizer of the VAE", lambda w, v: torch.optim.SGD(w.vae.parameters(), 0.1), False
        ),
        Value(
            "an optimizer of the heads",
            lambda w, v: torch.optim.SGD(w.prior.parameters(), 0.1),
            None,
        ),
    ),
)


@call(
    "ncprior.vaebm.VAEBMTrainer",
    model=MODEL,
    optimizer=OPTIMIZER,
    backward=function(*LAYERS[:1]),
    sampler=OPTIONAL_SAMPLER,
    contrast=CONTRAST,
    buffer=only_invalid(instance(type, none=True)),
    spectral_weight=number(0),
    max_grad_norm=MAX_NORM,
    condition=function(none=True),
)
def _(w: World) -> Built:
    def use(**arguments: Any) -> None:
        vaebm.VAEBMTrainer(**arguments).step(w.x)

    return use, {"model": w.model, "optimizer": _adam(w)}


@call("ncprior.vaebm.VAEBMTrainer.step", x=X)
def _(w: World) -> Built:
    return vaebm.VAEBMTrainer(w.model, _adam(w)).step, {"x": w.x}


@call("ncprior.vaebm.VAEBMTrainer.chains", x=opened(X))
def _(w: World) -> Built:
    return vaebm.VAEBMTrainer(w.model, _adam(w)).chains, {"x": w.x}


@call(
    "ncprior.vaebm.fit_vaebm",
    options={"slow": True, "limit": 2.5},
    model=MODEL,
    data=DATA,
    steps=FEW,
    batch_size=count(),
    learning_rate=RATE,
    sampler=OPTIONAL_SAMPLER,
    condition=function(none=True),
    checkpoint=OPTIONAL_PATH,
    callback=CALLBACK,
    progress=only_invalid(FLAG),
    eval_every=count(),
    checkpoint_every=count(),
    settings=instance(vaebm.EnergySettings),
)
def _(w: World) -> Built:
    return vaebm.fit_vaebm, {
        "model": w.model,
        "data": w.x,
        "steps": 2,
        "batch_size": 8,
        "eval_every": 2,
        "checkpoint": w.folder / "run",
        "progress": False,
    }


IMAGE_SHAPE = Kind(
    "an image shape",
    lambda v: (
        None
        if isinstance(v, tuple | list | torch.Tensor)
        and len(v) == 3
        and all(int(n) > 0 for n in v)
        else False
    ),
    (
        constant("(0, 8, 8)", (0, 8, 8), False),
        constant("(1, -8, 8)", (1, -8, 8), False),
        constant("(1, 8)", (1, 8), False),
        constant("(1, 8.0, 8)", (1, 8.0, 8), False),
        constant("(10**12, 8, 8)", (10**12, 8, 8), None),
        *(v for v in ANYTHING.pool if "torch" not in v.name),
    ),
)


@call("ncprior.vaebm.EnergyNet", image_shape=IMAGE_SHAPE, width=unsure(count()))
def _(w: World) -> Built:
    return vaebm.EnergyNet, {"image_shape": (1, 8, 8), "width": 8}


@call("ncprior.vaebm.EnergyNet.config")
def _(w: World) -> Built:
    return vaebm.EnergyNet((1, 8, 8), width=8).config, {}


@call("ncprior.vaebm.EnergyNet.forward", x=INNER)
def _(w: World) -> Built:
    return vaebm.EnergyNet((1, 8, 8), width=8), {"x": torch.rand(3, 1, 8, 8)}


@call("ncprior.vaebm.GaussianDecoder", source=SOURCE, sigma=RATE, origin=TEXT)
def _(w: World) -> Built:
    return vaebm.GaussianDecoder, {"source": w.source, "sigma": 0.5}


@call("ncprior.vaebm.GaussianDecoder.fitted", source=SOURCE, held_out=DATA, batch_size=count())
def _(w: World) -> Built:
    return vaebm.GaussianDecoder.fitted, {"source": w.source, "held_out": w.x}


@call("ncprior.vaebm.GaussianDecoder.likelihood")
def _(w: World) -> Built:
    state = w.source.advance(w.source.start(24), w.z)
    return vaebm.GaussianDecoder(w.source, 0.5).likelihood, {"state": state}


# --- encoders


@call(
    "ncprior.training.fit_encoder",
    options={"slow": True},
    source=SOURCE,
    data=DATA,
    encoder=instance(nn.Module, none=True),
    held_out=OPTIONAL_DATA,
    kl_weight=RATE,
    steps=steps(),
    batch_size=count(),
    learning_rate=RATE,
    patience=count(none=True),
    seed=Kind("a seed or None", lambda v: v is None or SEED.verdict(v), SEED.pool),
    progress=only_invalid(FLAG),
)
def _(w: World) -> Built:
    arguments = {"source": w.source, "data": w.x, "steps": 2, "batch_size": 8}
    return training.fit_encoder, {**arguments, "progress": False}


def _amortised(w: World) -> training.AmortisedSource:
    return training.AmortisedSource(w.source, nn.Linear(3, 4).eval())


@call("ncprior.training.AmortisedSource", source=SOURCE, encoder=MODULE)
def _(w: World) -> Built:
    return training.AmortisedSource, {"source": w.source, "encoder": nn.Linear(3, 4)}


def _resampled(w: World) -> training.ResampledPosterior:
    return training.ResampledPosterior(w.prior, 4)


@call(
    "ncprior.training.ResampledPosterior",
    prior=PRIOR_OR_SOURCE,
    num_samples=count(),
    chunk_size=count(),
)
def _(w: World) -> Built:
    return training.ResampledPosterior, {"prior": w.prior, "num_samples": 4, "chunk_size": 16}


for _name in ("encode", "ess"):

    @call(f"ncprior.training.ResampledPosterior.{_name}", x=opened(X))
    def _(w: World, name: str = _name) -> Built:
        return getattr(_resampled(w), name), {"x": w.x}


@call("ncprior.training.ResampledPosterior.start", batch_size=unsure(count()))
def _(w: World) -> Built:
    source = _resampled(w)
    return source.start, {"batch_size": 24, "encoding": source.encode(w.x)}


for _name in ("group", "advance", "decode", "likelihood"):

    @call(f"ncprior.training.ResampledPosterior.{_name}")
    def _(w: World, name: str = _name) -> Built:
        source = _resampled(w)
        state = source.start(24, source.encode(w.x))
        if name in ("decode", "likelihood"):
            state = source.advance(state, w.z)
        more = {"z": w.z} if name == "advance" else {}
        return getattr(source, name), {"state": state, **more}


@call("ncprior.training.AmortisedSource.encode", x=opened(X))
def _(w: World) -> Built:
    return _amortised(w).encode, {"x": w.x}


@call("ncprior.training.AmortisedSource.infer")
def _(w: World) -> Built:
    return _amortised(w).infer, {"x": w.x}


@call("ncprior.training.AmortisedSource.start", batch_size=count())
def _(w: World) -> Built:
    return _amortised(w).start, {"batch_size": 3}


@call("ncprior.training.AmortisedSource.advance")
def _(w: World) -> Built:
    source = _amortised(w)
    return source.advance, {"state": source.start(24), "z": w.z}


for _name in ("group", "decode", "likelihood"):

    @call(f"ncprior.training.AmortisedSource.{_name}")
    def _(w: World, name: str = _name) -> Built:
        source = _amortised(w)
        return getattr(source, name), {"state": source.advance(source.start(24), w.z)}


# --- data


@call("ncprior.data.Stream", data=opened(DATA), batch_size=count(), resumable=FLAG)
def _(w: World) -> Built:
    from ncprior.data import Stream

    return Stream, {"data": w.x, "batch_size": 8}


@call("ncprior.data.one_pass", data=opened(DATA), batch_size=count())
def _(w: World) -> Built:
    from ncprior.data import one_pass

    return partial(_five, one_pass), {"data": w.x, "batch_size": 8}


def _five(function: Any, **arguments: Any) -> None:
    for _ in zip(range(5), function(**arguments), strict=False):
        pass


@call(
    "ncprior.data.split",
    data=opened(DATA),
    fraction=unsure(number(0, 1, open_low=True, open_high=True)),  # one row must be left
    seed=SEED,
)
def _(w: World) -> Built:
    from ncprior.data import split

    return split, {"data": w.x, "fraction": 0.2, "seed": 0}


@call("ncprior.data.first_batch", data=opened(DATA), batch_size=count())
def _(w: World) -> Built:
    from ncprior.data import first_batch

    return first_batch, {"data": w.x, "batch_size": 8}


@call("ncprior.data.Loader")
def _(w: World) -> Built:
    from ncprior.data import Loader, Stream

    return Loader, {"stream": Stream(w.x, 8), "device": torch.device("cpu")}


@call("ncprior.data.RowStore", budget=number(0, left_open=(math.inf,)), folder=OPTIONAL_PATH)
def _(w: World) -> Built:
    from ncprior.data import RowStore

    return RowStore, {"batches": list(w.x.split(8)), "budget": 10**6}


@call("ncprior.data.RowStore.prefetch", rows=instance(torch.Tensor))
def _(w: World) -> Built:
    from ncprior.data import RowStore

    return RowStore(list(w.x.split(8)), budget=0).prefetch, {"rows": torch.arange(8)}


@call("ncprior.data.EncodedSource", source=SOURCE)
def _(w: World) -> Built:
    from ncprior.data import EncodedSource

    return EncodedSource, {"source": w.source}


@call("ncprior.data.CachedGroupsSource", source=SOURCE)
def _(w: World) -> Built:
    from ncprior.data import CachedGroupsSource

    return CachedGroupsSource, {"source": w.source}


@call(
    "ncprior.data.CachedEncodings",
    source=SOURCE,
    data=opened(DATA),
    batch_size=count(),
    seed=SEED,
    budget=number(0, left_open=(math.inf,)),
    folder=OPTIONAL_PATH,
)
def _(w: World) -> Built:
    from ncprior.data import CachedEncodings

    return CachedEncodings, {"source": w.source, "data": w.x, "batch_size": 8, "seed": 0}


# --- saving

REPORT = Kind(
    "a report", lambda v: True if v is None else None if hasattr(v, "num_proposals") else False
)
CARD = {
    "report": REPORT,
    "base_model": OPTIONAL_TEXT,
    "card_data": Kind("a dict", lambda v: None if isinstance(v, dict | None) else False),
}


@call("ncprior.NCPrior.save_pretrained", directory=PATH, **CARD)
def _(w: World) -> Built:
    return w.prior.save_pretrained, {"directory": w.folder / "saved"}


@call("ncprior.vaebm.VAEBM.save_pretrained", directory=PATH, **CARD)
def _(w: World) -> Built:
    return w.model.save_pretrained, {"directory": w.folder / "saved"}


@call(
    "ncprior.NCPrior.push_to_hub",
    options={"valid": False},
    repo_id=only_invalid(TEXT),
    private=only_invalid(FLAG),
)
def _(w: World) -> Built:
    return w.prior.push_to_hub, {"repo_id": "not/a/repository"}


LOADED_FROM = PATH.without("a missing path", "a path under a file", "a path under /proc")


@call(
    "ncprior.NCPrior.from_pretrained",
    source=SOURCE,
    path_or_repo=only_invalid(LOADED_FROM),
    revision=only_invalid(OPTIONAL_TEXT),
    check_fingerprint=FLAG,
    heads=instance(nn.Module, list, tuple, none=True),
)
def _(w: World) -> Built:
    w.prior.save_pretrained(w.folder / "saved")
    return NCPrior.from_pretrained, {"source": w.source, "path_or_repo": w.folder / "saved"}


@call(
    "ncprior.vaebm.VAEBM.from_pretrained",
    source=BASE_OF_MODEL,
    path_or_repo=only_invalid(LOADED_FROM),
    check_fingerprint=FLAG,
    energy=instance(nn.Module, none=True),
)
def _(w: World) -> Built:
    energy = MLPHead((3,), width=4, depth=1)
    vaebm.VAEBM(w.prior, energy, num_steps=2).save_pretrained(w.folder / "saved")
    return vaebm.VAEBM.from_pretrained, {"source": w.prior, "path_or_repo": w.folder / "saved"}


@call("ncprior.saving.inspect", path_or_repo=only_invalid(LOADED_FROM))
def _(w: World) -> Built:
    from ncprior.saving import inspect

    w.prior.save_pretrained(w.folder / "saved")
    return inspect, {"path_or_repo": w.folder / "saved"}


TENSORS = Kind(
    "tensors by name",
    lambda v: None if isinstance(v, dict) and "x" not in v else False,
    (
        Value("not tensors", lambda w, v: {"a": [1.0]}, False),
        Value("None by name", lambda w, v: {"a": None}, False),
        Value("numbered", lambda w, v: {1: w.x}, False),
        Value("sparse", lambda w, v: {"a": w.x.to_sparse()}, False),
        Value("on the meta device", lambda w, v: {"a": w.x.to("meta")}, False),
        Value("complex", lambda w, v: {"a": w.x.to(torch.complex64)}, None),
        *(v for v in ANYTHING.pool if v.name != "a VAE"),
    ),
    gated=False,
)
METADATA = Kind(
    "metadata",
    MAPPING.verdict,
    (
        Value("with NaN", lambda w, v: {"a": math.nan}, False),
        Value("with a set", lambda w, v: {"a": {1}}, False),
        Value("with a tensor", lambda w, v: {"a": torch.ones(1)}, False),
        Value("with itself", lambda w, v: _circle(), False),
        Value("with bytes", lambda w, v: {"a": b"x"}, False),
        Value("1,000 deep", lambda w, v: _deep(1000), None),
        *ANYTHING.pool,
    ),
    gated=False,
)


def _circle() -> dict[str, Any]:
    circle: dict[str, Any] = {}
    circle["a"] = circle
    return circle


def _deep(depth: int) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for _ in range(depth):
        tree = {"a": tree}
    return tree


@call("ncprior.saving.save_tensors", path=PATH, tensors=TENSORS, metadata=METADATA)
def _(w: World) -> Built:
    from ncprior.saving import save_tensors

    return save_tensors, {"path": w.folder / "a.st", "tensors": {"a": w.x}, "metadata": {"b": 1}}


for _name in ("load_tensors", "read_metadata"):

    @call(f"ncprior.saving.{_name}", path=PATH)
    def _(w: World, name: str = _name) -> Built:
        from ncprior import saving

        saving.save_tensors(w.folder / "a.st", {"a": w.x}, {"b": 1})
        return getattr(saving, name), {"path": w.folder / "a.st"}


@call("ncprior.saving.write_atomically", path=PATH)
def _(w: World) -> Built:
    from ncprior.saving import write_atomically

    def write(path: Any) -> None:
        with write_atomically(path) as temporary:
            temporary.write_text("whole")

    return write, {"path": w.folder / "notes.txt"}


# --- utilities


@call(
    "ncprior.utils.at_precision",
    device_type=choice("cpu", "cuda", "mps"),
    precision=instance(torch.dtype),
)
def _(w: World) -> Built:
    from ncprior.utils import at_precision

    return at_precision, {"device_type": "cpu", "precision": torch.bfloat16}


@call("ncprior.utils.fast_precision", device=choice("cpu", "cuda", "mps"))
def _(w: World) -> Built:
    from ncprior.utils import fast_precision

    return fast_precision, {"device": "cpu"}


@call("ncprior.utils.require_eval", **{"*parts": ANYTHING})
def _(w: World) -> Built:
    from ncprior.utils import require_eval

    return require_eval, {"*parts": w.vae}


@call("ncprior.utils.module_fingerprint", module=MODULE)
def _(w: World) -> Built:
    from ncprior.utils import module_fingerprint

    return module_fingerprint, {"module": w.vae}


@call(
    "ncprior.utils.train",
    options={"limit": 2.5},
    module=MODULE.without("a VAE"),
    loss=function(*LAYERS),
    num_rows=only_invalid(count()),  # the loss decides how many rows there are
    steps=count(huge=False),
    batch_size=count(huge=False),
    learning_rate=RATE,
    max_grad_norm=MAX_NORM,
    name=TEXT,
    progress=only_invalid(FLAG),
)
def _(w: World) -> Built:
    from ncprior.utils import train

    line = nn.Linear(3, 1)
    return train, {
        "module": line,
        "loss": lambda rows: line(w.x[rows]).square().mean(),
        "num_rows": 24,
        "steps": 2,
        "batch_size": 8,
        "progress": False,
    }
