"""Getting a published NVAE: its checkpoint, a machine without a GPU, its BatchNorm statistics."""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, silu
from torch.nn.modules.batchnorm import _BatchNorm

from ncprior.adapters.nvae.layout import checked_model, cuda_only_layers
from ncprior.source import LatentSource, require_source, visit
from ncprior.utils.require import (
    described,
    require_callable,
    require_counts,
    require_flags,
    require_instance,
)
from ncprior.utils.visible import require_eval

_OLDER_ARGS = {"ada_groups": False, "min_groups_per_scale": 1, "num_mixture_dec": 10}

_OTHER_MODEL = "Let `build` make the model that the checkpoint's args and arch_instance describe."

_NOT_WEIGHTS = (".weight_normalized", ".num_batches_tracked")  # older checkpoints lack them


def load_checkpoint(
    path: str | os.PathLike[str],
    build: Callable[[argparse.Namespace, Any], nn.Module],
    *,
    trust_pickle: bool = False,
) -> nn.Module:
    """Loads a checkpoint of NVAE's training script, and checks that every weight arrived.

    Arguments:
        path: The checkpoint, such as ``checkpoint.pt``.
        build: Makes the model from the checkpoint's ``args`` and ``arch_instance``, such as
            ``lambda args, arch: AutoEncoder(args, None, arch)`` with NVAE's ``AutoEncoder``. On a
            machine without a GPU it runs inside :func:`without_cuda`.
        trust_pickle: Whether the file may hold more than tensors, plain values and an
            ``argparse.Namespace``. Reading such a file can run any code that its author wished.

    Returns:
        The model, on the CPU and in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If ``build`` is no function, or returns no module.
        ValueError: If the file is damaged, holds other types, is no such checkpoint, or does not
            fill the model.

    Example:
        >>> model = load_checkpoint(  # doctest: +SKIP
        ...     "checkpoint.pt", lambda args, arch: AutoEncoder(args, None, arch)
        ... )
    """
    require_instance("path", path, (str, os.PathLike), "Pass the path of a checkpoint.")
    require_callable("build", build, "Pass lambda args, arch: AutoEncoder(args, None, arch).")
    require_flags(trust_pickle=trust_pickle)
    checkpoint = _read(path, trust_pickle)
    args, weights = _checked(path, checkpoint)
    for name, value in _OLDER_ARGS.items():
        vars(args).setdefault(name, value)
    if torch.cuda.is_available():
        model = build(args, checkpoint["arch_instance"])
    else:
        with without_cuda():
            model = build(args, checkpoint["arch_instance"])
    require_instance(
        "build(args, arch)", model, nn.Module, "Return the AutoEncoder that it makes."
    )
    _fill(model, weights)
    return model.eval()


@contextmanager
def without_cuda() -> Iterator[None]:
    """A context manager inside which ``tensor.cuda()`` leaves the tensor where it is.

    NVAE's flows call it in their constructors: ``with without_cuda(): model = AutoEncoder(...)``.

    Example:
        >>> with without_cuda():
        ...     print(torch.ones(1).cuda().device)
        cpu
    """
    own = vars(Tensor).get("cuda")
    setattr(Tensor, "cuda", lambda self, *args, **kwargs: self)  # noqa: B010 (mypy: a method)
    try:
        yield
    finally:
        if own is None:
            delattr(Tensor, "cuda")
        else:
            setattr(Tensor, "cuda", own)  # noqa: B010


