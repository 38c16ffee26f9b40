r"""Encodings of a data set by a frozen VAE, computed once and used at many training steps.

A training step needs prior, posterior and context of each group. Their parameters are cached, and
z_k is drawn anew from them at every step. A base whose parameters are not known, such as a network over
codes, is cached as one draw per row.

With one group, they depend on x alone, and the distribution of a step is unchanged: only the encoder
is skipped. With several groups, they depend on z_<k too, which stays the same until the cache is
renewed: a row of x has one draw of z_<k ~ q(z_<k | x) per cache. Contrastive pairs are still drawn
given the same z_<k, so that each loss is unbiased; but heads are trained on fewer different
contexts, and may memorise them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Size, Tensor
from torch.distributions import Distribution
from torch.utils._pytree import tree_leaves

from ncprior.data.batches import one_pass
from ncprior.data.generators import own_generators, own_generators_restored
from ncprior.data.row_store import RowStore
from ncprior.data.rows import RowData, Rows
from ncprior.distributions import build, parameters
from ncprior.source import (
    Group,
    LatentSource,
    WrappedSource,
    device_of,
    num_rows,
    posterior_of,
    require_source,
)
from ncprior.utils.batches import to_device
from ncprior.utils.draws import drawn
from ncprior.utils.random_state import random_state, seeded
from ncprior.utils.require import require_counts, require_instance, require_numbers
from ncprior.utils.trees import same
from ncprior.utils.visible import require_eval


class CachedEncodings(RowData):
    """Cache of the encodings of all rows of a data set, renewed from time to time.

    Arguments:
        source: The VAE.
        data: The data, as for :func:`ncprior.data.one_pass`.
        batch_size: Rows per batch, where batches are made here.
        seed: Seed of the draws of z_<k; the generators of torch, NumPy and Python are unchanged.
        budget: Bytes in memory; larger caches are on disk, see :class:`ncprior.data.RowStore`.
        folder: Folder for a cache on disk.

    Attributes:
        source: A source whose batches are rows of the cache.

    Raises:
        TypeError: If there are several groups and the posterior of one is not of a type whose
            parameters can be cached.

    Example:
        >>> walks = CachedEncodings(source, torch.randn(10, 3), batch_size=4, seed=0)
        >>> group = walks.source.group(walks.source.start(2, walks[torch.tensor([7, 0])]))
        >>> len(walks), group.posterior.sample().shape
        (10, torch.Size([2, 2]))
    """

    def __init__(
        self,
        source: LatentSource[Any, Any],
        data: Any,  # noqa: ANN401
        *,
        batch_size: int,
        seed: int,
        budget: float = 2**32,
        folder: str | os.PathLike[str] | None = None,
    ) -> None:
        require_source(source)
        require_counts(batch_size=batch_size)
        require_counts("(-1e18, 1e18)", seed=seed)
        require_numbers("[0, inf]", budget=budget)
        if folder is not None:
            require_instance("folder", folder, (str, os.PathLike), "Pass the path of a folder.")
        self.vae, self.data, self.batch_size, self.seed = source, data, batch_size, seed
        self.budget, self.folder = budget, folder
        self.source = self._kind()(source)
        self.number, self.draws = (
            -1,
            False,
        )  # whether encode draws, as of a posterior in another order
        self._own = [(generator, generator.get_state()) for generator in own_generators(data)]
        self.renew(0)

    def renew(self, number: int) -> None:
        """Fills the cache for the given renewal, 0, 1, …, unless it is filled for it already."""
        if number == self.number:
            return
        device = device_of(self.vae)
        self._rows: Any = None  # frees the old cache first
        with own_generators_restored(self.data), seeded(self.seed + number):
            for generator, first in self._own:
                generator.set_state(first)
            self._rows = RowStore(self._walk(device), budget=self.budget, folder=self.folder)
        self.number, self.device = number, self._rows.device

    def renewal(self, epochs: float) -> Callable[[int], None] | None:
        """Returns a function of the batch index that renews the cache every ``epochs`` epochs."""
        if math.isinf(epochs) or not (self.vae.num_groups > 1 or self.draws):
            return None
        return self._every(epochs)

    def _every(self, epochs: float) -> Callable[[int], None]:
        period = epochs * max(1, len(self) // self.batch_size)
        return lambda batch: self.renew(int(batch // period))

    def _kind(self) -> type[EncodedSource]:
        return EncodedSource if self.vae.num_groups == 1 else CachedGroupsSource

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Tensor | slice) -> Any:  # noqa: ANN401
        """Returns rows, by a tensor of their numbers or a slice."""
        return self._rows[rows]

    def prefetch(self, rows: Tensor) -> None:
        """Begins to read rows of a cache on disk."""
        self._rows.prefetch(rows)

    @torch.no_grad()
    def _walk(self, device: torch.device) -> Iterator[Any]:
        require_eval(self.vae, self.vae.module)
        for i, x in enumerate(one_pass(self.data, self.batch_size, device)):
            before = random_state() if i == 0 else None
            encoding = self.vae.encode(x)
            if before is not None:
                self.draws = not same(before, random_state())
            yield encoding if self.vae.num_groups == 1 else tuple(_groups(self.vae, encoding))


@torch.no_grad()
def drawn_once(
    source: LatentSource[Any, Any], batches: Iterable[Any], *, budget: float
) -> RowStore:
    """Returns the groups along one walk per row of x, as batches of a :class:`CachedGroupsSource`.

    A prior or posterior whose parameters are not known, such as one that a sampler draws, is one draw
    per row.

    Arguments:
        source: The VAE.
        batches: The data, as batches on the VAE's device; they are read once.
        budget: Bytes in memory; more rows are kept on disk.
    """
    require_eval(source, source.module)
    walks = (tuple(_groups(source, source.encode(x), strict=False)) for x in batches)
    return RowStore(walks, budget=budget)


def _groups(
    source: LatentSource[Any, Any],
    encoding: Any,  # noqa: ANN401
    *,
    strict: bool = True,
) -> Iterator[dict[str, Any]]:
    """Prior, posterior and context of all groups; strict about posteriors of unknown parameters."""
    state = source.start(num_rows(encoding), encoding)
    for k in range(source.num_groups):
        group = source.group(state)
        q = posterior_of(group)
        context = group.context
        yield {
            "prior": _parameters_or_draw(group.prior),
            "posterior": _known(q, k) if strict else _parameters_or_draw(q),
            "context": None if context is None else context.contiguous(),
        }
        if k + 1 < source.num_groups:  # the last z_k is not drawn: it decides nothing
            state = source.advance(state, drawn(q))


def _parameters_or_draw(prior: Any) -> Any:  # noqa: ANN401
    tree = parameters(prior) if isinstance(prior, Distribution) else None
    return prior.sample() if tree is None else tree


class _Drawn(NamedTuple):
    """A prior or posterior by one draw per row, with shape ``(B, *event)``."""

    z: Tensor

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        return self.z.expand(*sample_shape, *self.z.shape)


def _kept(tree: Any) -> Any:  # noqa: ANN401
    """A distribution by its parameters or by one draw per row."""
    return _Drawn(tree) if isinstance(tree, Tensor) else build(tree)


def _known(distribution: Distribution, k: int) -> Any:  # noqa: ANN401
    tree = parameters(distribution)
    if tree is None:
        raise TypeError(
            f"Groups are cached as parameters of their distributions; group {k} has a "
            f"{type(distribution).__name__}, whose parameters are not known. Pass cache_epochs=None."
        )
    return tree


class EncodedSource(WrappedSource):
    """A source whose batches are encodings already; all else is that of the wrapped source.

    Arguments:
        source: The VAE.

    Example:
        >>> encoding = source.encode(x)
        >>> EncodedSource(source).encode(encoding) is encoding
        True
    """

    def encode(self, x: Any) -> Any:  # noqa: ANN401
        """Returns the encoding that it is given."""
        return x


class CachedGroupsSource(EncodedSource):
    """A source whose batches are cached groups: for training, without a decoder.

    Arguments:
        source: The VAE.

    Example:
        >>> normal = parameters(Independent(Normal(torch.zeros(4, 2), 1.0), 1))
        >>> cached = ({"prior": normal, "posterior": normal, "context": None},)
        >>> source = CachedGroupsSource(source)
        >>> source.group(source.start(4, source.encode(cached))).prior.sample().shape
        torch.Size([4, 2])
    """

    class State(NamedTuple):
        """The cached groups, and the index of the next one."""

        groups: Any
        k: int

    def start(self, batch_size: int, encoding: Any = None, condition: Any = None) -> State:  # noqa: ANN401
        """Returns the state in front of the first group."""
        return self.State(encoding, 0)

    def group(self, state: State) -> Group:
        """Returns the group as it was cached."""
        kept = state.groups[state.k]
        prior, posterior = _kept(kept["prior"]), _kept(kept["posterior"])
        return Group(prior, posterior, kept["context"])

    def advance(self, state: State, z: Tensor) -> State:
        """Returns the state of the next cached group, whatever z is."""
        return state._replace(k=state.k + 1)

    def decode(self, state: State) -> Tensor:
        """Raises an error, as the decoder's features are not cached.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("Cached groups are for training. Decode with the VAE's source.")


