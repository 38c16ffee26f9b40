"""Checks of a source, as one call for the tests of an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils._pytree import tree_leaves

from ncprior.distributions import naming_bad_rows
from ncprior.source import Group, LatentSource, device_of, num_rows, posterior_of
from ncprior.testing.groups import (
    check_first_axis,
    check_group,
    draws_of,
    require,
    require_same,
    require_type,
    tensors,
)
from ncprior.utils.batches import own_batch
from ncprior.utils.precision import HALF
from ncprior.utils.random_state import random_state, reproducible
from ncprior.utils.states import state_of
from ncprior.utils.trees import Tree, clone, same, take

Source: TypeAlias = LatentSource[Any, Any]

Start: TypeAlias = tuple[int, Tree, Tree]  # batch size, encoding and condition


def check_source(source: Source, x: Tree, *, condition: Tree = None) -> None:
    """Checks that a source keeps the rules of :class:`ncprior.LatentSource`.

    Nothing is returned if all rules hold. The numbers are not compared with those of the model
    itself: do that once, see ``adapters/README.md``. The rules are: shapes and dtypes; priors and
    contexts do not depend on x; ``group`` is pure and ``advance`` leaves the old state usable; rows
    of a batch do not depend on other rows, and one row alone works too (encodings are compared
    where ``encode`` draws nothing); one seed gives one result; draws of the prior can be decoded;
    prior and posterior draw latents of one set, such as codes of the same categories, a sphere or a
    simplex; a condition is used, and heads see it where p(z_k | z_<k) depends on it;
    ``features`` are functions of z alone; gradients reach every latent from whatever is not whole
    numbers; grad mode and the VAE (parameters, ``.grad``, buffers, training flags) are unchanged.

    Arguments:
        source: The source to check.
        x: One batch, as the user's loader yields it, of at least two rows.
        condition: The condition of a conditional VAE for the same rows, or ``None``.

    Raises:
        AssertionError: At the first rule that is broken; the message gives the value and a remedy.
        TypeError: If the source is no :class:`ncprior.LatentSource`, or x no batch.

    Example:
        >>> check_source(source, x)
        >>> source.num_groups = 0
        >>> check_source(source, x)
        Traceback (most recent call last):
        AssertionError: num_groups must be an int of at least 1; got 0.
    """
    device = device_of(source)
    groups = source.num_groups
    right = type(groups) is int and groups >= 1
    require(right, f"num_groups must be an int of at least 1; got {groups}.")
    x = own_batch(x, device)
    condition = None if condition is None else own_batch(condition, device)
    with _frozen(source), reproducible(), torch.no_grad():
        encoding = source.encode(x)
        count = num_rows(encoding)
        _check_count(x, count)
        check_first_axis(encoding, count, "encode(x)")
        walk = _walk_and_check(source, (count, encoding, None))
        free = _walk_and_check(source, (count, None, condition), walk.latents)
        for state, z in (*zip(walk.states, walk.latents), *zip(free.states, free.latents)):  # noqa: B905
            with _naming_old_states():
                _check_purity(source, state)
                _check_fork(source, state, z)
        for last, start in ((walk.states[-1], x), (free.states[-1], None)):
            _check_decoder(source, last, start)
        _check_prior_walk(source, count, condition)
        _check_blindness(source, walk, free)
        for rows in ([count - 1, 0], [0]):
            _check_encoding_rows(source, x, encoding, rows)
            _check_walk_rows(source, walk, rows)
            _check_walk_rows(source, free, rows)
        _check_use_of_condition(source, free, condition)
        for k, z in enumerate(walk.latents):
            _check_features(source, k, z)
        _check_gradients(source, walk)
        _check_gradients(source, free)


@contextmanager
def _drawing_nothing(message: str) -> Iterator[None]:
    """Context that checks that no generator has moved."""
    before = random_state()
    yield
    require(same(random_state(), before), message)


@contextmanager
def _naming_old_states() -> Iterator[None]:
    try:
        yield
    except (IndexError, KeyError, AttributeError) as error:
        raise AssertionError(
            f"group or advance fails when a state is used again ({error!r}). Does advance change a "
            f"list or dict of the old state? Make a new one."
        ) from error


def _check_count(x: Tree, count: int) -> None:
    require(count > 1, f"Rows are compared: x must have at least 2 rows; got {count}.")
    rows = {len(leaf) for leaf in tree_leaves(x) if isinstance(leaf, Tensor) and leaf.ndim > 0}
    require(
        len(rows) != 1 or rows == {count},
        f"encode(x): x has {min(rows, default=0)} rows and its encoding {count}. The batch must be "
        f"the first axis of every tensor of an encoding.",
    )


def _check_blindness(source: Source, walk: _Walk, free: _Walk) -> None:
    rule = (
        "{} must be the same with and without x, as p(z_k | z_<k) and c(z_<k) do not depend on it. "
        "Pass condition= if the source takes one."
    )
    for k, (group, other) in enumerate(zip(walk.groups, free.groups, strict=True)):
        blind, z = other.posterior is None, walk.latents[k]
        require(blind, f"Group {k}: without x the posterior must be None.")
        pair = tensors(other, z), tensors(group._replace(posterior=None), z)
        require_same(*pair, rule.format(f"Group {k}: prior and context"), _tolerance(source))
    require_same(free.x, walk.x, rule.format("decode(state)"), _tolerance(source))


def _check_purity(source: Source, state: Tree) -> None:
    before, seen = clone(state), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        with _drawing_nothing("group(state) draws: it must show distributions, and draw nothing."):
            group = source.group(state)
        seen.append(draws_of(group))
    require_same(state, before, "group(state) has changed the state: it must be a pure view.")
    require_same(
        seen[1],
        seen[0],
        "A second group(state) differs, or draws otherwise under the same seed: group must be a "
        "pure view, and draws must come from torch's global generator.",
    )


def _check_decoder(source: Source, state: Tree, x: Tree) -> None:
    first, again = source.decode(state), source.decode(state)
    rule = "A second decode(state) differs: it must return the mean of p(x | z) and draw nothing."
    require_same(again, first, rule)
    images, likelihood = x[0] if isinstance(x, tuple | list) else x, None
    with suppress(ValueError):  # it has none
        likelihood = source.likelihood(state)
    if isinstance(images, Tensor) and isinstance(likelihood, Distribution):
        shape = tuple(likelihood.log_prob(images).shape)
        require(
            shape == (len(images),),
            f"likelihood(state).log_prob(x) must have shape ({len(images)},); got {shape}. "
            f"Independent sums over axes.",
        )
        with suppress(NotImplementedError):  # it is a density alone
            shape, right = tuple(likelihood.sample().shape), tuple(images.shape)
            rule = "likelihood(state).sample() must have the shape of x"
            require(shape == right, f"{rule}, {right}; got {shape}.")


def _check_prior_walk(source: Source, count: int, condition: Tree) -> None:
    """Checks that draws of the prior can be decoded."""
    state = source.start(count, None, condition)
    for _ in range(source.num_groups):
        state = source.advance(state, source.group(state).prior.sample())
    try:
        source.decode(state)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise AssertionError(
            f"decode(state) fails for draws of the prior ({error!r}). Are they of the dtype and range "
            f"of the posterior's?"
        ) from error


def _check_fork(source: Source, state: Tree, z: Tensor) -> None:
    before, group = clone((state, z)), draws_of(source.group(state))
    first = source.advance(state, z)
    kept = clone(first)
    source.advance(state, source.group(state).prior.sample())
    rule = "An old state stays usable: make a new one, without in-place operations."
    require_same((state, z), before, f"advance(state, z) has changed the state or z. {rule}")
    require_same(draws_of(source.group(state)), group, f"advance has changed its group. {rule}")
    require_same(first, kept, f"A second advance has changed the state of the first. {rule}")
    again = source.advance(state, z)
    require_same(again, first, "A second advance(state, z) differs: it must draw nothing.")


def _check_encoding_rows(source: Source, x: Tree, encoding: Tree, rows: list[int]) -> None:
    leaves, before = [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)], random_state()
    source.encode(x)
    if not same(random_state(), before):
        return  # an encoder that draws gives other rows other numbers
    if leaves and all(leaf.shape[:1] == (num_rows(encoding),) for leaf in leaves):
        part, whole = source.encode(take(x, rows)), take(encoding, rows)
        require_same(part, whole, f"encode(x): {_COMPANY}", _tolerance(source))


def _check_walk_rows(source: Source, walk: _Walk, rows: list[int]) -> None:
    latents, tolerance = take(walk.latents, rows), _tolerance(source)
    part = _walk_and_check(source, (len(rows), *take(walk.start[1:], rows)), latents)
    for k, z in enumerate(latents):
        whole = take(tensors(walk.groups[k], walk.latents[k]), rows)
        for group in (source.group(take(walk.states[k], rows)), part.groups[k]):
            require_same(tensors(group, z), whole, f"Group {k}: {_COMPANY}", tolerance)
    require_same(part.x, walk.x[rows], f"decode(state): {_COMPANY}", tolerance)


_COMPANY = (
    "some rows alone differ from the same rows of a batch. A walk must not depend on its company: "
    "no batch statistics, the batch as first axis of every encoding and state, and no number of "
    "rows kept in a state."
)


def _check_use_of_condition(source: Source, free: _Walk, condition: Tree) -> None:
    """Checks that something depends on the condition, and that heads see it where priors do."""
    rows = list(range(free.start[0]))
    turned = None if condition is None else take(condition, rows[1:] + rows[:1])
    if condition is None or same(turned, condition):
        return
    other = _walk_and_check(source, (free.start[0], None, turned), free.latents)
    pairs = list(zip(free.groups, other.groups, strict=True))
    seen = [not same(a.context, b.context) for a, b in pairs]
    moved = [
        not same(tensors(a._replace(context=None), z), tensors(b._replace(context=None), z))
        for (a, b), z in zip(pairs, free.latents, strict=True)
    ]
    require(
        any(seen) or any(moved) or not same(free.x, other.x),
        "The condition changes nothing: priors, contexts and decode(state) are the same with the "
        "conditions of other rows. Is it left out of the state?",
    )
    for k, (is_moved, is_seen) in enumerate(zip(moved, seen, strict=True)):
        require(
            is_seen or not is_moved,
            f"Group {k}: the prior depends on the condition, and the context does not. A head learns "
            f"q(z | c) / p(z | c) only if it sees c: make c a part of the context.",
        )


def _check_features(source: Source, k: int, z: Tensor) -> None:
    """Checks the inputs of the heads, which are functions of z_k alone."""
    two, name = torch.stack([z, z.flip(0)]), f"features({k}, z)"
    with _drawing_nothing(f"{name} draws: it must be a function of z alone."):
        h = source.features(k, two)
    require(
        isinstance(h, Tensor) and h.shape[:2] == two.shape[:2],
        f"{name} must keep the leading axes of z, which are proposals and rows: from (*, B, *event) "
        f"to (*, B, ...).",
    )
    require_same(source.features(k, z[:1]), h[0, :1], f"{name}: {_COMPANY}", _tolerance(source))


def _check_gradients(source: Source, walk: _Walk) -> None:
    latents = [z.clone().requires_grad_(z.is_floating_point()) for z in walk.latents]
    with torch.enable_grad():
        walk = _walk_and_check(source, walk.start, latents)
        shown = [tensors(g, z.detach()) for g, z in zip(walk.groups, latents, strict=True)]
        for k, z in enumerate(latents):
            later = [t for t in tree_leaves((shown[k + 1 :], walk.x)) if isinstance(t, Tensor)]
            later = [t.flatten() for t in later if t.is_floating_point()]  # tokens have none
            require(
                not (later and z.requires_grad) or _depends(torch.cat(later), z),
                f"Group {k}: no gradient reaches z from decode(state) or a later group. "
                f"A source never detaches and never disables gradients; its callers do.",
            )


def _depends(y: Tensor, z: Tensor) -> bool:
    if not y.requires_grad:
        return False
    return torch.autograd.grad(y.sum(), z, retain_graph=True, allow_unused=True)[0] is not None


@contextmanager
def _frozen(source: Source) -> Iterator[None]:
    before = state_of(_modules(source))
    yield
    after = state_of(_modules(source))
    changed = [name for name in after if not same(after[name], before.get(name))]
    require(not changed, f"The VAE must stay as it was; these changed: {', '.join(changed[:3])}.")


def _modules(source: Source) -> dict[str, nn.Module]:
    parts = {"source": source, **vars(source)}
    return {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def _tolerance(source: Source) -> float:
    """Relative difference of floats that is allowed between batch sizes."""
    tensors = [p for module in _modules(source).values() for p in module.parameters()]
    return 0.1 if any(p.dtype in HALF for p in tensors) else 1e-4


class _Walk(NamedTuple):
    start: Start
    states: list[Tree]  # K + 1: in front of every group, and the last
    groups: list[Group]
    latents: list[Tensor]
    x: Tensor


def _walk_and_check(source: Source, start: Start, latents: Sequence[Tensor] = ()) -> _Walk:
    """Visits all groups with given latents or draws of the posterior, and checks every output."""
    count, mode = start[0], torch.is_grad_enabled()
    states, groups, drawn = [source.start(*start)], [], []
    for k in range(source.num_groups):
        check_first_axis(states[-1], count, f"The state in front of group {k}")
        groups.append(source.group(states[-1]))
        require_type(groups[-1], Group, "group must return a Group")
        with naming_bad_rows(k, groups[-1].posterior):
            drawn.append(latents[k] if latents else posterior_of(groups[-1]).sample())
        check_group(groups[-1], drawn[-1], count, f"Group {k}")
        states.append(source.advance(states[-1], drawn[-1]))
    check_first_axis(states[-1], count, "The last state")
    x = source.decode(states[-1])
    require_type(x, Tensor, "decode(state) must return one tensor")
    check_first_axis(x, count, "decode(state)")
    require(
        torch.is_grad_enabled() == mode,
        "The source has turned gradients on or off. It must leave that to its callers.",
    )
    return _Walk(start, states, groups, drawn, x)
