"""Checks that a module has the parts of an NVAE, and that they are consistent."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ncprior.utils.require import described

_ATTRIBUTES = (
    *("stem", "pre_process", "enc_tower", "dec_tower", "enc0", "enc_sampler", "dec_sampler"),
    *("nf_cells", "prior_ftr0", "z0_size", "post_process", "image_conditional", "res_dist"),
    *("num_flows", "vanilla_vae", "decoder_output", "crop_output"),
)


def checked_model(model: Any) -> nn.Module:  # noqa: ANN401
    """Returns the unwrapped model after validating its layout.

    Arguments:
        model: The ``AutoEncoder``, possibly wrapped.

    Returns:
        The model itself.

    Raises:
        TypeError: If it is no module with the attributes of NVAE's ``AutoEncoder``.
        ValueError: If its parts contradict each other, or its first forward would change it.
    """
    if not hasattr(model, "stem") and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module
    missing = [name for name in _ATTRIBUTES if not hasattr(model, name)]
    if missing or not isinstance(model, nn.Module):
        raise TypeError(
            f"NVAESource takes NVAE's AutoEncoder; got {described(model)}, which lacks "
            f"{', '.join(missing[:3])}. Give the model itself, not its checkpoint; "
            f"load_checkpoint makes the one from the other."
        )
    if getattr(model, "dataset", None) == "stacked_mnist":
        raise ValueError("NVAE's own code does not support the data set 'stacked_mnist'.")
    _check_counts(model)
    if any(getattr(m, "data_init", False) and not m.init_done for m in model.modules()):
        raise ValueError(
            "The model's first forward would initialise its ELUConv layers from data, and overwrite "
            "what was loaded. Load it by load_checkpoint, or set m.init_done = True for every "
            "submodule m with m.data_init."
        )
    return model


def cell_types(tower: Any) -> list[str]:  # noqa: ANN401
    """Returns the type of every cell of a tower, in order."""
    return [cell.cell_type for cell in tower]


def image_shape(model: Any) -> tuple[int, int, int]:  # noqa: ANN401
    """Returns the shape ``(C, H, W)`` of the images that the encoder takes."""
    cells = cell_types(model.pre_process) + cell_types(model.enc_tower)
    factor = 2 ** sum(kind.startswith("down") for kind in cells)
    _, height, width = model.z0_size
    return model.stem.in_channels, factor * height, factor * width


def cuda_only_layers(model: nn.Module) -> list[nn.Module]:
    """Returns the layers that raise an error for CPU tensors."""
    return [m for m in model.modules() if type(m).__name__ == "SyncBatchNormSwish"]


def masked_layers(model: nn.Module) -> list[Any]:
    """Returns the layers of the flows whose mask is a plain tensor, which ``to`` does not move."""
    return [m for m in model.modules() if isinstance(vars(m).get("mask"), Tensor)]


def _check_counts(model: Any) -> None:  # noqa: ANN401
    down, up = cell_types(model.dec_tower), cell_types(model.enc_tower)
    num_groups = len(model.enc_sampler)
    combiners = 0 if model.vanilla_vae else num_groups
    expected = {
        "dec_sampler": (len(model.dec_sampler), num_groups - 1),
        "nf_cells": (len(model.nf_cells), num_groups * model.num_flows),
        "combiners in dec_tower": (down.count("combiner_dec"), combiners),
        "combiners in enc_tower": (up.count("combiner_enc"), max(combiners - 1, 0)),
        "combiners in front of dec_tower": (down[:1].count("combiner_dec"), min(combiners, 1)),
    }
    for name, (got, needed) in expected.items():
        if got != needed:
            raise ValueError(
                f"With {num_groups} groups in enc_sampler, NVAE has {needed} {name}; got {got}. "
                f"The model is not of the layout that ncprior knows."
            )
