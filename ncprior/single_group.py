"""A VAE with one group of latents as a source, from prior, posterior and decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ncprior.distributions import (
    Sampleable,
    build,
    expand,
    is_parameters,
    is_prior,
    parameters,
)
from ncprior.source import Group, LatentSource, num_rows
from ncprior.utils.batches import tensors_of
from ncprior.utils.conditions import (
    called,
    context_of,
    require_condition,
    require_rows_of_x,
    require_tensors,
)
from ncprior.utils.precision import floating_dtype
from ncprior.utils.random_state import seeded
from ncprior.utils.require import described, require_callable, require_counts, require_instance
from ncprior.utils.visible import require_eval


class SingleGroup(LatentSource[Any, Any]):
    """A VAE with one group of latents, from its three parts.

    Arguments:
        prior: p(z), with an empty batch shape; or, with a ``condition``, a function that maps c to
            p(z | c), with batch shape ``(B,)``, such as the learned prior of a conditional VAE.
        posterior: Maps a batch x to q(z | x), a distribution of batch shape ``(B,)``. If a batch is
            a tuple or list such as (image, label), x is its first item. ``None`` stands for a
            decoder without an encoder: :func:`ncprior.training.fit_encoder` trains one.
        decoder: Maps z, with shape ``(B, *event)``, to the mean of p(x | z).
        module: The VAE itself, or a list of its modules, for the fingerprint, the dtype of z, and
            the check that it is in evaluation mode, which also covers ``posterior`` and ``decoder``.
            It is never registered, moved or changed.
        likelihood: Maps z to p(x | z), a distribution over x.
        condition: Returns the condition c of a batch as the loader yields it: a tensor, or tensors
            in a tuple or dict, such as a padded sequence and its lengths, with B rows each. Then
            ``posterior``, ``decoder`` and ``likelihood`` take c as a second argument, and sampling
            needs it as ``condition``.
        context: Maps c to the second input of the ratio head, ``(B, ...)``, such as the frozen VAE's
            own embedding of c, or the one-hot vectors of labels. By default c itself, with shape
            ``(B, C)``.
        features: Maps z, with shape ``(N, *event)``, to the input of the ratio head, ``(N, ...)``:
            a function of z alone, such as the first layers of the frozen decoder, ``vae.decoder[:2]``.
            On a feature map a :class:`~ncprior.heads.ConvHead` learns faster than an MLP on many z.

    Raises:
        ValueError: If the prior has a batch shape, or the prior or a context needs a condition.
        TypeError: If the prior cannot be sampled, or a part has the wrong type.

    Example:
        >>> from ncprior.source import sample_posterior
        >>> encoder, decoder = torch.nn.Linear(3, 4).eval(), torch.nn.Linear(2, 3).eval()
        >>> def posterior(x):
        ...     mean, log_var = encoder(x).chunk(2, dim=-1)
        ...     return Independent(Normal(mean, (0.5 * log_var).exp()), 1)
        >>> prior = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
        >>> source = SingleGroup(prior, posterior, decoder)
        >>> latents, state = sample_posterior(source, torch.randn(5, 3))
        >>> latents[0].shape, source.decode(state).shape
        (torch.Size([5, 2]), torch.Size([5, 3]))

        A VAE of images with integer labels, whose networks embed labels themselves:

        >>> source = SingleGroup(
        ...     prior,
        ...     lambda x, label: posterior(x),
        ...     lambda z, label: decoder(z),
        ...     condition=lambda batch: batch[1],
        ...     context=lambda label: torch.nn.functional.one_hot(label, 10).float(),
        ... )
        >>> source.group(source.start(4, condition=torch.tensor([3, 1, 4, 1]))).context.shape
        torch.Size([4, 10])
    """

    num_groups = 1

    def __init__(
        self,
        prior: Sampleable | Callable[[Any], Distribution],
        posterior: Callable[..., Distribution] | None,
        decoder: Callable[..., Tensor],
        *,
        module: nn.Module | Iterable[nn.Module] | None = None,
        likelihood: Callable[..., Distribution] | None = None,
        condition: Callable[[Any], Any] | None = None,
        context: Callable[[Any], Tensor] | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        has_draws = isinstance(prior, Sampleable) and not isinstance(prior, type)
        given_c: Any = None if has_draws else prior
        if not has_draws and (isinstance(prior, type) or not callable(prior)):
            raise TypeError(
                f"The prior needs a method `sample`; got {described(prior)}. Pass a distribution, "
                f"such as Independent(Normal(zeros, ones), 1); or, with condition=, a function of c "
                f"that returns one."
            )
        optional: dict[str, Any] = {"posterior": posterior, "likelihood": likelihood}
        optional |= {"condition": condition, "context": context, "features": features}
        given: dict[str, Any] = {key: part for key, part in optional.items() if part is not None}
        for name, part in {"decoder": decoder, **given}.items():
            require_callable(name, part, "Pass a function or a module.")
        for name, part in {"A prior that is a function": given_c, "context=": context}.items():
            if part is not None and condition is None:
                raise ValueError(
                    f"{name} needs a condition c; got condition=None. Pass condition=, which picks "
                    f"c out of a batch."
                )
        if isinstance(prior, Distribution) and prior.batch_shape:
            raise ValueError(
                f"The prior must have an empty batch shape; got batch shape "
                f"{tuple(prior.batch_shape)} and event shape {tuple(prior.event_shape)}. "
                f"Wrap it in Independent(prior, {len(prior.batch_shape)})."
            )
        own: Any = prior if given_c is None else None
        self.prior = own
        self.module = _as_module(module)
        self._given_c: Any = given_c
        self._posterior = posterior
        self._decoder = decoder
        self._likelihood = likelihood
        self._condition = condition
        self._context = context
        self._features = features
        self._event_ndim: int | None = None  # that of p(z | c) is known after the first walk
        if features is not None and own is not None:
            shape = getattr(own, "event_shape", None)
            self._event_ndim = _axes_of_draw(own) if shape is None else len(shape)

    @property
    def _watched(self) -> tuple[object, ...]:
        """What must be in evaluation mode: the modules, and those of bound methods."""
        parts = (self._posterior, self._decoder, self._given_c, self._context)
        return (self.module, *(getattr(part, "__self__", part) for part in parts))

    class Encoding(NamedTuple):
        """Parameters of q(z | x), or else the batch itself, and the condition."""

        posterior: Any
        condition: Any

    class State(NamedTuple):
        """The state before z is given (``z is None``) or after."""

        rows: Tensor  # (B, 0): carries the batch size
        z: Tensor | None
        posterior: Any
        condition: Any

    def encode(self, x: Any) -> Encoding:  # noqa: ANN401
        """Encodes one batch: the parameters of q(z | x) where its type is known, else x."""
        require_eval(*self._watched)
        if isinstance(x, tuple | list) and not x:
            raise ValueError("x must be one batch; got an empty list. Pass rows of data.")
        c = None
        if self._condition is not None:
            c = self._condition(x)
            require_tensors(c)
            self._require_head_context(c)
        x = x[0] if isinstance(x, tuple | list) else x
        require_rows_of_x(c, x)
        distribution = self._checked_posterior(x, c)
        _require_rows_of(x, distribution)
        q = parameters(distribution)
        return self.Encoding(x if q is None else q, c)

    def start(
        self,
        batch_size: int,
        encoding: Encoding | None = None,
        condition: Any = None,  # noqa: ANN401
    ) -> State:
        """Returns the state before z is given, for ``batch_size`` rows."""
        require_counts(batch_size=batch_size)
        require_eval(*self._watched)
        q, c = (None, condition) if encoding is None else encoding
        require_condition(c, batch_size, is_taken=self._condition is not None)
        if c is not None:
            self._require_head_context(c)
        if q is not None and num_rows(q) != batch_size:
            raise ValueError(
                f"The walk has {batch_size} rows; got {num_rows(q)} rows of encoding."
            )
        leaves = tensors_of((q, c))
        device = leaves[0].device if leaves else None
        return self.State(torch.empty(batch_size, 0, device=device), None, q, c)

    def group(self, state: State) -> Group:
        """Returns p(z) or p(z | c) and, given an x, q(z | x), for every row."""
        q, c, rows = state.posterior, state.condition, len(state.rows)
        if q is not None:
            q = build(q) if is_parameters(q) else self._checked_posterior(q, c)
        p = expand(self.prior, rows) if self._given_c is None else self._prior_given(c, rows, q)
        return Group(p, q, self._head_context(c, rows))

    def advance(self, state: State, z: Tensor) -> State:
        """Returns the state with z, which has shape ``(B, *event)``."""
        if len(z) != len(state.rows):
            raise ValueError(f"The walk has {len(state.rows)} rows; got {len(z)} rows of z.")
        return state._replace(z=z)

    def decode(self, state: State) -> Tensor:
        """Returns the mean of p(x | z)."""
        return self._decoder(*self._decoder_arguments(state))

    def likelihood(self, state: State) -> Distribution:
        """Returns p(x | z).

        Raises:
            ValueError: If the source was made without a likelihood.
        """
        if self._likelihood is None:
            raise ValueError(
                "This source does not know p(x | z). Make it with SingleGroup(likelihood=...), or, if "
                "the decoder was trained by squared error, wrap the source in "
                "GaussianDecoder.fitted(source, held_out)."
            )
        return self._likelihood(*self._decoder_arguments(state))

    def features(self, k: int, z: Tensor) -> Tensor:
        """Returns the input of the ratio head for z of shape ``(*, B, *event)``: by default z."""
        if self._features is None:
            return z
        lead = z.shape[: z.ndim - (1 if self._event_ndim is None else self._event_ndim)]
        flat = z.reshape(-1, *z.shape[len(lead) :])
        try:
            h = self._features(self._for(self._features, flat))
        except Exception as error:
            if self._event_ndim is not None:
                raise
            raise ValueError(
                f"A latent of p(z | c) is taken for a vector until its shape is known from the first "
                f"walk, and features fails there: {error}. Call "
                f"source.group(source.start(batch_size, condition=c)) before."
            ) from error
        if not isinstance(h, Tensor) or h.shape[:1] != flat.shape[:1]:
            raise ValueError(
                f"features must map z of shape (N, *event) to one tensor of N rows, here {len(flat)}; "
                f"got {described(h)}. Features of a row depend on that row of z alone."
            )
        return h.reshape(*lead, *h.shape[1:])

    def shared_prior(self) -> Sampleable | None:
        """Returns p(z), with an empty batch shape; ``None`` if the prior is a function of c."""
        prior: Sampleable | None = self.prior
        return prior

    def _decoder_arguments(self, state: State) -> tuple[Tensor, ...]:
        if state.z is None:
            raise ValueError("Decoding needs z; this walk has none yet. Call advance(state, z).")
        z = self._for(self._decoder, state.z)
        return (z,) if state.condition is None else (z, state.condition)

    def _for(self, function: object, z: Tensor) -> Tensor:
        """z in the floating-point dtype of a function's module, or of the VAE, if there is one."""
        if not z.is_floating_point():
            return z
        part = getattr(function, "__self__", function)
        dtype = floating_dtype(part if isinstance(part, nn.Module) else self.module)
        return z if dtype is None else z.to(dtype)

    def _prior_given(self, c: Any, rows: int, q: Distribution | None) -> Sampleable:  # noqa: ANN401
        """Returns p(z | c), after a check of its rows and of the shape of z."""
        p = called("prior(c)", self._given_c, c)
        if not is_prior(p):
            raise TypeError(
                f"prior(c) must return a distribution p(z | c); got {described(p)}. From a mean and a "
                f"log-variance make Independent(Normal(mean, (0.5 * log_var).exp()), 1)."
            )
        event = getattr(p, "event_shape", torch.Size())
        wanted = event if q is None else q.event_shape
        if isinstance(p, Distribution) and (p.batch_shape, event) != ((rows,), wanted):
            raise ValueError(
                f"prior(c) must have batch shape ({rows},), one row per row of c, and the event "
                f"shape of q(z | x), {tuple(wanted)}; got batch shape {tuple(p.batch_shape)} and event "
                f"shape {tuple(event)}. Independent(p, n) turns n batch axes into event axes."
            )
        if isinstance(p, Distribution):
            self._event_ndim = len(event)
        elif self._features is not None and self._event_ndim is None:
            self._event_ndim = _axes_of_draw(p) - 1
        return p

    def _head_context(self, c: Any, rows: int) -> Tensor | None:  # noqa: ANN401
        """Returns the context of the ratio head, after a check."""
        if self._context is None:
            context: Tensor | None = c
            return context
        return context_of(self._context, c, rows=rows)

    def _require_head_context(self, c: Any) -> None:  # noqa: ANN401
        """Validates that a condition without context= is a context: a vector per row."""
        if self._context is None and (not isinstance(c, Tensor) or c.ndim < 2):
            raise ValueError(
                f"The context of the ratio head is the condition, of shape (B, C), a vector per row; "
                f"got {described(c)}. Make labels one-hot, or pass another context, a function of c: "
                f"SingleGroup(context=lambda c: torch.nn.functional.one_hot(c, num_classes).float())."
            )

    def _checked_posterior(self, x: Any, c: Any) -> Distribution:  # noqa: ANN401
        if self._posterior is None:
            raise ValueError(
                "This source has no posterior q(z | x). Train one for its decoder: "
                "source = ncprior.training.fit_encoder(source, data)."
            )
        try:
            q = self._posterior(x) if c is None else self._posterior(x, c)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            kind = ValueError if isinstance(error, ValueError) else RuntimeError
            raise kind(_in_words(error, x)) from error
        if not isinstance(q, Distribution):
            raise TypeError(
                f"posterior(x) must return a distribution; got {described(q)}. From a mean "
                f"and a log-variance make Independent(Normal(mean, (0.5 * log_var).exp()), 1)."
            )
        event = self.prior.event_shape if isinstance(self.prior, Distribution) else q.event_shape
        if len(q.batch_shape) == 1 and len(q.event_shape) == len(event) and q.event_shape != event:
            raise ValueError(
                f"Prior and posterior must have latents of one shape; got {tuple(event)} from the "
                f"prior and {tuple(q.event_shape)} from q(z | x). Make the prior of that shape."
            )
        if len(q.batch_shape) != 1 or q.event_shape != event:
            raise ValueError(
                f"q(z | x) must have batch shape (B,) and the prior's event shape "
                f"{tuple(event)}; got batch shape {tuple(q.batch_shape)} and event shape "
                f"{tuple(q.event_shape)}. Independent(q, n) turns n batch axes into event axes; "
                f"the prior is to have as many event axes."
            )
        return q


