"""Molecules of MOSES and its measures: FCD, similarity to the nearest molecule, scaffolds.

The files are those of the package `molsets`, which is found but not imported: its own dependencies
are old. Distances are to the statistics of the test set that it contains. The definitions are those
of MOSES (Polykovskiy et al., 2020, https://doi.org/10.3389/fphar.2020.565644).
"""

import gzip
import importlib.metadata
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from fcd_torch import FCD
from fcd_torch.utils import get_one_hot
from rdkit import Chem, RDLogger
from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator
from rdkit.Chem.Scaffolds.MurckoScaffold import GetScaffoldForMol
from torch import Tensor

RDLogger.DisableLog("rdApp.*")  # invalid strings are counted, not reported one by one

CHUNK = 500
LONGEST = 350  # symbols that ChemNet reads
BLOCKS = 20  # of the jackknife


def file_of_molsets(name: str) -> Path:
    """A file of the package `molsets`."""
    remedy = "pip install --no-deps molsets==0.3.1"
    try:
        files = importlib.metadata.files("molsets") or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(f"The molecules of MOSES are needed: {remedy}") from None
    found = [Path(str(file.locate())) for file in files if file.name == name]
    if not found:
        raise SystemExit(f"molsets has no file {name}. Install the tested version: {remedy}")
    return found[0]


def molecules(count: int, *, seed: int = 0) -> list[str]:
    """Molecules of the training file of MOSES in a random order."""
    with gzip.open(file_of_molsets("train.csv.gz"), "rt") as file:
        strings = file.read().split()[1:]
    random.Random(seed).shuffle(strings)
    return strings[:count]


def canonical(text: str) -> str | None:
    """The canonical string of a molecule, or None if the string is not valid."""
    molecule = Chem.MolFromSmiles(text) if text else None
    return None if molecule is None else Chem.MolToSmiles(molecule)


class Measures(NamedTuple):
    """Measures of one set of molecules.

    Attributes:
        fcd: Fréchet ChemNet distance to the test set, and its values without each block in turn.
        scaffolds: Cosine similarity of the counts of scaffolds, and without each block.
        snn: Mean Tanimoto similarity to the nearest test molecule, and its standard error.
        unique: Share of different molecules.
        novel: Share of the different molecules that are not among the training molecules.
        num_unique: Number of different molecules.
    """

    fcd: Tensor  # (1 + BLOCKS,)
    scaffolds: Tensor  # (1 + BLOCKS,)
    snn: Tensor  # (2,)
    unique: Tensor
    novel: Tensor
    num_unique: Tensor


class TestSet:
    """What sets of molecules are measured against.

    Arguments:
        train: Canonical strings of the training molecules.
        neighbours: Number of molecules whose nearest test molecule is looked for.
        num_test: Number of test molecules that are looked at for it; all by default.
    """

    def __init__(self, train: set[str], *, neighbours: int, num_test: int | None = None) -> None:
        self.train, self.neighbours = train, neighbours
        with np.load(file_of_molsets("test_stats.npz"), allow_pickle=True) as file:
            statistics = file["stats"].item()  # pickled: molsets itself is trusted
        self.mean = torch.tensor(statistics["FCD"]["mu"]).double()
        self.cov = torch.tensor(statistics["FCD"]["sigma"]).double()
        values, vectors = torch.linalg.eigh(self.cov)
        self.root = vectors * values.clamp(min=0).sqrt()
        self.fingerprints = torch.tensor(statistics["SNN"]["fps"][:num_test])
        self.scaffolds: Counter[str] = statistics["Scaf"]["scaf"]
        self.chemnet = FCD().model
        self.morgan = GetMorganGenerator(radius=2, fpSize=1024)

    def measures(self, strings: Sequence[str]) -> Measures:
        """Measures of valid molecules, given as canonical strings."""
        features, scaffolds = self.features(strings), [scaffold_of(text) for text in strings]
        block = torch.arange(len(strings)) % BLOCKS
        kept = [block != left_out for left_out in range(-1, BLOCKS)]
        similarities = self.nearest(strings[: self.neighbours])
        different = set(strings)
        counts = len(different) / len(strings), len(different - self.train) / len(different)
        return Measures(
            torch.stack([self.distance(features[rows]) for rows in kept]),
            torch.tensor([self.similarity(scaffolds, rows) for rows in kept]),
            torch.stack([similarities.mean(), similarities.std() / len(similarities) ** 0.5]),
            *(torch.tensor(float(value)) for value in (*counts, len(different))),
        )

    @torch.no_grad()
    def features(self, strings: Sequence[str]) -> Tensor:
        """Activations of ChemNet, ``(N, 512)``."""
        found = []
        for start in range(0, len(strings), CHUNK):
            inputs = [get_one_hot(text, LONGEST) for text in strings[start : start + CHUNK]]
            one_hot = torch.tensor(np.stack(inputs)).float().mT
            found.append(self.chemnet(one_hot / one_hot.shape[1]))  # as fcd-torch does
        return torch.cat(found).double()

    def distance(self, features: Tensor) -> Tensor:
        """The FCD: Fréchet distance between the Gaussians of features and test set."""
        cov = features.mT.cov()
        cross = torch.linalg.eigvalsh(self.root.mT @ cov @ self.root).clamp(min=0).sqrt().sum()
        squared = (features.mean(0) - self.mean).square().sum()
        return squared + cov.trace() + self.cov.trace() - 2 * cross

    def similarity(self, scaffolds: Sequence[str | None], rows: Tensor) -> float:
        """Cosine of the counts of scaffolds of rows and of the test set."""
        ours = Counter(x for x, is_in in zip(scaffolds, rows.tolist(), strict=True) if x and is_in)
        product = sum(number * self.scaffolds[name] for name, number in ours.items())
        lengths = (sum(n * n for n in counts.values()) ** 0.5 for counts in (ours, self.scaffolds))
        return float(product / np.prod(list(lengths))) if ours else 0.0

    @torch.no_grad()
    def nearest(self, strings: Sequence[str]) -> Tensor:
        """Tanimoto similarity of every molecule to its nearest test molecule."""
        prints = [self.morgan.GetFingerprintAsNumPy(Chem.MolFromSmiles(x)) for x in strings]
        ours = torch.tensor(np.stack(prints)).float()
        best = torch.zeros(len(ours))
        for part in self.fingerprints.split(5000):
            theirs = part.float()
            both = ours @ theirs.mT
            either = ours.sum(1)[:, None] + theirs.sum(1) - both
            best = torch.maximum(best, (both / either.clamp(min=1)).amax(1))
        return best


def scaffold_of(text: str) -> str | None:
    """The Murcko scaffold of a molecule, or None if it has fewer than two rings."""
    scaffold = GetScaffoldForMol(Chem.MolFromSmiles(text))
    if scaffold.GetRingInfo().NumRings() < 2:
        return None
    return Chem.MolToSmiles(scaffold)


def jackknife_error(values: Tensor) -> float:
    """Standard error of a statistic, from its values without each block in turn."""
    without = values[1:]
    spread = (without - without.mean()).square().sum()
    return float((spread * (len(without) - 1) / len(without)).sqrt())
