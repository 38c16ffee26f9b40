"""The priors that prior_hole.py sets side by side: peers, references and ours.

Not a benchmark itself. A method is fitted to the training encodings (or images) of a frozen VAE and
then asked for samples, again and again; what it costs is counted, not assumed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bench import Bench, with_settings
from clock import now
from hole_cases import Case, on_latents, slug
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal

from ncprior import Group, LatentSource, NCPrior, SingleGroup, fit, improve, sir
from ncprior.bases import (
    Empirical,
    JointSource,
    Rebased,
    fit_flow,
    fit_flow_matching,
    fit_flows,
    fit_gaussian,
    fit_mixture,
    fit_vamp,
    rebase,
    stored_numbers,
)
from ncprior.diagnostics import diagnose, match_strength, recommend_sampler
from ncprior.heads import factors
from ncprior.recipe import Improvement
from ncprior.samplers import (
    LogRatio,
    Sampler,
    budgeted_rejection,
    describe,
    tempered_smc,
    within_components,
)
from ncprior.saving import write_atomically
from ncprior.source import visit
from ncprior.training import FitSettings, calibrate_heads, gate, nested

BATCH = 1000  # samples drawn at once
AFTER = ("gate", "stages", "calibrate")  # what acts on trained heads
MUCH = 20_000  # rows, of which trainings are worth keeping

Images = tuple[Tensor, Tensor]  # decoded images and flat latents


OTHERS = "posterior of other images"  # half of the test images; the other half is the reference
TRAINING_IMAGES = "training images"


class Fitted(NamedTuple):
    """A fitted method: draws images with their latents; what it took to fit and what it stores."""

    draw: Callable[[int], Images]
    seconds: float = 0.0
    stored: int = 0
    priors: tuple[NCPrior, ...] = ()  # whose heads are evaluated


class Method(NamedTuple):
    """A method by name; `family` is ours (a trained ratio head), peer or reference."""

    name: str
    family: str
    fit: Callable[[Case, int], Fitted]


def from_source(source: LatentSource) -> Callable[[int], Images]:
    """Draws from the prior of a source, group by group."""

    @torch.no_grad()
    def draw(count: int) -> Images:
        latents, state = visit(source, source.start(count), lambda k, group: group.prior.sample())
        return source.decode(state), torch.cat([z.flatten(1) for z in latents], 1)

    return draw


def from_ncp(prior: NCPrior, sampler: Sampler) -> Callable[[int], Images]:
    """Draws from an NCP prior."""

    def draw(count: int) -> Images:
        sample = prior.sample(count, sampler)
        latents, source = sample.latents, prior.source
        groups = source.latents(latents[0]) if isinstance(source, JointSource) else latents
        return sample.x, torch.cat([z.flatten(1) for z in groups], 1)

    return draw


# --- references and peers ---


def base(case: Case, seed: int) -> Fitted:
    return Fitted(from_source(case.source))


def posterior(case: Case, seed: int) -> Fitted:
    return Fitted(case.posterior, stored=case.encodings.numel())


def posterior_of_others(case: Case, seed: int) -> Fitted:
    return Fitted(partial(case.posterior, held_out=True))


def training_images(case: Case, seed: int) -> Fitted:
    """No prior: data as they are, which show what the measure gives to images without a VAE."""

    def draw(count: int) -> Images:
        rows = torch.randperm(len(case.encodings))[:count]
        return case.images[rows], case.encodings[rows]

    return Fitted(draw, stored=case.images.numel())


def alone(heads: Heads, name: str) -> Callable[[Case, int], Fitted]:
    """A base of `ncprior.bases` and its kin, the one that heads are trained on."""

    def run(case: Case, seed: int) -> Fitted:
        found, seconds = heads.base(case, seed, name)
        source = rebase(case.source, found)
        return Fitted(from_source(source), seconds, sum(map(stored_numbers, source.bases or ())))

    return run


def colder(temperature: float) -> Callable[[Case, int], Fitted]:
    """The VAE's own prior with its scale reduced, the usual remedy for hierarchical models."""

    def run(case: Case, seed: int) -> Fitted:
        return Fitted(from_source(rebase(case.source, partial(tempered, temperature))), stored=1)

    return run


