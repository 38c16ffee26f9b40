"""Saving of an energy, with fingerprints of VAE, base and heads and settings of the chains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, get_args

from torch import Tensor, nn

from ncprior.heads.networks import MLPHead
from ncprior.prior import NCPrior
from ncprior.saving.cards import energy_text
from ncprior.saving.checks import (
    SavedFile,
    Validators,
    fingerprints,
    is_count,
    is_fingerprint,
    is_number,
)
from ncprior.saving.identity import heads_on
from ncprior.saving.kinds import entry_of, is_custom
from ncprior.saving.mixin import Pretrained
from ncprior.source import LatentSource, device_of, require_source
from ncprior.utils.fingerprints import module_fingerprint
from ncprior.utils.require import require_instance
from ncprior.vaebm.energy_net import EnergyNet
from ncprior.vaebm.gaussian_decoder import gaussian_decoder_of
from ncprior.vaebm.noise import LangevinTarget

FILE = "vaebm.safetensors"

ENERGIES = {"EnergyNet": EnergyNet, "MLPHead": MLPHead}

_MOST_STEPS = 100_000  # of a chain: more would seem not to end

_SETTINGS = ("num_steps", "step_size", "langevin_target", "data_noise")  # of the model


class PretrainedEnergy(Pretrained):
    """The part of :class:`~ncprior.vaebm.VAEBM` that is saved: the energy and its settings."""

    prior: NCPrior | None
    energy: Any
    decoder_noise: str

    _file = FILE
    _own_modules = "energy"
    _tags = ("ncprior", "vae", "energy-based-model", "vaebm")
    _validators: ClassVar[Validators] = {
        "energy": lambda value: isinstance(value, dict),
        "num_steps": lambda value: is_count(value, 0, _MOST_STEPS),
        "step_size": lambda value: is_number(value, 0) and value > 0,
        "langevin_target": lambda value: value in get_args(LangevinTarget),
        "data_noise": lambda value: is_number(value, 0),
        "sigma": lambda value: value is None or (is_number(value, 0) and value > 0),
        "fingerprint": lambda value: is_fingerprint(value, "vae", "base", "heads"),
    }

    def _tensors(self) -> dict[str, Tensor]:
        if not isinstance(self.energy, nn.Module):
            raise TypeError(
                f"Only a network can be saved; this energy is a {type(self.energy).__name__}. "
                f"Make it an nn.Module."
            )
        return dict(self.energy.state_dict())

    def _configuration(self) -> dict[str, Any]:
        return {
            "energy": entry_of(self.energy, ENERGIES),
            **{name: getattr(self, name) for name in _SETTINGS},
            **trained_on(self.source, self.prior),
        }

    def _card_text(self, config: Mapping[str, Any], **names: Any) -> str:  # noqa: ANN401
        size = sum(p.numel() for p in self.parameters())
        names["has_sampler"] = self.prior is not None and self.prior.sampler is not None
        return energy_text(config, size, self.decoder_noise, **names)

    @classmethod
    def _check(cls, saved: SavedFile) -> None:
        if not is_custom(saved.config["energy"]):
            _built(saved)

    @classmethod
    def _build(
        cls,
        saved: SavedFile,
        source: NCPrior | LatentSource[Any, Any],
        check_fingerprint: bool,
        energy: nn.Module | None = None,
    ) -> PretrainedEnergy:
        config = saved.config
        heads, vae = (source, source.source) if isinstance(source, NCPrior) else (None, source)
        require_source(vae)
        if check_fingerprint:
            now = trained_on(vae, heads)
            _check_trained_on(saved, now)
            saved.check_fingerprints(now["fingerprint"])
        if (new := energy) is None:
            new = _built(saved).to(device_of(vae))
        else:
            require_instance("energy", new, nn.Module, "Pass a network.")
            saved.check_tensors(new.state_dict(), "energy")
        model = cls(source, new, **{name: config[name] for name in _SETTINGS})
        if energy is not None:
            energy.load_state_dict(saved.tensors)
        return model


def _built(saved: SavedFile) -> nn.Module:
    """Builds the energy from its entry and its tensors."""
    entry = saved.config["energy"]
    network = saved.build_network("its energy", entry, ENERGIES, "Pass energy=")
    return saved.fill(network, "", "energy")


def trained_on(source: LatentSource[Any, Any], prior: NCPrior | None) -> dict[str, Any]:
    """Returns σ of the decoder, and the fingerprints of the VAE, its base and the ratio heads."""
    decoder = gaussian_decoder_of(source)
    return {
        "sigma": None if decoder is None else decoder.sigma,
        "fingerprint": {**fingerprints(source), "heads": _heads_fingerprint(prior)},
    }


def _heads_fingerprint(prior: NCPrior | None) -> str | None:
    """Fingerprint of an NCP prior: its heads, their strength, and which of them are in use."""
    if prior is None:
        return None
    on = "".join(str(int(is_on)) for is_on in heads_on(prior))
    return f"{module_fingerprint(prior.heads)}:{float(prior.strength)!r}:{on}"


def _check_trained_on(saved: SavedFile, now: Mapping[str, Any]) -> None:
    """Validates that heads and decoder noise are those of training."""
    both = saved.config["fingerprint"]["heads"], now["fingerprint"]["heads"]
    if both[0] != both[1]:
        stored, given = ("the VAE alone" if heads is None else f"heads {heads}" for heads in both)
        saved.fail(
            f"it was trained on {stored}; got {given}",
            "Pass the NCP prior or source that it was trained on, or check_fingerprint=False",
        )
    sigma = saved.config["sigma"]
    if not _same_sigma(sigma, now["sigma"]):
        saved.fail(
            f"it was trained with decoder noise {sigma or 'of the likelihood'}, and the source "
            f"has {now['sigma'] or 'that of its likelihood'}",
            "Wrap it in GaussianDecoder(source, sigma), or leave that out",
        )


def _same_sigma(one: float | None, other: float | None) -> bool:
    """Compares two σ up to the rounding of fits with different numbers of threads."""
    if one is None or other is None:
        return one is other
    return math.isclose(one, other, rel_tol=1e-6)
