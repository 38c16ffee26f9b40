"""Small models with the attribute layout of those of ``scvi.model``, for tests without scvi-tools."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, NegativeBinomial, Normal, Poisson
from torch.nn.functional import one_hot
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

CELLS, LATENTS, PROTEINS = 100, 4, 3


class Counts(NegativeBinomial):
    """Samples in inference mode, as the laws of scvi-tools do."""

    @torch.inference_mode()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        return super().sample(sample_shape)


class Encoder(nn.Module):
    """Counts to a normal law; z is a transformation of a draw of it."""

    def __init__(self, genes: int, latents: int, transformation: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(genes, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.dropout = nn.Dropout(0.5)
        self.heads = nn.Linear(8, 2 * latents)
        self.z_transformation = transformation

    def forward(self, x: Tensor) -> tuple[Normal, Tensor]:
        loc, log_scale = self.heads(self.dropout(self.layers(x))).chunk(2, -1)
        q = Normal(loc, log_scale.exp())
        return q, self.z_transformation(q.rsample())


class Module(nn.Module):
    """The network: the calls that ``scvi.module.VAE`` takes, and its names."""

    def __init__(
        self,
        genes: int,
        batches: int,
        likelihood: str,
        latent: str,
        dispersion: str,
        observed: bool,
    ) -> None:
        super().__init__()
        self.n_input, self.n_batch, self.n_latent = genes, batches, LATENTS
        self.use_observed_lib_size, self.dispersion = observed, dispersion
        self.gene_likelihood, self.latent_distribution = likelihood, latent
        softmax = nn.Softmax(-1) if latent == "ln" else nn.Identity()
        self.z_encoder = Encoder(genes, self.n_latent, softmax)
        self.l_encoder = Encoder(genes, 1, nn.Identity())
        self.library_log_means, self.library_log_vars = torch.tensor(
            [[[3.0, 3.5][:batches]], [[0.1, 0.2][:batches]]]
        )
        self.decoder = nn.Linear(self.n_latent + batches, genes)
        self.px_r = nn.Parameter(torch.randn(3, genes))  # of every label

    def _get_inference_input(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": tensors["X"], "batch_index": tensors["batch"]}

    def inference(self, x: Tensor, batch_index: Tensor) -> dict[str, Any]:
        q, z = self.z_encoder(x.log1p())
        ql, library = None, x.sum(1, keepdim=True).log()
        if not self.use_observed_lib_size:
            ql, library = self.l_encoder(x.log1p())
        return {"z": z, "qz": q, "ql": ql, "library": library}

    def _get_generative_input(
        self, tensors: dict[str, Tensor], inference_outputs: dict[str, Any]
    ) -> dict[str, Any]:
        names = {"batch_index": "batch", "y": "labels", "size_factor": "size_factor"}
        given = {name: tensors.get(key) for name, key in names.items()}
        return {"z": inference_outputs["z"], "library": inference_outputs["library"], **given}

    def generative(
        self,
        z: Tensor,
        library: Tensor,
        batch_index: Tensor,
        y: Tensor,
        size_factor: Tensor | None,
    ) -> dict[str, Distribution]:
        total = library.exp() if size_factor is None else size_factor
        batch = one_hot(batch_index[:, 0], self.n_batch).float()
        mean = total * self.decoder(torch.cat([z, batch], -1)).softmax(-1)
        if self.gene_likelihood == "poisson":
            return {"px": Poisson(mean)}
        if self.gene_likelihood == "normal":
            return {"px": Normal(mean, 1.0)}
        label = y[:, 0] if self.dispersion == "gene-label" else torch.zeros_like(y[:, 0])
        count = self.px_r[label].exp()
        return {"px": Counts(count, logits=mean.log() - count.log())}


class OneHot(nn.Module):
    """A network that sees latents and a label, and returns a mean and a variance, or their normal."""

    def __init__(self, labels: int, *, returns_dist: bool) -> None:
        super().__init__()
        self.labels, self.returns_dist = labels, returns_dist
        self.linear = nn.Linear(LATENTS + labels, 2 * LATENTS)

    def forward(self, z: Tensor, y: Tensor) -> tuple[Any, Tensor]:
        h = torch.cat([z, one_hot(y[:, 0].long(), self.labels).float()], -1)
        mean, log_variance = self.linear(h).chunk(2, -1)
        if not self.returns_dist:
            return mean, log_variance.exp()
        q = Normal(mean, (0.5 * log_variance).exp())
        return q, q.rsample()


class AnnotatedModule(Module):
    """The network of ``scvi.module.SCANVAE``, with three labels."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.n_labels = 3
        self.classifier = nn.Linear(LATENTS, 3)
        self.encoder_z2_z1 = OneHot(3, returns_dist=True)
        self.decoder_z1_z2 = OneHot(3, returns_dist=False)


