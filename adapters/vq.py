"""VQ-VAEs as sources: grids of codes, one per level.

The encoder of a VQ-VAE maps x to whole numbers, the indices of codebook vectors, and the decoder maps
them back. There is no prior: it is fitted afterwards, to the codes of the training data.

    source = VQSource(encode, decode, num_categories=512, module=vqvae)
    source = rebase(source, fit_code_bases(source, x))

A VQ-VAE with several levels, such as VQ-VAE-2, has a group of latents per level, the coarsest first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ncprior.bases.codes import NoCodePrior
from ncprior.distributions import PointMass, Sampleable, expand
from ncprior.source import Group, LatentSource
from ncprior.utils.batches import tensors_of
from ncprior.utils.conditions import (
    context_of,
    require_condition,
    require_rows_of_x,
    require_tensors,
)
from ncprior.utils.precision import at_least_float32, input_like
from ncprior.utils.require import (
    described,
    floats_of_batch,
    require_callable,
    require_counts,
    require_finite,
    require_instance,
)
from ncprior.utils.visible import require_eval

_PIXELS = (-16.0, 16.0)  # pixels of any scaling are within; bytes are not


class VQSource(LatentSource[Any, Any]):
    """A VQ-VAE as groups of codes: any pair of an encoder to indices and a decoder of indices.

    A batch is x itself, or the first item of a tuple. q(z | x) has all its mass on the codes of the
    encoder. With a condition, such as a class label, base and ratio heads depend on it, and encoder
    and decoder do not.

    Arguments:
        encode: Maps x to codes, whole numbers of shape ``(B, *grid)``; of several levels to a tuple
            of them, in the order in which they are drawn.
        decode: Maps the codes, one argument per level, to the decoder's mean, ``(B, ...)``.
        num_categories: Number of vectors in the codebook; of several levels a list of numbers.
        module: The VQ-VAE, for its fingerprint and the check that it is in evaluation mode.
        condition: Returns the condition c of a batch as the loader yields it, such as
            ``lambda batch: batch[1]``: a tensor, or tensors in a tuple or dict, with B rows each.
            Sampling then needs it as ``condition``.
        context: Maps the codes of the levels before the next one, one argument per level, to the
            context of its base and its ratio head, ``(B, ...)``; for every level but the first. With
            a condition, it takes c in front of them, and is called for the first level, too.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``num_categories`` is below 1, or a context is missing: several levels and a
            condition need one.

    Example:
        >>> codebook = torch.linspace(-1, 1, 8)
        >>> def encode(x):
        ...     return (x.unsqueeze(-1) - codebook).abs().argmin(-1)
        >>> source = VQSource(encode, lambda z: codebook[z], num_categories=8)
        >>> x = torch.rand(4, 5, 5)
        >>> state = source.advance(source.start(4, source.encode(x)), encode(x))
        >>> bool((source.decode(state) - x).abs().max() < 0.2)
        True

        Codes given a class label:

        >>> source = VQSource(
        ...     encode,
        ...     lambda z: codebook[z],
        ...     num_categories=8,
        ...     condition=lambda batch: batch[1],
        ...     context=lambda label: torch.nn.functional.one_hot(label, 10).float(),
        ... )
        >>> source.group(source.start(4, condition=torch.tensor([3, 1, 4, 1]))).context.shape
        torch.Size([4, 10])
    """

    def __init__(
        self,
        encode: Callable[[Any], Tensor | Sequence[Tensor]],
        decode: Callable[..., Tensor],
        *,
        num_categories: int | Sequence[int],
        module: nn.Module | None = None,
        condition: Callable[[Any], Any] | None = None,
        context: Callable[..., Tensor] | None = None,
    ) -> None:
        for name, part in {"encode": encode, "decode": decode}.items():
            require_callable(name, part, "Pass a function or a module.")
        several = isinstance(num_categories, list | tuple)
        counts: Any = num_categories if several else [num_categories]
        require_counts(**{f"num_categories[{k}]": count for k, count in enumerate(counts)})
        if module is not None:
            require_instance("module", module, nn.Module, "Pass the VQ-VAE, or leave it out.")
        if condition is not None:
            require_callable("condition", condition, "Pass a function of a batch.")
        if context is not None:
            require_callable("context", context, "Pass a function of the codes drawn before.")
        needs_context = len(counts) > 1 or condition is not None
        if not counts or needs_context != (context is not None):
            raise ValueError(
                f"A context is needed for several levels of codes and for a condition, and only "
                f"there; got {len(counts)} levels, {'no' if condition is None else 'a'} condition "
                f"and {'no' if context is None else 'a'} context."
            )
        self.num_groups, self.module = len(counts), module
        self._priors = [NoCodePrior(int(count)) for count in counts]
        self._encode, self._decode = encode, decode
        self._condition, self._context = condition, context

    class Encoding(NamedTuple):
        """The codes of all levels, and the condition."""

        codes: tuple[Tensor, ...]
        condition: Any

    class State(NamedTuple):
        """The codes of x, or ``None`` without an x, the condition, and the codes chosen so far."""

        rows: Tensor  # (B, 0): carries the batch size
        codes: tuple[Tensor, ...] | None
        condition: Any
        chosen: tuple[Tensor, ...]

    def encode(self, x: Any) -> Encoding:  # noqa: ANN401
        """Returns the codes of one batch, of all levels, and its condition.

        Raises:
            TypeError: If the encoder returns no codes, or the condition has no tensors.
            ValueError: If x has NaN or infinity, or codes are out of range.
        """
        self._require_eval()
        c = None if self._condition is None else self._condition(x)
        x = x[0] if isinstance(x, tuple | list) and len(x) > 0 else x
        if isinstance(x, Tensor) and x.is_floating_point():
            require_finite("x", x)  # the nearest vector to NaN would be the first one
        codes = self._encode(x)
        found = tuple(codes) if isinstance(codes, tuple | list) else (codes,)
        if len(found) != self.num_groups:
            raise ValueError(
                f"encode(x) must return the codes of {self.num_groups} levels; got {len(found)}."
            )
        codes = tuple(self._checked(k, z, x) for k, z in enumerate(found))
        if self._condition is not None:
            require_tensors(c)
            require_rows_of_x(c, codes[0])
        return self.Encoding(codes, c)

    def start(
        self,
        batch_size: int,
        encoding: Encoding | None = None,
        condition: Any = None,  # noqa: ANN401
    ) -> State:
        """Returns the state before the first level."""
        require_counts(batch_size=batch_size)
        self._require_eval()
        codes, c = (None, condition) if encoding is None else encoding
        require_condition(c, batch_size, is_taken=self._condition is not None)
        device = None
        if codes is not None:
            device = codes[0].device
        elif self.module is not None:
            device = input_like(self.module).device
        return self.State(torch.empty(batch_size, 0, device=device), codes, c, ())

    def group(self, state: State) -> Group:
        """Returns the codes of the next level as its posterior, and its context."""
        k, rows = len(state.chosen), len(state.rows)
        q: Distribution | None = None
        if state.codes is not None:
            q = PointMass(state.codes[k])
        return Group(expand(self._priors[k], rows), q, self._seen(state))

    def advance(self, state: State, z: Tensor) -> State:
        """Returns the state with the codes of the level, of shape ``(B, *grid)``."""
        if len(z) != len(state.rows):
            raise ValueError(f"The walk has {len(state.rows)} rows; got {len(z)} rows of z.")
        return state._replace(chosen=(*state.chosen, z))

    def decode(self, state: State) -> Tensor:
        """Returns the decoder's mean."""
        return self._decode(*state.chosen)

    def shared_prior(self) -> Sampleable | None:
        """Returns the placeholder of the missing prior of a single level."""
        return self._priors[0] if self.num_groups == 1 else None

    def _seen(self, state: State) -> Tensor | None:
        """Returns the context of the next level, or ``None``."""
        if self._context is None:
            return None
        if self._condition is not None:
            return context_of(self._context, state.condition, *state.chosen, rows=len(state.rows))
        return self._context(*state.chosen) if state.chosen else None

    def _checked(self, k: int, codes: Any, x: Any) -> Tensor:  # noqa: ANN401
        """Returns the codes of a level after a check of their type and, waiting for a GPU, range."""
        whole = isinstance(codes, Tensor) and not (codes.is_floating_point() or codes.is_complex())
        if not whole or codes.ndim < 1 or codes.dtype == torch.bool:
            raise TypeError(
                f"encode(x) must return codes, whole numbers of shape (B, *grid); got "
                f"{described(codes)}. Return the indices of the codebook vectors."
            )
        rows = {len(leaf) for leaf in tensors_of(x) if leaf.ndim > 0}
        if len(rows) == 1 and len(codes) not in rows:
            raise ValueError(
                f"encode(x) must return one row of codes per row of x; got {len(codes)} rows for "
                f"{rows.pop()} of x. Flat indices: codes.view(len(x), *grid)."
            )
        count = self._priors[k].num_categories
        if codes.numel() > 0 and not ((codes >= 0) & (codes < count)).all():
            raise ValueError(
                f"Codes of level {k} must be from 0 to num_categories - 1 = {count - 1}; got others. "
                f"Pass num_categories=, the number of vectors in the codebook."
            )
        checked: Tensor = codes.long()
        return checked

    def _require_eval(self) -> None:
        require_eval(
            self.module, *(getattr(p, "__self__", p) for p in (self._encode, self._decode))
        )


