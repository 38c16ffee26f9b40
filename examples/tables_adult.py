"""A better prior for TVAE, the tabular VAE of ctgan, on the Adult census table.

    NCPRIOR_DATA=... python examples/tables_adult.py --seed 0 1 2 --json domain_tables.json
    NCPRIOR_DATA=... python examples/tables_adult.py --quick

For each seed the 32,560 rows are shuffled. A TVAE with ctgan's defaults, but 100 epochs of 300 to save
minutes, is fitted to 20,000 of them; 2,500 are for choices, and 5,000 each for the reference and for the
arms that need new rows. All arms draw 5,000 rows from the same decoder:

* TVAE.sample: ctgan's own draws, z ~ N(0, I), with one category per column, that of the largest tanh of
  its logit: in float32 logits above 9 tie, and the first of them is taken;
* all others: draws of the decoder's p(x | z), with z from N(0, I), from a Gaussian or a mixture of
  ten fitted to the encodings, from NCP as `improve` makes it, or from q(z | x) of training rows or of
  new rows; "real" are the new rows themselves.

Columns: `quality`, the score of SDMetrics against the reference, with its two parts; `decoded`, the AUC
of a classifier of drawn rows and decoded encodings of the reference, `own_way` the same with both sides
decoded as TVAE.sample does, and `real` the AUC against the reference itself; `tstr`, the AUC on the
reference of a classifier of income that was trained on the drawn rows; `copies`, the share of rows that
equal a training row, and `near`, of those closer to a training row than 95 % of the new rows are.
`--refit` adds arms with an encoder that `fit_encoder` trains on the decoder alone, as if TVAE's own were
lost.
"""

import os
import warnings
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.bench import Bench, Row, machine, parser, table
from benchmarks.clock import now
from torch import Tensor, nn

from ncprior import LatentSource, improve
from ncprior.adapters.tvae import TVAESource, capture_encoder
from ncprior.bases import fit_gaussian, fit_mixture, latents_of
from ncprior.evaluation import auroc, log_likelihood, near_copies, two_sample_test
from ncprior.training import fit_encoder

try:
    import pandas as pd
    from ctgan import TVAE
    from sdmetrics.reports import QualityReport
    from sklearn.ensemble import HistGradientBoostingClassifier
except ImportError as error:
    raise SystemExit(
        f"This example needs ctgan and sdmetrics ({error}): pip install '.[tables]' in the clone"
    ) from None

COLUMNS = {
    "method": "<42",
    "seed": ">4",
    "quality": ">8.3f",
    "shapes": ">7.3f",
    "pairs": ">7.3f",
    "decoded": ">8.3f",
    "decoded_low": ">12.3f",
    "decoded_high": ">13.3f",
    "own_way": ">10.3f",
    "own_way_low": ">14.3f",
    "own_way_high": ">15.3f",
    "real": ">7.3f",
    "tstr": ">7.3f",
    "tstr_low": ">9.3f",
    "tstr_high": ">10.3f",
    "copies": ">8.4f",
    "near": ">7.3f",
    "elbo": ">8.2f",
    "seconds": ">8.0f",
}
OWN, POSTERIOR, BUDGET = "TVAE.sample", "posterior (held-out rows)", 50
TARGET, POSITIVE = "income", ">50K"
FULL, QUICK = (20_000, 2_500, 5_000, 100), (2_000, 500, 500, 10)  # training, choices, test, epochs


def adult(path: Path) -> pd.DataFrame:
    """The table, without the one row of a country that occurs once."""
    if not path.exists():
        raise SystemExit(f"There is no {path}. Pass --csv FILE, or set NCPRIOR_DATA.")
    whole = pd.read_csv(path, skipinitialspace=True)
    countries = whole["native-country"]
    return whole[countries.map(countries.value_counts()) > 1]