def tempered(temperature: float, k: int, group: Group) -> Distribution:
    """The VAE's own prior with its scale multiplied by the temperature, as a base."""
    p: Any = group.prior
    normal = Normal(p.mean, temperature * p.stddev, validate_args=False)
    return Independent(normal, len(p.event_shape), validate_args=False)


def pythaes(kind: str, **config: object) -> Callable[[Case, int], Fitted]:
    """A sampler of pythae, fitted and drawn from by pythae itself, with its default training.

    But for two that would take hours instead of its 100 epochs: the second stage of a VAE gets 20,
    and IAF, which inverts itself latent by latent in training, 10 where there are many latents. A
    quick run trains each for one or two.
    """

    def run(case: Case, seed: int) -> Fitted:
        from pythae import samplers
        from pythae.trainers import BaseTrainerConfig

        for name in ("base_trainer.base_trainer", "training_callbacks"):
            logging.getLogger(f"pythae.trainers.{name}").setLevel(logging.WARNING)
        np.random.seed(seed)
        model = _pythae_model(case)
        sampler = getattr(samplers, f"{kind}Sampler")(
            model, getattr(samplers, f"{kind}SamplerConfig")(**config)
        )
        options = {}
        images, held_out = images_of_rows(case)
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
            if kind != "GaussianMixture":
                options = {"eval_data": held_out}
                quick, iaf = (1, 10) if case.encodings.shape[1] > 64 else (2, 100)
                full = {"TwoStageVAE": 20, "IAF": iaf}.get(kind, 100)
                options["training_config"] = BaseTrainerConfig(
                    output_dir=folder, seed=seed, num_epochs=quick if case.quick else full
                )
            started = now()
            sampler.fit(images, **options)
            seconds = now() - started
        networks = [  # what is trained, but for a second copy of it
            module
            for name, module in vars(sampler).items()
            if isinstance(module, nn.Module) and name not in ("model", "flow_contained_model")
        ]
        stored = sum({p: p.numel() for net in networks for p in net.parameters()}.values())
        if kind == "GaussianMixture":
            gmm = sampler.gmm
            k, d = gmm.means_.shape
            stored = k * (1 + d + d * (d + 1) // 2)

        def draw(count: int) -> Images:
            np.random.seed(int(torch.randint(2**31, ())))
            seen: list[Tensor] = []
            hook = model.decoder.register_forward_pre_hook(lambda _, z: seen.append(z[0].detach()))
            try:
                x = sampler.sample(count, batch_size=min(count, 500))
            finally:
                hook.remove()
            return x, torch.cat(seen)[:count]

        return Fitted(draw, seconds, stored)

    return run


def images_of_rows(case: Case) -> tuple[Tensor, Tensor]:
    """Training and held-out images."""
    return case.images[: -case.num_held_out], case.images[-case.num_held_out :]


def _pythae_model(case: Case) -> Any:  # noqa: ANN401
    """The frozen VAE as an object of pythae."""
    from pythae.models import VAE, VAEConfig
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseEncoder

    vae: Any = case.vae

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.vae = vae

        def forward(self, x: Tensor) -> ModelOutput:
            q = self.vae.posterior(x)
            return ModelOutput(embedding=q.mean, log_covariance=2 * q.stddev.log())

    class Decoder(BaseDecoder):
        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=vae.decode(z))

    latents = case.encodings.shape[1]
    config = VAEConfig(input_dim=tuple(case.images.shape[1:]), latent_dim=latents)
    return VAE(config, encoder=Encoder(), decoder=Decoder()).eval()


# --- ours ---


