"""Calls of the adapters, on small stand-ins for the published models."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from fuzz.calls import call
from fuzz.kinds import (
    ANYTHING,
    FLAG,
    INDICES,
    INNER,
    MAPPING,
    NO_CONDITION,
    OPTIONAL_TEXT,
    PATH,
    SEQUENCE,
    SOURCE,
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
from fuzz.values import LAYERS, Value
from fuzz.world import World
from helpers import nvae_standin, scvi_standin, tvae_standin, vdvae_standin
from torch import nn

from ncprior.adapters import hvae, lars_snis, logistics, nvae, rae, vdvae
from ncprior.adapters.diffusers import DiffusersSource
from ncprior.adapters.pythae import NCPSampler, PythaeSource
from ncprior.adapters.scvi import SCVISource
from ncprior.adapters.tvae import TVAESource
from ncprior.source import sample_posterior

Built = tuple[Any, dict[str, Any]]
SLOW = {"slow": True, "limit": 6.0}
WRONG_MODEL = only_invalid(
    instance(
        type,
        more=(
            Value("a layer of another kind", lambda w, v: nn.Linear(2, 2), False),
            Value("a class of layers", lambda w, v: nn.Linear, False),
        ),
    )
)
IMAGES = tensor(nan=None, whole=None, cast=None, rank=None)
FEW = count(huge=False)
PROGRESS = only_invalid(FLAG)


def _nvae(w: World) -> Any:
    model = nvae_standin.nvae()
    nvae.on_cpu(model)
    return nvae.NVAESource(model)


def _images() -> torch.Tensor:
    return torch.rand(4, 1, 28, 28).round()


def _hvae(w: World) -> Any:
    return hvae.HVAESource(hvae.HVAE(num_groups=2, width=8, hidden=4).eval())


def _eim(w: World) -> Any:
    return lars_snis.EIMSource(lars_snis.EIMVAE(torch.full((1, 28, 28), 0.5)).eval())


def _conv_eim(w: World) -> Any:
    return lars_snis.ConvEIMSource(lars_snis.ConvEIMVAE(torch.full((1, 28, 28), 0.5)).eval())


def _rae(w: World) -> Any:
    return rae.RAESource(rae.VAE("mnist", width=0.05).eval())


SOURCES = {
    "nvae.NVAESource": (_nvae, lambda: torch.rand(4, 1, 8, 8).round()),
    "vdvae.VDVAESource": (
        lambda w: vdvae.VDVAESource(vdvae_standin.vdvae()),
        vdvae_standin.images,
    ),
    "hvae.HVAESource": (_hvae, _images),
    "lars_snis.ConvEIMSource": (_conv_eim, _images),
    "lars_snis.EIMSource": (_eim, _images),
    "rae.RAESource": (_rae, lambda: rae.pad_to_32(_images())),
}


def _walk(name: str, make: Any, images: Any) -> None:
    owner = f"ncprior.adapters.{name}"

    @call(f"{owner}.encode", x=opened(X), options=SLOW)
    def _(w: World) -> Built:
        return make(w).encode, {"x": images()}

    @call(f"{owner}.start", batch_size=count(), condition=NO_CONDITION, options=SLOW)
    def _(w: World) -> Built:
        return make(w).start, {"batch_size": 2}

    @call(f"{owner}.group", options=SLOW)
    def _(w: World) -> Built:
        source = make(w)
        return source.group, {"state": source.start(2)}

    @call(f"{owner}.advance", options=SLOW)
    def _(w: World) -> Built:
        source = make(w)
        state = source.start(2)
        return partial(source.advance, state), {"z": source.group(state).prior.sample()}

    for method in ("decode", "likelihood"):

        @call(f"{owner}.{method}", options=SLOW)
        def _(w: World, method: str = method) -> Built:
            source = make(w)
            return getattr(source, method), {"state": sample_posterior(source, images())[1]}


for _name, (_make, _batch) in SOURCES.items():
    _walk(_name, _make, _batch)

TOLERANCE = number(0)
RATE = number(0, open_low=True)


def _observed(name: str) -> None:
    make, images = SOURCES[name]

    @call(f"ncprior.adapters.{name}.observed", batch=opened(X), options=SLOW)
    def _(w: World) -> Built:
        return make(w).observed, {"batch": images()}


for _name in ("vdvae.VDVAESource", "hvae.HVAESource"):
    _observed(_name)

for _name in ("nvae.NVAESource", "vdvae.VDVAESource"):

    @call(f"ncprior.adapters.{_name}.self_check", x=opened(X), tolerance=TOLERANCE, options=SLOW)
    def _(w: World, name: str = _name) -> Built:
        make, images = SOURCES[name]
        return make(w).self_check, {"x": images(), "tolerance": 0.1}


TEMPERATURE = number(0, open_low=True)


@call("ncprior.adapters.nvae.NVAESource", model=WRONG_MODEL, temperature=TEMPERATURE)
def _(w: World) -> Built:
    return nvae.NVAESource, {"model": nvae_standin.nvae()}


@call("ncprior.adapters.vdvae.VDVAESource", model=WRONG_MODEL, temperature=TEMPERATURE)
def _(w: World) -> Built:
    return vdvae.VDVAESource, {"model": vdvae_standin.vdvae()}


@call("ncprior.adapters.nvae.on_cpu", model=WRONG_MODEL)
def _(w: World) -> Built:
    return nvae.on_cpu, {"model": nvae_standin.nvae()}


@call("ncprior.adapters.nvae.on_cpu.remove")
def _(w: World) -> Built:
    return nvae.on_cpu(nvae_standin.nvae()).remove, {}


@call("ncprior.adapters.nvae.without_cuda")
def _(w: World) -> Built:
    return nvae.without_cuda, {}


@call(
    "ncprior.adapters.nvae.readjust_batchnorm",
    options=SLOW,
    source=SOURCE,
    draw=function(*LAYERS[-1:], none=True),
    batch_size=count(),
    iterations=FEW,
)
def _(w: World) -> Built:
    return nvae.readjust_batchnorm, {"source": _nvae(w), "batch_size": 2, "iterations": 2}


@call(
    "ncprior.adapters.nvae.load_checkpoint", path=PATH, build=function(*LAYERS), trust_pickle=FLAG
)
def _(w: World) -> Built:
    model, path = nvae_standin.nvae(), w.folder / "checkpoint.pt"
    saved = {
        "args": nvae_standin.arguments(),
        "state_dict": model.state_dict(),
        "arch_instance": None,
    }
    torch.save(saved, path)

    def build(arguments: Any, architecture: Any) -> nn.Module:
        return nvae_standin.nvae()

    return nvae.load_checkpoint, {"path": path, "build": build, "trust_pickle": True}


@call("ncprior.adapters.hvae.HVAESource", model=WRONG_MODEL)
def _(w: World) -> Built:
    return hvae.HVAESource, {"model": hvae.HVAE(num_groups=2, width=8, hidden=4).eval()}


@call(
    "ncprior.adapters.hvae.HVAE",
    num_groups=count(huge=False),
    latents=count(),
    width=count(),
    hidden=count(),
)
def _(w: World) -> Built:
    return hvae.HVAE, {"num_groups": 2, "width": 8, "hidden": 4}


for _method, _given in {
    "features": {"x": (4, 1, 28, 28)},
    "negative_elbo": {"x": (4, 1, 28, 28)},
    "start": {},
    "logits": {},
    "warm_up_loss": {"x": (4, 1, 28, 28)},
}.items():

    @call(f"ncprior.adapters.hvae.HVAE.{_method}", options=SLOW)
    def _(w: World, method: str = _method, given: Any = _given) -> Built:
        model = hvae.HVAE(num_groups=2, width=8, hidden=4).eval()
        arguments = {name: torch.rand(shape).round() for name, shape in given.items()}
        more = {"start": {"batch_size": 3}, "warm_up_loss": {"beta": 0.5}}.get(method, {})
        if method == "logits":
            more = {"h": model.start(3)}
        return getattr(model, method), {**arguments, **more}


@call(
    "ncprior.adapters.hvae.train_hvae",
    options=SLOW,
    vae=WRONG_MODEL,
    images=IMAGES,
    epochs=FEW,
    batch_size=unsure(count()),  # at most the number of images
    learning_rate=RATE,
    progress=PROGRESS,
)
def _(w: World) -> Built:
    return hvae.train_hvae, {
        "vae": hvae.HVAE(num_groups=2, width=8, hidden=4),
        "images": torch.rand(16, 1, 28, 28),
        "epochs": 1,
        "batch_size": 8,
        "progress": False,
    }


@call(
    "ncprior.adapters.logistics.LogisticMixture",
    parameters=INNER,
    num_bits=count(1, 16, huge=False),
)
def _(w: World) -> Built:
    return logistics.LogisticMixture, {"parameters": torch.randn(2, 50, 4, 4)}


def _logistic() -> Any:
    return logistics.LogisticMixture(torch.randn(2, 50, 4, 4))


@call("ncprior.adapters.logistics.LogisticMixture.sample")
def _(w: World) -> Built:
    return _logistic().sample, {}


@call("ncprior.adapters.logistics.LogisticMixture.log_prob", value=INNER)
def _(w: World) -> Built:
    return _logistic().log_prob, {"value": torch.rand(2, 3, 4, 4)}


@call("ncprior.adapters.vdvae.ByteImages", mixture=WRONG_MODEL)
def _(w: World) -> Built:
    return vdvae.ByteImages, {"mixture": _logistic()}


@call("ncprior.adapters.vdvae.ByteImages.sample")
def _(w: World) -> Built:
    return vdvae.ByteImages(_logistic()).sample, {}


@call("ncprior.adapters.vdvae.ByteImages.log_prob")
def _(w: World) -> Built:
    images = vdvae.ByteImages(_logistic())
    return images.log_prob, {"value": images.sample()}


DATASET = choice("mnist", "cifar10", "celeba")
RAE_SIZES = {"width": only_invalid(number(0, open_low=True)), "beta": number(0, none=True)}


@call(
    "ncprior.adapters.rae.RAE",
    data=DATASET,
    regulariser=choice(None, "l2", "gp", "sn"),
    **RAE_SIZES,
)
def _(w: World) -> Built:
    return rae.RAE, {"data": "mnist", "width": 0.05}


@call("ncprior.adapters.rae.VAE", data=DATASET, **RAE_SIZES)
def _(w: World) -> Built:
    return rae.VAE, {"data": "mnist", "width": 0.05}


for _owner, _methods in {
    "RAE": ("encode", "loss"),
    "VAE": ("posterior", "loss", "prior", "likelihood"),
}.items():
    for _method in _methods:

        @call(f"ncprior.adapters.rae.{_owner}.{_method}", options=SLOW)
        def _(w: World, owner: str = _owner, method: str = _method) -> Built:
            model = getattr(rae, owner)("mnist", width=0.05).eval()
            x = torch.rand(4, 1, 32, 32)
            if method == "prior":
                return model.prior, {}
            if method == "likelihood":
                return partial(model.likelihood, model.posterior(x).sample()), {}
            return partial(getattr(model, method), x), {}


@call(
    "ncprior.adapters.rae.RAESource",
    model=WRONG_MODEL,
    noise=unsure(number(0, open_low=True, none=True)),
    maps=unsure(FLAG),
)
def _(w: World) -> Built:
    return rae.RAESource, {"model": rae.VAE("mnist", width=0.05).eval()}


@call("ncprior.adapters.rae.pad_to_32", x=tensor(nan=None, cast=None, empty=None))
def _(w: World) -> Built:
    return rae.pad_to_32, {"x": torch.rand(4, 1, 28, 28)}


@call("ncprior.adapters.rae.settle", options=SLOW, model=WRONG_MODEL, images=IMAGES)
def _(w: World) -> Built:
    return rae.settle, {"model": rae.VAE("mnist", width=0.05), "images": torch.rand(20, 1, 32, 32)}


for _name, _adapter in {
    "pythae.PythaeSource": PythaeSource,
    "pythae.NCPSampler": NCPSampler,
    "diffusers.DiffusersSource": DiffusersSource,
    "tvae.TVAESource": TVAESource,
}.items():

    @call(f"ncprior.adapters.{_name}", options={"valid": False}, model=WRONG_MODEL)
    def _(w: World, adapter: Any = _adapter) -> Built:
        return adapter, {}


def _tvae() -> TVAESource:
    return TVAESource(tvae_standin.fitted(), tvae_standin.Encoder(6, (8,), 4).eval())


TABLE_ROWS = Kind(
    "rows of a table", lambda v: None if hasattr(v, "shape") else False, ANYTHING.pool
)


@call("ncprior.adapters.tvae.TVAESource.rows", table=TABLE_ROWS)
def _(w: World) -> Built:
    return _tvae().rows, {"table": tvae_standin.table()}


@call("ncprior.adapters.tvae.TVAESource.table", x=X)
def _(w: World) -> Built:
    source = _tvae()
    return source.table, {"x": source.rows(tvae_standin.table())}


@call("ncprior.adapters.tvae.TVAESource.encode", x=opened(X))
def _(w: World) -> Built:
    source = _tvae()
    return source.encode, {"x": source.rows(tvae_standin.table())}


@call("ncprior.adapters.scvi.SCVISource", model=WRONG_MODEL, given=opened(SEQUENCE))
def _(w: World) -> Built:
    return SCVISource, {"model": scvi_standin.SCVI(), "given": ["batch"]}


def _cells() -> tuple[SCVISource, Any]:
    source = SCVISource(scvi_standin.SCANVI())
    return source, next(iter(source.loader(batch_size=4)))


@call(
    "ncprior.adapters.scvi.SCVISource.loader",
    adata=ANYTHING,
    indices=INDICES,
    batch_size=FEW,
    shuffle=FLAG,
)
def _(w: World) -> Built:
    return _cells()[0].loader, {"batch_size": 4}


@call(
    "ncprior.adapters.scvi.SCVISource.condition",
    cells=opened(MAPPING),
    batch=OPTIONAL_TEXT,
    label=OPTIONAL_TEXT,
)
def _(w: World) -> Built:
    source, x = _cells()
    return source.condition, {"cells": x, "batch": "control", "label": "A"}


@call("ncprior.adapters.scvi.SCVISource.encode", x=opened(MAPPING))
def _(w: World) -> Built:
    source, x = _cells()
    return source.encode, {"x": x}


@call("ncprior.adapters.scvi.SCVISource.observed", batch=opened(MAPPING))
def _(w: World) -> Built:
    source, x = _cells()
    return source.observed, {"batch": x}


@call("ncprior.adapters.scvi.SCVISource.start", batch_size=count(), condition=opened(MAPPING))
def _(w: World) -> Built:
    source, x = _cells()
    return source.start, {"batch_size": 4, "condition": source.condition(x)}


for _method in ("group", "advance", "decode", "likelihood", "shared_prior"):

    @call(f"ncprior.adapters.scvi.SCVISource.{_method}")
    def _(w: World, method: str = _method) -> Built:
        source, x = _cells()
        state = source.start(4, source.encode(x))
        if method in ("decode", "likelihood"):
            state = sample_posterior(source, x)[1]
        given = {"advance": {"state": state, "z": w.z[:4]}, "shared_prior": {}}
        return getattr(source, method), given.get(method, {"state": state})


@call("ncprior.adapters.lars_snis.EnergyNet", latents=count())
def _(w: World) -> Built:
    return lars_snis.EnergyNet, {"latents": 4}


@call("ncprior.adapters.lars_snis.EnergyNet.forward", z=INNER)
def _(w: World) -> Built:
    return lars_snis.EnergyNet(2), {"z": w.z}


PRIORS = {"latents": count(), "num_proposals": count()}


@call(
    "ncprior.adapters.lars_snis.LARSPrior",
    **PRIORS,
    truncation=count(2),
    decay=number(0, 1, left_open=(0, 1)),
)
def _(w: World) -> Built:
    return lars_snis.LARSPrior, {"latents": 2}


@call("ncprior.adapters.lars_snis.SNISPrior", **PRIORS, energy=function(*LAYERS[:1], none=True))
def _(w: World) -> Built:
    return lars_snis.SNISPrior, {"latents": 2}


for _owner in ("LARSPrior", "SNISPrior"):
    for _method in ("log_ratio", "distribution", "sample"):

        @call(f"ncprior.adapters.lars_snis.{_owner}.{_method}")
        def _(w: World, owner: str = _owner, method: str = _method) -> Built:
            prior = getattr(lars_snis, owner)(2, num_proposals=4).eval()
            if owner == "LARSPrior":
                prior.estimate_normaliser(100)
            return getattr(prior, method), {"z": w.z} if method == "log_ratio" else {}


@call("ncprior.adapters.lars_snis.LARSPrior.estimate_normaliser", num_samples=count())
def _(w: World) -> Built:
    return lars_snis.LARSPrior(2).eval().estimate_normaliser, {"num_samples": 10}


MEAN = tensor(nan=None, rank=None)


@call("ncprior.adapters.lars_snis.EIMVAE", options=SLOW, mean=MEAN)
def _(w: World) -> Built:
    return lars_snis.EIMVAE, {"mean": torch.full((1, 28, 28), 0.5)}


@call("ncprior.adapters.lars_snis.ConvEIMVAE", options=SLOW, mean=MEAN)
def _(w: World) -> Built:
    return lars_snis.ConvEIMVAE, {"mean": torch.full((1, 28, 28), 0.5)}


for _owner, _methods in {
    "EIMVAE": ("posterior", "negative_elbo"),
    "ConvEIMVAE": ("encode", "negative_elbo"),
}.items():
    for _method in _methods:

        @call(f"ncprior.adapters.lars_snis.{_owner}.{_method}", options=SLOW)
        def _(w: World, owner: str = _owner, method: str = _method) -> Built:
            model = getattr(lars_snis, owner)(torch.full((1, 28, 28), 0.5)).eval()
            return partial(getattr(model, method), _images()), {}


for _method in ("prior_of_z_1", "posterior_of_z_1", "likelihood"):

    @call(f"ncprior.adapters.lars_snis.ConvEIMVAE.{_method}", options=SLOW)
    def _(w: World, method: str = _method) -> Built:
        model = lars_snis.ConvEIMVAE(torch.full((1, 28, 28), 0.5)).eval()
        mean, _, features = model.encode(_images())
        more = {"prior_of_z_1": (), "posterior_of_z_1": (features,), "likelihood": (mean,)}[method]
        return partial(getattr(model, method), mean, *more), {}


for _method in ("likelihood", "decode"):

    @call(f"ncprior.adapters.lars_snis.EIMVAE.{_method}", options=SLOW)
    def _(w: World, method: str = _method) -> Built:
        model = lars_snis.EIMVAE(torch.full((1, 28, 28), 0.5)).eval()
        return partial(getattr(model, method), model.posterior(_images()).sample()), {}


for _owner in ("EIMSource", "ConvEIMSource"):

    @call(f"ncprior.adapters.lars_snis.{_owner}", options=SLOW, model=WRONG_MODEL)
    def _(w: World, owner: str = _owner) -> Built:
        return getattr(lars_snis, owner), {
            "model": (_eim if owner == "EIMSource" else _conv_eim)(w).module
        }


@call("ncprior.adapters.lars_snis.Binarised", images=IMAGES, batch_size=unsure(count()))
def _(w: World) -> Built:
    return lars_snis.Binarised, {"images": torch.rand(10, 1, 28, 28), "batch_size": 4}


@call(
    "ncprior.adapters.lars_snis.train_vae",
    options=SLOW,
    vae=WRONG_MODEL,
    images=IMAGES,
    epochs=FEW,
    batch_size=count(),
    learning_rate=RATE,
    progress=PROGRESS,
)
def _(w: World) -> Built:
    return lars_snis.train_vae, {
        "vae": lars_snis.EIMVAE(torch.full((1, 28, 28), 0.5)),
        "images": torch.rand(16, 1, 28, 28),
        "epochs": 1,
        "batch_size": 8,
        "progress": False,
    }
