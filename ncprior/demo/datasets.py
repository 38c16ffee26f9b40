"""Data sets of real images: from a local folder, the Hugging Face Hub, or scikit-learn.

Needs the extra ``demo``. Images are float tensors ``(N, C, H, W)`` in [0, 1], labels ``(N,)``.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError
from torch import Tensor

from ncprior.utils.random_state import permutation
from ncprior.utils.require import require_counts, require_instance

if TYPE_CHECKING:
    from pyarrow import ChunkedArray

_FOLDER = "NCPRIOR_DATA"  # environment variable with the path of the user's folder

_COLUMNS = ("image", "img")


class Labelled(NamedTuple):
    """Labelled images.

    Attributes:
        images: Float images in [0, 1], with shape ``(N, C, H, W)``.
        labels: Integer classes, with shape ``(N,)``.
    """

    images: Tensor
    labels: Tensor

    def rows(self, index: Tensor | slice) -> Labelled:
        """Returns a subset of the images, with their labels.

        Example:
            >>> data = Labelled(torch.rand(10, 1, 8, 8), torch.arange(10))
            >>> data.rows(slice(3)).labels
            tensor([0, 1, 2])
        """
        return Labelled(self.images[index], self.labels[index])


def read_images(repo: str, split: str, label: str = "label") -> Labelled:
    """Labelled images from the Parquet files of a data set of the Hugging Face Hub.

    Files ``<split>.parquet`` and ``<split>-*.parquet`` below ``$NCPRIOR_DATA/<repo>`` are read if
    there are any. Otherwise they are downloaded once into the cache of the Hub.

    Arguments:
        repo: The repository of the data set, such as ``"ylecun/mnist"``.
        split: The split, such as ``"train"`` or ``"test"``.
        label: The column of the classes.

    Returns:
        The images, grey (C = 1) or RGB (C = 3), and labels, in the order of the files.

    Raises:
        FileNotFoundError: If there are no such files in the folder and on the Hub.
        ValueError: If the files have no column ``image`` or ``img``, or none of the classes, or
            images of several sizes.
        TypeError: If a name is not a text.
        ImportError: If pyarrow or Pillow is not installed; install the extra ``demo``.

    Example:
        >>> read_images("ylecun/mnist", "test").images.shape  # doctest: +SKIP
        torch.Size([10000, 1, 28, 28])
    """
    for name, text in (("repo", repo), ("split", split), ("label", label)):
        require_instance(name, text, str, "Pass a name.")
    try:
        from PIL import Image
        from pyarrow import parquet
    except ImportError as error:
        _raise_missing("pyarrow and Pillow", error)
    images, labels = [], []
    for path in _locate(repo, split):
        table = parquet.read_table(path)
        column = next((name for name in _COLUMNS if name in table.column_names), None)
        if column is None or label not in table.column_names:
            raise ValueError(
                f"{path} must have a column named {' or '.join(_COLUMNS)} and one named {label}; "
                f"it has {', '.join(table.column_names)}."
            )
        images.append(_decode(table[column], Image.open))
        labels.append(torch.tensor(table[label].to_pylist()))
    return Labelled(torch.cat(images), torch.cat(labels))


def digits() -> Labelled:
    """The 1,797 handwritten digits of 8×8 pixels in scikit-learn.

    A pixel x is the fraction of black points among 16 points of a scan, so that 16 x is an
    integer.

    Raises:
        ImportError: If scikit-learn is not installed; install the extra ``demo``.

    References:
        Optical Recognition of Handwritten Digits (Alpaydin & Kaynak, 1998)
        https://doi.org/10.24432/C50P49

    Example:
        >>> images, labels = digits()
        >>> images.shape, labels[:5]
        (torch.Size([1797, 1, 8, 8]), tensor([0, 1, 2, 3, 4]))
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        _raise_missing("scikit-learn", error)
    bunch = load_digits()
    images = torch.from_numpy(bunch.images / 16).to(torch.float32)
    return Labelled(images[:, None], torch.from_numpy(bunch.target).long())


def split(data: Labelled, held_out: int, seed: int) -> tuple[Labelled, Labelled]:
    """Random split into training and held-out images, stratified by class.

    The order is stratified too: any contiguous range of either set has the same class frequencies.

    Arguments:
        data: The images.
        held_out: Number of held-out images.
        seed: Seed of the shuffle, which depends on the seed alone.

    Returns:
        The training images and the held-out images.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If either set would be empty.

    Example:
        >>> train, held_out = split(digits(), held_out=600, seed=0)
        >>> len(train.images), len(held_out.images)
        (1197, 600)
    """
    require_instance("data", data, Labelled, "Pass Labelled(images, labels).")
    total = len(data.labels)
    require_counts(f"[1, {total - 1}]", held_out=held_out)
    require_counts("(-1e18, 1e18)", seed=seed)
    order = permutation(total, seed)
    labels = data.labels[order]
    place = torch.empty(total, dtype=torch.float64)
    for label in labels.unique():
        members = labels == label
        count = int(members.sum())
        place[members] = (torch.arange(count) + 0.5).double() / count  # quantiles within the class
    order = order[place.argsort(stable=True)]
    return data.rows(order[:-held_out]), data.rows(order[-held_out:])


def _locate(repo: str, split: str) -> list[Path]:
    """Paths of the Parquet files, in the user's folder or else on the Hub."""
    names = f"{split}.parquet", f"{split}-*.parquet"  # in parts: train-00000-of-00002.parquet
    own, wanted = os.environ.get(_FOLDER), " or ".join(names)
    if own is not None and (found := _found(Path(own) / repo, names)):
        return found
    looked = f"${_FOLDER} is not set" if own is None else f"{Path(own) / repo} has none"
    try:
        patterns = [*names, *(f"*/{name}" for name in names)]
        folder = snapshot_download(repo, repo_type="dataset", allow_patterns=patterns)
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"Found no {wanted} of {repo}: {looked}, and the Hugging Face Hub returned none "
            f"({error}). Go online, or put the files below a folder of your own as "
            f"<folder>/{repo}/{split}.parquet and set {_FOLDER}=<folder>."
        ) from error
    if found := _found(Path(folder), names):
        return found
    raise FileNotFoundError(f"Found no {wanted} of {repo}: {looked}, and neither has the Hub.")


def _found(folder: Path, names: Iterable[str]) -> list[Path]:
    return sorted(path for name in names for path in folder.glob(f"**/{name}"))


def _decode(column: ChunkedArray, read: Callable[[io.BytesIO], Any]) -> Tensor:
    """Decodes PNG or JPEG bytes to one tensor, with shape ``(N, C, H, W)``."""
    arrays = []
    for cell in column.to_pylist():
        image = read(io.BytesIO(cell["bytes"]))
        arrays.append(np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB")))
    if len(shapes := {array.shape for array in arrays}) != 1:
        found = ", ".join(map(str, sorted(shapes))) or "none"
        raise ValueError(f"All images must have one size and kind; the file has {found}.")
    images = torch.from_numpy(np.stack(arrays))
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return images.to(torch.float32).contiguous() / 255


def _raise_missing(packages: str, error: ImportError) -> NoReturn:
    raise ImportError(
        f"This data needs {packages} ({error}): install ncprior's extra 'demo' "
        f"(pip install '.[demo]' in the clone)."
    ) from error