class on_cpu:
    """Handle under which a model of NVAE runs on a CPU, until ``remove()`` or the end of ``with``.

    Every ``SyncBatchNormSwish``, which does not support CPU tensors, gets a forward for them:
    batch normalisation of this process alone, then SiLU. Parameters, buffers and flags stay as
    they are, and tensors on a GPU take the published way.

    Arguments:
        model: The model, or any module that contains such layers.

    Raises:
        TypeError: If it is no module.
        ValueError: If it contains no such layer.

    Example:
        >>> from helpers.nvae_standin import nvae  # a small model of NVAE's layout, in the tests
        >>> from ncprior.adapters.nvae import NVAESource
        >>> with on_cpu(nvae()) as model:
        ...     NVAESource(model).self_check(torch.rand(2, 1, 8, 8).round())
        0.0
    """

    def __init__(self, model: nn.Module) -> None:
        require_instance("model", model, nn.Module, "Pass an AutoEncoder of NVAE.")
        layers = cuda_only_layers(model)
        if not layers:
            raise ValueError(
                f"model must contain layers of NVAE's SyncBatchNormSwish; got {described(model)} "
                f"without any. Pass an AutoEncoder of NVAE."
            )
        self.model = model
        self._layers = [layer for layer in layers if "forward" not in vars(layer)]
        for layer in self._layers:
            setattr(layer, "forward", partial(_batchnorm_swish, layer))  # noqa: B010

    def remove(self) -> None:
        """Takes the forwards away again."""
        for layer in self._layers:
            del layer.forward
        self._layers = []

    def __enter__(self) -> nn.Module:
        return self.model

    def __exit__(self, *exception: object) -> None:
        self.remove()


@contextmanager
def readjust_batchnorm(
    source: LatentSource[Any, Any],
    draw: Callable[[], object] | None = None,
    *,
    batch_size: int = 16,
    iterations: int = 500,
) -> Iterator[None]:
    """A context manager inside which the decoder's BatchNorm statistics are those of samples.

    They are moving averages over ``iterations`` batches, each normalised by its own statistics, as
    if the decoder were in training mode. Afterwards all is as it was, also after an exception.

    Sample inside and nothing else: the decoder also makes contexts and posteriors, which inside
    are not those that the heads were trained on.

    Arguments:
        source: The source, with the temperature to sample at.
        draw: Draws one batch of samples, such as ``lambda: prior.sample(16, sampler)``; the base
            prior's own walk if ``None``.
        batch_size: Samples per batch of the base prior's own walk.
        iterations: Number of batches.

    References:
        NVAE (Vahdat and Kautz, NeurIPS 2020), section on sampling with a readjusted BatchNorm

    Example:
        >>> from helpers.nvae_standin import nvae
        >>> from ncprior.adapters.nvae import NVAESource
        >>> source = NVAESource(nvae(), temperature=0.7)
        >>> with on_cpu(source.module), readjust_batchnorm(source, iterations=3):
        ...     state = source.start(4)
        ...     for _ in range(source.num_groups):
        ...         state = source.advance(state, source.group(state).prior.sample())
        ...     x = source.decode(state)
        >>> x.shape
        torch.Size([4, 1, 8, 8])
    """
    require_source(source)
    require_counts(batch_size=batch_size, iterations=iterations)
    if draw is not None:
        require_callable("draw", draw, "Pass lambda: prior.sample(16, sampler).")
    require_eval(source.module)
    layers = _decoder_batchnorms(source.module)
    before = {layer: _statistics(layer) for layer in layers}
    averages = {layer: _statistics(layer) for layer in layers}
    try:
        hooks = [
            layer.register_forward_pre_hook(partial(_take_batch_statistics, averages[layer]))
            for layer in layers
        ]
        try:
            with torch.no_grad():
                for _ in range(iterations):
                    _walk(source, batch_size) if draw is None else draw()
        finally:
            for hook in hooks:
                hook.remove()
        _set_statistics(averages)
        yield
    finally:
        _set_statistics(before)


