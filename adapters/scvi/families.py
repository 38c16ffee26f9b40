"""Differences between the models of scvi-tools: groups of latents, conditions, decoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Normal
from torch.nn.functional import linear, one_hot

from ncprior.adapters.scvi.likelihoods import (
    Cells,
    GenesAndProteins,
    Peaks,
    Proteins,
    ZeroInflated,
    negative_binomial,
)
from ncprior.distributions import PointMass, build
from ncprior.utils.precision import input_like
from ncprior.utils.random_state import seeded
from ncprior.utils.require import described

Tensors: TypeAlias = Mapping[str, Tensor]
Posterior: TypeAlias = dict[str, dict[str, Tensor]]
"""Parameters of q by the names of the groups."""

_LARGEST_LOG_LIBRARY = 15.0  # TOTALVI's


class Genes:
    """SCVI and LinearSCVI: latents z, and a latent library size where it is not observed.

    Attributes:
        groups: The names of the groups of latents, in the order of the prior.
        size: The name of the size of a cell, and ``None`` where it is a latent.
    """

    def __init__(self, model: Any) -> None:  # noqa: ANN401
        self.model, self.module = model, model.module
        is_observed = getattr(self.module, "use_observed_lib_size", True)
        self.groups: tuple[str, ...] = ("z",) if is_observed else ("z", "library")
        self.size: str | None = "library" if is_observed else None
        self.is_minified = getattr(model, "minified_data_type", None) is not None

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the tensors of a batch, beside the counts, that every model of this kind has."""
        stored = ("latent_qzm", "latent_qzv", "observed_lib_size")
        return ("batch", *(stored if self.is_minified else ()))

    @property
    def num_columns(self) -> int:
        """Number of columns of the counts."""
        return int(self.module.n_input)

    @property
    def num_labels(self) -> int:
        """Number of labels of cells."""
        return int(getattr(self.model.summary_stats, "n_labels", 1))

    @property
    def takes_counts(self) -> bool:
        """Whether the likelihood is of whole numbers."""
        return bool(self.module.gene_likelihood != "normal")

    @property
    def needs_labels(self) -> bool:
        """Whether the decoder takes the label of a cell."""
        return bool(self.module.dispersion == "gene-label")

    def observed(self, x: Tensors) -> Tensor:
        """The counts of which the likelihood is."""
        return x["X"]

    def measured(self, x: Tensors) -> Tensors:
        """Conditions that are computed from cells: their library sizes."""
        if self.size is None:
            return {}
        total = x["observed_lib_size"] if self.is_minified else x["X"].sum(1, keepdim=True)
        return {"library": total.float().log()}

    def encode(self, x: Tensors, condition: Tensors) -> Posterior:
        """Parameters of q(z | x) and, where it is a latent, of the log library size."""
        if self.is_minified:  # TOTALVI's own network takes the stored variance for a deviation
            scale = x["latent_qzv"].float().sqrt()
            return {"z": {"loc": x["latent_qzm"].float(), "scale": scale}}
        found = self.module.inference(**self.module._get_inference_input({**x, **condition}))
        q = {"z": found["qz"]} if self.size else {"z": found["qz"], "library": found["ql"]}
        return {name: {"loc": d.loc.float(), "scale": d.scale.float()} for name, d in q.items()}

    def prior(self, name: str, latents: Tensors, condition: Tensors) -> Distribution:
        """The prior of a group, given the latents before it."""
        rows = condition["batch"]
        if name == "library":
            means, variances = self.module.library_log_means, self.module.library_log_vars
            batch = one_hot(rows[:, 0].long(), means.shape[1]).float()
            return normal(linear(batch, means), linear(batch, variances).sqrt())
        zeros = rows.new_zeros(len(rows), self.module.n_latent, dtype=torch.float32)
        return normal(zeros, torch.ones_like(zeros))

    def posterior(self, name: str, q: Tensors) -> Distribution:
        """The posterior of a group."""
        return normal(q["loc"], q["scale"])

    def likelihood(self, latents: Tensors, condition: Tensors) -> Distribution:
        """p(x | z, c)."""
        return Cells(self._generated(latents, condition)["px"])

    def _z(self, latents: Tensors) -> Tensor:
        """z as the decoder takes it."""
        z: Tensor = self.module.z_encoder.z_transformation(
            latents["z"].to(input_like(self.module))
        )
        return z

    def _generated(self, latents: Tensors, condition: Tensors, **inferred: Any) -> Any:  # noqa: ANN401
        """Returns the output of the decoder."""
        z, known = self._z(latents), {**condition, **latents}
        inferred = {"z": z, "library": known.get("library"), **inferred}
        labels = torch.zeros_like(condition["batch"])  # unused where no condition names them
        given = self.module._get_generative_input({"labels": labels, **condition}, inferred)
        return self.module.generative(**given)