def _axes_of_draw(prior: Sampleable) -> int:
    """Number of axes of a draw, by one draw that leaves all random generators unchanged."""
    with seeded(0):
        return prior.sample().ndim


def _as_module(module: nn.Module | Iterable[nn.Module] | None) -> nn.Module | None:
    """Returns one module for several."""
    remedy = "Pass the VAE, an nn.Module, or a list of its modules; or leave it out."
    if module is None or isinstance(module, nn.Module):
        return module
    if not isinstance(module, list | tuple) or not module:
        return require_instance("module", module, nn.Module, remedy)
    return nn.ModuleList([require_instance("module", part, nn.Module, remedy) for part in module])


def _require_rows_of(x: Any, q: Distribution) -> None:  # noqa: ANN401
    """Validates that q(z | x) has the rows of x, where x has one number of rows."""
    rows = {len(leaf) for leaf in tensors_of(x) if leaf.ndim > 0}
    if len(rows) == 1 and q.batch_shape[0] not in rows:
        raise ValueError(
            f"posterior(x) must return one row per row of x; got {q.batch_shape[0]} rows for "
            f"{rows.pop()} of x. The batch must be the first axis of both."
        )


def _in_words(error: Exception, x: Any) -> str:  # noqa: ANN401
    """The error of a user's posterior, with the batch that it was given, and remedies."""
    first = str(error).partition("\n")[0]
    if isinstance(x, Tensor) and not torch.isfinite(x).all():
        return f"posterior(x) failed, and x has NaN or infinity. Remove or mend such rows. {first}"
    return (
        f"posterior(x) failed on a batch, {described(x)}. Check that the encoder takes this shape and "
        f"dtype, and that scales are positive, such as (0.5 * log_var).exp(). {first}"
    )
