"""A model of scvi-tools as a source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, Normal
from torch.utils.data import DataLoader

from ncprior.adapters.scvi.conditions import Condition, Conditions
from ncprior.adapters.scvi.families import Posterior, family_of
from ncprior.source import Group, LatentSource
from ncprior.utils.precision import input_like
from ncprior.utils.require import (
    described,
    require_counts,
    require_flags,
)
from ncprior.utils.visible import require_eval


class SCVISource(LatentSource[Any, Any]):
    """A model of scvi-tools: SCVI, LinearSCVI, SCANVI, TOTALVI or PEAKVI.

    A batch is the dict that the model's own loader yields, see :meth:`loader`. Library size, batch
    and other columns of a cell are its condition: part of the encoding, and given to a walk without
    cells. :meth:`condition` reads it from real cells. A minified model, which has latents in place
    of counts, works as any other.

    The groups of latents, with the name of each in ``group_names``:

    * ``z``, with prior N(0, I). With ``latent_distribution="ln"`` it is the input of the softmax.
    * SCANVI has ``z2`` ~ N(0, I) before it, and z ~ p(z | z2, y), where y is the label.
    * ``library``, the log library size, where it is a latent (``use_observed_lib_size=False``).

    Decoded are counts of genes, with TOTALVI genes and then proteins, with PEAKVI open regions.

    Arguments:
        model: The model, trained, in evaluation mode, on the device where it is to stay.
        given: Names of the conditions that heads see, such as ``["batch", "labels"]``. By default
            all that the decoder takes. With ``"labels"``, cells of one label can be drawn from a
            model that does not know labels.

    Attributes:
        module: The network, ``model.module``.
        group_names: The names of the groups.

    Raises:
        TypeError: If it is no such model.
        ValueError: If it is untrained, without its cells, or in training mode.

    Example:
        >>> SCVISource(torch.nn.Linear(1, 1))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        TypeError: SCVISource takes an scvi.model.SCVI, LinearSCVI, SCANVI, TOTALVI, PEAKVI; got ...

        With scvi-tools:

        >>> source = SCVISource(model)                                      # doctest: +SKIP
        >>> prior = improve(source, train, held_out=held_out)               # doctest: +SKIP
        >>> cells = next(iter(source.loader(batch_size=1000)))              # doctest: +SKIP
        >>> condition = source.condition(cells, batch="stimulated")         # doctest: +SKIP
        >>> prior.sample(1000, condition=condition, draw_x=True).x.shape    # doctest: +SKIP
        torch.Size([1000, 2000])
    """

    def __init__(self, model: Any, *, given: Sequence[str] | None = None) -> None:  # noqa: ANN401
        self._family = family_of(model)
        require_eval(model.module)
        self.model = model
        self.module: Any = model.module
        self.group_names = self._family.groups
        self.num_groups = len(self.group_names)
        self._conditions = Conditions(self._family, given)

    class Encoding(NamedTuple):
        """Parameters of the posterior of each group, and the condition."""

        q: Posterior
        condition: Condition

    class State(NamedTuple):
        """The parameters of the posterior, if there is one, the condition, and latents so far."""

        q: Posterior | None
        condition: Condition
        latents: dict[str, Tensor]

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

        Raises:
            TypeError: If the cells are no AnnData.
            ValueError: If they do not fit the model.

        Example:
            >>> for batch in source.loader():  # doctest: +SKIP
            ...     print(batch["X"].shape)
            torch.Size([256, 2000])
        """
        require_counts(batch_size=batch_size)
        require_flags(shuffle=shuffle)
        if adata is not None and not hasattr(adata, "n_obs"):
            raise TypeError(
                f"adata must be an AnnData; got {described(adata)}. Pass the table of cells that "
                f"the model was set up with, or another one of the same genes."
            )
        try:
            adata = self.model._validate_anndata(adata)
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            remedy = (
                "The model is minified: it takes no cells without stored latents"
                if self._family.is_minified
                else "Pass cells with the genes and the columns that the model was set up with"
            )
            raise ValueError(f"These cells do not fit the model. {remedy}. ({error})") from error
        loader: DataLoader[Any] = self.model._make_data_loader(
            adata, indices=indices, batch_size=batch_size, shuffle=shuffle
        )
        return loader

    def condition(
        self, cells: Mapping[str, Tensor], *, batch: str | None = None, label: str | None = None
    ) -> Condition:
        """Returns the condition of real cells: library sizes, batches and covariates.

        Arguments:
            cells: One batch, as the loader yields it.
            batch: Name of a batch that all cells are put into; their own if ``None``.
            label: Name of a label that all cells get; their own if ``None``. The source must depend
                on labels: SCANVI does, others with ``given=["labels", ...]``.

        Returns:
            A dict of tensors of B rows: ``library``, the log of a cell's total count (PEAKVI:
            ``depth``), ``batch``, ``labels`` if the source depends on it, each ``(B, 1)``, and
            the covariates that the model was set up with. An unlabelled cell gets its most
            probable label.

        Raises:
            ValueError: If the batch lacks something, or there is no such category.

        Example:
            >>> condition = source.condition(cells, label="B cells")  # doctest: +SKIP
        """
        return self._conditions.of_cells(self._conditions.batch(cells), batch=batch, labels=label)

    def encode(self, x: Mapping[str, Tensor]) -> Encoding:
        """Encodes one batch: the parameters of the posterior, and the condition."""
        require_eval(self.module)
        cells = self._conditions.batch(x)
        condition = self._conditions.of_cells(cells)
        return self.Encoding(self._family.encode(cells, condition), condition)

    def observed(self, batch: Any) -> Tensor:  # noqa: ANN401
        """Returns the counts of a batch; for TOTALVI genes and proteins, one after the other.

        Raises:
            ValueError: If the model is minified, so that its cells have none.
        """
        if self._family.is_minified:
            raise ValueError(
                "A minified model has no counts, which log p(x | z) needs. Load the model with the "
                "counts of its cells."
            )
        return self._family.observed(self._conditions.batch(batch))

    def facts(self) -> dict[str, Any]:
        """Returns the names of the conditions that heads see."""
        return {"SCVISource.given": list(self._conditions.given)}

    def start(
        self,
        batch_size: int,
        encoding: Encoding | None = None,
        condition: Mapping[str, Tensor] | None = None,
    ) -> State:
        """Returns the state before the first group, from an encoding or a condition.

        Raises:
            ValueError: If there is no condition, or one that lacks something.
        """
        require_eval(self.module)
        if encoding is not None:
            self._conditions.require_rows(encoding.condition, batch_size)
            return self.State(*encoding, {})
        given = {} if condition is None else condition
        return self.State(None, self._conditions.checked(given, batch_size), {})

    def group(self, state: State) -> Group:
        """Returns prior and posterior of the next group; context are conditions and latents."""
        name = self.group_names[len(state.latents)]
        prior = self._family.prior(name, state.latents, state.condition)
        q = None if state.q is None else self._family.posterior(name, state.q[name])
        seen = [*state.latents.values(), *self._conditions.context(state.condition)]
        return Group(prior, q, torch.cat(seen, -1).float() if seen else None)

    def advance(self, state: State, z: Tensor) -> State:
        """Returns the state with the latents of the next group, which have shape ``(B, D)``."""
        name = self.group_names[len(state.latents)]
        return state._replace(latents={**state.latents, name: z})

    def decode(self, state: State) -> Tensor:
        """Returns the mean of p(x | z, c), with shape ``(B, genes)``."""
        return self.likelihood(state).mean

    def likelihood(self, state: State) -> Distribution:
        """Returns p(x | z, c), from which counts are drawn; its ``log_prob`` sums over genes."""
        if len(state.latents) < self.num_groups:
            missing = self.group_names[len(state.latents)]
            raise ValueError(
                f"Decoding needs {missing}; this walk has none yet. Call advance(state, z) first."
            )
        return self._family.likelihood(state.latents, state.condition)

    def shared_prior(self) -> Distribution | None:
        """Returns N(0, I), which all cells share where there is one group."""
        if self.num_groups > 1:
            return None
        zeros = input_like(self.module).new_zeros(self.module.n_latent, dtype=torch.float32)
        return Independent(Normal(zeros, torch.ones_like(zeros), validate_args=False), 1)
