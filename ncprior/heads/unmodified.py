"""Whether a head is as its class makes it, so that it can be evaluated in another way."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

from ncprior.heads.codes import CategoricalHead
from ncprior.heads.networks import ConvHead, Head, MLPHead


def is_unmodified(head: nn.Module) -> bool:
    """Returns whether a head has the modules its class makes and no hooks.

    Arguments:
        head: Any module; for other classes than those of this package, only hooks are checked.
    """
    for module in head.modules():
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return False
    if not isinstance(head, Head) or type(head) not in (MLPHead, ConvHead, CategoricalHead):
        return True
    kind: Any = type(head)
    return _layout(head) == _made_layout(kind, json.dumps(head.config()))


def _layout(head: nn.Module) -> tuple[tuple[str, type[nn.Module]], ...]:
    return tuple((name, type(module)) for name, module in head.named_modules())


@cache
def _made_layout(
    kind: Callable[..., Head], config: str
) -> tuple[tuple[str, type[nn.Module]], ...]:
    with torch.device("meta"):
        return _layout(kind(**json.loads(config)))