def _read(path: str | os.PathLike[str], trust_pickle: bool) -> Mapping[str, Any]:
    allowed = argparse.Namespace in torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=not trust_pickle)
    except pickle.UnpicklingError as error:
        remedy = "Copy or download it again."
        if "global" in str(error).lower():  # of torch's messages: "Unsupported global"
            remedy = (
                "It holds more than tensors, plain values and an argparse.Namespace, and reading it "
                "could run any code. If you trust where it comes from, pass trust_pickle=True."
            )
        raise ValueError(f"Cannot read {os.fspath(path)}. {remedy} {error}") from error
    except (EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        if getattr(error, "filename", None) is not None:  # there is no such file, or no permission
            raise
        raise ValueError(
            f"Cannot read {os.fspath(path)}: it is empty, damaged or no file of torch.save "
            f"({type(error).__name__}: {error}). Copy or download it again."
        ) from error
    finally:
        if not allowed:
            types = torch.serialization.get_safe_globals()  # loading may have registered some
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals([t for t in types if t is not argparse.Namespace])
    return checkpoint if isinstance(checkpoint, Mapping) else {}


def _checked(
    path: str | os.PathLike[str], checkpoint: Mapping[str, Any]
) -> tuple[argparse.Namespace, Mapping[str, Tensor]]:
    """Returns the arguments and the weights of a checkpoint of NVAE, after a check of their types."""
    remedy = "Give the file that NVAE's train.py wrote."
    if lacking := {"args", "arch_instance", "state_dict"} - set(checkpoint):
        raise ValueError(
            f"{os.fspath(path)} is no checkpoint of NVAE: it lacks {', '.join(sorted(lacking))}. "
            f"{remedy}"
        )
    args, weights = checkpoint["args"], checkpoint["state_dict"]
    are_weights = isinstance(weights, Mapping) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in weights.items()
    )
    if not isinstance(args, argparse.Namespace) or not are_weights:
        raise ValueError(
            f"{os.fspath(path)} is no checkpoint of NVAE: its args must be an argparse.Namespace "
            f"and its state_dict must map names to tensors; got {described(args)} and "
            f"{described(weights)}. {remedy}"
        )
    return args, weights


def _fill(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # of shapes
        raise ValueError(f"The checkpoint did not load: {error}. {_OTHER_MODEL}") from error
    missing = [name for name in missing if not name.endswith(_NOT_WEIGHTS)]
    if missing or unexpected:
        some = ", ".join([*missing, *unexpected][:3])
        raise ValueError(
            f"The checkpoint did not load: {len(missing)} weights of the model are missing and "
            f"{len(unexpected)} of the checkpoint are unknown to it ({some}, ...). {_OTHER_MODEL}"
        )
    for module in model.modules():
        if getattr(module, "data_init", False):
            setattr(module, "init_done", True)  # noqa: B010 (else the first forward overwrites)


def _batchnorm_swish(layer: Any, x: Tensor) -> Tensor:  # noqa: ANN401
    if x.is_cuda:
        published: Tensor = type(layer).forward(layer, x)
        return published
    if layer.training:
        layer.num_batches_tracked.add_(1)
    return silu(
        batch_norm(
            x,
            layer.running_mean,
            layer.running_var,
            layer.weight,
            layer.bias,
            training=layer.training,
            momentum=layer.momentum,
            eps=layer.eps,
        )
    )


Statistics: TypeAlias = tuple[Tensor, Tensor]  # running mean and variance, each (C,)


def _decoder_batchnorms(model: Any) -> list[Any]:  # noqa: ANN401
    checked_model(model)
    cells = (*model.dec_tower, *model.post_process)
    return [m for cell in cells for m in cell.modules() if isinstance(m, _BatchNorm)]


def _statistics(layer: Any) -> Statistics:  # noqa: ANN401
    return layer.running_mean.clone(), layer.running_var.clone()


def _set_statistics(statistics: Mapping[Any, Statistics]) -> None:
    for layer, (mean, variance) in statistics.items():
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)


def _take_batch_statistics(average: Statistics, layer: Any, inputs: tuple[Tensor]) -> None:  # noqa: ANN401
    """Normalises this call by its batch, and moves the average as training mode would."""
    (x,) = inputs
    axes = [axis for axis in range(x.ndim) if axis != 1]
    variance, mean = torch.var_mean(x, axes, correction=0)
    _set_statistics({layer: (mean, variance)})
    count = x.numel() // x.shape[1]
    unbiased = variance * count / max(count - 1, 1)
    for moving, new in zip(average, (mean, unbiased), strict=True):
        moving.lerp_(new.to(moving), layer.momentum)


def _walk(source: LatentSource[Any, Any], batch_size: int) -> None:
    """Draws one batch from the base prior and decodes it."""
    _, state = visit(source, source.start(batch_size), lambda k, group: group.prior.sample())
    source.decode(state)
