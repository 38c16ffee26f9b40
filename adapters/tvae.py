"""TVAE of ctgan as a source: rows of a table from one group of latents.

A TVAE describes a row by numbers: a column of numbers by the component of a mixture that it belongs
to, one-hot, and by its place within the component, between -1 and 1; a column of categories one-hot.
p(x | z) is a normal distribution around tanh of the decoder's output for each place, with a learnt
scale, and a categorical distribution for each one-hot span.

The training of a TVAE ends with its encoder thrown away. Capture it by :func:`capture_encoder`, or
train a new one on the fitted decoder by :func:`ncprior.training.fit_encoder`.

References:
    | Modeling Tabular Data using Conditional GAN (Xu et al., NeurIPS 2019)
    | https://github.com/sdv-dev/CTGAN
"""

from __future__ import annotations

import copy
import importlib
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Size, Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal, constraints

from ncprior.single_group import SingleGroup
from ncprior.utils.fingerprints import module_fingerprint
from ncprior.utils.precision import at_least_float32, input_like
from ncprior.utils.require import described, floats_of_batch, require_finite, require_instance
from ncprior.utils.visible import require_eval

_ROWS = "Pass rows as source.rows(table) returns them."


class TVAESource(SingleGroup):
    """A TVAE of ctgan, with p(z) = N(0, I) and the decoder's own p(x | z).

    A batch holds encoded rows, as :meth:`rows` makes them of a table, and draws of x become a table by
    :meth:`table`. Decoder and transformer are copied: the model does not change, and may be trained
    again.

    This source draws the categories of a row. ``TVAE.sample`` takes, in each one-hot span, the largest
    tanh of a logit instead: logits above 9 tie in float32, and the first of them wins.

    The loss of a TVAE is the reconstruction times ``loss_factor``, by default 2, plus the KL
    divergence. :func:`~ncprior.training.fit_encoder` minimises the same with ``kl_weight=1 /
    model.loss_factor``; by default it maximises the ELBO of p(x | z), a lower bound of log p(x).

    Arguments:
        model: The fitted ``TVAE``, on the device where the source is to stay.
        encoder: Its encoder, from :func:`capture_encoder`, or ``None`` for a source without a
            posterior.

    Attributes:
        model: The TVAE.
        module: The copy of its decoder.

    Raises:
        TypeError: If it is no TVAE, or the encoder is no network.
        ValueError: If it is not fitted.

    Example:
        >>> TVAESource(torch.nn.Linear(1, 1))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        TypeError: TVAESource takes a TVAE of ctgan; got an object of type Linear. Pass ...

        With ctgan:

        >>> with capture_encoder() as captured:           # doctest: +SKIP
        ...     model.fit(table, ["income"])
        >>> source = TVAESource(model, captured.encoder)  # doctest: +SKIP
        >>> prior = improve(source, source.rows(table))   # doctest: +SKIP
        >>> source.table(prior.sample(1000, draw_x=True).x)  # doctest: +SKIP
    """

    module: Any

    def __init__(self, model: Any, encoder: nn.Module | None = None) -> None:  # noqa: ANN401
        _require_tvae(model)
        remedy = "Pass captured.encoder of capture_encoder(), or None."
        require_instance("encoder", encoder, (nn.Module, type(None)), remedy)
        self.model, self.encoder = model, encoder
        self._transformer = copy.deepcopy(model.transformer)  # its generators move when it is used
        decoder = copy.deepcopy(model.decoder).eval()
        device = input_like(decoder).device
        self._layout = _layout_of(self._transformer.output_info_list, device)
        zeros = torch.zeros(model.embedding_dim, device=device)
        super().__init__(
            _normal(zeros, torch.ones_like(zeros)),
            None if encoder is None else self._q,
            lambda z: self._rows_given(z).mean,
            likelihood=self._rows_given,
            module=decoder,
        )

    def facts(self) -> dict[str, Any]:
        """Returns the fingerprint of the encoder, which is no part of the module."""
        encoder = None if self.encoder is None else module_fingerprint(self.encoder)
        return {**super().facts(), "TVAESource.encoder": encoder}

    def rows(self, table: Any) -> Tensor:  # noqa: ANN401
        """Returns the rows of a table as the TVAE encodes them, for ``fit`` and ``improve``.

        The component of a number is drawn, as in the training of a TVAE; the draws come from torch's
        generator.

        Arguments:
            table: A table with the columns that the TVAE was fitted to, of the same kind: a
                DataFrame, or an array.

        Returns:
            The rows, with shape ``(N, F)``.

        Raises:
            TypeError: If it is no table of the right kind.
            ValueError: If it has no rows, lacks a column, or has a category that the TVAE has not
                seen.

        Example:
            >>> x = source.rows(table)  # doctest: +SKIP
        """
        self._check_table(table)
        for column in self._transformer._column_transform_info_list:
            state = np.random.RandomState(int(torch.randint(2**31, ())))
            column.transform.set_random_state(state, "transform")
        joblib = importlib.import_module("joblib")
        with warnings.catch_warnings(), joblib.parallel_config(backend="sequential"):
            warnings.simplefilter("ignore", UserWarning)  # about new categories, checked below
            found = torch.from_numpy(self._transformer.transform(table)).float()
        self._check_categories(found)
        return found.to(input_like(self.module).device)

    def table(self, x: Any) -> Any:  # noqa: ANN401
        """Returns encoded rows as a table of the kind that the TVAE was fitted to.

        Arguments:
            x: Rows, with shape ``(N, F)``: draws of p(x | z), means of p(x | z), or the result of
                :meth:`rows`. Of a span of means the most likely category is taken.

        Returns:
            A DataFrame or an array of N rows.

        Raises:
            ValueError: If x has another number of columns, NaN or infinity, or holds no floats.

        Example:
            >>> source.table(prior.sample(1000, draw_x=True).x)  # doctest: +SKIP
        """
        x = self._checked(x)
        require_finite("x", x)
        return self._transformer.inverse_transform(x.detach().cpu().numpy())

    def encode(self, x: Any) -> SingleGroup.Encoding:  # noqa: ANN401
        """Encodes one batch of rows: the parameters of q(z | x).

        Raises:
            TypeError: If x is a table, or no tensor or array.
            ValueError: If x has another number of columns, or there is no encoder.
        """
        return super().encode(self._checked(x))

    def _checked(self, x: Any) -> Tensor:  # noqa: ANN401
        if hasattr(x, "columns"):
            raise TypeError(f"TVAESource encodes rows of numbers; got {described(x)}. {_ROWS}")
        rows, width = floats_of_batch("TVAESource", x, _ROWS), len(self._layout.order)
        if rows.ndim != 2 or rows.shape[1] != width:
            raise ValueError(f"TVAESource takes rows (N, {width}); got {described(rows)}. {_ROWS}")
        return rows

    def _q(self, x: Tensor) -> Distribution:
        encoder: Any = self.encoder  # without one, this is not the posterior
        require_eval(encoder)
        loc, scale, *_ = encoder(x.to(input_like(encoder)))
        return _normal(at_least_float32(loc), at_least_float32(scale))

    def _rows_given(self, z: Tensor) -> _TableRows:
        """p(x | z), with batch shape ``(B,)``."""
        output, sigma = self.module(z)
        output, sigma = at_least_float32(output), at_least_float32(sigma)
        return _TableRows(output, sigma, self._layout)

    def _check_table(self, table: Any) -> None:  # noqa: ANN401
        wants_frame, infos = (
            self._transformer.dataframe,
            self._transformer._column_transform_info_list,
        )
        names = [info.column_name for info in infos]
        if not hasattr(table, "columns" if wants_frame else "shape"):
            kind = "a DataFrame" if wants_frame else "an array"
            raise TypeError(
                f"table must be {kind}, as the TVAE was fitted to one; got {described(table)}."
            )
        if wants_frame and (missing := [name for name in names if name not in table.columns]):
            raise ValueError(
                f"table must have the columns that the TVAE was fitted to; {missing} are missing."
            )
        if not wants_frame and (table.ndim != 2 or table.shape[1] != len(names)):
            raise ValueError(f"table must be (N, {len(names)}); got {described(table)}.")
        if len(table) == 0:
            raise ValueError("table must have 1 or more rows; got none.")

    def _check_categories(self, rows: Tensor) -> None:
        """Validates that every one-hot span holds a one: rdt encodes a new category as zeros."""
        first = 0
        for info in self._transformer._column_transform_info_list:
            for span in info.output_info:
                part = rows[:, first : first + span.dim]
                unseen = int((part.sum(1) != 1).sum()) if span.activation_fn == "softmax" else 0
                if unseen:
                    raise ValueError(
                        f"Column {info.column_name!r} has, in {unseen} rows, a category that the "
                        f"TVAE has not seen. Remove these rows."
                    )
                first += span.dim