class Heads:
    """Fits each base, and trains the heads on it, once per seed for all that draw from them."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.bases: dict[tuple[str, int], tuple[Any, float]] = {}
        self.kept: dict[Path, Trained] = {}

    def base(self, case: Case, seed: int, name: str) -> tuple[Any, float]:
        """A base of `BASES`, the same whenever it is fitted, and the seconds that it took."""
        if (name, seed) not in self.bases:
            torch.manual_seed(seed)
            started = now()
            found = (BASES | CONDITIONAL)[name](case)
            self.bases[name, seed] = found, now() - started
        return self.bases[name, seed]

    def on(self, case: Case, seed: int, base: str, **options: object) -> Trained:
        """Heads on a base of `BASES`, or the VAE's own; trained, or taken from the cache.

        What `gate`, `calibrate` and `stages` do, they do to the same training, by its checkpoint.
        """
        settings = {**case.fit, **options}
        folder = self._path(case, seed, base, settings)
        if folder not in self.kept:
            plain = {key: value for key, value in options.items() if key not in AFTER}
            seconds = 0.0 if plain == options else self.on(case, seed, base, **plain).seconds
            file = folder / "made.json"
            if not file.exists():
                made = self._train(case, seed, base, settings)
                with write_atomically(file) as temporary:
                    temporary.write_text(json.dumps(made), encoding="utf-8")
            made = json.loads(file.read_text(encoding="utf-8"))
            print(f"{folder.name}: {made['history']}", flush=True)
            prior = NCPrior.from_pretrained(case.source, folder)
            prior.precision = settings.get("precision", torch.float32)
            self.kept[folder] = Trained(prior, seconds + made["seconds"])
        return self.kept[folder]

    def _train(self, case: Case, seed: int, base: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Trains heads, or goes on from what was trained; the seconds are those of what was new."""
        source, seconds = case.source, 0.0
        if base:
            found, seconds = self.base(case, seed, base)
            source = rebase(source, found)
        training = {key: value for key, value in settings.items() if key not in AFTER}
        seconds = seconds if training == settings else 0.0
        checkpoint = self._path(case, seed, base, training).with_suffix(".checkpoint")
        torch.manual_seed(seed)
        clock = Stopwatch(self._path(case, seed, base, settings).with_suffix(".seconds"))
        prior = NCPrior.for_source(source, case.inputs(case.rows[:512]), **case.head)
        options = {key: value for key, value in settings.items() if key in (*training, "stages")}
        options |= {"held_out": case.held_out, "checkpoint": checkpoint}
        if case.quick and "num_cached_proposals" in settings:
            options["num_cached_proposals"] = 5000
        options = with_settings(FitSettings, options)
        history = fit(prior, case.data, callback=clock.note, **options)
        losses = ", ".join(f"{loss:.3f}" for loss in history.rows[-1].loss)
        told = f"training NCE loss {losses} nats; {history}"
        if settings.get("gate"):
            told += f"; groups left at their base: {gate(prior, history)}"
        if settings.get("calibrate"):
            size = settings.get("batch_size", 256)
            told += f"; slopes of log r: {calibrate_heads(prior, case.held_out, size)}"
        seconds += clock.seconds
        prior.save_pretrained(self._path(case, seed, base, settings))
        return {"seconds": seconds, "history": f"{told}\n{diagnose(prior, case.held_out)}"}

    def _path(self, case: Case, seed: int, base: str, settings: dict[str, Any]) -> Path:
        """A folder of its own for all that the heads depend on."""
        key = f"{case.head} {settings} {case.base_steps}"
        name = slug(f"hole-{case.name}-{base}-{seed}") + "-quick" * case.quick
        return self.bench.cache / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


