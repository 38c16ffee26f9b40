"""Single cells: priors of scVI and SCANVI, judged by a classifier that tells drawn cells from real.

    pip install -c constraints.txt '.[cells,demo]'
    python examples/scvi_cells.py --quick                        # pbmc68k, without `improve`: 2 or 3 minutes
    python examples/scvi_cells.py --seed 0 1 2 --json cells.json
    python examples/scvi_cells.py --h5ad cells.h5ad --batch-key donor --layer counts

The method is not about images. A model of scvi-tools is trained on half of the cells, and each prior
is fitted to its frozen latents of these cells. The other half is split in two, several times: cells
are drawn under the conditions of one part (library size, batch, label), and compared with the other.

`auc` is the area under the ROC curve of gradient-boosted trees on the log-normalised counts of the 100
most variable genes, on cells that the trees have not seen: 0.5 where drawn and real cells cannot be
told apart. It is the mean over the splits; `auc_low` and `auc_high` are the mean ends of the 95 %
intervals of single splits. `over` is the difference to decoded posteriors of training cells on the same splits.
`correlation` is the root mean square error of the gene-gene correlations, and `pseudobulk` that of
log mean expression. `near_copies` is the share of cells that are closer to a training cell than 95 %
of real new cells are. `real` compares real cells with real ones: the noise of every measure.

The rows: the VAE's own prior (N(0, I); with SCANVI p(z1 | z2, y) behind it); a mixture of ten Gaussians;
a ratio head on that mixture with SIR from 50 proposals; `improve`; decoded posteriors of training
cells, and those of the held-out cells whose conditions are used, which is the ceiling for new cells.
Heads see the conditions; the mixture does not.

Data: peripheral blood cells of Kang et al. (2018), 1,000 control and 1,000 stimulated with interferon,
from $NCPRIOR_DATA/kang2018/pbmc_stim.h5ad, by SCVI with the condition as its batch; and 700 blood
cells of ten types that scanpy ships, by SCANVI with the type as its label.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from benchmarks.bench import Bench, Row, machine, parser, table
from scipy.sparse import csr_matrix
from scipy.stats import t as student
from torch import Tensor

from ncprior import NCPrior, fit, improve, sir
from ncprior.adapters.scvi import SCVISource
from ncprior.bases import fit_mixture, latents_of, rebase
from ncprior.evaluation import near_copies, two_sample_test
from ncprior.source import sample_posterior
from ncprior.training import FitSettings

if TYPE_CHECKING:
    from anndata import AnnData

Cells = dict[str, Tensor]  # as the loader of a model yields them

OWN, MIXTURE, NCP, IMPROVE = "own prior", "mixture of 10", "NCP on it, SIR(50)", "improve(50)"
TRAINING, HELD_OUT, REAL = "posterior (training cells)", "posterior (held-out cells)", "real"
METHODS = (TRAINING, HELD_OUT, REAL, OWN, MIXTURE, NCP, IMPROVE)
MEASURES = ("auc", "auc_low", "auc_high", "correlation", "pseudobulk", "near_copies")
COLUMNS = {
    "data": "<10",
    "condition": "<11",
    "method": "<27",
    "seed": ">4",
    "auc": ">6.3f",
    "auc_low": ">7.3f",
    "auc_high": ">8.3f",
    "over": ">6.3f",
    "correlation": ">12.3f",
    "pseudobulk": ">11.3f",
    "near_copies": ">12.3f",
    "seconds": ">8.0f",
}


class Settings(NamedTuple):
    """Sizes of a run."""

    genes: int = 1000
    updates: int = 1600  # of the model, in whole epochs
    splits: int = 4
    steps: int = 1500  # of a head
    compared: int = 100  # genes that cells are compared by


QUICK = Settings(genes=200, updates=200, splits=1, steps=200, compared=100)


class Data(NamedTuple):
    """Counts of cells, and the model for them."""

    name: str
    cells: AnnData  # with columns "batch" and "label"
    model: str  # class of scvi.model
    conditions: tuple[str, ...]  # batches that are compared one by one


def kang() -> Data | None:
    """Control and stimulated cells, if they are there."""
    import anndata

    path = Path(os.environ.get("NCPRIOR_DATA", ".")) / "kang2018" / "pbmc_stim.h5ad"
    if not path.exists():
        return None
    read = anndata.read_h5ad(path)
    cells = table_of(csr_matrix(read.X), batch=read.obs["condition"])
    return Data("Kang", cells, "SCVI", ("control", "stimulated"))


def pbmc68k() -> Data:
    """Cells of ten types that scanpy ships, whose counts are recovered from their logarithms."""
    import scanpy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = scanpy.datasets.pbmc68k_reduced()
    counts = csr_matrix(read.raw.X).expm1()
    least = np.minimum.reduceat(counts.data, counts.indptr[:-1])  # of a cell: one molecule
    counts.data = (counts.data / np.repeat(least, np.diff(counts.indptr))).round()
    return Data("pbmc68k", table_of(counts, label=read.obs["bulk_labels"]), "SCANVI", ())


def of_file(path: Path, batch_key: str | None, layer: str | None) -> Data:
    """Cells of a file, by SCVI."""
    import anndata

    read = anndata.read_h5ad(path)
    batch = read.obs[batch_key].astype(str) if batch_key else "all"
    counts = csr_matrix(read.X if layer is None else read.layers[layer])
    cells = table_of(counts, batch=batch)
    return Data(path.stem, cells, "SCVI", tuple(sorted(set(cells.obs["batch"]))))


def table_of(counts: csr_matrix, *, batch: Any = "all", label: Any = "all") -> AnnData:  # noqa: ANN401
    """A table of whole numbers with two columns."""
    import anndata

    if (counts.data < 0).any() or (counts.data != counts.data.round()).any():
        raise SystemExit("Raw counts are needed: whole numbers. Name their layer by --layer.")
    cells = anndata.AnnData(counts.astype(np.float32))
    cells.obs["batch"], cells.obs["label"] = np.asarray(batch), np.asarray(label)
    return cells


class Case:
    """A trained model with its cells, and counts drawn in every way; `bench` keeps its network."""

    def __init__(self, data: Data, settings: Settings, seed: int, bench: Bench) -> None:
        self.data, self.settings, self.seed, self.bench = data, settings, seed, bench

    @cached_property
    def source(self) -> SCVISource:
        """The model as a source, trained on half of the cells."""
        import scvi

        scvi.settings.seed = self.seed
        model = self._model(getattr(scvi.model, self.data.model))
        key = {"settings": list(self.settings[:2]), "seed": self.seed, "model": self.data.model}
        batches = -(-len(self.tables[0]) // 128)
        train = partial(train_model, model, -(-self.settings.updates // batches))
        self.bench.network(f"cells-{self.data.name}-{self.seed}", model.module, train, **key)
        model.is_trained = True
        return SCVISource(model)

    @cached_property
    def tables(self) -> tuple[AnnData, AnnData]:
        """Training and held-out cells, of the genes that vary most in the former."""
        order = np.random.default_rng(self.seed).permutation(self.data.cells.n_obs)
        halves = np.array_split(order, 2)
        logs = log_normalised(torch.from_numpy(self.data.cells.X[halves[0]].toarray()))
        genes = logs.var(0).argsort(descending=True)[: self.settings.genes].sort().values.numpy()
        train, held_out = (self.data.cells[rows][:, genes].copy() for rows in halves)
        for part in (train, held_out):
            part.X = part.X.toarray()
        return train, held_out[held_out.X.sum(1) > 0].copy()

    @cached_property
    def train(self) -> Cells:
        """All training cells, as one batch."""
        return next(iter(self.source.loader(batch_size=self.tables[0].n_obs)))

    @cached_property
    def held_out(self) -> Cells:
        """All held-out cells, as one batch."""
        table = self.tables[1]
        return next(iter(self.source.loader(table, batch_size=table.n_obs)))

    @cached_property
    def compared(self) -> Tensor:
        """The genes that vary most, by which cells are compared."""
        spread = log_normalised(self.train["X"]).var(0)
        return spread.argsort(descending=True)[: self.settings.compared]

    def splits(self) -> list[tuple[Cells, Cells]]:
        """Held-out cells that drawn cells are compared with, and others that give the conditions."""
        count = len(self.held_out["X"])
        generator = torch.Generator().manual_seed(self.seed)
        orders = [torch.randperm(count, generator=generator) for _ in range(self.settings.splits)]
        return [
            (
                rows_of(self.held_out, order[: count // 2]),
                rows_of(self.held_out, order[count // 2 :]),
            )
            for order in orders
        ]

    def prior(self, method: str) -> NCPrior:
        """A prior with its sampler."""
        count = self.tables[0].n_obs
        stop = self.source.loader(indices=range(count // 5))
        train = self.source.loader(indices=range(count // 5, count), batch_size=128, shuffle=True)
        if method == IMPROVE:
            return improve(
                self.source, train, held_out=stop, budget=50, seed=self.seed, progress=False
            )
        source = self.source if method == OWN else self._on_mixture()
        prior = NCPrior.for_source(source, self.train, width=64, dropout=0.1)
        prior.sampler = partial(sir, num_proposals=50)
        if method == NCP:
            settings = FitSettings(weight_decay=0.1)
            steps = self.settings.steps
            fit(prior, train, held_out=stop, steps=steps, progress=False, settings=settings)
        else:
            prior.active = [False] * source.num_groups
        return prior

    def _on_mixture(self) -> Any:  # noqa: ANN401
        """The source with a mixture as the prior of its first group."""
        z = torch.cat([latents_of(self.source, [self.train]) for _ in range(10)])
        mixture = fit_mixture(z, 10)
        if self.source.num_groups == 1:
            return rebase(self.source, mixture)
        return rebase(self.source, lambda k, group: group.prior if k else mixture)

    @torch.no_grad()
    def draw(self, method: str, prior: NCPrior | None, cells: Cells) -> Cells:
        """Counts of as many drawn cells as there are cells that give the conditions."""
        if method == REAL:
            return cells
        if method == TRAINING:  # each with its own condition
            rows = torch.randint(len(self.train["X"]), (len(cells["X"]),))
            cells = rows_of(self.train, rows)
        if prior is None:
            state = sample_posterior(self.source, cells)[1]
            return {**cells, "X": self.source.likelihood(state).sample()}
        condition = self.source.condition(cells)
        drawn = prior.sample(len(cells["X"]), condition=condition, draw_x=True)
        return {**cells, "X": drawn.x}

    def _model(self, kind: Any) -> Any:  # noqa: ANN401
        """An untrained model of scvi-tools."""
        labels = {"labels_key": "label", "unlabeled_category": "unknown"}
        kind.setup_anndata(
            self.tables[0], batch_key="batch", **(labels if self.data.model == "SCANVI" else {})
        )
        return kind(self.tables[0], n_latent=10, gene_likelihood="nb")


def train_model(model: Any, epochs: int) -> None:  # noqa: ANN401
    """Trains a model as scvi-tools does by default, with fewer epochs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice
        plan = {"n_epochs_kl_warmup": epochs, "lr": 2e-3}
        options = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
        model.train(
            max_epochs=epochs, train_size=1.0, accelerator="cpu", plan_kwargs=plan, **options
        )
    model.module.eval()


