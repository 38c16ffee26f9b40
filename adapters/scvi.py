"""scVI models of scvi-tools as sources: counts of genes in single cells.

The latents z form one group with prior N(0, I). Library size and batch of a cell are a condition c:
p(x | z, c) is a negative binomial, zero-inflated or not, a Poisson or a normal distribution with mean
``library * share(z, batch)``.

References:
    | Deep generative modeling for single-cell transcriptomics (Lopez et al., Nature Methods 2018)
    | https://github.com/scverse/scvi-tools
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Size, Tensor
from torch.distributions import Distribution, Independent, Normal, constraints
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader

from ncprior.source import Group, LatentSource, require_eval
from ncprior.utils.precision import input_like
from ncprior.utils.require import (
    described,
    require_counts,
    require_flags,
    require_instance,
    tensor_of_batch,
)

Condition: TypeAlias = dict[str, Tensor]

_COVARIATES = ("size_factor", "extra_continuous_covs", "extra_categorical_covs")


class SCVISource(LatentSource[Any, Any]):
    """An scVI model of scvi-tools.

    A batch is the dict that the model's own loader yields, see :meth:`loader`; library size and
    batch are then part of the encoding. Sampling needs them as its condition, which
    :meth:`condition` reads from real cells. If there are several batches, the one-hot batch is the
    context of the heads. With ``latent_distribution="ln"`` z is the input of the model's softmax.

    Arguments:
        model: The ``scvi.model.SCVI``, trained, in evaluation mode, on the device where it is to
            stay.

    Attributes:
        module: The network, ``model.module``.

    Raises:
        TypeError: If it is no SCVI model.
        ValueError: If it is untrained, minified, in training mode, or has latent library sizes.

    Example:
        >>> SCVISource(torch.nn.Linear(1, 1))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        TypeError: SCVISource takes an scvi.model.SCVI; got an object of type Linear. Pass ...

        With scvi-tools:

        >>> source = SCVISource(model)                                    # doctest: +SKIP
        >>> prior = NCPrior.for_source(source, next(iter(source.loader())))  # doctest: +SKIP
        >>> history = fit(prior, source.loader(shuffle=True))             # doctest: +SKIP
        >>> condition = source.condition(next(iter(source.loader())))     # doctest: +SKIP
    """

    num_groups = 1

    def __init__(self, model: Any) -> None:  # noqa: ANN401
        if "SCVI" not in [part.__name__ for part in type(model).__mro__]:
            raise TypeError(
                f"SCVISource takes an scvi.model.SCVI; got {described(model)}. Pass the trained "
                f"model, not its network."
            )
        if not model.is_trained:
            raise ValueError("The SCVI model is not trained: call model.train() first.")
        if model.minified_data_type is not None:
            raise ValueError(
                f"The model's AnnData is minified ({model.minified_data_type}): it holds latents "
                f"in place of counts. Load the model with the AnnData of the counts."
            )
        if not model.module.use_observed_lib_size:
            raise ValueError(
                "The model has the library size as a second latent (use_observed_lib_size=False), "
                "whose prior the heads would leave as it is. Train it with "
                "use_observed_lib_size=True, which makes the library size a condition."
            )
        require_eval(model.module)
        self.model = model
        self.module: Any = model.module
        names = model.adata_manager.data_registry
        labels = ("labels",) if self.module.dispersion == "gene-label" else ()
        self._needed = ("batch", *labels, *(name for name in _COVARIATES if name in names))

    class Encoding(NamedTuple):
        """Parameters of q(z | x), and the condition."""

        loc: Tensor  # (B, D)
        scale: Tensor  # (B, D)
        condition: Condition

    class State(NamedTuple):
        """The state before z is given (``z is None``) or after."""

        loc: Tensor | None
        scale: Tensor | None
        condition: Condition
        z: Tensor | None

    def loader(
        self,
        adata: Any = None,  # noqa: ANN401
        *,
        indices: Sequence[int] | None = None,
        batch_size: int = 256,
        shuffle: bool = False,
    ) -> DataLoader[Any]:
        """Returns the model's own loader of batches, for :func:`ncprior.fit`; it can be reread.

        Arguments:
            adata: The cells, of the same genes; the model's own if ``None``.
            indices: Rows of the cells to take; all if ``None``.
            batch_size: Cells per batch.
            shuffle: Whether the order is new every time.

        Returns:
            A ``DataLoader`` of dicts of tensors.

        Example:
            >>> for batch in source.loader():  # doctest: +SKIP
            ...     print(batch["X"].shape)
            torch.Size([256, 2000])
        """
        require_counts(batch_size=batch_size)
        require_flags(shuffle=shuffle)
        adata = self.model._validate_anndata(adata)
        loader: DataLoader[Any] = self.model._make_data_loader(
            adata, indices=indices, batch_size=batch_size, shuffle=shuffle
        )
        return loader

    def condition(self, batch: Mapping[str, Tensor]) -> Condition:
        """Returns the condition of real cells: library sizes, batches and covariates.

        Arguments:
            batch: One batch, as the loader yields it.

        Returns:
            A dict of tensors of B rows: ``library``, the log of a cell's total count, and
            ``batch``, both ``(B, 1)``, and the covariates that the model was set up with.

        Raises:
            ValueError: If the batch lacks something.

        Example:
            >>> prior.sample(256, sampler, condition=source.condition(batch))  # doctest: +SKIP
        """
        if not isinstance(batch, Mapping) or "X" not in batch:
            got = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                f"A batch is a dict with the counts as 'X', as source.loader(adata) yields it; "
                f"got {got}."
            )
        counts = tensor_of_batch(batch["X"])
        if counts.ndim != 2 or counts.shape[1] != self.module.n_input:
            raise ValueError(
                f"The counts have shape (B, {self.module.n_input}), a column per gene; "
                f"got {tuple(counts.shape)}."
            )
        library = counts.sum(1, keepdim=True).float().log()
        return self._checked({**batch, "library": library}, len(counts))

    def encode(self, x: Mapping[str, Tensor]) -> Encoding:
        """Encodes one batch: the parameters of q(z | x), and the condition."""
        require_eval(self.module)
        condition = self.condition(x)
        counts = tensor_of_batch(x["X"]).to(input_like(self.module))
        tensors = self.module._get_inference_input({**condition, "X": counts})
        q = self.module.inference(**tensors)["qz"]
        return self.Encoding(q.loc.float(), q.scale.float(), condition)

    def start(
        self,
        batch_size: int,
        encoding: Encoding | None = None,
        condition: Mapping[str, Tensor] | None = None,
    ) -> State:
        """Returns the state before z is given, from an encoding or a condition.

        Raises:
            ValueError: If there is no condition, or one that lacks something.
        """
        require_eval(self.module)
        if encoding is not None:
            self._checked(encoding.condition, batch_size)
            return self.State(*encoding, z=None)
        given = {} if condition is None else condition
        return self.State(None, None, self._checked(given, batch_size), None)

    def group(self, state: State) -> Group:
        """Returns p(z) = N(0, I), q(z | x), and the one-hot batch as context."""
        batch, count = state.condition["batch"], self.module.n_batch
        zeros = batch.new_zeros(len(batch), self.module.n_latent, dtype=torch.float32)
        q = None
        if state.loc is not None and state.scale is not None:
            q = _normal(state.loc, state.scale)
        context = one_hot(batch[:, 0].long(), count).float() if count > 1 else None
        return Group(_normal(zeros, torch.ones_like(zeros)), q, context)

    def advance(self, state: State, z: Tensor) -> State:
        """Returns the state with z, which has shape ``(B, D)``."""
        return state._replace(z=z)

    def decode(self, state: State) -> Tensor:
        """Returns the mean of p(x | z, c), with shape ``(B, genes)``."""
        return self.likelihood(state).mean

    def likelihood(self, state: State) -> Distribution:
        """Returns p(x | z, c), from which counts are drawn; its ``log_prob`` sums over genes."""
        if state.z is None:
            raise ValueError(
                "Decoding needs z; this walk has none yet. Call advance(state, z) first."
            )
        z = self.module.z_encoder.z_transformation(state.z.to(input_like(self.module)))
        inferred = {"z": z, "library": state.condition["library"]}
        labels = torch.zeros_like(state.condition["batch"])  # unused where no condition names them
        tensors = {"labels": labels, **state.condition}
        return _Cells(
            self.module.generative(**self.module._get_generative_input(tensors, inferred))["px"]
        )

    def _checked(self, condition: Mapping[str, Tensor], count: int) -> Condition:
        """Returns the needed tensors of a condition on the model's device, after validating it."""
        remedy = "Pass what source.condition(next(iter(source.loader()))) returns."
        require_instance("condition", condition, Mapping, remedy)
        names = ("library", *self._needed)
        missing = [name for name in names if name not in condition]
        if missing:
            raise ValueError(
                f"The counts of a cell depend on its {', '.join(names)}: pass a condition with "
                f"these tensors, each (B, ...); missing: {', '.join(missing)}. Real cells give it: "
                f"source.condition(next(iter(source.loader())))."
            )
        for name in names:
            require_instance(name, condition[name], Tensor, remedy)
            rows = tuple(condition[name].shape)
            if (
                len(rows) != 2
                or rows[0] != count
                or (name in ("library", "batch") and rows[1] != 1)
            ):
                raise ValueError(
                    f"The walk has {count} rows, and its condition {name!r} shape {rows}; "
                    f"library and batch are ({count}, 1)."
                )
        device = input_like(self.module).device
        return {name: condition[name].to(device) for name in names}


class _Cells(Distribution):
    """A distribution of scvi-tools over genes as one over cells, of batch shape (B,)."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, genes: Distribution) -> None:
        self.genes = genes
        shape = genes.mean.shape
        super().__init__(shape[:1], shape[1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self.genes.mean

    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        # scvi-tools samples in inference mode; a clone is a tensor like any other.
        return self.genes.sample(Size(sample_shape)).clone()

    def log_prob(self, value: Tensor) -> Tensor:
        return self.genes.log_prob(value).sum(-1)


def _normal(loc: Tensor, scale: Tensor) -> Distribution:
    return Independent(Normal(loc, scale, validate_args=False), 1, validate_args=False)