class Stopwatch:
    """Seconds that a training has taken, with those before it was broken off."""

    def __init__(self, file: Path) -> None:
        self.file, self.started = file, now()
        self.before = float(file.read_text(encoding="utf-8")) if file.exists() else 0.0

    @property
    def seconds(self) -> float:
        return self.before + now() - self.started

    def note(self, _: object) -> None:
        """Writes them down; a callback of fit."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(str(self.seconds), encoding="utf-8")


class Trained(NamedTuple):
    """Heads, and the seconds that they and their base took."""

    prior: NCPrior
    seconds: float

    @property
    def stored(self) -> int:
        heads = sum(p.numel() for p in self.prior.parameters())
        source = self.prior.source
        if isinstance(source, JointSource):
            heads += sum(p.numel() for p in source.prior.heads.parameters())
            source = source.prior.source
        bases = source.bases if isinstance(source, Rebased) else None
        return heads + sum(map(stored_numbers, bases or ()))


def ours(
    heads: Heads, base: str, sampler: Sampler, *, matched: bool = False, **options: object
) -> Callable[[Case, int], Fitted]:
    """Trained heads with one sampler, at strength 1 or at the one that matches the sampler."""

    def run(case: Case, seed: int) -> Fitted:
        prior, seconds = found = heads.on(case, seed, base, **options)
        if matched:
            prior, more = at_matched_strength(case, prior, sampler)
            seconds += more
        return Fitted(from_ncp(prior, sampler), seconds, found.stored, (prior,))

    return run


def at_matched_strength(case: Case, prior: NCPrior, sampler: Sampler) -> tuple[NCPrior, float]:
    """The same heads at another strength, and the seconds that it took to find."""
    started = now()
    found = NCPrior(prior.source, prior.heads).eval()
    found.precision = prior.precision
    held_out = case.held_out[: 300 if case.quick else 2000]
    found.strength = match_strength(found, held_out, sampler, batch_size=BATCH)
    print(f"{case.name}, {describe(sampler)}: strength {found.strength:.3f}", flush=True)
    return found, now() - started


def recommended(
    heads: Heads, base: str, budget: int, **options: object
) -> Callable[[Case, int], Fitted]:
    """Trained heads with the sampler that `recommend_sampler` picks, its strength matched."""

    def run(case: Case, seed: int) -> Fitted:
        prior = heads.on(case, seed, base, **options).prior
        choice = recommend_sampler(diagnose(prior, case.held_out), budget=budget)
        print(f"{case.name}, seed {seed}, budget {budget}: {choice}", flush=True)
        return ours(heads, base, choice.sampler, matched=True, **options)(case, seed)

    return run


def improved(
    bench: Bench, budget: int, of: Callable[[Case], Case]
) -> Callable[[Case, int], Fitted]:
    """The prior of `improve` on a variant `of` the case, which is told the budget and the seed alone."""

    def run(case: Case, seed: int) -> Fitted:
        case = of(case)
        prior, seconds = found = _improved(bench, case, seed, budget)
        assert prior.sampler is not None
        below = prior.source.prior if isinstance(prior.source, JointSource) else None
        priors = (below, prior) if isinstance(below, NCPrior) else (prior,)
        return Fitted(from_ncp(prior, prior.sampler), seconds, found.stored, priors)

    return run


def _improved(bench: Bench, case: Case, seed: int, budget: int) -> Trained:
    """The prior of `improve`; in the cache are trainings of much data, and what came of them.

    Both budgets have the same training.
    """
    data, held_out = case.all_data
    quick = "-quick" if bench.settings["quick"] else ""
    vae = str(case.source.fingerprint())[-8:]
    folder = bench.cache / f"improve-{slug(case.name)}-{vae}-{seed}{quick}"
    ready, took = folder / f"prior-{budget}", folder / f"seconds-{budget}.json"
    if took.exists():
        return Trained(NCPrior.from_pretrained(case.source, ready), json.loads(took.read_text()))
    started = now()
    prior = improve(
        *(case.source, data),
        held_out=held_out,
        budget=budget,
        seed=seed,
        checkpoint=folder if len(case.rows) > MUCH else None,
    )
    seconds = now() - started + _trained_before(prior.report)
    print(f"{case.name}, seed {seed}, budget {budget}:\n{prior.report}", flush=True)
    if len(case.rows) > MUCH:
        prior.save_pretrained(ready)
        with write_atomically(took) as temporary:
            temporary.write_text(json.dumps(seconds))
    return Trained(prior, seconds)


def _trained_before(report: Improvement) -> float:
    """Seconds of the training of all heads in earlier runs, which checkpoints have saved."""
    trained = ("heads", "joint head")
    now_spent = sum(it.seconds or 0.0 for it in report.choices if it.part in trained)
    spent: float = sum(history.rows[-1].seconds for history in report.histories)
    return max(0.0, spent - now_spent)


def second_stage(heads: Heads, base: str, first: int, then: int) -> Callable[[Case, int], Fitted]:
    """A second head on what SIR with `first` proposals draws, in nested form."""

    def run(case: Case, seed: int) -> Fitted:
        prior, seconds = found = heads.on(case, seed, base)
        source = nested(prior, partial(sir, num_proposals=first))
        second = NCPrior.for_source(source, case.held_out[:512], **case.head)
        options = {**case.fit, "num_cached_proposals": 5000 if case.quick else 50_000}
        started = now()
        options = with_settings(FitSettings, options)
        history = fit(second, case.data, held_out=case.held_out, **options)
        seconds += now() - started
        print(f"{case.name}, seed {seed}, nested: {history}", flush=True)
        stored = found.stored + sum(p.numel() for p in second.parameters())
        draw = from_ncp(second, partial(sir, num_proposals=then))
        return Fitted(draw, seconds, stored, (prior, second))

    return run


BASES: dict[str, Callable[[Case], Any]] = {
    "Gaussian": lambda case: fit_gaussian(case.encodings),
    "mixture of 10": lambda case: fit_mixture(case.encodings, 10),
    "mixture of 100": lambda case: fit_mixture(case.encodings, 100),
    "flow": lambda case: fit_flow(case.encodings, steps=case.base_steps),
    "flow matching": lambda case: fit_flow_matching(
        case.encodings, steps=case.base_steps if case.quick else 5000
    ),
    "VampPrior": lambda case: fit_vamp(  # each step encodes all 500
        on_images(case), images_of_rows(case)[0], 500, steps=case.base_steps // 4
    ),
    "VampPrior, not trained": lambda case: fit_vamp(  # 500 random images as they are
        on_images(case), images_of_rows(case)[0], 500, steps=0
    ),
    "training encodings": lambda case: Empirical(case.encodings),
}
CONDITIONAL: dict[str, Callable[[Case], Any]] = {  # given z_<k, for several groups
    "flow given z_<k": lambda case: fit_flows(case.source, case.data, steps=case.base_steps),
}


def on_images(case: Case, **options: Any) -> SingleGroup:  # noqa: ANN401
    """The flat VAE as a source of images, for what sees or learns inputs of its encoder."""
    vae: Any = case.vae
    parts = (vae.prior(), vae.posterior, vae.decode)
    return SingleGroup(*parts, module=vae, features=case.maps, **options)


def references(case: Case) -> list[Method]:
    """Methods that every run has, the VAE's own prior and the posterior first."""
    own = "N(0, I)" if case.source.num_groups == 1 else "base prior"
    return [
        Method(own, "reference", base),
        Method("posterior", "reference", posterior),
        Method(OTHERS, "reference", posterior_of_others),
        Method(TRAINING_IMAGES, "reference", training_images),
    ]


