"""Model cards: a description of a saved model and code to load it, as templates of text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from ncprior.saving.hub import is_repository
from ncprior.saving.kinds import base_kinds, is_custom, is_joint
from ncprior.utils.require import described
from ncprior.utils.texts import printable

_PRIOR = """\
# {heading}

A [noise contrastive prior](https://arxiv.org/abs/2010.02917) for {vae}. The VAE is not in here and
was not changed: {what} Saved by `ncprior` {ncprior}.

## How to load it

```python
{imports}

source = ...  # the VAE, such as ncprior.SingleGroup(prior, posterior, decoder, module=vae)
prior = NCPrior.from_pretrained(source, {name}{own})
x = prior.sample({sampler}).x
```

{about_sampler}

## Latent groups

| Group | Head | Parameters | In use |
| ----: | :--- | ---------: | :----- |
{rows}

{on_ratio}{on_base}
"""

_HEADS = """\
these are the ratio heads that reweigh its prior, so that samples decoded from the
prior come closer to samples decoded from its posterior."""

_NO_HEADS = "the prior is {base} alone, as all ratio heads are off."

_ADVICE = """\
`recommend_sampler(diagnose(prior, x_test), budget=500)` of `ncprior.diagnostics` finds the sampler
that fits these heads and the number of evaluations that a sample may cost."""

_BASE_ALONE = {
    "imports": "from ncprior import NCPrior",
    "sampler": "64",
    "about_sampler": "It needs no sampler: every draw is one of the base.",
}

_BASE = (
    " The base prior is a fitted {kind}, which comes with the heads and is put on when loading."
)

_FIRST = (
    " The head sees all groups of the VAE together. It chooses among the draws of a first prior, "
    "with a head for each of the {count} groups, which comes with it."
)

_OWN_BASE = (
    " The base prior is not in here: put it on the VAE's source, by `rebase`, before loading."
)

_ENERGY = """\
# {heading}

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

    Raises:
        TypeError: If the metadata is not of texts, numbers, and lists and dicts of them, or its
            tags are no list of texts.
        ValueError: If the Hub does not take the metadata.
    """
    for name, value in data.items():
        _require_plain(f"card_data[{name!r}]", value)
    more = data.get("tags") or []
    if not isinstance(more, list | tuple) or not all(isinstance(tag, str) for tag in more):
        raise TypeError(f"card_data['tags'] must be a list of texts; got {described(more)}.")
    try:
        entries = {**data, "library_name": "ncprior", "tags": [*tags, *more]}
        front = ModelCardData(**entries).to_yaml()
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"card_data must be metadata of a model card; got {', '.join(map(repr, data))} "
            f"({error}). See the documentation of model cards of the Hugging Face Hub."
        ) from error
    longest = max((len(ticks) for ticks in re.findall("`+", report or "")), default=0)
    fence = "`" * max(3, longest + 1)
    end = "It was saved without a report." if report is None else f"{fence}text\n{report}\n{fence}"
    return f"---\n{front}\n---\n\n{text}\n## Diagnostics\n\n{end}\n"


def vae_link(base_model: str | None) -> str:
    """Returns a link to the VAE in a Hub repository, or ``"a VAE"`` without one.

    Raises:
        ValueError: If the name cannot be that of a repository.
    """
    if base_model is None:
        return "a VAE"
    if not is_repository(base_model):
        raise ValueError(
            f"base_model must be a Hub repository, such as 'user/my-vae'; got "
            f"{described(base_model)}. Describe any other VAE in the card itself."
        )
    return f"[{base_model}](https://huggingface.co/{base_model})"


def _require_plain(name: str, value: Any) -> None:  # noqa: ANN401
    """Validates that metadata is of plain types, which YAML writes without names of classes."""
    if value is None or type(value) in (bool, int, float, str):
        return
    if type(value) in (list, tuple):
        for item in value:
            _require_plain(name, item)
    elif type(value) is dict and all(isinstance(key, str) for key in value):
        for key, item in value.items():
            _require_plain(f"{name}[{key!r}]", item)
    else:
        raise TypeError(
            f"{name} must be text, a number, or a list or dict of them; got {described(value)}. "
            f"Convert it first."
        )


def _heading(name: str) -> str:
    """A name of a directory as plain text of a Markdown heading."""
    return re.sub(r"([\\`*<>\[\]&|#])", r"\\\1", printable(name))


def prior_text(
    config: Mapping[str, Any],
    sizes: Sequence[int],
    **names: Any,  # noqa: ANN401
) -> str:
    """Returns the text of a prior's card.

    Arguments:
        config: The saved configuration.
        sizes: Number of parameters of each head.
        names: ``name`` to load it by, ``vae`` as a link, ``num_proposals`` of the example, and
            ``sampler``, the description of the saved one or ``None``.
    """
    base, name, strength = config["base"], names.pop("name"), config["strength"]
    is_on = any(config["active"]) and strength > 0
    on_mixture = base is not None and base["kind"] == "GaussianMixture" and len(sizes) == 1
    sampler, num_proposals = names.pop("sampler"), names.pop("num_proposals")
    example = _sampling(sampler, num_proposals, on_mixture) if is_on else _BASE_ALONE
    fitted = base is not None and not is_custom(base) and not is_joint(base)
    alone = "the fitted base" if fitted else "its base"
    groups = zip(sizes, config["heads"], config["active"], strict=True)
    rows = [
        f"| {k} | {entry['kind']} | {size:,} | {'yes' if on else 'no'} |"
        for k, (size, entry, on) in enumerate(groups)
    ]
    return _PRIOR.format(
        heading=_heading(name),
        name=json.dumps(name),
        own=", heads=..." if any(map(is_custom, config["heads"])) else "",
        rows="\n".join(rows),
        what=_HEADS if is_on else _NO_HEADS.format(base=alone),
        on_ratio=f"The ratio is used to the power of {strength:g}."
        if is_on
        else "No head is used.",
        on_base=_on_base(base),
        ncprior=config["ncprior"],
        **example,
        **names,
    )


def _on_base(base: Mapping[str, Any] | None) -> str:
    """The sentence on the saved base, if there is one."""
    if base is None:
        return ""
    if is_custom(base):
        return _OWN_BASE
    if is_joint(base):
        return _FIRST.format(count=base["config"]["num_groups"])
    return _BASE.format(kind=base_kinds(base))


def _sampling(sampler: str | None, num_proposals: int, on_mixture: bool) -> dict[str, str]:
    """Parts of a prior's card on sampling: with its own sampler, or else with a proposal."""
    if sampler is not None:
        about = f"The prior draws by its own sampler, `{sampler}`."
        return {
            "imports": "from ncprior import NCPrior",
            "sampler": "64",
            "about_sampler": about,
        }
    by_sir = f"partial(sir, num_proposals={num_proposals})"
    within = "\nfrom ncprior.samplers import within_components" * on_mixture
    return {
        "imports": f"from functools import partial\n\nfrom ncprior import NCPrior, sir{within}",
        "sampler": f"16, within_components({by_sir})" if on_mixture else f"16, {by_sir}",
        "about_sampler": _ADVICE,
    }


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
        names: ``name`` to load it by, ``vae`` as a link, ``num_proposals`` of the example, and
            ``has_sampler``, whether the NCP prior has a sampler of its own.
    """
    sigma, on_data = config["sigma"], config["data_noise"]
    on_ncp = config["fingerprint"]["heads"] is not None
    settings = ("ncprior", "num_steps", "step_size", "langevin_target")
    name, num_proposals = names.pop("name"), names.pop("num_proposals")
    by_sir = None if names.pop("has_sampler") or not on_ncp else num_proposals
    return _ENERGY.format(
        heading=_heading(name),
        of="a noise contrastive prior on it" if on_ncp else "its own prior",
        missing="The VAE and the ratio heads are" if on_ncp else "The VAE is",
        code=_energy_code(config, on_ncp, name, by_sir),
        kind=config["energy"]["kind"],
        size=size,
        noise=noise if sigma is None else f"one σ = {sigma:.4g}",
        on_data=f"σ = {on_data:.4g}" if on_data else "none",
        **{key: config[key] for key in settings},
        **names,
    )


def _energy_code(config: Mapping[str, Any], on_ncp: bool, name: str, by_sir: int | None) -> str:
    """Code that loads an energy and samples, from a prior by SIR with so many proposals."""
    sigma = config["sigma"]
    prior = "prior" if on_ncp else "source"
    own = ", energy=..." if is_custom(config["energy"]) else ""
    sampler = "" if by_sir is None else f", sampler=partial(sir, num_proposals={by_sir})"
    lines = [
        *(["from functools import partial\n"] * (by_sir is not None)),
        *(["from ncprior import NCPrior" + ", sir" * (by_sir is not None)] * on_ncp),
        "from ncprior.vaebm import VAEBM" + ", GaussianDecoder" * (sigma is not None),
        "\nsource = ...  # the VAE, such as ncprior.SingleGroup(prior, posterior, decoder)",
        *([f"source = GaussianDecoder(source, {sigma!r})"] * (sigma is not None)),
        *(['prior = NCPrior.from_pretrained(source, "...")'] * on_ncp),
        f"model = VAEBM.from_pretrained({prior}, {json.dumps(name)}{own})",
        f"x = model.sample(16{sampler}).mean",
    ]
    return "\n".join(lines)
