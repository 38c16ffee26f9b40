"""Projections and neighbours of samples."""

import pytest
import torch
from sklearn.decomposition import PCA as SklearnPCA
from sklearn.neighbors import NearestNeighbors

from ncprior.geometry import PCA, nearest


def test_components_are_those_of_scikit_learn() -> None:
    x = torch.randn(200, 6) @ torch.randn(6, 6) + 3
    theirs = SklearnPCA(3, svd_solver="full").fit(x.numpy())
    mine, other = PCA(x, 3)(x), torch.from_numpy(theirs.transform(x.numpy()))
    assert torch.allclose(mine.abs(), other.abs(), atol=1e-3)


def test_all_components_keep_all_distances() -> None:
    x = torch.randn(30, 4)
    assert torch.allclose(torch.pdist(PCA(x, 500)(x)), torch.pdist(x), atol=1e-4)


def test_other_samples_are_projected_by_the_components_of_the_first() -> None:
    x = torch.randn(100, 3) * torch.tensor([10.0, 1.0, 0.1])
    y = PCA(x, 1)(x.mean(0) + torch.tensor([[0.0, 5.0, 5.0]]))
    assert y.abs().item() < 2  # of √50, almost nothing lies along the first component


def test_neighbours_are_those_of_scikit_learn() -> None:
    data, queries = torch.rand(300, 2, 3), torch.rand(37, 2, 3)
    fitted = NearestNeighbors(n_neighbors=4).fit(data.flatten(1).numpy())
    distance, row = fitted.kneighbors(queries.flatten(1).numpy())
    found = nearest(queries, data, 4, chunk_size=10)
    assert torch.equal(found.row, torch.from_numpy(row))
    assert torch.allclose(found.distance, torch.from_numpy(distance).float(), atol=1e-4)


@pytest.mark.parametrize(("shape", "k"), [((5, 3), 1), ((5, 2), 6), ((5, 2), 0)])
def test_neighbours_that_there_are_not_are_refused(shape: tuple[int, int], k: int) -> None:
    with pytest.raises(ValueError, match="rows of one shape"):
        nearest(torch.rand(4, 2), torch.rand(shape), k)