class VQModelSource(VQSource):
    """A ``VQModel`` of diffusers as a source of one grid of codes.

    A batch is x itself, ``(B, 3, H, W)`` in [-1, 1] for most models, or the first item of a tuple.
    The images of one source must be of one size.

    Arguments:
        model: The model, in evaluation mode, on the device where it is to stay.
        condition: Returns the condition of a batch, as in :class:`VQSource`.
        context: Maps a condition to the context of base and ratio head, ``(B, ...)``.

    Raises:
        TypeError: If the model is no VQ-VAE with the interface of ``VQModel``.
        ValueError: If it is in training mode, its codes are remapped, or one of ``condition`` and
            ``context`` is missing.

    Example:
        >>> from diffusers import VQModel
        >>> model = VQModel(latent_channels=2, norm_num_groups=8, block_out_channels=(8,))
        >>> source = VQModelSource(model.eval())
        >>> [z.shape for z in source.encode(2 * torch.rand(5, 3, 4, 4) - 1).codes]
        [torch.Size([5, 4, 4])]
    """

    module: Any

    def __init__(
        self,
        model: Any,  # noqa: ANN401
        *,
        condition: Callable[[Any], Any] | None = None,
        context: Callable[[Any], Tensor] | None = None,
    ) -> None:
        parts = ("encode", "decode", "quantize", "post_quant_conv")
        _require_parts(model, parts, "a VQModel of diffusers: VQModel.from_pretrained(...)")
        if getattr(model.quantize, "remap", None) is not None:
            raise ValueError("A VQModel with remapped codes cannot be wrapped; use VQSource.")
        count = model.quantize.embedding.num_embeddings
        super().__init__(
            *(self._codes, self._image),
            num_categories=count,
            module=model,
            condition=condition,
            context=context,
        )
        require_eval(model)

    def _codes(self, x: Any) -> Tensor:  # noqa: ANN401
        model = self.module
        remedy = "Scale images to [-1, 1]: x / 127.5 - 1 for bytes."
        x = floats_of_batch(type(model).__name__, x, remedy, _PIXELS)
        h = model.encode(x.to(input_like(model.encoder))).latents
        indices = model.quantize(h)[2][2]
        codes: Tensor = indices.reshape(len(h), *h.shape[2:])
        return codes

    def _image(self, z: Tensor) -> Tensor:
        model = self.module
        vectors = model.quantize.embedding(z).movedim(-1, 1)
        vectors = vectors.contiguous().to(input_like(model.post_quant_conv))
        spatial = model.config.norm_type == "spatial"
        x: Tensor = model.decoder(model.post_quant_conv(vectors), vectors if spatial else None)
        return at_least_float32(x)