class Case:
    """A TVAE with its data and sources, each made when it is first needed."""

    def __init__(self, bench: Bench, whole: pd.DataFrame, seed: int) -> None:
        self.bench, self.seed, self.quick = bench, seed, bench.settings["quick"]
        num_train, num_choices, self.count, self.epochs = QUICK if self.quick else FULL
        order = np.random.default_rng(seed).permutation(len(whole))
        ends = np.cumsum([num_train, num_choices, self.count, self.count])
        parts = [whole.iloc[rows].reset_index(drop=True) for rows in np.split(order, ends)]
        seen = pd.concat(parts[:1])
        known = [self._known(part, seen) for part in parts]
        self.train, self.choices, self.reference, self.fresh = known[:4]
        self.categories = [
            name for name in whole if not pd.api.types.is_numeric_dtype(whole[name])
        ]
        self.levels = {name: sorted(whole[name].unique()) for name in self.categories}
        self.key = {"epochs": self.epochs, "rows": num_train}
        self.fit_seconds: dict[str, float] = {}

    @staticmethod
    def _known(part: pd.DataFrame, seen: pd.DataFrame) -> pd.DataFrame:
        """Rows whose categories were seen in training, which TVAE needs: all but a handful."""
        texts = [name for name in seen if not pd.api.types.is_numeric_dtype(seen[name])]
        inside = np.logical_and.reduce([part[name].isin(seen[name].unique()) for name in texts])
        return part[inside].reset_index(drop=True)

    @cached_property
    def model(self) -> TVAE:
        return self._networks[0]

    @cached_property
    def source(self) -> TVAESource:
        """The source with TVAE's own encoder."""
        return TVAESource(*self._networks)

    @cached_property
    def _networks(self) -> tuple[TVAE, nn.Module]:
        """The fitted model and its encoder, whose weights are kept in --cache."""

        def fitted(epochs: int) -> tuple[TVAE, nn.Module]:
            model = TVAE(epochs=epochs, enable_gpu=False)
            model.set_random_state(self.seed)
            with capture_encoder() as captured:
                model.fit(self.train, self.categories)
            return model, captured.encoder

        def weights() -> dict[str, Tensor]:
            model, encoder = fitted(self.epochs)
            return nn.ModuleList([model.decoder, encoder]).state_dict()

        tensors, seconds = self.bench.tensors(f"tvae-adult-{self.seed}", weights, **self.key)
        self.fit_seconds[OWN] = seconds
        model, encoder = fitted(0)
        nn.ModuleList([model.decoder, encoder]).load_state_dict(tensors)
        model.random_states = None
        return model, encoder.eval()

    @cached_property
    def rows(self) -> dict[str, Tensor]:
        """Encoded rows of the four parts."""
        torch.manual_seed(self.seed)
        parts = ("train", "choices", "reference", "fresh")
        return {name: self.source.rows(getattr(self, name)) for name in parts}

    @cached_property
    def refitted(self) -> LatentSource[Any, Any]:
        """The same decoder with an encoder that is trained on it."""
        fitted = fit_encoder(
            TVAESource(self.model),
            self.rows["train"],
            held_out=self.rows["choices"],
            kl_weight=1 / self.model.loss_factor,
            steps=300 if self.quick else 20_000,
            seed=self.seed,
            progress=False,
        )
        print(f"encoder refitted: weighted ELBO {fitted.elbo:.2f} nats per row", flush=True)
        return fitted

    @cached_property
    def z(self) -> dict[str, Tensor]:
        """Encodings of the training rows and of the rows for choices."""
        torch.manual_seed(self.seed)
        return {part: latents_of(self.source, self.rows[part]) for part in ("train", "choices")}

    def latents(self, arm: str) -> tuple[Tensor, float]:
        """Draws of z of an arm, and the seconds that its prior took to fit."""
        rows, z, count = self.rows, self.z, self.count  # made first, as they move the generator
        torch.manual_seed(1000 + self.seed)
        started = now()
        if arm == "N(0, I)":
            return torch.randn(count, self.model.embedding_dim), 0.0
        if arm.startswith("posterior"):
            source = self.refitted if "refitted" in arm else self.source
            x = rows["train" if "training" in arm else "fresh"]
            return latents_of(source, x[torch.randperm(len(x))[:count]]), 0.0
        if arm == "Gaussian":
            base = fit_gaussian(z["train"])
            return base.sample((count,)), now() - started
        if arm == "mixture of 10":
            mixture = fit_mixture(z["train"], 10, held_out=z["choices"])
            return mixture.sample((count,)), now() - started
        name = f"ncp-adult-{'refitted-' if 'refitted' in arm else ''}{self.seed}"
        tensors, seconds = self.bench.tensors(name, partial(self.improved, name), **self.key)
        return tensors["z"], seconds

    def improved(self, name: str) -> dict[str, Tensor]:
        """Draws of z of the prior that `improve` makes."""
        prior = improve(
            self.refitted if "refitted" in name else self.source,
            self.rows["train"],
            held_out=self.rows["choices"],
            budget=BUDGET,
            seed=self.seed,
            max_seconds=20 if self.quick else 240,
            checkpoint=self.bench.cache / f"{name}{'-quick' if self.quick else ''}",
            progress=False,
        )
        print(prior.report, flush=True)
        return {"z": prior.sample(self.count).latents[0]}

    @torch.no_grad()
    def drawn(self, z: Tensor, seed: int) -> pd.DataFrame:
        """A table of draws of p(x | z)."""
        torch.manual_seed(seed)
        state = self.source.advance(self.source.start(len(z)), z)
        return self.source.table(self.source.likelihood(state).sample())

    @torch.no_grad()
    def own_way(self, z: Tensor, seed: int) -> pd.DataFrame:
        """A table as TVAE.sample makes it of z."""
        np.random.seed(seed)
        output, sigma = self.model.decoder(z)
        return self.model.transformer.inverse_transform(output.tanh().numpy(), sigma.numpy())

    @cached_property
    def decoded_reference(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Decoded encodings of the reference, by draws and as TVAE.sample does."""
        torch.manual_seed(self.seed)
        z = latents_of(self.source, self.rows["reference"])
        return self.drawn(z, 1), self.own_way(z, 1)

    def arm(self, arm: str) -> list[Row]:
        """The row of an arm."""
        print(f"{arm}, seed {self.seed}", flush=True)
        if arm == "real":
            return [self.measured(self.fresh)]
        if arm == OWN:
            torch.manual_seed(1000 + self.seed)
            np.random.seed(1000 + self.seed)
            own = self.model.sample(self.count)
            told = self.told("own_way", self.decoded_reference[1], own)
            return [{**self.measured(own), **told, "seconds": self.fit_seconds[OWN]}]
        z, seconds = self.latents(arm)
        rows, decoded = self.drawn(z, 2), self.decoded_reference
        row = {
            **self.measured(rows),
            **self.told("decoded", decoded[0], rows),
            **self.told("own_way", decoded[1], self.own_way(z, 2)),
            "seconds": seconds,
        }
        if arm.startswith(POSTERIOR):
            source = self.refitted if "refitted" in arm else self.source
            bound = log_likelihood(source, self.rows["reference"], num_samples=1)
            row["elbo"] = bound["base"].lower.mean().item()
        return [row]

    def measured(self, rows: pd.DataFrame) -> Row:
        """What is measured of every table."""
        columns = {
            name: {"sdtype": "categorical" if name in self.categories else "numerical"}
            for name in rows.columns
        }
        metadata = {"tables": {"adult": {"columns": columns}}, "relationships": []}
        report = QualityReport()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            report.generate({"adult": self.reference}, {"adult": rows}, metadata, verbose=False)
        shapes, pairs = report.get_properties()["Score"]
        merged = rows.merge(self.train.drop_duplicates(), how="left", indicator=True)
        near = near_copies(self.train, self.fresh, rows)
        return {
            "quality": float(report.get_score()),
            "shapes": float(shapes),
            "pairs": float(pairs),
            **self.told("real", self.reference, rows),
            **self.trained_on(rows),
            "copies": float((merged["_merge"] == "both").mean()),
            "near": near.share,
            "near_low": near.low,
            "near_high": near.high,
        }

    @staticmethod
    def told(name: str, reference: pd.DataFrame, rows: pd.DataFrame) -> Row:
        """AUC of telling rows from a reference, with its interval."""
        found = two_sample_test(reference, rows, classifier="trees", folds=3)
        return {name: found.auc, f"{name}_low": found.low, f"{name}_high": found.high}

    def trained_on(self, rows: pd.DataFrame) -> Row:
        """AUC on the reference of a classifier of income that is trained on the rows."""
        inputs = [name for name in rows.columns if name != TARGET]
        is_category = [name in self.categories for name in inputs]
        trees = HistGradientBoostingClassifier(
            max_iter=100, categorical_features=is_category, random_state=0
        )
        trees.fit(self._numbers(rows[inputs]), rows[TARGET] == POSITIVE)
        scores = torch.from_numpy(trees.decision_function(self._numbers(self.reference[inputs])))
        rich = torch.from_numpy((self.reference[TARGET] == POSITIVE).to_numpy())
        area = auroc(scores[rich], scores[~rich])
        return {"tstr": area.value, "tstr_low": area.low, "tstr_high": area.high}

    def _numbers(self, rows: pd.DataFrame) -> np.ndarray:
        coded = {
            name: pd.Categorical(rows[name], categories=self.levels[name]).codes
            for name in rows.columns
            if name in self.categories
        }
        return rows.assign(**coded).to_numpy(float)


def main() -> None:
    made = parser(__doc__)
    data = Path(os.environ.get("NCPRIOR_DATA", "."))
    made.add_argument("--csv", type=Path, default=data / "adult" / "adult.csv", metavar="FILE")
    made.add_argument("--refit", action="store_true", help="also with a refitted encoder")
    options = made.parse_args()
    ncp = f"NCP, improve({BUDGET})"
    arms = [OWN, "N(0, I)", "Gaussian", "mixture of 10", ncp]
    arms += ["posterior (training rows)", POSTERIOR, "real"]
    if options.refit:
        arms += [f"{ncp}, refitted encoder", f"{POSTERIOR}, refitted encoder"]
    bench, whole = Bench(options, {}), adult(options.csv)
    print(machine(), flush=True)
    for seed in options.seed:
        case = Case(bench, whole, seed)
        for arm in arms:
            bench.add(partial(case.arm, arm), method=arm, seed=seed)
    print(table(bench.rows, COLUMNS))


if __name__ == "__main__":
    main()
