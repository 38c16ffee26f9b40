"""How the heads of a prior are used: their strength, precision, and which of them are on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ncprior.source import LatentSource
from ncprior.utils.precision import check_precision
from ncprior.utils.require import require_counts, require_numbers
from ncprior.utils.switches import Switches, is_switched_off, switched_off


class HeadSettings:
    """Settings of a prior's heads, validated when they are set."""

    source: LatentSource[Any, Any]

    @property
    def strength(self) -> float:
        """Strength α ≥ 0 of r^α: 1 is the trained prior, 0 the base."""
        return self._strength

    @strength.setter
    def strength(self, strength: float) -> None:
        require_numbers("[0, inf)", strength=strength)
        self._strength = float(strength)

    @property
    def active(self) -> Switches:
        """One bool per group: whether its head is used; ``prior.active[k] = False`` switches it off."""
        return self._active

    @active.setter
    def active(self, active: Iterable[bool]) -> None:
        self._active = Switches("active", active, self.source.num_groups)

    @property
    def precision(self) -> torch.dtype:
        """Precision of matrix products and convolutions in the heads during sampling.

        It is ``torch.float32``, or ``torch.bfloat16`` with sums in float32, see
        :func:`ncprior.heads.prepare_head`.
        """
        return self._precision

    @precision.setter
    def precision(self, precision: torch.dtype) -> None:
        check_precision(precision)
        self._precision = precision

    def is_on(self, k: int) -> bool:
        """Returns whether head k is used: it is ``active``, ``strength`` > 0, and not ``disabled``.

        Example:
            >>> prior.is_on(0)
            True
        """
        require_counts(f"[0, {len(self._active) - 1}]", k=k)
        return self._active[k] and self._strength != 0 and not is_switched_off(self)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """A context manager inside which this prior equals the base prior.

        The base prior is the VAE's own prior, unless ``improve`` or ``rebase`` has put a fitted one
        in its place. Below a joint head, the heads of the groups are off as well, for every prior on
        the same source.

        Like ``torch.no_grad``, it holds for the thread or task that entered it: other threads, and
        threads that are started inside, go on with the trained prior.

        Example:
            >>> with prior.disabled():
            ...     prior.log_ratio([torch.randn(2, 2)])
            tensor([[0.],
                    [0.]])
        """
        with switched_off(self), switched_off(self.source):  # a source may have heads of its own
            yield