class VQVAE2Source(VQSource):
    """The VQ-VAE-2 of ``rosinality/vq-vae-2-pytorch`` as two groups of codes: top, then bottom.

    The context of the bottom codes is the decoded top codes: the feature map that the encoder joins
    to its own.

    Arguments:
        model: A ``VQVAE`` of that repository, in evaluation mode.

    Raises:
        TypeError: If the model does not have the interface of that class.
        ValueError: If it is in training mode.

    References:
        | Generating Diverse High-Fidelity Images with VQ-VAE-2 (Razavi et al., NeurIPS 2019)

    Example:
        >>> from helpers.vqvae2_standin import TwoLevels  # a small model of that kind, in the tests
        >>> source = VQVAE2Source(TwoLevels().eval())
        >>> [z.shape for z in source.encode(torch.rand(5, 3, 8, 8)).codes]
        [torch.Size([5, 2, 2]), torch.Size([5, 4, 4])]
    """

    module: Any

    def __init__(self, model: Any) -> None:  # noqa: ANN401
        parts = ("encode", "decode_code", "quantize_t", "quantize_b", "dec_t")
        _require_parts(model, parts, "a VQVAE of rosinality/vq-vae-2-pytorch")
        super().__init__(
            self._codes,
            model.decode_code,
            num_categories=[int(model.quantize_t.n_embed), int(model.quantize_b.n_embed)],
            module=model,
            context=partial(_decoded_top, model),
        )
        require_eval(model)

    def _codes(self, x: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401
        remedy = "Scale images as in its training: to [-1, 1]."
        x = floats_of_batch(type(self.module).__name__, x, remedy, _PIXELS)
        _, _, _, top, bottom = self.module.encode(x)
        return top, bottom


def _decoded_top(model: Any, top: Tensor) -> Tensor:  # noqa: ANN401
    features: Tensor = model.dec_t(model.quantize_t.embed_code(top).movedim(-1, 1))
    return at_least_float32(features)


def _require_parts(model: Any, parts: Iterable[str], wanted: str) -> None:  # noqa: ANN401
    """Validates that a model has the modules and methods that its source uses.

    Raises:
        TypeError: If one is missing.
    """
    require_instance("model", model, nn.Module, f"Pass {wanted}.")
    missing = [part for part in parts if not hasattr(model, part)]
    if missing:
        raise TypeError(
            f"model must be {wanted}; got a {type(model).__name__} without {', '.join(missing)}. "
            f"Wrap any other VQ-VAE in VQSource(encode, decode, num_categories=...)."
        )
