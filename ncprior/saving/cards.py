"""Model cards: a description of a saved model and code to load it, as templates of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

_PRIOR = """\
# {name}

A [noise contrastive prior](https://arxiv.org/abs/2010.02917) for {vae}. The VAE is not in here and
was not changed: these are the ratio heads that reweigh its prior, so that samples decoded from the
prior come closer to samples decoded from its posterior. Saved by `ncprior` {ncprior}.

## How to load it

```python
from functools import partial

from ncprior import NCPrior, sir

source = ...  # the VAE, such as ncprior.SingleGroup(prior, posterior, decoder, module=vae)
prior = NCPrior.from_pretrained(source, "{name}"{own})
x = prior.sample(16, partial(sir, num_proposals={num_proposals})).x
```

## Latent groups

| Group | Head | Parameters | In use |
| ----: | :--- | ---------: | :----- |
{rows}

The ratio is used to the power of {strength:g}.{on_base}
"""

_BASE = (
    " The base prior is a fitted {kind}, which comes with the heads and is put on when loading."
)

_OWN_BASE = (
    " The base prior is not in here: put it on the VAE's source, by `rebase`, before loading."
)

_ENERGY = """\
# {name}

The energy of a [VAEBM](https://arxiv.org/abs/2010.00654) for {vae}: it reweighs the images of {of}
by e^(-E(x)). {missing} not in here and not changed. Saved by `ncprior` {ncprior}.

## How to load it

```python
{code}
```

## Settings

| | |
| :--- | :--- |
| Network | {kind}, {size:,} parameters |
| Chains | {num_steps} Langevin steps of {step_size:g} |
| Target | {langevin_target} |
| Decoder noise | {noise} |
| Noise on data | {on_data} |
"""


def model_card(text: str, tags: Sequence[str], data: Mapping[str, Any], report: str | None) -> str:
    """Returns a card: Markdown below a YAML front matter, with a report at its end.

    Arguments:
        text: The text of a prior or of an energy.
        tags: Tags of all cards of this kind.
        data: Metadata for the Hub; its tags are added.
        report: Text of a report.
    """
    tags = [*tags, *data.get("tags", ())]
    front = ModelCardData(**{"library_name": "ncprior", **data, "tags": tags}).to_yaml()
    end = "It was saved without a report." if report is None else f"```text\n{report}\n```"
    return f"---\n{front}\n---\n\n{text}\n## Diagnostics\n\n{end}\n"


def prior_text(
    config: Mapping[str, Any],
    sizes: Sequence[int],
    **names: Any,  # noqa: ANN401
) -> str:
    """Returns the text of a prior's card.

    Arguments:
        config: The saved configuration.
        sizes: Number of parameters of each head.
        names: ``name`` to load it by, ``vae`` as a link, and ``num_proposals`` of the example.
    """
    base = config["base"]
    groups = zip(sizes, config["heads"], config["active"], strict=True)
    rows = [
        f"| {k} | {entry['kind']} | {size:,} | {'yes' if on else 'no'} |"
        for k, (size, entry, on) in enumerate(groups)
    ]
    return _PRIOR.format(
        own=", heads=..." if any(map(_is_custom, config["heads"])) else "",
        rows="\n".join(rows),
        on_base="" if base is None else _OWN_BASE if _is_custom(base) else _BASE.format(**base),
        **{key: config[key] for key in ("ncprior", "strength")},
        **names,
    )


def energy_text(
    config: Mapping[str, Any],
    size: int,
    noise: str,
    **names: Any,  # noqa: ANN401
) -> str:
    """Returns the text of an energy's card.

    Arguments:
        config: The saved configuration.
        size: Number of parameters.
        noise: Description of the noise of a decoder without ``GaussianDecoder``.
        names: ``name`` to load it by, ``vae`` as a link, and ``num_proposals`` of the example.
    """
    sigma, on_data = config["sigma"], config["data_noise"]
    on_ncp = config["fingerprint"]["heads"] is not None
    settings = ("ncprior", "num_steps", "step_size", "langevin_target")
    return _ENERGY.format(
        of="a noise contrastive prior on it" if on_ncp else "its own prior",
        missing="The VAE and the ratio heads are" if on_ncp else "The VAE is",
        code=_energy_code(config, on_ncp, names["name"], names["num_proposals"]),
        kind=config["energy"]["kind"],
        size=size,
        noise=noise if sigma is None else f"one σ = {sigma:.4g}",
        on_data=f"σ = {on_data:.4g}" if on_data else "none",
        **{key: config[key] for key in settings},
        **names,
    )


def _energy_code(config: Mapping[str, Any], on_ncp: bool, name: str, num_proposals: int) -> str:
    """Code that loads an energy and samples."""
    sigma = config["sigma"]
    prior = "prior" if on_ncp else "source"
    own = ", energy=..." if _is_custom(config["energy"]) else ""
    sampler = f", sampler=partial(sir, num_proposals={num_proposals})" if on_ncp else ""
    lines = [
        *(["from functools import partial\n", "from ncprior import NCPrior, sir"] * on_ncp),
        "from ncprior.vaebm import VAEBM" + ", GaussianDecoder" * (sigma is not None),
        "\nsource = ...  # the VAE, such as ncprior.SingleGroup(prior, posterior, decoder)",
        *([f"source = GaussianDecoder(source, {sigma!r})"] * (sigma is not None)),
        *(['prior = NCPrior.from_pretrained(source, "...")'] * on_ncp),
        f'model = VAEBM.from_pretrained({prior}, "{name}"{own})',
        f"x = model.sample(16{sampler}).mean",
    ]
    return "\n".join(lines)


def _is_custom(entry: Mapping[str, Any]) -> bool:
    """Whether an entry, or a factor of a product of heads, is outside the tables of kinds."""
    return entry["kind"] == "custom" or any(map(_is_custom, entry["config"].get("heads", ())))
