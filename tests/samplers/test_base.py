"""Properties that the samplers share."""

import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers.exact import rows
from helpers.problems import standard_normal
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from ncprior import langevin, sir
from ncprior.heads.networks import MLPHead
from ncprior.samplers.base import latents_at_once


def test_the_shape_of_log_r_is_checked() -> None:
    prior = rows(standard_normal(2), 4)
    with pytest.raises(ValueError, match=re.escape("(8, 4, 2)")):
        sir(prior, lambda z: z, num_proposals=8)
    with pytest.raises(ValueError, match=re.escape("(4, 2)")):
        langevin(prior, lambda z: z, num_steps=1, step_size=0.1)


@pytest.mark.parametrize(
    "sampler",
    [
        partial(sir, num_proposals=8),
        partial(langevin, num_steps=3, step_size=0.1),
        partial(langevin, num_steps=3, step_size=0.1, adjusted=True),
    ],
)
def test_samplers_leave_no_gradients(sampler: Callable[..., tuple[Tensor | None, ...]]) -> None:
    head = MLPHead((2,), width=8, depth=1)
    with torch.no_grad():
        head.out.weight.normal_()
    frozen = nn.Parameter(torch.ones(()), requires_grad=False)
    loc = torch.zeros(4, 2, requires_grad=True)
    before = [p.clone() for p in head.parameters()]
    draw = sampler(Independent(Normal(loc, 1.0), 1), lambda z: frozen * head(z))
    assert all(part is None or not part.requires_grad for part in draw)
    assert loc.grad is None and frozen.grad is None and not frozen.requires_grad
    assert all(p.grad is None and p.requires_grad for p in head.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True))
    assert torch.is_grad_enabled()


def test_an_accelerator_gets_more_latents_at_once_within_a_bound_on_memory() -> None:
    vectors, maps = (
        torch.empty(1, 16, 16, device="meta"),
        torch.empty(1, 4, 20, 16, 16, device="meta"),
    )
    assert latents_at_once(torch.empty(1, 16, 16), None) == 4096
    assert latents_at_once(vectors, None) == 2**17
    assert latents_at_once(maps, None) == 2**26 // (20 * 16 * 16)
    assert latents_at_once(torch.empty(1, 1, 2**27, device="meta"), None) == 1
    assert latents_at_once(vectors, 7) == 7