class ProteinModule(Module):
    """The network of ``scvi.module.TOTALVAE``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.n_input_genes, self.gene_dispersion = self.n_input, self.dispersion
        self.protein_dispersion = "protein"
        self.encoder = self.z_encoder
        self.background = nn.Linear(LATENTS, 4 * PROTEINS)
        self.py_r = nn.Parameter(torch.randn(PROTEINS))
        self.log_efficiency = nn.Parameter(0.1 * torch.randn(PROTEINS))
        del self.n_input, self.dispersion

    def _get_generative_input(
        self, tensors: dict[str, Tensor], inference_outputs: dict[str, Any]
    ) -> dict[str, Any]:
        names = ("z", "library_gene")
        known = {name: inference_outputs[name] for name in names}
        return {**known, "batch_index": tensors["batch"], "label": tensors["labels"]}

    def generative(  # type: ignore[override]
        self, z: Tensor, library_gene: Tensor, batch_index: Tensor, label: Tensor
    ) -> dict[str, Any]:
        batch = one_hot(batch_index[:, 0], self.n_batch).float()
        rate = library_gene * self.decoder(torch.cat([z, batch], -1)).softmax(-1)
        alpha, log_beta, increase, mixing = self.background(z).chunk(4, -1)
        proteins = {
            "back_alpha": alpha,
            "back_beta": log_beta.exp(),
            "fore_scale": 1 + increase.relu(),
            "mixing": mixing,
            "r": self.py_r.exp(),
            "rate_back": Normal(alpha, log_beta.exp()).rsample().exp(),
        }
        genes = {"rate": rate, "r": self.px_r[0].exp(), "dropout": rate.log() - 2}
        efficiency = self.log_efficiency.exp().expand(len(z), PROTEINS)
        return {"px_": genes, "py_": proteins, "per_batch_efficiency": efficiency}


class PeakModule(Module):
    """The network of ``scvi.module.PEAKVAE``."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.n_input_regions = self.n_input
        self.region_factors = nn.Parameter(torch.randn(self.n_input))
        del self.n_input, self.n_batch, self.use_observed_lib_size, self.gene_likelihood

    def inference(self, x: Tensor, batch_index: Tensor) -> dict[str, Any]:
        q, z = self.z_encoder(x.log1p())
        return {"z": z, "qz": q, "d": (x > 0).float().mean(1, keepdim=True)}

    def _get_generative_input(
        self, tensors: dict[str, Tensor], inference_outputs: dict[str, Any]
    ) -> dict[str, Any]:
        return {"z": inference_outputs["z"], "qz_m": inference_outputs["qz"].loc}

    def generative(self, z: Tensor, qz_m: Tensor) -> dict[str, Any]:  # type: ignore[override]
        padded = torch.cat([z, z.new_zeros(len(z), self.decoder.in_features - LATENTS)], -1)
        return {"px": self.decoder(padded).sigmoid()}


class Table(dict[str, Tensor]):
    """Cells, in the place of an AnnData."""

    @property
    def n_obs(self) -> int:
        return len(self["X"])