class _Layout(NamedTuple):
    """The numbers of an encoded row: S one-hot spans, each padded to the widest, W, and places."""

    places: Tensor  # (P,), their columns
    spans: Tensor  # (S, W), the columns of each span
    inside: Tensor  # (S, W), whether an entry is no padding
    order: Tensor  # (F,), the position of each column behind one another: places, then spans


def _layout_of(info: Sequence[Sequence[Any]], device: torch.device) -> _Layout:
    """Returns the layout of the rows of a transformer, from its ``output_info_list``."""
    parts = [span for column in info for span in column]
    columns = torch.arange(sum(part.dim for part in parts), device=device)
    split = list(zip(columns.split([part.dim for part in parts]), parts, strict=True))
    one_hot = [c for c, part in split if part.activation_fn == "softmax"]
    places = torch.cat([columns[:0], *(c for c, part in split if part.activation_fn != "softmax")])
    spans = nn.utils.rnn.pad_sequence(one_hot, batch_first=True, padding_value=-1)
    inside = spans >= 0
    return _Layout(places, spans, inside, torch.cat([places, spans[inside]]).argsort())


class _TableRows(Distribution):
    """Distribution of a row given z: normal places within components, and one-hot spans.

    Arguments:
        output: Output of the decoder, with shape ``(B, F)``: for a place, the inverse tanh of its
            mean; for a one-hot span, its logits.
        sigma: Scales, ``(F,)``, of which those of places are used.
        layout: The layout of a row.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(self, output: Tensor, sigma: Tensor, layout: _Layout) -> None:
        self.layout, self.output = layout, output
        loc = output[..., layout.places].tanh()
        self.places = _normal(loc, sigma[layout.places].expand_as(loc))
        self.logits = output[..., layout.spans].masked_fill(~layout.inside, -math.inf)
        super().__init__(output.shape[:-1], output.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """Mean of each place, and probability of each category."""
        return self._joined(self.places.mean, self.logits.softmax(-1))

    def sample(self, sample_shape: Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Returns rows of shape ``(*sample_shape, B, F)``."""
        shape = Size(sample_shape)
        codes = Categorical(logits=self.logits, validate_args=False).sample(shape)
        width = torch.arange(self.logits.shape[-1], device=codes.device)
        return self._joined(self.places.sample(shape), codes[..., None] == width)

    def log_prob(self, value: Tensor) -> Tensor:
        """Returns log p(x | z) in nats, with shape ``(*, B)``."""
        value, columns = value.to(self.output), self.layout.spans[self.layout.inside]
        chosen = (value * self.output)[..., columns].sum(-1) - self.logits.logsumexp(-1).sum(-1)
        return self.places.log_prob(value[..., self.layout.places]) + chosen

    def _joined(self, places: Tensor, spans: Tensor) -> Tensor:
        """Rows of places, ``(*, P)``, and one-hot spans, ``(*, S, W)``."""
        flat = spans[..., self.layout.inside].to(places)
        return torch.cat([places, flat], -1)[..., self.layout.order]