def rows_of(cells: Cells, rows: Tensor) -> Cells:
    return {name: t[rows] for name, t in cells.items()}


def log_normalised(x: Tensor) -> Tensor:
    """Logarithms of counts per 10,000."""
    return (1e4 * x / x.sum(1, keepdim=True).clamp(min=1)).log1p()


def correlation_error(a: Tensor, b: Tensor) -> float:
    """Root mean square difference of the correlations of genes that vary in both."""
    varies = (a.std(0) > 0) & (b.std(0) > 0)
    difference = torch.corrcoef(a[:, varies].T) - torch.corrcoef(b[:, varies].T)
    return difference.square().mean().sqrt().item()


def pseudobulk_error(a: Tensor, b: Tensor) -> float:
    """Root mean square difference of log mean expression, of counts (B, genes)."""
    logs = [(1e4 * x.sum(0) / x.sum()).log1p() for x in (a, b)]
    return (logs[0] - logs[1]).square().mean().sqrt().item()


def measures(case: Case, drawn: list[Cells], posterior: dict[str, list[float]]) -> list[Row]:
    """Measures of cells that were drawn for each split, for each condition; means over the splits.

    `posterior` has the AUCs of decoded posteriors by condition, for `over`.
    """
    rows: list[Row] = []
    for code, name in enumerate(case.data.conditions or ("all",)):

        def counts_of(cells: Cells, code: int = code) -> Tensor:
            is_here = cells["batch"][:, 0] == code
            return cells["X"][is_here] if case.data.conditions else cells["X"]

        train = log_normalised(counts_of(case.train))[:, case.compared]
        found, aucs = [], []
        for (reference, _), cells in zip(case.splits(), drawn, strict=True):
            counts = [counts_of(part) for part in (reference, cells)]
            real, ours = (log_normalised(x)[:, case.compared] for x in counts)
            test = two_sample_test(real, ours, classifier="trees", seed=case.seed)
            aucs.append(test.auc)
            errors = (correlation_error(real, ours), pseudobulk_error(*counts))
            found.append((*test[:3], *errors, near_copies(train, real, ours).share))
        row = dict(zip(MEASURES, np.mean(found, 0).tolist(), strict=True))
        over = float(np.mean(np.subtract(aucs, posterior.get(name, aucs))))
        rows.append({"condition": name, **row, "over": over, "aucs": aucs})
    return rows


