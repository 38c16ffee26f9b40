"""A VAE of SMILES strings: a GRU as encoder, one vector of latents, and a GRU as decoder.

A string is a row of numbers of *pieces*, frequent runs of symbols such as `c1ccc(`. Each row ends
with the number 0, as often as the length of the table demands.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Independent, Normal
from torch.nn.functional import cross_entropy

from ncprior import SingleGroup

SYMBOL = re.compile(r"\[[^\]]*\]|Br|Cl|.")


class Pieces:
    """The alphabet: symbols of SMILES, and their most frequent runs, as of byte-pair encoding.

    Arguments:
        strings: SMILES strings; all symbols of all of them become pieces.
        size: Number of pieces.
        sampled: Number of strings in which frequent runs are counted.
    """

    def __init__(self, strings: Sequence[str], size: int, *, sampled: int = 2000) -> None:
        found = sorted({symbol for text in strings for symbol in SYMBOL.findall(text)})
        rows = [SYMBOL.findall(text) for text in strings[:sampled]]
        while len(found) < size:
            pairs = Counter(pair for row in rows for pair in pairwise(row))
            if not pairs:
                break
            pair = pairs.most_common(1)[0][0]
            found.append("".join(pair))
            rows = [list(_merged(row, pair)) for row in rows]
        self.texts = ["", *found]
        self.numbers = {text: number for number, text in enumerate(self.texts)}
        longest_first = sorted(found, key=len, reverse=True)
        # No piece ends in the middle of Cl or Br.
        self.pattern = re.compile(f"(?:{'|'.join(map(re.escape, longest_first))})(?![lr])")

    def numbered(self, strings: Sequence[str]) -> Tensor:
        """Rows of numbers of pieces, ``(N, L)``; the last column is 0."""
        texts = [self.pattern.findall(x) for x in strings]
        if unknown := [x for x, found in zip(strings, texts, strict=True) if "".join(found) != x]:
            raise ValueError(f"These strings have symbols that are no piece: {unknown[:3]}.")
        rows = [[self.numbers[text] for text in found] for found in texts]
        length = max(map(len, rows)) + 1
        return torch.tensor([row + [0] * (length - len(row)) for row in rows])

    def joined(self, rows: Tensor) -> list[str]:
        """The strings of rows, each up to its first 0."""
        ends = (rows != 0).long().cumprod(1).sum(1).tolist()
        texts = self.texts
        return [
            "".join(texts[number] for number in row[:end])
            for row, end in zip(rows.tolist(), ends, strict=True)
        ]


def _merged(row: list[str], pair: tuple[str, str]) -> Iterator[str]:
    """A row in which a pair of neighbours is one piece."""
    i = 0
    while i < len(row):
        together = tuple(row[i : i + 2]) == pair
        yield "".join(row[i : i + 1 + together])
        i += 1 + together


class MoleculeVAE(nn.Module):
    """A VAE of rows of pieces.

    Arguments:
        pieces: Number of pieces, with the one that ends a row.
        length: L, the length of rows.
        latents: Number of latents.
        hidden: Width of the decoder; the encoder has two thirds of it.
        embedding: Width of the embedding of a piece.
    """

    def __init__(
        self, pieces: int, length: int, *, latents: int, hidden: int, embedding: int = 96
    ) -> None:
        super().__init__()
        self.length, self.latents = length, latents
        self.embedding = nn.Embedding(pieces, embedding)
        self.encoder = nn.GRU(embedding, 2 * hidden // 3, batch_first=True)
        self.to_posterior = nn.Linear(2 * hidden // 3, 2 * latents)
        self.to_state, self.to_inputs = nn.Linear(latents, hidden), nn.Linear(latents, embedding)
        self.decoder = nn.GRU(embedding, hidden, batch_first=True)
        self.to_logits = nn.Linear(hidden, pieces)

    def posterior(self, x: Tensor) -> Distribution:
        """q(z | x), from the state of the encoder at the end of each row."""
        ends = (x != 0).sum(1)
        states, _ = self.encoder(self.embedding(x[:, : int(ends.max()) + 1]))
        last = states[torch.arange(len(x), device=x.device), ends]
        mean, log_var = self.to_posterior(last).float().chunk(2, -1)
        scale = (0.5 * log_var).exp().clamp(1e-3, 10)
        return Independent(Normal(mean, scale, validate_args=False), 1, validate_args=False)

    def logits(self, x: Tensor, z: Tensor) -> Tensor:
        """Logits of every piece of x, given z and the pieces before it: ``(B, L, pieces)``."""
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
        inputs = self.embedding(before) + self.to_inputs(z)[:, None]
        return self.to_logits(self.decoder(inputs, self.to_state(z)[None].contiguous())[0])

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x | z), in nats: each row counts up to its first 0."""
        width = int((x != 0).sum(1).max()) + 1
        x = x[:, :width]
        misfit = cross_entropy(self.logits(x, z).float().mT, x, reduction="none")
        ended = (x == 0).cumsum(1) > 1
        return -misfit.masked_fill(ended, 0).sum(1)

    def write(self, z: Tensor, *, greedy: bool) -> Tensor:
        """Rows of p(x | z), piece by piece: drawn, or the likeliest piece at each place."""
        state, inputs = self.to_state(z)[None].contiguous(), self.to_inputs(z)
        piece = z.new_zeros(len(z), dtype=torch.long)
        rows = z.new_zeros(len(z), self.length, dtype=torch.long)
        ended = z.new_zeros(len(z), dtype=torch.bool)
        for place in range(self.length - 1):
            out, state = self.decoder((self.embedding(piece) + inputs)[:, None], state)
            logits = self.to_logits(out[:, 0])
            piece = logits.argmax(1) if greedy else logits.softmax(1).multinomial(1)[:, 0]
            ended |= piece == 0
            rows[:, place] = piece.masked_fill(ended, 0)
            if ended.all():
                break
        return rows

    def source(self) -> SingleGroup:
        """The VAE as a source, whose p(x | z) can be drawn from."""
        zeros = torch.zeros(self.latents)
        return SingleGroup(
            Independent(Normal(zeros, zeros + 1), 1),
            self.posterior,
            lambda z: self.write(z, greedy=True),
            module=self,
            likelihood=lambda z: Rows(self, z),
        )


