"""Calls of codes: bases, networks and VQ-VAEs as sources."""

from __future__ import annotations

from typing import Any

import torch
from fuzz.calls import call
from fuzz.kinds import (
    DATA,
    FLAG,
    INNER,
    MODULE,
    NETWORK,
    OPTIONAL_MODULE,
    OPTIONAL_NETWORK,
    OPTIONAL_SHAPE,
    SHAPE,
    SOURCE,
    X,
    choice,
    count,
    number,
    only_invalid,
    replace,
    steps,
    tensor,
    unsure,
)
from fuzz.values import Layer
from fuzz.world import World
from helpers.vqvae2_standin import TwoLevels

from ncprior import bases, distributions
from ncprior.adapters import vq

Built = tuple[Any, dict[str, Any]]
CODES = tensor(array=True, rank=None, whole=None)
FEW = count(none=True, huge=False)


def _network(context: tuple[int, ...] | None = None) -> bases.MaskedConvNet:
    sizes = {"width": 4, "depth": 1, "kernel_size": 3}
    return bases.MaskedConvNet((2,), 5, context_shape=context, **sizes).eval()


def _source() -> vq.VQSource:
    layer = Layer(3, 3)
    return vq.VQSource(lambda x: (layer(x) > 0).long(), lambda z: z.float(), num_categories=2)


def _state(source: vq.VQSource) -> Any:
    state = source.start(4)
    return source.advance(state, torch.zeros(4, 3, dtype=torch.long))


# --- distributions


@call("ncprior.distributions.PointMass", z=INNER, log_q=INNER, validate_args=FLAG)
def _(w: World) -> Built:
    return distributions.PointMass, {"z": w.z, "log_q": torch.zeros(len(w.z))}


@call("ncprior.distributions.PointMass.log_prob", value=INNER)
def _(w: World) -> Built:
    return distributions.PointMass(w.z).log_prob, {"value": w.z}


@call("ncprior.distributions.PointMass.sample", sample_shape=SHAPE)
def _(w: World) -> Built:
    return distributions.PointMass(w.z).sample, {"sample_shape": (2,)}


@call("ncprior.distributions.num_categories_of")
def _(w: World) -> Built:
    return distributions.num_categories_of, {"prior": w.base}


# --- bases

BASES = {
    "CodeFrequencies": lambda: bases.CodeFrequencies(torch.zeros(2, 5)),
    "CodeNetwork": lambda: bases.CodeNetwork(_network()),
}
for _kind, _make in BASES.items():
    _owner = f"ncprior.bases.{_kind}"

    @call(f"{_owner}.sample")
    def _(w: World, make: Any = _make) -> Built:
        return make().sample, {"sample_shape": (4,)}

    @call(f"{_owner}.log_prob", value=INNER)
    def _(w: World, make: Any = _make) -> Built:
        return make().log_prob, {"value": torch.randint(5, (4, 2))}

    @call(f"{_owner}.expand")
    def _(w: World, make: Any = _make) -> Built:
        return make().expand, {"batch_shape": (3,)}

    for _name in ("config", "tensors"):

        @call(f"{_owner}.{_name}")
        def _(w: World, make: Any = _make, name: str = _name) -> Built:
            return getattr(make(), name), {}

    @call(f"{_owner}.to")
    def _(w: World, make: Any = _make) -> Built:
        return make().to, {"device": "cpu"}

    @call(f"{_owner}.rebuild")
    def _(w: World, make: Any = _make) -> Built:
        base = make()
        return base.rebuild, {"tensors": base.tensors(), "config": base.config()}


@call("ncprior.bases.CodeFrequencies", logits=tensor(array=None, rank=None, whole=None))
def _(w: World) -> Built:
    return bases.CodeFrequencies, {"logits": torch.zeros(2, 5)}


@call("ncprior.bases.CodeNetwork", network=MODULE)
def _(w: World) -> Built:
    return bases.CodeNetwork, {"network": _network()}


@call("ncprior.bases.CodeNetwork.given", context=INNER)
def _(w: World) -> Built:
    return bases.CodeNetwork(_network((3,))).given, {"context": torch.randn(4, 3)}


@call("ncprior.bases.NoCodePrior", num_categories=count())
def _(w: World) -> Built:
    return bases.NoCodePrior, {"num_categories": 5}


@call("ncprior.bases.fit_code_frequencies", codes=CODES, num_categories=unsure(FEW))
def _(w: World) -> Built:
    return bases.fit_code_frequencies, {"codes": torch.randint(5, (9, 2)), "num_categories": 5}


