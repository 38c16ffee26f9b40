r"""Spectral regularisation: the sum of the largest singular values of a network's weights.

.. math::
    R(\theta) = \sum_W \sigma_1(W) = \sum_W u_W^T W v_W,

where W is a weight with all axes but the first flattened, and u, v are its leading singular
vectors. They are found by power iteration, which starts from the vectors of the last call. The
gradient treats u and v as constants: ∂R/∂W = u vᵀ.

References:
    | VAEBM: A Symbiosis between Variational Autoencoders and Energy-based Models
    | (Xiao, Kreis, Kautz & Vahdat, ICLR 2021)
    | Spectral Norm Regularization for Improving the Generalizability of Deep Learning
    | (Yoshida & Miyato, 2017)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

_FIRST_ITERATIONS = 30


class SpectralPenalty(nn.Module):
    """Spectral penalty R(θ) of a network; the vectors u are buffers, the network no submodule.

    Arguments:
        net: The network; every parameter of two axes or more is a weight.
        num_iterations: Power iterations per call.
    """

    @torch.inference_mode(False)  # its buffers are written to in every step
    def __init__(self, net: nn.Module, num_iterations: int = 2) -> None:
        super().__init__()
        self.num_iterations = num_iterations
        object.__setattr__(self, "net", net)
        for i, weight in enumerate(self._weights()):
            self.register_buffer(f"u{i}", normalize(torch.randn_like(weight[:, 0]), dim=0))
        self._iterate(_FIRST_ITERATIONS)

    def forward(self) -> Tensor:
        """Returns Σ σ_1, a scalar."""
        self._iterate(self.num_iterations)
        norms = []
        for i, weight in enumerate(self._weights()):
            u = self.get_buffer(f"u{i}")
            v = normalize(weight.detach().T @ u, dim=0)
            norms.append(u @ weight @ v)
        if norms:
            return torch.stack(norms).sum()
        net: nn.Module = self.net  # type: ignore[assignment]
        return torch.zeros((), device=next((p.device for p in net.parameters()), None))

    def _weights(self) -> Iterator[Tensor]:
        net: nn.Module = self.net  # type: ignore[assignment]
        return (p.flatten(1) for p in net.parameters() if p.ndim > 1)

    @torch.no_grad()
    def _iterate(self, count: int) -> None:
        for i, weight in enumerate(self._weights()):
            u = self.get_buffer(f"u{i}")
            for _ in range(count):
                new = weight @ (weight.T @ u)
                length = new.norm()  # 0 if the weight is 0; the vector stays as it was
                u.copy_(torch.where(length > 0, new / length, u))
