"""A sampler with the interface of pythae's own samplers.

References:
    | Pythae: Unifying Generative Autoencoders in Python (Chadebec et al., NeurIPS 2022)
    | https://github.com/clementchadebec/benchmark_VAE
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ncprior.adapters.pythae.source import PythaeSource, check_noise, lineage_of
from ncprior.prior import NCPrior
from ncprior.recipe.improve import improve
from ncprior.utils.require import (
    described,
    require_counts,
    require_flags,
    require_instance,
    require_numbers,
)


class NCPSampler:
    """A sampler of pythae that draws from a better prior: p(z) times a learned ratio.

    It is a ``BaseSampler`` of pythae, and is used as those are. Like them, it puts the model in
    evaluation mode, and on a GPU if there is one. A ``GenerationPipeline`` makes only the samplers
    of a fixed list by the name of a config; put this one in their place:

    .. code-block:: python

        pipeline = GenerationPipeline(model)
        pipeline.sampler = NCPSampler(model)
        x = pipeline(num_samples=100, train_data=x_train)

    Arguments:
        model: The model.
        noise: The noise on deterministic codes, as for :class:`PythaeSource`.
        budget: Evaluations of the head per sample, 2 or more.
        max_seconds: Largest time for :meth:`fit`, in seconds, or ``None``.
        progress: Whether to show progress.

    Attributes:
        prior: The :class:`~ncprior.NCPrior` after :meth:`fit`, with its report; ``None`` before.

    Raises:
        ValueError: If the model cannot be a :class:`PythaeSource`. It stays as it was then.
        TypeError: If it is no pythae model, or an argument has the wrong type.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("ignore")  # this model is not trained
        >>> from pythae.models import VAE, VAEConfig
        >>> model = VAE(VAEConfig(input_dim=(1, 8, 8), latent_dim=3))
        >>> sampler = NCPSampler(model, max_seconds=0.1, progress=False)
        >>> sampler.fit(torch.rand(100, 1, 8, 8)).sample(num_samples=5).shape
        torch.Size([5, 1, 8, 8])
    """

    model: Any
    is_fitted: bool
    save_img: Any
    prior: NCPrior | None

    def __new__(cls: Any, model: nn.Module, **_: Any) -> Any:  # noqa: ANN401
        """Makes a sampler whose class is a subclass of pythae's too, after a check of the model."""
        lineage_of(model)
        return _new(cls)

    def __reduce__(self) -> tuple[Any, ...]:
        """Returns the parts of a copy or pickle, which cannot find the class with pythae's base."""
        return _new, type(self).__bases__[:1], vars(self)

    def __init__(
        self,
        model: nn.Module,
        *,
        noise: float | None = None,
        budget: int = 50,
        max_seconds: float | None = None,
        progress: bool = True,
    ) -> None:
        check_noise(model, noise)
        require_counts("[2, inf)", budget=budget)
        require_numbers("(0, inf) or None", max_seconds=max_seconds)
        require_flags(progress=progress)
        pythaes: Any = super()
        pythaes.__init__(model)
        self.noise, self.prior = noise, None
        options = {"budget": budget, "max_seconds": max_seconds, "progress": progress}
        self.options: dict[str, Any] = options

    def fit(
        self,
        train_data: Any,  # noqa: ANN401
        eval_data: Any = None,  # noqa: ANN401
        training_config: None = None,
    ) -> NCPSampler:
        """Fits the prior to the training data, by :func:`ncprior.improve`.

        Arguments:
            train_data: A tensor or array of x, scaled as for the model, or other data that
                :func:`ncprior.fit` takes. ``None`` keeps a sampler that is fitted as it is, for a
                pipeline that draws again.
            eval_data: Held-out data; by default a part of the training data is held out.
            training_config: Must be ``None``: the configs are those of pythae's flows.

        Returns:
            The sampler itself.

        Raises:
            TypeError: If there are no data, or there is a config.
        """
        if training_config is not None:
            raise TypeError(
                f"training_config must be None: it trains pythae's flows; got "
                f"{described(training_config)}. Pass options to NCPSampler(model, ...)."
            )
        if train_data is None and self.is_fitted:
            return self
        if train_data is None:
            raise TypeError("train_data must be data, such as a tensor; got None. Pass data.")
        source = PythaeSource(self.model, noise=self.noise)
        self.prior = improve(source, train_data, held_out=eval_data, **self.options)
        self.is_fitted = True
        return self

    def sample(
        self,
        num_samples: int = 1,
        batch_size: int = 500,
        output_dir: str | os.PathLike[str] | None = None,
        return_gen: bool = True,
        save_sampler_config: bool = False,
    ) -> Tensor | None:
        """Draws samples, and returns the decoder's means.

        Arguments:
            num_samples: The number of samples.
            batch_size: Samples that are drawn at once.
            output_dir: A folder for the samples as PNG files, made if missing; ``None`` writes
                none. The values of images are clipped to [0, 1].
            return_gen: Whether to return the samples.
            save_sampler_config: Whether to :meth:`save` the prior in ``output_dir``.

        Returns:
            The samples, with shape ``(num_samples, *input_dim)``, or ``None``.

        Raises:
            RuntimeError: If the sampler is not fitted.
            ValueError: If a number is out of range, there is no folder to save to, or the samples
                are no images.
        """
        require_counts(num_samples=num_samples, batch_size=batch_size)
        require_flags(return_gen=return_gen, save_sampler_config=save_sampler_config)
        prior = self._fitted()
        if output_dir is None and save_sampler_config:
            raise ValueError("save_sampler_config needs output_dir; got None. Pass a folder.")
        kept = []
        for first in range(0, num_samples, batch_size):
            x = prior.sample(min(batch_size, num_samples - first)).x
            if output_dir is not None:
                self._save_images(x, output_dir, first)
            if return_gen:
                kept.append(x)
        if output_dir is not None and save_sampler_config:
            self.save(output_dir)
        return torch.cat(kept) if return_gen else None

    def save(self, dir_path: str | os.PathLike[str]) -> None:
        """Saves the heads and their base, and pythae's ``sampler_config.json``.

        ``NCPrior.from_pretrained(PythaeSource(model), dir_path)`` loads them again.

        Arguments:
            dir_path: The folder.

        Raises:
            RuntimeError: If the sampler is not fitted.
            OSError: If a file cannot be written.
        """
        self._fitted().save_pretrained(dir_path)
        pythaes: Any = super()
        pythaes.save(dir_path)

    def _fitted(self) -> NCPrior:
        if self.prior is None:
            raise RuntimeError("The sampler must be fitted first. Call fit(train_data).")
        return self.prior

    def _save_images(self, x: Tensor, folder: str | os.PathLike[str], first: int) -> None:
        require_instance("output_dir", folder, (str, os.PathLike), "Pass the path of a folder.")
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise ValueError(
                f"output_dir is for images of 1 or 3 channels; the samples have the shape "
                f"{tuple(x.shape[1:])}. Leave output_dir out, and save what sample returns."
            )
        Path(folder).mkdir(parents=True, exist_ok=True)
        for number, image in enumerate(x.clamp(0, 1), start=first):
            self.save_img(image, os.fspath(folder), f"{number:08d}.png")


def _new(cls: type) -> Any:  # noqa: ANN401
    """Returns a sampler without attributes, whose class has pythae's base."""
    return object.__new__(_with_pythaes_base(cls))


@cache
def _with_pythaes_base(cls: type) -> type:
    """Returns a class with pythae's BaseSampler as its last base; pythae is imported only here."""
    from pythae.samplers import BaseSampler

    names = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (cls, BaseSampler), names)