def rows_of_method(case: Case, method: str, known: list[Row]) -> list[Row]:
    """Fits one prior, draws from it and measures the cells."""
    assert case.source  # trained before the clock starts
    started = time.perf_counter()
    torch.manual_seed(case.seed)
    is_prior = method not in (REAL, TRAINING, HELD_OUT)
    prior = case.prior(method) if is_prior else None
    seconds = time.perf_counter() - started if is_prior else 0.0
    drawn = [case.draw(method, prior, cells) for _, cells in case.splits()]
    posterior = {
        row["condition"]: row["aucs"]
        for row in known
        if (row["data"], row["seed"], row["method"]) == (case.data.name, case.seed, TRAINING)
    }
    return [{**row, "seconds": seconds} for row in measures(case, drawn, posterior)]


def summary(rows: list[Row]) -> list[str]:
    """Differences of AUCs to the posterior's, with 95 % Student intervals over seeds.

    Splits of one seed share a model and cells: their mean is one value.
    """
    found: dict[tuple[str, ...], list[float]] = {}
    keys = ("data", "condition", "seed")
    posterior = {
        tuple(row[key] for key in keys): row["aucs"] for row in rows if row["method"] == TRAINING
    }
    for row in rows:
        of = posterior[tuple(row[key] for key in keys)]
        name = (row["data"], row["condition"], row["method"])
        found.setdefault(name, []).append(np.subtract(row["aucs"], of).mean())
    lines = []
    for (data, condition, method), values in found.items():
        if method not in (REAL, TRAINING) and len(values) > 1:
            half = (
                student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
            )
            mean = np.mean(values)
            lines.append(
                f"{data}, {condition}: AUC of {method} less that of the posterior: {mean:+.3f} "
                f"({mean - half:+.3f} to {mean + half:+.3f}), {len(values)} seeds"
            )
    return lines