class Rows(Distribution):
    """p(x | z) of rows of pieces; no piece of x is independent of the pieces before it."""

    arg_constraints: ClassVar[dict[str, object]] = {}

    def __init__(self, vae: MoleculeVAE, z: Tensor) -> None:
        self.vae, self.z = vae, z
        super().__init__(z.shape[:1], torch.Size([vae.length]), validate_args=False)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws x, one row per row of z."""
        shape = torch.Size(sample_shape)
        z = self.z.expand(*shape, *self.z.shape).reshape(-1, self.z.shape[-1])
        with torch.no_grad():
            rows = self.vae.write(z, greedy=False)
        return rows.reshape(*shape, len(self.z), self.vae.length)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x | z) of every row, in nats."""
        return self.vae.log_prob(x, self.z)


def negative_elbo(vae: MoleculeVAE, x: Tensor, *, beta: float, chunks: int = 2) -> Tensor:
    """-E log p(x | z) + β KL(q(z | x), p(z)), the mean over rows; rows of one length go together."""
    x = x[(x != 0).sum(1).argsort()]
    return torch.stack(
        [_negative_elbo(vae, part, beta).sum() for part in x.chunk(chunks)]
    ).sum() / len(x)


def _negative_elbo(vae: MoleculeVAE, x: Tensor, beta: float) -> Tensor:
    q = vae.posterior(x)
    z, mean, scale = q.rsample(), q.mean, q.stddev
    kl = 0.5 * (mean.square() + scale.square() - 1) - scale.log()
    return beta * kl.sum(1) - vae.log_prob(x, z)
