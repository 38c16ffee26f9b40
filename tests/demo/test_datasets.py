"""Reading data sets: from a folder of Parquet files, from the Hub, from scikit-learn."""

import builtins
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ncprior.demo import datasets as data
from ncprior.demo.datasets import Labelled, digits, read_images, split

REPO = "someone/shapes"


def png(pixels: np.ndarray) -> dict[str, Any]:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def write(path: Path, pixels: list[np.ndarray], labels: list[int], column: str = "image") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: [png(p) for p in pixels], "label": labels}), path)


def grey(value: int, size: int = 4) -> np.ndarray:
    pixels = np.zeros((size, size), np.uint8)
    pixels[0, 1] = value
    return pixels


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own folder; whoever asks the Hub from it is told that it is not there."""

    def offline(repo: str, **_: Any) -> str:
        raise ConnectionError(f"no way to {repo}")

    monkeypatch.setenv("NCPRIOR_DATA", str(tmp_path))
    monkeypatch.setattr(data, "snapshot_download", offline)
    return tmp_path


def test_reads_every_file_of_a_part_in_order(folder: Path) -> None:
    below = folder / REPO / "main"
    write(below / "train-00001-of-00002.parquet", [grey(3)], [7])
    write(below / "train-00000-of-00002.parquet", [grey(255), grey(51)], [5, 6])
    write(below / "test-00000-of-00001.parquet", [grey(0)], [9])
    images, labels = read_images(REPO, "train")
    assert images.shape == (3, 1, 4, 4)
    assert images.dtype == torch.float32
    torch.testing.assert_close(images[:, 0, 0, 1], torch.tensor([1.0, 0.2, 3 / 255]))
    assert labels.tolist() == [5, 6, 7]
    assert read_images(REPO, "test").labels.tolist() == [9]


def test_splits_that_begin_alike_are_others(folder: Path) -> None:
    for name in ("test.parquet", "test_corrupted.parquet", "tests-00000-of-00001.parquet"):
        write(folder / REPO / name, [grey(0)], [len(name)])
    assert read_images(REPO, "test").labels.tolist() == [len("test.parquet")]


def test_reads_colour_images_and_their_channels_in_order(folder: Path) -> None:
    pixels = np.zeros((2, 3, 3), np.uint8)
    pixels[1, 2] = (255, 51, 0)  # row 1, column 2: red, green, blue
    write(folder / REPO / "train.parquet", [pixels], [0], column="img")
    images = read_images(REPO, "train").images
    assert images.shape == (1, 3, 2, 3)
    torch.testing.assert_close(images[0, :, 1, 2], torch.tensor([1.0, 0.2, 0.0]))


@pytest.mark.parametrize("own", ["empty", "unset"])
def test_missing_data_says_what_was_looked_for_and_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch, own: str
) -> None:
    if own == "unset":
        monkeypatch.delenv("NCPRIOR_DATA")
    with pytest.raises(FileNotFoundError) as error:
        read_images(REPO, "train")
    looked = "$NCPRIOR_DATA is not set" if own == "unset" else f"{folder / REPO} has none"
    for part in (
        looked,
        f"train.parquet or train-*.parquet of {REPO}",
        "no way to",
        "set NCPRIOR_DATA=",
    ):
        assert part in str(error.value)


def test_what_is_not_in_the_folder_comes_from_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = folder / "cache"
    write(snapshot / "mnist" / "test-0.parquet", [grey(9)], [4])
    asked: dict[str, Any] = {}

    def download(repo: str, **options: Any) -> str:
        asked.update(options, repo=repo)
        return str(snapshot)

    monkeypatch.setattr(data, "snapshot_download", download)
    assert read_images(REPO, "test").labels.tolist() == [4]
    assert asked == {
        "repo": REPO,
        "repo_type": "dataset",
        "allow_patterns": [
            "test.parquet",
            "test-*.parquet",
            "*/test.parquet",
            "*/test-*.parquet",
        ],
    }
    with pytest.raises(FileNotFoundError, match="neither has the Hub"):
        read_images(REPO, "train")


def test_a_table_without_images_or_labels_is_refused(folder: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), folder / "a.parquet")
    (folder / REPO).mkdir(parents=True)
    (folder / "a.parquet").rename(folder / REPO / "train.parquet")
    with pytest.raises(ValueError, match="column named image or img .* it has text, label"):
        read_images(REPO, "train")


def test_images_of_several_sizes_are_refused(folder: Path) -> None:
    write(folder / REPO / "train.parquet", [grey(1), grey(1, size=5)], [0, 0])
    with pytest.raises(ValueError, match=r"one size.*\(4, 4\), \(5, 5\)"):
        read_images(REPO, "train")


@pytest.mark.parametrize(
    ("missing", "call"),
    [
        ("pyarrow", lambda: read_images(REPO, "train")),
        ("PIL", lambda: read_images(REPO, "train")),
        ("sklearn.datasets", digits),
    ],
)
def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, missing: str, call: Callable[[], Labelled]
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == missing:
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"No module.*extra 'demo' \(pip install '\.\[demo\]'"):
        call()


def test_digits_are_counts_out_of_sixteen() -> None:
    images, labels = digits()
    assert images.shape == (1797, 1, 8, 8)
    counts = 16 * images
    assert torch.equal(counts, counts.round())
    assert (counts.min(), counts.max()) == (0, 16)
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def numbered(labels: torch.Tensor) -> Labelled:
    """Images that hold their own place."""
    return Labelled(torch.arange(len(labels)).float().reshape(-1, 1, 1, 1), labels)


def test_a_split_keeps_every_row_once_and_labels_with_images() -> None:
    labels = torch.randint(10, (500,))
    parts = split(numbered(labels), 200, seed=0)
    assert [len(part.images) for part in parts] == [300, 200]
    rows = torch.cat([part.images.flatten() for part in parts]).long()
    assert torch.equal(rows.sort().values, torch.arange(500))
    assert torch.equal(torch.cat([part.labels for part in parts]), labels[rows])


def test_a_split_of_ordered_data_is_shuffled_and_has_classes_in_equal_shares() -> None:
    data = numbered(torch.arange(10).repeat_interleave(60))  # in order by class
    train, held_out = split(data, 200, seed=0)
    assert train.labels.bincount().tolist() == [40] * 10
    assert held_out.labels.bincount().tolist() == [20] * 10
    assert train.labels[:100].bincount(minlength=10).tolist() == [10] * 10
    within = train.images.flatten()[train.labels == 3]  # rows of one class: 180 to 239
    assert not torch.equal(within, within.sort().values)


def test_a_split_depends_on_its_seed_alone() -> None:
    data = numbered(torch.randint(10, (100,)))
    first = split(data, 30, seed=1)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again, other = split(data, 30, seed=1), split(data, 30, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first[1].images, again[1].images)
    assert not torch.equal(first[1].images, other[1].images)


@pytest.mark.parametrize("held_out", [0, 10, -1])
def test_a_split_without_rows_is_refused(held_out: int) -> None:
    with pytest.raises(
        ValueError, match=rf"held_out must be a whole number in \[1, 9\]; got {held_out}"
    ):
        split(numbered(torch.zeros(10, dtype=torch.long)), held_out, seed=0)
