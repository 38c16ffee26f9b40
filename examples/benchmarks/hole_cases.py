"""The frozen VAEs of prior_hole.py and vaebm.py, their judges, and what heads are trained on.

Not a benchmark itself. Every VAE is trained on the plain ELBO before any prior is looked at, and
kept in --cache; so is the classifier whose features the Fréchet distances are taken on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import Bench
from torch import Tensor, nn
from torch.distributions import Independent, Normal
from torch.nn.functional import cross_entropy

from ncprior import LatentSource, SingleGroup
from ncprior.adapters.hvae import HVAE, HVAESource, train_hvae
from ncprior.adapters.lars_snis import Binarised
from ncprior.adapters.rae import VAE as RAEVAE
from ncprior.adapters.rae import settle
from ncprior.bases import latents_of
from ncprior.demo import VAE, Classifier, Labelled, digits, in_batches, read_images, split
from ncprior.heads import MLPHead
from ncprior.source import sample_posterior
from ncprior.utils import fast_precision, train

DECODED = (
    100  # latents decoded at once: images of more of them leave a core's cache, which is slow
)


@dataclass
class Case:
    """One frozen VAE, ready for priors to be fitted and judged.

    `rows` are what the source encodes: for flat VAEs mean and σ of q(z | x) in place of x, so that
    the encoder is visited once; the last `num_held_out` of them stop the training of heads. `test_rows` are
    those of the images whose features are the reference.
    """

    name: str
    vae: nn.Module
    source: LatentSource
    rows: Tensor
    test_rows: Tensor
    num_held_out: int
    images: Tensor
    test_images: Tensor  # those of the reference
    features: Callable[[Tensor], Tensor]
    reference: Tensor
    facts: dict[str, Any]
    head: dict[str, Any]
    fit: dict[str, Any]
    quick: bool
    maps: Callable[[Tensor], Tensor] | None = None  # what heads see of z, if not z itself
    binarise: bool = False
    base_steps: int = 3000  # of the bases that are trained by descent
    bases: tuple[str, ...] = ("", "mixture of 100", "mixture of 10")  # that heads are trained on
    proposals: tuple[int, ...] = (50, 500)
    every_sampler: bool = True  # not SIR alone
    train: Tensor = field(init=False)
    held_out: Tensor = field(init=False)  # as the source encodes them, the same for all
    encodings: Tensor = field(init=False)
    fresh_encodings: Tensor = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        cut = len(self.rows) - self.num_held_out
        self.train, self.held_out = self.rows[:cut], self.inputs(self.rows[cut:])
        if self.source.num_groups == 1:
            self.encodings = latents_of(self.source, self.train)
            self.fresh_encodings = latents_of(self.source, self.held_out)
        else:
            self.encodings = self._all_latents(self.train)
            self.fresh_encodings = self._all_latents(self.held_out)

    def inputs(self, rows: Tensor) -> Tensor:
        """Rows as the source encodes them."""
        return rows.bernoulli() if self.binarise else rows

    @property
    def data(self) -> Any:  # noqa: ANN401
        """What heads are trained on."""
        batch = self.fit.get("batch_size", 256)
        return Binarised(self.train, batch) if self.binarise else self.train

    @property
    def all_data(self) -> tuple[Any, Tensor | None]:
        """What `improve` gets: all rows, or, if they are drawn anew, held-out rows besides."""
        return (self.data, self.held_out) if self.binarise else (self.rows, None)

    @torch.no_grad()
    def posterior(self, count: int, *, held_out: bool = False) -> tuple[Tensor, Tensor]:
        """Decoded posterior samples, of training data or the first half of the test images, and their latents."""
        data = self.test_rows[: len(self.test_rows) // 2] if held_out else self.train
        total = len(data)
        passes = -(-count // total)  # again where there are fewer than samples
        rows = data[torch.cat([torch.randperm(total) for _ in range(passes)])[:count]]
        parts = [sample_posterior(self.source, self.inputs(part)) for part in rows.split(1000)]
        z = torch.cat([torch.cat([z.flatten(1) for z in latents], 1) for latents, _ in parts])
        return torch.cat([self.source.decode(state) for _, state in parts]), z

    def _all_latents(self, rows: Tensor) -> Tensor:
        parts = [sample_posterior(self.source, self.inputs(part))[0] for part in rows.split(1000)]
        return torch.cat([torch.cat([z.flatten(1) for z in latents], 1) for latents in parts])


def make_case(bench: Bench, data: str, model: str) -> Case:
    """Trains, or takes from the cache, what the benchmark of `data` and `model` needs."""
    if model == "hierarchical":
        if data != "mnist":
            raise SystemExit("--model hierarchical is made for --data mnist.")
        return _hierarchical(bench)
    return {"mnist": _mnist, "digits": _digits, "cifar10": _cifar10}[data](bench)


def _images(name: str) -> tuple[Labelled, Labelled]:
    """Training and test images, shuffled, the same for every seed."""
    torch.manual_seed(0)
    try:
        parts = [read_images(name, part) for part in ("train", "test")]
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from None
    train_part, test = (part.rows(torch.randperm(len(part.labels))) for part in parts)
    return train_part, test


def _classifier(bench: Bench, name: str, net: Classifier, data: Labelled, steps: int) -> None:
    def misfit(rows: Tensor) -> Tensor:
        return cross_entropy(net(data.images[rows]), data.labels[rows])

    do = partial(train, net, misfit, len(data.labels), steps=steps, batch_size=128)
    bench.network(f"classifier-{name}", net, partial(do, name="classifier"), steps=steps)


def flat_source(vae: Any, features: Any = None) -> SingleGroup:  # noqa: ANN401
    """The source of a VAE with one group, whose rows are mean and σ of q(z | x)."""

    def posterior(h: Tensor) -> Independent:
        return Independent(Normal(*h.chunk(2, -1), validate_args=False), 1, validate_args=False)

    def decode(z: Tensor) -> Tensor:
        return torch.cat([vae.decode(part) for part in z.split(DECODED)])

    return SingleGroup(vae.prior(), posterior, decode, module=vae, features=features)


def on_latents(case: Case) -> Case:
    """The case with heads that see z itself, not feature maps."""
    return replace(case, name=f"{case.name}-z", source=flat_source(case.vae), maps=None)


def _encoded(vae: Any, images: Tensor) -> Tensor:  # noqa: ANN401
    def moments(x: Tensor) -> Tensor:
        q = vae.posterior(x)
        return torch.cat([q.mean, q.stddev], -1)

    return in_batches(moments, images)


def _flat(
    bench: Bench,
    name: str,
    vae: VAE,
    net: Classifier,
    data: Labelled,
    test: Labelled,
    **options: Any,  # noqa: ANN401
) -> Case:
    """A grey flat VAE: trains it and its judge."""
    steps = options.pop("vae_steps")

    def loss(rows: Tensor) -> Tensor:
        return vae.negative_elbo(data.images[rows]).mean()

    torch.manual_seed(0)
    do = partial(train, vae, loss, len(data.labels), steps=steps, batch_size=128, name="VAE")
    bench.network(f"hole-vae-{name}", vae, do, steps=steps)
    _classifier(bench, name, net, data, options.pop("classifier_steps"))
    facts = {
        "negative ELBO on test images, nats": in_batches(vae.negative_elbo, test.images).mean(),
        "classifier's accuracy": (in_batches(net, test.images).argmax(1) == test.labels).float(),
    }
    return Case(
        name=name,
        vae=vae,
        source=flat_source(vae),
        rows=_encoded(vae, data.images),
        test_rows=_encoded(vae, test.images),
        images=data.images,
        test_images=test.images,
        features=net.features,
        reference=in_batches(net.features, test.images),
        facts={key: value.mean().item() for key, value in facts.items()},
        quick=bench.settings["quick"],
        base_steps=200 if bench.settings["quick"] else 3000,
        **options,
    )


def _mnist(bench: Bench) -> Case:
    quick = bench.settings["quick"]
    data, test = _images("ylecun/mnist")
    if quick:
        data = data.rows(slice(20_000))
    torch.manual_seed(0)
    return _flat(
        *(bench, "mnist", VAE(28, latents=16, counts=1)),
        *(Classifier(28, num_features=64), data, test),
        vae_steps=1000 if quick else 9000,
        classifier_steps=300 if quick else 900,
        num_held_out=3000,
        head={"width": 128 if quick else 256, "depth": 2 if quick else 3, "dropout": 0.1},
        fit={
            "steps": 3000 if quick else 12_000,
            "batch_size": 512,
            "precision": fast_precision("cpu"),
            "eval_every": 100 if quick else 500,
        },
    )


def _digits(bench: Bench) -> Case:
    quick = bench.settings["quick"]
    torch.manual_seed(0)
    data, test = split(digits(), 600, 0)
    return _flat(
        *(bench, "digits", VAE(8, latents=6, counts=16)),
        *(Classifier(8, num_features=16), data, test),
        vae_steps=800 if quick else 2500,
        classifier_steps=200 if quick else 500,
        num_held_out=120,
        head={"width": 64, "depth": 1, "dropout": 0.1},
        fit={"steps": 300 if quick else 1000, "eval_every": 50},
    )


def _cifar10(bench: Bench) -> Case:
    quick = bench.settings["quick"]
    data, test = _images("uoft-cs/cifar10")
    torch.manual_seed(0)
    vae, net = RAEVAE("cifar10", width=0.25), Classifier(32, num_features=32 if quick else 64)
    steps = 300 if quick else 4800

    def fit_vae() -> None:
        def loss(rows: Tensor) -> Tensor:
            return vae.loss(data.images[rows]).mean()

        train(vae, loss, len(data.labels), steps=steps, batch_size=64, learning_rate=1e-3)
        settle(vae, data.images[:5000])

    bench.network("hole-vae-cifar10", vae, fit_vae, steps=steps)
    vae.to(memory_format=torch.channels_last)  # decodes faster
    _classifier(bench, "cifar10", net, data, 300 if quick else 2000)
    right = in_batches(net, test.images).argmax(1) == test.labels
    count = 8000 if quick else len(data.images)
    return Case(
        name="cifar10",
        vae=vae,
        source=flat_source(vae, vae.decoder[:2]),
        maps=vae.decoder[:2],
        rows=_encoded(vae, data.images[:count]),
        test_rows=_encoded(vae, test.images),
        num_held_out=count // 20,
        images=data.images[:count],
        test_images=test.images,
        features=net.features,
        reference=in_batches(net.features, test.images),
        facts={"classifier's accuracy": right.float().mean().item()},
        quick=quick,
        head={"width": 16 if quick else 64, "depth": 1 if quick else 2, "dropout": 0.1},
        fit={
            "steps": 500 if quick else 4000,
            "learning_rate": 2e-3,
            "weight_decay": 0.05,
            "precision": fast_precision("cpu"),
            "eval_every": 100 if quick else 200,
        },
        base_steps=50 if quick else 2000,
        bases=("", "mixture of 10"),
        proposals=(50,),
        every_sampler=False,
    )


def _hierarchical(bench: Bench) -> Case:
    quick = bench.settings["quick"]
    data, test = _images("ylecun/mnist")
    torch.manual_seed(0)
    vae, epochs = HVAE(num_groups=10), 2 if quick else 16
    do = partial(train_hvae, vae, data.images[:50_000], epochs=epochs)
    bench.network("hvae-10", vae, do, groups=10, epochs=epochs)
    net = Classifier(28, num_features=64)
    _classifier(bench, "mnist", net, data, 300 if quick else 900)
    elbo = in_batches(lambda x: vae.negative_elbo(x.bernoulli()), test.images)
    right = in_batches(net, test.images).argmax(1) == test.labels
    return Case(
        name="mnist-hierarchical",
        vae=vae,
        source=HVAESource(vae),
        rows=data.images,
        test_rows=test.images,
        num_held_out=3000,
        images=data.images,
        test_images=test.images,
        features=net.features,
        reference=in_batches(net.features, test.images),
        facts={
            "negative ELBO on test images, nats": elbo.mean().item(),
            "classifier's accuracy": right.float().mean().item(),
        },
        quick=quick,
        base_steps=50 if quick else 3000,
        head={"kind": MLPHead, "width": 128},
        fit={
            "steps": 300 if quick else 12_000,
            "num_draws": 4,
            "learning_rate": 2e-3,
            "cache_epochs": 3,
            "precision": fast_precision("cpu"),
            "eval_every": 100 if quick else 600,
        },
        binarise=True,
    )


def slug(name: str) -> str:
    """A name as a part of a file's name."""
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


BASE, POSTERIOR = "N(0, I)", "posterior"  # the methods that all others are judged against


def image_file(samples: Path, case: str, method: str, seed: int) -> Path:
    """The file of a method's images, (generations, N, C, H, W) in bytes, which judges.py reads."""
    return samples / f"{slug(f'{case}-{method}-{seed}')}.npy"


def save_images(file: Path, generations: list[Tensor]) -> None:
    """Writes the images in [0, 1] of all generations."""
    file.parent.mkdir(parents=True, exist_ok=True)
    np.save(file, in_bytes(torch.stack(generations)).numpy())


def in_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as a file has them."""
    return (images.clamp(0, 1) * 255).round().byte()