SIZES = {
    "width": count(huge=False),
    "depth": count(0, huge=False),
    "kernel_size": unsure(count(huge=False)),
}


@call(
    "ncprior.bases.MaskedConvNet",
    event_shape=SHAPE.without("(10**12,)"),
    num_categories=count(huge=False),
    context_shape=OPTIONAL_SHAPE.without("(10**12,)"),
    dropout=number(0, 1, left_open=(1,)),
    **SIZES,
)
def _(w: World) -> Built:
    sizes = {"event_shape": (2,), "num_categories": 5, "context_shape": None}
    return bases.MaskedConvNet, {**sizes, "width": 4, "depth": 1, "kernel_size": 3, "dropout": 0.1}


@call("ncprior.bases.MaskedConvNet.forward")
def _(w: World) -> Built:
    return _network().forward, {"codes": torch.randint(5, (4, 2))}


@call("ncprior.bases.MaskedConvNet.draw")
def _(w: World) -> Built:
    return _network().draw, {"count": 3}


@call("ncprior.bases.MaskedConvNet.embed_context")
def _(w: World) -> Built:
    return _network((3,)).embed_context, {"context": torch.randn(4, 3)}


@call("ncprior.bases.MaskedConvNet.config")
def _(w: World) -> Built:
    return _network().config, {}


@call(
    "ncprior.bases.fit_code_network",
    codes=only_invalid(CODES),
    num_categories=only_invalid(FEW),
    steps=replace(only_invalid(steps()), is_work=True),
    batch_size=only_invalid(count()),
    learning_rate=only_invalid(number(0, open_low=True)),
    weight_decay=only_invalid(number(0)),
    dropout=only_invalid(number(0, 1, left_open=(1,))),
    patience=only_invalid(count(none=True)),
    max_seconds=only_invalid(number(0, open_low=True, none=True, also=(float("inf"),))),
    progress=only_invalid(FLAG),
    **{name: only_invalid(kind) for name, kind in SIZES.items()},
    options={"slow": True, "limit": 6.0},
)
def _(w: World) -> Built:
    arguments: dict[str, Any] = {"codes": torch.randint(5, (40, 2)), "num_categories": 5}
    arguments |= {"steps": 1, "batch_size": 8, "learning_rate": 1e-3, "weight_decay": 0.1}
    arguments |= {"width": 4, "depth": 1, "kernel_size": 3, "dropout": 0.1, "patience": 2}
    return bases.fit_code_network, {**arguments, "max_seconds": 1.0, "progress": False}


@call(
    "ncprior.bases.fit_code_bases",
    source=SOURCE,
    data=DATA,
    kind=choice("network", "frequencies"),
    options={"slow": True},
)
def _(w: World) -> Built:
    return bases.fit_code_bases, {"source": _source(), "data": w.x, "kind": "frequencies"}


# --- sources


@call(
    "ncprior.adapters.vq.VQSource",
    encode=NETWORK,
    decode=NETWORK,
    num_categories=unsure(count()),
    module=OPTIONAL_MODULE,
    condition=unsure(OPTIONAL_NETWORK),
    context=unsure(OPTIONAL_NETWORK),
)
def _(w: World) -> Built:
    parts = {"encode": lambda x: (x > 0).long(), "decode": lambda z: z.float()}
    return vq.VQSource, {
        **parts,
        "num_categories": 2,
        "module": None,
        "condition": None,
        "context": None,
    }


@call("ncprior.adapters.vq.VQSource.encode", x=X)
def _(w: World) -> Built:
    return _source().encode, {"x": w.x}


@call("ncprior.adapters.vq.VQSource.start", batch_size=count())
def _(w: World) -> Built:
    return _source().start, {"batch_size": 3}


for _method in ("group", "decode"):

    @call(f"ncprior.adapters.vq.VQSource.{_method}")
    def _(w: World, method: str = _method) -> Built:
        source = _source()
        state = source.start(4) if method == "group" else _state(source)
        return getattr(source, method), {"state": state}


@call("ncprior.adapters.vq.VQSource.advance")
def _(w: World) -> Built:
    source = _source()
    return source.advance, {"state": source.start(4), "z": torch.zeros(4, 3).long()}


@call("ncprior.adapters.vq.VQSource.shared_prior")
def _(w: World) -> Built:
    return _source().shared_prior, {}


@call("ncprior.adapters.vq.VQVAE2Source", model=MODULE)
def _(w: World) -> Built:
    return vq.VQVAE2Source, {"model": TwoLevels().eval()}
