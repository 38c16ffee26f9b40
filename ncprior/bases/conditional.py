"""Base of conditional bases: distributions p(z | c) that are given their contexts."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Size, Tensor
from torch.distributions import Distribution, constraints

from ncprior.heads.contexts import require_context

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T", bound="ConditionalBase")


class ConditionalBase(Distribution):
    """Distribution of latents, which may need a context; of empty batch shape until one is given.

    Arguments:
        event_shape: Shape of z without batch.
        context_shape: Shape of the context without batch; ``None`` for a base without a context.

    Attributes:
        context: The contexts that were given, with shape ``(B, *context_shape)``, or ``None``.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False

    def __init__(self, event_shape: Size, context_shape: Sequence[int] | None) -> None:
        self.context_shape = None if context_shape is None else tuple(context_shape)
        self.context: Tensor | None = None
        super().__init__(Size(), event_shape, validate_args=False)

    @property
    def needs_context(self) -> bool:
        """Whether the distribution is conditional, and no context is given yet."""
        return self.context_shape is not None and self.context is None

    def given(self, context: Tensor | None) -> Self:
        """Returns the distribution of B rows with contexts of shape ``(B, ...)``.

        Raises:
            TypeError: If the context is no tensor of real numbers.
            ValueError: If the base takes no context, or one of another shape.
        """
        require_context(context)
        shape = None if context is None else tuple(context.shape[1:])
        if context is None or shape != self.context_shape:
            raise ValueError(
                f"This base was fitted with a context of shape (B, ...) with ... = "
                f"{self.context_shape}; got {shape}. Pass the context of the group."
            )
        new = self._with_batch(context.shape[:1])
        new.context = context
        return new

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:  # noqa: ANN401
        """Returns the distribution of independent rows, which share the network."""
        size = Size(batch_shape)
        if self.context is None:
            return self._with_batch(size)
        if size != self.batch_shape:
            raise ValueError(
                f"The distribution has the {len(self.context)} rows of its context; got a batch shape "
                f"{tuple(size)}."
            )
        return self

    def _require_rows(self, lead: Size) -> None:
        """Validates that z, of shape ``(*lead, *event)``, has a row for each context.

        Raises:
            ValueError: If it has not, or a context is still needed.
        """
        if self.needs_context:
            raise ValueError("This base is conditional. Take base.given(context), with B rows.")
        if self.context is not None and lead[-1:] != self.batch_shape:
            raise ValueError(
                f"z must have a row for each of the {len(self.context)} contexts; got the shape "
                f"{tuple(lead)} in front of the event."
            )

    def _with_batch(self, size: Size) -> Self:
        new = copy.copy(self)
        new._batch_shape = size
        return new