def main() -> None:
    made = parser(__doc__ or "")
    made.add_argument("--h5ad", type=Path, help="cells of your own, in place of the two data sets")
    made.add_argument("--batch-key", help="column of the file that names a cell's batch")
    made.add_argument("--layer", help="layer of the file that holds the counts, if not X")
    options = made.parse_args()
    try:
        import scvi
    except ImportError as error:
        raise SystemExit(
            f"This example needs scvi-tools ({error}): pip install '.[cells,demo]' in the clone"
        ) from None
    scvi.settings.verbosity = 30
    own = partial(of_file, options.h5ad, options.batch_key, options.layer)
    known = [pbmc68k] if options.quick else [kang, pbmc68k]
    run(options, known if options.h5ad is None else [own])


def run(options: argparse.Namespace, readers: Sequence[Callable[[], Data | None]]) -> list[Row]:
    """Makes all rows, and prints them."""
    settings = QUICK if options.quick else Settings()
    bench = Bench(options, {"settings": list(settings)})
    for read in readers:
        data = read()
        for seed in options.seed if data is not None else ():
            case = Case(data, settings, seed, bench)
            for method in METHODS[: -1 if options.quick else None]:
                make = partial(rows_of_method, case, method, bench.rows)
                bench.add(make, data=data.name, method=method, seed=seed)
    print(table(bench.rows, COLUMNS), *summary(bench.rows), machine(), sep="\n")
    return bench.rows


if __name__ == "__main__":
    main()
