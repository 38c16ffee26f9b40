"""Data sets: real images from a folder of one's own, the Hugging Face Hub, or scikit-learn.

Needs the extra ``demo``. Images are float tensors ``(N, C, H, W)`` in [0, 1], labels ``(N,)``.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.utils import HFValidationError
from torch import Tensor

if TYPE_CHECKING:
    from pyarrow import ChunkedArray

_FOLDER = "NCPRIOR_DATA"  # the environment variable that names the user's own folder

_COLUMNS = ("image", "img")


class Labelled(NamedTuple):
    """Images and their classes.

    Attributes:
        images: Float images in [0, 1], with shape ``(N, C, H, W)``.
        labels: Integer classes, with shape ``(N,)``.
    """

    images: Tensor
    labels: Tensor

    def rows(self, index: Tensor | slice) -> Labelled:
        """Returns some of the images, with their labels.

        Example:
            >>> data = Labelled(torch.rand(10, 1, 8, 8), torch.arange(10))
            >>> data.rows(slice(3)).labels
            tensor([0, 1, 2])
        """
        return Labelled(self.images[index], self.labels[index])


def read_images(repo: str, part: str, label: str = "label") -> Labelled:
    """Reads labelled images from the Parquet files of a data set of the Hugging Face Hub.

    Files ``<part>*.parquet`` anywhere below ``$NCPRIOR_DATA/<repo>`` are read where there are any;
    otherwise they are downloaded, once, into the Hub's cache.

    Arguments:
        repo: The data set's repository, such as ``"ylecun/mnist"``.
        part: Its part, such as ``"train"`` or ``"test"``.
        label: The column of the classes.

    Returns:
        The images, grey (C = 1) or RGB (C = 3), and labels, in the order of the files.

    Raises:
        FileNotFoundError: If there are no such files, here or on the Hub.
        ValueError: If the files have no column ``image`` or ``img``, or none of the classes, or
            images of several sizes.
        ImportError: If pyarrow or Pillow is missing.

    Example:
        >>> read_images("ylecun/mnist", "test").images.shape  # doctest: +SKIP
        torch.Size([10000, 1, 28, 28])
    """
    try:
        from PIL import Image
        from pyarrow import parquet
    except ImportError as error:
        _refuse_without("pyarrow and Pillow", error)
    images, labels = [], []
    for path in _locate(repo, part):
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
    """Returns the 1,797 handwritten digits of 8×8 pixels that scikit-learn ships.

    A pixel is the share of black points among 16 of a scan, so that 16 x is a whole number.

    Raises:
        ImportError: If scikit-learn is missing.

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
        _refuse_without("scikit-learn", error)
    bunch = load_digits()
    images = torch.from_numpy(bunch.images / 16).to(torch.float32)
    return Labelled(images[:, None], torch.from_numpy(bunch.target).long())


def split(data: Labelled, held_out: int, seed: int) -> tuple[Labelled, Labelled]:
    """Shuffles, then splits into a training and a held-out part with each class in equal shares.

    The order is such that any stretch of either part has the classes in equal shares.

    Arguments:
        data: The images.
        held_out: Number of images of the held-out part.
        seed: Seed of the shuffle, which depends on nothing else.

    Returns:
        The two parts.

    Raises:
        ValueError: If either part would be empty.

    Example:
        >>> train, held_out = split(digits(), held_out=600, seed=0)
        >>> len(train.images), len(held_out.images)
        (1197, 600)
    """
    total = len(data.labels)
    if not 0 < held_out < total:
        raise ValueError(f"held_out must be between 1 and {total - 1}; got {held_out}.")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    labels = data.labels[order]
    place = torch.empty(total, dtype=torch.float64)
    for label in labels.unique():
        members = labels == label
        count = int(members.sum())
        place[members] = (torch.arange(count) + 0.5).double() / count  # quantiles of its class
    order = order[place.argsort(stable=True)]
    return data.rows(order[:-held_out]), data.rows(order[-held_out:])


def _locate(repo: str, part: str) -> list[Path]:
    """Finds the Parquet files, in the user's own folder or else on the Hub."""
    own = os.environ.get(_FOLDER)
    if own is not None and (found := _parquet_files(Path(own) / repo, part)):
        return found
    names = f"{part}*.parquet"
    looked = f"${_FOLDER} is not set" if own is None else f"{Path(own) / repo} has none"
    try:
        patterns = [names, f"*/{names}"]
        folder = snapshot_download(repo, repo_type="dataset", allow_patterns=patterns)
    except (OSError, HFValidationError) as error:
        raise FileNotFoundError(
            f"Found no {names} of {repo}: {looked}, and the Hugging Face Hub did not give any "
            f"({error}). Go online, or put the files below a folder of your own as "
            f"<folder>/{repo}/{part}.parquet and set {_FOLDER}=<folder>."
        ) from error
    if found := _parquet_files(Path(folder), part):
        return found
    raise FileNotFoundError(f"Found no {names} of {repo}: {looked}, and neither has the Hub.")


def _parquet_files(folder: Path, part: str) -> list[Path]:
    return sorted(folder.glob(f"**/{part}*.parquet"))


def _decode(column: ChunkedArray, read: Callable[[io.BytesIO], Any]) -> Tensor:
    """Decodes PNG or JPEG bytes to one tensor, with shape ``(N, C, H, W)``."""
    arrays = []
    for cell in column.to_pylist():
        image = read(io.BytesIO(cell["bytes"]))
        arrays.append(np.asarray(image if image.mode in ("L", "RGB") else image.convert("RGB")))
    if len(shapes := {array.shape for array in arrays}) != 1:
        found = ", ".join(map(str, sorted(shapes))) or "none"
        raise ValueError(f"Images of one size and kind are needed; the file has {found}.")
    images = torch.from_numpy(np.stack(arrays))
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return images.to(torch.float32).contiguous() / 255


def _refuse_without(what: str, error: ImportError) -> NoReturn:
    raise ImportError(f"This data needs {what} ({error}): pip install 'ncprior[demo]'") from error