class _Captured:
    """The encoder of the TVAE that was fitted inside :func:`capture_encoder`."""

    def __init__(self) -> None:
        self.networks: list[nn.Module] = []

    @property
    def encoder(self) -> nn.Module:
        """The encoder, in evaluation mode.

        Raises:
            RuntimeError: If no TVAE, or more than one, was fitted.
        """
        if len(self.networks) != 1:
            raise RuntimeError(
                f"One TVAE must be fitted inside capture_encoder(); got {len(self.networks)}. Call "
                f"model.fit there once, in this process."
            )
        return self.networks[0].eval()


@contextmanager
def capture_encoder() -> Iterator[_Captured]:
    """Context that keeps the encoder of the TVAE that is fitted inside it.

    ``TVAE.fit`` builds its encoder as a local variable. Inside the context the constructor of
    ctgan's ``Encoder`` also records the network; afterwards it is as it was. The synthesizers of SDV
    call the same ``fit``.

    Returns:
        An object whose attribute ``encoder`` is the network once ``fit`` has returned.

    Raises:
        ImportError: If ctgan is not installed.

    Example:
        >>> with capture_encoder() as captured:  # doctest: +SKIP
        ...     model.fit(table, ["income"])
        >>> source = TVAESource(model, captured.encoder)  # doctest: +SKIP
    """
    try:
        kind = importlib.import_module("ctgan.synthesizers.tvae").Encoder
    except ImportError as error:
        raise ImportError(
            f"capture_encoder() needs ctgan ({error}): install ncprior's extra 'tables' "
            f"(pip install '.[tables]' in the clone)."
        ) from error
    build, captured = kind.__init__, _Captured()

    def recorded(self: nn.Module, *arguments: Any, **options: Any) -> None:  # noqa: ANN401
        build(self, *arguments, **options)
        captured.networks.append(self)

    kind.__init__ = recorded
    try:
        yield captured
    finally:
        kind.__init__ = build


def _require_tvae(model: Any) -> None:  # noqa: ANN401
    """Validates that a model is a fitted TVAE of ctgan."""
    if "TVAE" not in [part.__name__ for part in type(model).__mro__]:
        remedy = "Pass the fitted ctgan.TVAE, not its networks."
        if "TVAE" in type(model).__name__ and not isinstance(model, type):
            remedy = (
                "Pass the TVAE inside of it, synthesizer._model, and give rows() the tables of "
                "synthesizer.preprocess(table)."
            )
        elif "CTGAN" in type(model).__name__:
            remedy = "A CTGAN is a GAN on conditions, without p(x | z). Fit a TVAE."
        raise TypeError(f"TVAESource takes a TVAE of ctgan; got {described(model)}. {remedy}")
    if not (hasattr(model, "decoder") and hasattr(model, "transformer")):
        raise ValueError(
            "The TVAE is not fitted: call model.fit(table, discrete_columns) first, inside "
            "capture_encoder() to keep its encoder."
        )


def _normal(loc: Tensor, scale: Tensor) -> Distribution:
    return Independent(Normal(loc, scale, validate_args=False), 1, validate_args=False)
