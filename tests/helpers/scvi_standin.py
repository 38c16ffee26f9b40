"""A small model with the attribute layout of ``scvi.model.SCVI``, for tests without scvi-tools."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, NegativeBinomial, Normal, Poisson
from torch.nn.functional import one_hot
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler


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
        self, genes: int, batches: int, likelihood: str, latent: str, dispersion: str
    ) -> None:
        super().__init__()
        self.n_input, self.n_batch, self.n_latent = genes, batches, 4
        self.use_observed_lib_size, self.dispersion = True, dispersion
        self.gene_likelihood = likelihood
        softmax = nn.Softmax(-1) if latent == "ln" else nn.Identity()
        self.z_encoder = Encoder(genes, self.n_latent, softmax)
        self.decoder = nn.Linear(self.n_latent + batches, genes)
        self.px_r = nn.Parameter(torch.randn(3, genes))  # of every label

    def _get_inference_input(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": tensors["X"], "batch_index": tensors["batch"]}

    def inference(self, x: Tensor, batch_index: Tensor) -> dict[str, Any]:
        q, z = self.z_encoder(x.log1p())
        return {"z": z, "qz": q, "ql": None, "library": x.sum(1, keepdim=True).log()}

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
        label = y[:, 0] if self.dispersion == "gene-label" else torch.zeros_like(y[:, 0])
        count = self.px_r[label].exp()
        return {"px": Counts(count, logits=mean.log() - count.log())}


class Dataset:
    """Rows by lists of indices, as dicts of tensors."""

    def __init__(self, cells: dict[str, Tensor], indices: Tensor) -> None:
        self.cells, self.indices = cells, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: list[int]) -> dict[str, Tensor]:
        return {name: t[self.indices[rows]] for name, t in self.cells.items()}


class SCVI:
    """The model: a trained network and its cells, dicts of tensors in the place of an AnnData."""

    def __init__(
        self,
        *,
        genes: int = 6,
        batches: int = 2,
        likelihood: str = "nb",
        latent: str = "normal",
        dispersion: str = "gene",
        size_factor: bool = False,
    ) -> None:
        self.module = Module(genes, batches, likelihood, latent, dispersion)
        self.adata = self.cells(100, genes, batches)
        if size_factor:
            self.adata["size_factor"] = 10 + 20 * torch.rand(100, 1)
        self.is_trained, self.minified_data_type = True, None
        self.adata_manager = SimpleNamespace(data_registry=dict.fromkeys(self.adata))
        for _ in range(20):
            self.module.inference(self.adata["X"], self.adata["batch"])
        self.module.eval()

    @staticmethod
    def cells(count: int, genes: int, batches: int) -> dict[str, Tensor]:
        """Counts with their batches and labels."""
        return {
            "X": 1 + torch.poisson(torch.full((count, genes), 5.0)),
            "batch": torch.arange(count)[:, None] % batches,
            "labels": torch.arange(count)[:, None] % 3,
        }

    def _validate_anndata(self, adata: dict[str, Tensor] | None) -> dict[str, Tensor]:
        return self.adata if adata is None else adata

    def _make_data_loader(
        self, adata: dict[str, Tensor], indices: Any, batch_size: int, shuffle: bool
    ) -> DataLoader[Any]:
        rows = torch.arange(len(adata["X"])) if indices is None else torch.as_tensor(indices)
        data: Any = Dataset(adata, rows)
        order = RandomSampler(data) if shuffle else SequentialSampler(data)
        sampler: Any = BatchSampler(order, batch_size, drop_last=False)
        return DataLoader(data, batch_size=None, sampler=sampler)
