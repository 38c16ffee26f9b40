"""Gating: groups whose heads have learnt nothing keep their base prior."""

from __future__ import annotations

from ncprior.prior import NCPrior
from ncprior.training.history import History
from ncprior.utils.require import require_instance


def gate(prior: NCPrior, history: History) -> tuple[int, ...]:
    """Switches off the groups (``prior.active``) whose heads have learnt nothing.

    A head has learnt something if its best held-out loss is below 2 log 2 nats, the loss without a
    head, by three standard errors, or if a further stage of its group was kept. The paper gates no
    groups.

    Arguments:
        prior: The trained prior; its ``active`` is changed.
        history: The history of its training, by :func:`ncprior.fit`.

    Returns:
        The groups that were switched off, from 0.

    Raises:
        TypeError: If an argument is of the wrong type. The message names the remedy.
        ValueError: If the history has no held-out losses, or is of another prior. Pass
            ``held_out`` to ``fit``.

    Example:
        >>> from ncprior import fit
        >>> x = torch.randn(300, 3) @ torch.randn(3, 3)
        >>> history = fit(prior, x, steps=1, learning_rate=1e-9, progress=False)
        >>> gate(prior, history), prior.active
        ((0,), [False])
    """
    require_instance("prior", prior, NCPrior, "Pass the trained NCPrior.")
    require_instance("history", history, History, "Pass what fit returned.")
    if len(history.best_step) != len(prior.heads):
        raise ValueError(
            f"The history must be of this prior, with {len(prior.heads)} groups; got "
            f"{len(history.best_step)} groups. Pass the history of its own training."
        )
    if history.best_loss is None:
        raise ValueError(
            "Gating needs held-out losses, and this history has none. Pass held_out= to fit."
        )
    learnt = history.has_learnt()
    for stage in history.stages:
        learnt = [one or other for one, other in zip(learnt, stage.kept, strict=True)]
    prior.active = [on and has for on, has in zip(prior.active, learnt, strict=True)]
    return tuple(k for k, has in enumerate(learnt) if not has)