def methods(case: Case, heads: Heads) -> list[Method]:
    """All that is compared on a case with its references."""
    few, many = (partial(sir, num_proposals=m) for m in (50, 500))
    found: list[Method] = []
    if case.source.num_groups > 1:
        found += [Method(f"temperature {t}", "peer", colder(t)) for t in (0.7, 0.8, 0.9)]
        found += [Method(name, "peer", alone(heads, name)) for name in CONDITIONAL]
        own: list[tuple[str, Sampler, dict[str, Any]]] = [
            ("NCP, SIR(50)", few, {}),
            ("NCP, SIR(500)", many, {}),
            ("NCP, SIR(50), matched", few, {"matched": True}),
            ("NCP gated and calibrated, SIR(50)", few, {"gate": True, "calibrate": True}),
        ]
        found += [Method(name, "ours", ours(heads, "", s, **options)) for name, s, options in own]
        found += [
            Method(f"NCP, recommended({m}), matched", "ours", recommended(heads, "", m))
            for m in (500, 5000)
        ]
        found += [
            Method(
                f"NCP on {name}, SIR(10)",
                "ours",
                ours(heads, name, partial(sir, num_proposals=10)),
            )
            for name in CONDITIONAL
        ]
        return found + automatic(heads.bench)
    for name in BASES:
        if name == "mixture of 100" and name not in case.bases:
            continue  # of many latents, twenty minutes; pythae's own is the same
        family = "reference" if name == "training encodings" else "peer"
        found.append(Method(name, family, alone(heads, name)))
    for components in (10, 100):
        sampler = pythaes("GaussianMixture", n_components=components)
        found.append(Method(f"pythae mixture of {components}", "peer", sampler))
    for name, kind in (("MAF", "MAF"), ("IAF", "IAF"), ("two-stage", "TwoStageVAE")):
        found.append(Method(f"pythae {name}", "peer", pythaes(kind)))
    smc = partial(tempered_smc, num_particles=1, share_particles=True, num_moves=8)
    pool = partial(budgeted_rejection, num_proposals=50, share_proposals=True)
    last = case.bases[-1]
    for where in case.bases:
        name = f"NCP on {where or 'N(0, I)'}"
        proposals = case.proposals if where in ("", last) else case.proposals[:1]
        kinds = [(f"SIR({m})", partial(sir, num_proposals=m)) for m in proposals]
        if where:
            kinds += [(f"{kind} within", within_components(sampler)) for kind, sampler in kinds]
        if case.every_sampler and where in ("", last):
            kinds += [("SMC", smc), ("pool of 50", pool)]
        if where == last:
            chain = partial(tempered_smc, num_particles=1, num_moves=24)
            kinds.append(("MALA(24) within", within_components(chain)))
        found += [Method(f"{name}, {kind}", "ours", ours(heads, where, s)) for kind, s in kinds]
        found += [
            Method(f"{name}, {kind}, matched", "ours", ours(heads, where, s, matched=True))
            for kind, s in (kinds if case.every_sampler else kinds[-1:])
            if where in ("", last)
        ]
    found += [
        Method(f"NCP on {last}, recommended({m}), matched", "ours", recommended(heads, last, m))
        for m in case.proposals
    ]
    found += automatic(heads.bench)
    if case.maps is not None:
        found += automatic(heads.bench, ", heads on z", on_latents)
    return found + (variants(heads, last) if case.every_sampler else [])