@torch.no_grad()
def walk_bytes(source: LatentSource[Any, Any], x: Any) -> float:  # noqa: ANN401
    """Returns the bytes per row of cached groups; infinite if they cannot be cached.

    Arguments:
        source: The VAE.
        x: A batch of data, on the VAE's device.
    """
    encoding = source.encode(x)
    groups = tuple(_groups(source, encoding, strict=False))
    if any(isinstance(group["posterior"], Tensor) for group in groups):
        return math.inf
    tensors = (leaf for leaf in tree_leaves(groups) if isinstance(leaf, Tensor))
    return sum(t.nbytes for t in tensors) / num_rows(encoding)


def epochs_to_cache(
    source: LatentSource[Any, Any],
    data: Any,  # noqa: ANN401
    epochs: float | Literal["auto"] | None,
    *,
    rows_drawn: float,
    stage: int = 1,
) -> float | None:
    """Returns the number of epochs for which :func:`ncprior.fit` caches encodings.

    Arguments:
        source: The VAE.
        data: The training data.
        epochs: The number asked for, or ``"auto"``.
        rows_drawn: Rows in all batches of the training; infinite if it is not known.
        stage: Number of the stage, from 1. Bases of later stages are sampled along the walk; with
            several groups, they cannot be cached.

    Returns:
        The number of epochs; ``None`` for no cache.
    """
    if epochs != "auto":
        return None if stage > 1 and source.num_groups > 1 else epochs
    has_rows = isinstance(data, Tensor | Rows)
    lasting = has_rows and source.num_groups == 1 and rows_drawn >= 2 * len(data)
    return math.inf if lasting and _encodes_once_for_all(source, data[:2]) else None


@torch.no_grad()
def _encodes_once_for_all(source: LatentSource[Any, Any], x: Tensor) -> bool:
    """Returns whether an encoding is neither x itself nor random."""
    x = to_device(x, device_of(source))
    with seeded(0):
        first, second = (
            [leaf for leaf in tree_leaves(source.encode(x)) if isinstance(leaf, Tensor)]
            for _ in range(2)
        )
    return not any(t is x for t in first) and all(map(torch.equal, first, second))
