# %% [markdown]
# # A hierarchical model, group by group
#
# A hierarchical VAE has groups of latents z_1, z_2, …: p(z_2 | z_1) depends on z_1. Every group has a prior hole of its
# own, and gets a head of its own. This notebook writes such a VAE as a source, trains the heads together, and looks
# at the groups one by one. Needs the extra `demo`; takes less than a minute on one core.

# %%
# %matplotlib inline
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence
from torch.nn.functional import binary_cross_entropy_with_logits

from ncprior import Group, LatentSource, NCPrior, fit, sir
from ncprior.demo import digits, plot_samples, split
from ncprior.diagnostics import diagnose
from ncprior.testing import check_source
from ncprior.utils import require_eval, train

torch.manual_seed(0)
data, held_out = split(digits(), 300, seed=0)
x_train, x_test = data.images.flatten(1), held_out.images.flatten(1)

# %% [markdown]
# ## The VAE
#
# Two groups of latents: z_1 with the prior N(0, I), and z_2 with a prior that a network makes of z_1.


# %%
def net(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 128), nn.SiLU(), nn.Linear(128, outputs))


def normal(parameters: Tensor) -> Independent:
    mean, log_std = parameters.chunk(2, dim=1)
    return Independent(Normal(mean, log_std.clamp(-5, 5).exp()), 1)


class TwoGroups(nn.Module):
    def __init__(self, first: int = 3, second: int = 5) -> None:
        super().__init__()
        self.sizes = (first, second)
        self.posterior_1, self.posterior_2 = net(64, 2 * first), net(64 + first, 2 * second)
        self.prior_2, self.decoder = net(first, 2 * second), net(first + second, 64)

    def negative_elbo(self, x: Tensor) -> Tensor:
        q_1 = normal(self.posterior_1(x))
        z_1 = q_1.rsample()
        q_2 = normal(self.posterior_2(torch.cat([x, z_1], 1)))
        logits = self.decoder(torch.cat([z_1, q_2.rsample()], 1))
        misfit = 16 * binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)
        p_1 = Independent(Normal(torch.zeros_like(z_1), 1.0), 1)
        return misfit + kl_divergence(q_1, p_1) + kl_divergence(q_2, normal(self.prior_2(z_1)))


vae = TwoGroups()


def loss(rows: Tensor) -> Tensor:
    return vae.negative_elbo(x_train[rows]).mean()


train(vae, loss, len(x_train), steps=2500, batch_size=128, progress=False)

# %% [markdown]
# ## The source
#
# Five short methods. The state holds x, if there is one, and the latents so far. `context` is the part of it that
# the head of the group sees: nothing for z_1, and z_1 for z_2.


# %%
class Source(LatentSource[Any, Any]):
    num_groups = 2

    class State(NamedTuple):
        x: Any
        z: Tensor  # the latents so far, (B, D)
        k: int

    def __init__(self, module: TwoGroups) -> None:
        self.module = module

    def encode(self, x: Any) -> Tensor:
        require_eval(self.module)
        return x

    def start(self, batch_size: int, encoding: Any = None, condition: Any = None) -> State:
        return self.State(encoding, next(self.module.parameters()).new_zeros(batch_size, 0), 0)

    def group(self, state: State) -> Group:
        vae, (x, z, k) = self.module, state
        if k == 0:
            zero = z.new_zeros(len(z), vae.sizes[0])
            q = None if x is None else normal(vae.posterior_1(x))
            return Group(Independent(Normal(zero, 1.0), 1), q, None)
        q = None if x is None else normal(vae.posterior_2(torch.cat([x, z], 1)))
        return Group(normal(vae.prior_2(z)), q, z)

    def advance(self, state: State, z: Tensor) -> State:
        return self.State(state.x, torch.cat([state.z, z], 1), state.k + 1)

    def decode(self, state: State) -> Tensor:
        return self.module.decoder(state.z).sigmoid()


source = Source(vae)
check_source(source, x_test[:16])

# %% [markdown]
# ## A head for each group
#
# Both heads are trained together. `diagnose` has a line for each group: how much of the KL between encodings and prior its
# head finds, how many of 50 proposals are worth anything, and a verdict. It counts groups from 0.

# %%
prior = NCPrior.for_source(source, x_train[:256], width=64)
fit(prior, x_train, steps=1500, progress=False)
report = diagnose(prior, x_test, train=x_train, num_proposals=(50, 500))
print(report)

# %% [markdown]
# ## One group at a time
#
# `prior.active` switches the head of a group off; the group is then drawn from the VAE's own prior.

# %%
sampler = partial(sir, num_proposals=50)
rows = {"data": x_test[:16]}
for name, active in {
    "no head": [False, False],
    "group 1 only": [True, False],
    "group 2 only": [False, True],
    "both": [True, True],
}.items():
    prior.active = active
    torch.manual_seed(1)
    rows[name] = prior.sample(16, sampler).x
plot_samples({name: x.reshape(-1, 1, 8, 8) for name, x in rows.items()})

# %% [markdown]
# ## Where the hole is
#
# KL is the mean log-ratio of held-out encodings: how much more likely the new prior makes them, up to its log Z. Here the
# hole is in z_2: the network that makes its prior from z_1 is a poor match. A group without a gain needs no head, and
# [gating](../../docs/training.md) leaves it at its base.

# %%
for group in report.groups:
    print(f"z_{group.group + 1}: {group.kl:.2f} nats, verdict: {group.verdict}")

# %% [markdown]
# For a whole model, read [how to write an adapter](../../adapters/README.md#write-an-adapter-for-your-model) and
# `examples/hierarchical_mnist.py` with ten groups.