class Annotated(Genes):
    """SCANVI: z2 ~ N(0, I), then z1 | z2, y, which is the "z" of the decoder; y is the label.

    The posterior is q(z1 | x) q(z2 | z1, y), in the other order: the encoder draws z1.
    """

    def __init__(self, model: Any) -> None:  # noqa: ANN401
        super().__init__(model)
        self.groups = ("z2", *self.groups)
        if self.module.latent_distribution != "normal":
            raise ValueError(
                f"SCANVI compares z1 with p(z1 | z2, y) after a softmax, which has no density; got a "
                f"model with latent_distribution={self.module.latent_distribution!r}. Train it with "
                f"latent_distribution='normal'."
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the tensors of a batch, beside the counts."""
        return (*super().columns, "labels")

    @property
    def num_labels(self) -> int:
        """Number of labels of cells, without the one for unlabelled cells."""
        return int(self.module.n_labels)

    @property
    def needs_labels(self) -> bool:
        """Whether the decoder takes the label of a cell."""
        return True

    def measured(self, x: Tensors) -> Tensors:
        """The library size, and the label: of an unlabelled cell the most probable one."""
        labels, is_unknown = x["labels"], x["labels"] >= self.num_labels
        if is_unknown.any():
            with seeded(0):  # the encoder draws z, which is not used
                q = super().encode(x, {})
            likeliest = self.module.classifier(q["z"]["loc"].to(input_like(self.module))).argmax(1)
            labels = torch.where(is_unknown, likeliest[:, None], labels)
        return {**super().measured(x), "labels": labels}

    def encode(self, x: Tensors, condition: Tensors) -> Posterior:
        """Parameters of q(z1 | x), a draw z1 of it, and parameters of q(z2 | z1, y)."""
        q = super().encode(x, condition)
        drawn = self.posterior("", q["z"]).sample()
        z2, _ = self.module.encoder_z2_z1(drawn.to(input_like(self.module)), condition["labels"])
        return {
            **q,
            "z2": {"loc": z2.loc.float(), "scale": z2.scale.float()},
            "z": {**q["z"], "drawn": drawn},
        }

    def prior(self, name: str, latents: Tensors, condition: Tensors) -> Distribution:
        """N(0, I) of z2, or p(z1 | z2, y)."""
        if name != "z":
            return super().prior(name, latents, condition)
        z2 = latents["z2"].to(input_like(self.module))
        mean, variance = self.module.decoder_z1_z2(z2, condition["labels"])
        return normal(mean.float(), variance.float().sqrt())

    def posterior(self, name: str, q: Tensors) -> Distribution:
        """The posterior of a group; that of z1 is a point mass on the draw."""
        found = super().posterior(name, q)
        if (drawn := q.get("drawn")) is None:
            return found
        return PointMass(drawn, found.log_prob(drawn))


class GenesProteins(Genes):
    """TOTALVI: counts of genes, then of proteins.

    The background of a protein is drawn from the decoder's own distribution given z, as
    scvi-tools does, and integrated out of the likelihood.
    """

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the tensors of a batch, beside the counts of genes."""
        return (*super().columns, *(() if self.is_minified else ("proteins",)))

    def observed(self, x: Tensors) -> Tensor:
        """The counts of genes, and then of proteins."""
        return torch.cat([x["X"], x["proteins"].to(x["X"])], dim=1)

    @property
    def takes_counts(self) -> bool:
        """Whether the likelihood is of whole numbers."""
        return True

    @property
    def num_columns(self) -> int:
        """Number of columns of the counts of genes."""
        return int(self.module.n_input_genes)

    @property
    def needs_labels(self) -> bool:
        """Whether the decoder takes the label of a cell."""
        labelled = ("gene-label", "protein-label")
        dispersions = (self.module.gene_dispersion, self.module.protein_dispersion)
        return any(dispersion in labelled for dispersion in dispersions)

    def likelihood(self, latents: Tensors, condition: Tensors) -> Distribution:
        """p(x, y | z, c) of genes x and proteins y."""
        library = {**condition, **latents}.get("library")
        total = None if library is None else library.clamp(max=_LARGEST_LOG_LIBRARY).exp()
        with seeded(0):  # the decoder draws a background, which is not used
            made = self._generated(latents, condition, library_gene=total)
        x, y, efficiency = made["px_"], made["py_"], made["per_batch_efficiency"]
        genes = negative_binomial(x["rate"], x["r"].expand_as(x["rate"]))
        if self.module.gene_likelihood == "zinb":
            genes = ZeroInflated(genes, x["dropout"])
        return GenesAndProteins(
            genes,
            Proteins(
                loc=y["back_alpha"] + efficiency.log(),
                scale=y["back_beta"],
                increase=y["fore_scale"],
                logits=y["mixing"],
                inverse_dispersion=y["r"],
            ),
        )

    def _z(self, latents: Tensors) -> Tensor:
        z: Tensor = self.module.encoder.z_transformation(latents["z"].to(input_like(self.module)))
        return z


class Regions(Genes):
    """PEAKVI: open regions. The depth of a cell, between 0 and 1, takes the place of the library."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401
        super().__init__(model)
        self.size = "depth"

    @property
    def num_columns(self) -> int:
        """Number of regions."""
        return int(self.module.n_input_regions)

    @property
    def takes_counts(self) -> bool:
        """Whether the likelihood is of whole numbers."""
        return True

    @property
    def needs_labels(self) -> bool:
        """Whether the decoder takes the label of a cell."""
        return False

    def measured(self, x: Tensors) -> Tensors:
        """The depth of cells, which a network reads from the regions."""
        with seeded(0):  # the encoder draws z, which is not used
            found = self.module.inference(**self.module._get_inference_input(x))["d"]
        depth = found if isinstance(found, Tensor) else torch.full((len(x["X"]), 1), float(found))
        return {"depth": depth.detach().float()}

    def likelihood(self, latents: Tensors, condition: Tensors) -> Distribution:
        """p(x | z, c): a region is open with probability p · depth · factor of the region."""
        z = latents["z"]
        p = self._generated(latents, condition, qz=Normal(z, 1.0, validate_args=False))["px"]
        factors = self.module.region_factors
        open_at_all = 1.0 if factors is None else torch.sigmoid(factors)
        chance = (p * condition["depth"] * open_at_all).float()
        return Peaks(Bernoulli(chance, validate_args=False))


_FAMILIES: dict[str, type[Genes]] = {
    "SCVI": Genes,
    "LinearSCVI": Genes,
    "SCANVI": Annotated,
    "TOTALVI": GenesProteins,
    "PEAKVI": Regions,
}


def family_of(model: Any) -> Genes:  # noqa: ANN401
    """Returns the description of the class of a model.

    Raises:
        TypeError: If it is of no known class.
        ValueError: If it is untrained, or without its cells.
    """
    kinds = [part.__name__ for part in type(model).__mro__]
    kind = next((kind for kind in kinds if kind in _FAMILIES), None)
    if kind is None:
        raise TypeError(
            f"SCVISource takes an scvi.model.{', '.join(_FAMILIES)}; got {described(model)}. Pass "
            f"the trained model, not its network."
        )
    if not model.is_trained:
        raise ValueError(f"The {kind} model is not trained: call model.train() first.")
    if getattr(model, "adata_manager", None) is None:
        raise ValueError(
            f"The {kind} model was loaded without its cells. Load it with the AnnData that is saved "
            f"beside it: {kind}.load(folder, adata=...)."
        )
    return _FAMILIES[kind](model)


def normal(loc: Tensor, scale: Tensor) -> Distribution:
    """Normal distribution of batch shape (B,)."""
    return build({"Normal": {"loc": loc, "scale": scale}})