def automatic(
    bench: Bench, variant: str = "", of: Callable[[Case], Case] = lambda case: case
) -> list[Method]:
    """`improve`, with no argument but the budget of evaluations per head."""
    return [Method(f"improve({m}){variant}", "ours", improved(bench, m, of)) for m in (50, 500)]


def variants(heads: Heads, last: str) -> list[Method]:
    """Other samplers, bases whose draws cost more than the heads, and further training."""
    ten, few = (partial(sir, num_proposals=m) for m in (10, 50))
    found = {
        f"{last}, calibrated, SIR(50)": ours(heads, last, few, calibrate=True),
        f"{last}, nested 7 × 7": second_stage(heads, last, 7, 7),
        "flow, SIR(10)": ours(heads, "flow", ten, num_cached_proposals=50_000),
        "flow matching, SIR(10)": ours(heads, "flow matching", ten, num_cached_proposals=50_000),
        f"{last}, stages auto, recommended(50), matched": recommended(
            heads, last, 50, stages="auto"
        ),
    }
    return [Method(f"NCP on {name}", "ours", fit) for name, fit in found.items()]


# --- what it costs ---


@contextmanager
def evaluations(priors: Iterable[NCPrior]) -> Iterator[Callable[[], int]]:
    """Counts the rows that heads are evaluated at by samplers, which go as fast as ever.

    With a gradient they count twice, and of stages that are multiplied, each counts.
    """
    total = 0

    def counted(ratio: Callable[..., LogRatio], heads: nn.ModuleList) -> Callable[..., LogRatio]:
        def of_group(k: int, context: Tensor | None) -> LogRatio:
            log_r, count = ratio(k, context), len(factors(heads[k]))

            def counting(z: Tensor) -> Tensor:
                nonlocal total
                found = log_r(z)
                total += found.numel() * count * (2 if torch.is_grad_enabled() else 1)
                return found

            return counting

        return of_group

    with ExitStack() as stack:
        for prior in priors:
            prior._ratio = counted(prior._ratio, prior.heads)  # type: ignore[method-assign]
            stack.callback(delattr, prior, "_ratio")
        yield lambda: total
