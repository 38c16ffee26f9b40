"""A small model with the attribute layout of ``ctgan.TVAE``, for tests without ctgan."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

NAMES = ("red", "green", "blue")


class Span(NamedTuple):
    """Some numbers of an encoded row."""

    dim: int
    activation_fn: str


class Generator:
    """The random state of a column, which is its own."""

    state = np.random.RandomState(0)

    def set_random_state(self, state: np.random.RandomState, method_name: str) -> None:
        """Sets the state."""
        assert method_name == "transform"
        self.state = state


class Column(NamedTuple):
    """A column of the table."""

    column_name: str
    output_info: list[Span]
    transform: Generator


class Transformer:
    """A number and one of three colours, in an array of objects; the number by one of two halves."""

    dataframe = False
    output_dimensions = 6

    def __init__(self) -> None:
        number = Column("0", [Span(1, "tanh"), Span(2, "softmax")], Generator())
        colour = Column("1", [Span(3, "softmax")], Generator())
        self._column_transform_info_list = [number, colour]
        self.output_info_list = [column.output_info for column in self._column_transform_info_list]

    def transform(self, table: Any) -> np.ndarray:
        """Encoded rows; a component is drawn, as one of ctgan is."""
        number, colour = table[:, 0].astype(float), table[:, 1]
        half = self._column_transform_info_list[0].transform.state.randint(2, size=len(table))
        place = np.clip((number - (2 * half - 1)) / 4, -0.99, 0.99)
        one_hot = (colour[:, None] == np.array(NAMES)).astype(float)
        return np.concatenate([place[:, None], np.eye(2)[half], one_hot], 1)

    def inverse_transform(self, data: np.ndarray, sigmas: np.ndarray | None = None) -> np.ndarray:
        """The table of encoded rows."""
        place = data[:, 0] if sigmas is None else np.random.normal(data[:, 0], sigmas[0])
        number = 4 * np.clip(place, -1, 1) + 2 * data[:, 1:3].argmax(1) - 1
        colour = np.array(NAMES)[data[:, 3:].argmax(1)]
        return np.stack([number.astype(object), colour.astype(object)], 1)


class Encoder(nn.Module):
    """Mean, scale and log-variance of q(z | x)."""

    def __init__(self, data_dim: int, compress_dims: tuple[int, ...], embedding_dim: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(nn.Linear(data_dim, compress_dims[0]), nn.ReLU())
        self.fc1, self.fc2 = (nn.Linear(compress_dims[0], embedding_dim) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Encodes rows."""
        h = self.seq(x)
        return self.fc1(h), (0.5 * self.fc2(h)).exp(), self.fc2(h)


class Decoder(nn.Module):
    """The output of which tanh and softmax are taken, and the scales."""

    def __init__(self, embedding_dim: int, data_dim: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(nn.Linear(embedding_dim, 8), nn.ReLU(), nn.Linear(8, data_dim))
        self.sigma = nn.Parameter(torch.full((data_dim,), 0.1))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Decodes latents."""
        return self.seq(z), self.sigma


class TVAE:
    """The model: its networks stay as they were initialised."""

    embedding_dim, loss_factor = 4, 2

    def fit(self, table: Any, discrete_columns: Any = ()) -> None:
        """Makes the networks; the encoder is a local variable, as in ctgan."""
        self.transformer = Transformer()
        width = self.transformer.output_dimensions
        self.decoder = Decoder(self.embedding_dim, width)
        encoder = Encoder(width, (8,), self.embedding_dim)
        encoder(torch.from_numpy(self.transformer.transform(table)).float())


def table(count: int = 60) -> np.ndarray:
    """Rows of a number and a colour."""
    colours = np.array(NAMES)[np.random.randint(3, size=count)]
    return np.stack([np.random.randn(count).astype(object), colours.astype(object)], 1)


def fitted() -> TVAE:
    """A model with networks."""
    model = TVAE()
    model.fit(table())
    return model