class Dataset:
    """Rows by lists of indices, as dicts of tensors."""

    def __init__(self, cells: dict[str, Tensor], indices: Tensor) -> None:
        self.cells, self.indices = cells, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        return {name: t[self.indices[rows]] for name, t in self.cells.items()}


class SCVI:
    """The model: a trained network and its cells."""

    network: type[Module] = Module

    def __init__(
        self,
        *,
        genes: int = 6,
        batches: int = 2,
        likelihood: str = "nb",
        latent: str = "normal",
        dispersion: str = "gene",
        size_factor: bool = False,
        observed: bool = True,
    ) -> None:
        self.module = self.network(
            genes=genes,
            batches=batches,
            likelihood=likelihood,
            latent=latent,
            dispersion=dispersion,
            observed=observed,
        )
        self.adata = self.cells(CELLS, genes, batches)
        if size_factor:
            self.adata["size_factor"] = 10 + 20 * torch.rand(CELLS, 1)
        self.is_trained, self.minified_data_type = True, None
        names = {"batch": ["control", "stimulated"][:batches], "labels": ["A", "B", "C", "?"]}
        self.adata_manager = SimpleNamespace(
            data_registry=dict.fromkeys(self.adata),
            get_state_registry=lambda name: SimpleNamespace(categorical_mapping=names[name]),
        )
        self.summary_stats = SimpleNamespace(n_batch=batches, n_labels=3)
        for _ in range(20):
            self.module.inference(self.adata["X"], self.adata["batch"])
        self.module.eval()

    def minify(self) -> None:
        """Puts latents in the place of the counts."""
        q = self.module.inference(self.adata["X"], self.adata["batch"])["qz"]
        self.adata["latent_qzm"], self.adata["latent_qzv"] = q.loc.detach(), q.scale.detach() ** 2
        self.adata["observed_lib_size"] = self.adata["X"].sum(1, keepdim=True)
        self.adata["X"] = torch.zeros_like(self.adata["X"])
        self.minified_data_type = "latent_posterior_parameters"  # type: ignore[assignment]

    @classmethod
    def cells(cls, count: int, genes: int, batches: int) -> Table:
        """Counts with their batches and labels."""
        return Table(
            X=1 + torch.poisson(torch.full((count, genes), 5.0)),
            batch=torch.arange(count)[:, None] % batches,
            labels=torch.arange(count)[:, None] % 3,
        )

    def _validate_anndata(self, adata: Table | None) -> Table:
        if adata is not None and adata["X"].shape[1] != self.adata["X"].shape[1]:
            raise ValueError("Number of vars in `adata_target` not the same as source.")
        return self.adata if adata is None else adata

    def _make_data_loader(
        self, adata: Table, indices: Any, batch_size: int, shuffle: bool
    ) -> DataLoader[Any]:
        rows = torch.arange(len(adata["X"])) if indices is None else torch.as_tensor(indices)
        data: Any = Dataset(adata, rows)
        order = RandomSampler(data) if shuffle else SequentialSampler(data)
        sampler: Any = BatchSampler(order, batch_size, drop_last=False)
        return DataLoader(data, batch_size=None, sampler=sampler)


class LinearSCVI(SCVI):
    """A model of the same layout."""


class SCANVI(SCVI):
    """Every fourth cell is unlabelled."""

    network = AnnotatedModule

    @classmethod
    def cells(cls, count: int, genes: int, batches: int) -> Table:
        labels = torch.arange(count)[:, None] % 4
        return Table(super().cells(count, genes, batches), labels=labels)


class TOTALVI(SCVI):
    """Genes and proteins."""

    network = ProteinModule

    @classmethod
    def cells(cls, count: int, genes: int, batches: int) -> Table:
        proteins = torch.poisson(torch.full((count, PROTEINS), 4.0))
        return Table(super().cells(count, genes, batches), proteins=proteins)


class PEAKVI(SCVI):
    """Open regions: about half of them."""

    network = PeakModule

    @classmethod
    def cells(cls, count: int, genes: int, batches: int) -> Table:
        table = super().cells(count, genes, batches)
        return Table(table, X=(table["X"] - 6).relu())
