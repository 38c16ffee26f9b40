"""Conditions of cells: library sizes, batches, labels and other columns, checked and as contexts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ncprior.adapters.scvi.families import Genes
from ncprior.utils.precision import input_like
from ncprior.utils.require import described, require_instance, tensor_of_batch

Condition: TypeAlias = dict[str, Tensor]

_COVARIATES = ("size_factor", "extra_continuous_covs", "extra_categorical_covs")

_CATEGORIES = ("batch", "labels")


class Conditions:
    """The conditions of the cells of a model.

    Arguments:
        family: The description of the class of the model.
        given: The conditions that heads see; ``None`` for all that the model has.

    Attributes:
        names: The conditions that a walk needs.
        given: The conditions that heads see.
    """

    def __init__(self, family: Genes, given: Sequence[str] | None) -> None:
        self.family, self.model = family, family.model
        registered = self.model.adata_manager.data_registry
        size = [] if family.size is None else [family.size]
        labels = ["labels"] if family.needs_labels else []
        covariates = [name for name in _COVARIATES if name in registered]
        needed = [*size, "batch", *labels, *covariates]
        known = [*needed, *(["labels"] if "labels" in registered and not labels else [])]
        wanted = needed if given is None else _checked_names(given, known)
        self.given = tuple(name for name in known if name in wanted)  # one order for all heads
        self.names = tuple(dict.fromkeys((*needed, *self.given)))
        self._codes = {"batch": int(self.model.summary_stats.n_batch), "labels": family.num_labels}

    def of_cells(self, x: Mapping[str, Tensor], **categories: str | None) -> Condition:
        """Returns the condition of cells, as :meth:`batch` returns them.

        Arguments:
            x: The cells.
            categories: For a column, the name of a category that it is set to.
        """
        codes = {
            name: torch.full((len(x["X"]), 1), self._code(name, category), device=x["X"].device)
            for name, category in categories.items()
            if category is not None
        }
        with torch.no_grad():
            measured = self.family.measured(x)
        return self.checked({**x, **measured, **codes}, len(x["X"]))

    def batch(self, x: Any) -> dict[str, Tensor]:  # noqa: ANN401
        """Returns one batch of a loader on the device of the model, after validating its counts."""
        if not isinstance(x, Mapping) or "X" not in x:
            got = list(x) if isinstance(x, Mapping) else described(x)
            raise ValueError(
                f"A batch is a dict with the counts as 'X', as source.loader(adata) yields it; "
                f"got {got}."
            )
        if missing := [name for name in self.family.columns if name not in x]:
            kind = (
                "minified: its cells are stored latents, and it"
                if self.family.is_minified
                else "one that"
            )
            raise ValueError(
                f"The model is {kind} takes no cells without {', '.join(missing)}. Pass batches of "
                f"source.loader()."
            )
        like = input_like(self.family.module)
        tensors = {k: tensor_of_batch(v).to(like.device) for k, v in x.items() if v is not None}
        counts = tensors["X"]
        if counts.ndim != 2 or counts.shape[1] != self.family.num_columns:
            raise ValueError(
                f"The counts have shape (B, {self.family.num_columns}), a column per gene; "
                f"got {tuple(counts.shape)}."
            )
        if not self.family.is_minified:
            self._require_counts(counts)
        return {**tensors, "X": counts.to(like)}

    def checked(self, condition: Any, count: int) -> Condition:  # noqa: ANN401
        """Returns the needed tensors on the model's device, after validating them."""
        remedy = "Pass what source.condition(next(iter(source.loader()))) returns."
        require_instance("condition", condition, Mapping, remedy)
        missing = [name for name in self.names if name not in condition]
        if missing:
            raise ValueError(
                f"The counts of a cell depend on its {', '.join(self.names)}: pass a condition with "
                f"these tensors, each (B, ...); missing: {', '.join(missing)}. Real cells give it: "
                f"source.condition(next(iter(source.loader())))."
            )
        needed = {
            name: require_instance(name, condition[name], Tensor, remedy) for name in self.names
        }
        self.require_rows(needed, count)
        for name in self._codes:
            if name in needed:
                self._require_codes(name, needed[name])
        device = input_like(self.family.module).device
        return {name: c.to(device) for name, c in needed.items()}

    def require_rows(self, condition: Mapping[str, Tensor], count: int) -> None:
        """Validates the shapes of the tensors of a condition."""
        for name, c in condition.items():
            wide = name.startswith("extra")
            if c.ndim != 2 or len(c) != count or (c.shape[1] != 1 and not wide):
                raise ValueError(
                    f"The walk has {count} rows, and its condition {name!r} shape "
                    f"{tuple(c.shape)}; it must be ({count}, {'...' if wide else 1})."
                )

    def context(self, condition: Condition) -> list[Tensor]:
        """Returns the columns that heads see, each of shape ``(B, ...)``, in float32."""
        columns = []
        for name in self.given:
            c = condition[name]
            if name in self._codes:
                count = self._codes[name]
                columns += [one_hot(c[:, 0].long(), count).float()] if count > 1 else []
            elif name == "extra_categorical_covs":
                counts = self.model.adata_manager.get_state_registry(name).n_cats_per_key
                columns += [
                    one_hot(column.long(), int(count)).float()
                    for column, count in zip(c.unbind(1), counts, strict=True)
                ]
            else:
                columns.append(c.float().log() if name == "size_factor" else c.float())
        return columns

    def _require_counts(self, counts: Tensor) -> None:
        """Validates whole numbers, where the likelihood is one of whole numbers."""
        empty, wrong = counts.sum(1) <= 0, (counts != counts.round()) | (counts < 0)
        any_empty, any_wrong = torch.stack([empty.any(), wrong.any()]).tolist()  # one wait
        if any_empty and self.family.size == "library":
            raise ValueError(
                f"{int(empty.sum())} of {len(counts)} cells of a batch have no counts, and so no "
                f"library size. Take these cells out: scanpy.pp.filter_cells(adata, min_counts=1)."
            )
        if any_wrong and self.family.takes_counts:
            row, column = (int(i) for i in wrong.nonzero()[0])
            raise ValueError(
                f"{type(self.model).__name__} is a model of whole numbers; got "
                f"{counts[row, column].item():.4g} in row {row}, column {column} of a batch, and "
                f"{int(wrong.sum())} such numbers in all. Normalised data are no counts: name the "
                f"layer of raw counts, setup_anndata(adata, layer=...), and train the model on it."
            )

    def _require_codes(self, name: str, c: Tensor) -> None:
        most = max(self._codes[name], 1)
        if ((c < 0) | (c >= most) | (c != c.round())).any():
            raise ValueError(
                f"The condition {name!r} must be whole numbers from 0 to {most - 1}; got numbers from "
                f"{c.min().item():g} to {c.max().item():g}. source.condition(cells) makes them."
            )

    def _code(self, name: str, category: str) -> int:
        """The code of a category by its name in the table of cells."""
        registry = self.model.adata_manager.get_state_registry(name)
        known = [*map(str, registry.categorical_mapping[: self._codes[name]])]
        if name not in self.names:
            raise ValueError(
                f"This source does not depend on {name!r}: neither decoder nor heads see it. Make it "
                f"with SCVISource(model, given={[*self.given, name]})."
            )
        if str(category) not in known:
            listed = ", ".join(map(repr, known[:20]))
            raise ValueError(f"{name} must be one of {listed}; got {described(category)}.")
        return known.index(str(category))


def _checked_names(given: Any, known: list[str]) -> list[str]:  # noqa: ANN401
    """Returns names of conditions after a check."""
    if isinstance(given, str) or not isinstance(given, list | tuple | np.ndarray):
        raise TypeError(
            f"given must be a list of names of conditions; got {described(given)}. Pass some of "
            f"{known}."
        )
    wrong = [name for name in given if name not in known]
    if wrong:
        raise ValueError(f"given must be names out of {known}; got {wrong[0]!r}.")
    return [*given]
