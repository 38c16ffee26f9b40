"""The model card of a saved prior: what it is, how to load it, and how good it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCardData

if TYPE_CHECKING:
    from ncprior.diagnostics.report import Report
    from ncprior.prior import NCPrior

_TAGS = ["ncprior", "vae", "noise-contrastive-prior"]

_CARD = """\
---
{data}
---

# {name}

A [noise contrastive prior](https://arxiv.org/abs/2010.02917) for {vae}. The VAE is not in here and
was not changed: these are the ratio heads that reweigh its prior, so that what it decodes from
the prior comes closer to what it decodes from its own posterior. Saved by `ncprior` {version}.

## How to load it

```python
from functools import partial

from ncprior import NCPrior, sir

source = ...  # the VAE, such as ncprior.SingleGroup(prior, posterior, decoder, module=vae)
prior = NCPrior.from_pretrained(source, "{name}"{heads})
x = prior.sample(16, partial(sir, num_proposals={proposals})).x
```

## Latent groups

| Group | Head | Parameters | In use |
| ----: | :--- | ---------: | :----- |
{rows}

The ratio is used to the power of {strength:g}.{base}

## Diagnostics

{report}
"""

_BASE = "The base prior is a fitted {kind}, which comes with the heads and is put on when loading."

_OWN_BASE = "The base prior is one of its author's own: put it on the VAE's source before loading."


def model_card(
    prior: NCPrior,
    name: str,
    configuration: Mapping[str, Any],
    *,
    report: Report | None,
    card_data: Mapping[str, Any],
) -> str:
    """Fills the model card.

    Arguments:
        prior: The trained prior.
        name: What to load it by.
        configuration: What is saved in the file's header.
        report: What ``diagnose`` said of the prior.
        card_data: Metadata for the Hub; its tags are added to ours.

    Returns:
        The card: Markdown below a YAML front matter.
    """
    tags = [*_TAGS, *card_data.get("tags", ())]
    data = ModelCardData(**{"library_name": "ncprior", **card_data, "tags": tags})
    base_model = card_data.get("base_model")
    entries = zip(prior.heads, configuration["heads"], configuration["active"], strict=True)
    rows = [
        f"| {k} | {entry['kind']} | {sum(p.numel() for p in head.parameters()):,} "
        f"| {'yes' if on else 'no'} |"
        for k, (head, entry, on) in enumerate(entries)
    ]
    custom = any(map(_is_custom, configuration["heads"]))
    return _CARD.format(
        data=data.to_yaml(),
        name=name,
        vae=f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a VAE",
        version=configuration["ncprior"],
        heads=", heads=..." if custom else "",
        proposals=500 if report is None else report.num_proposals[-1],
        rows="\n".join(rows),
        strength=configuration["strength"],
        base=_told(configuration["base"]),
        report="It was saved without a report." if report is None else f"```text\n{report}\n```",
    )


def _is_custom(entry: Mapping[str, Any]) -> bool:
    return entry["kind"] == "custom" or any(map(_is_custom, entry["config"].get("heads", ())))


def _told(base: Mapping[str, Any] | None) -> str:
    """What the card says of the base prior."""
    if base is None:
        return ""
    return f" {_OWN_BASE if base['kind'] == 'custom' else _BASE.format(kind=base['kind'])}"
