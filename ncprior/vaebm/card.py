"""The model card of a saved energy: what it is, on what, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from huggingface_hub import ModelCardData

from ncprior.vaebm.model import VAEBM

_TAGS = ["ncprior", "vae", "energy-based-model", "vaebm"]

_CARD = """\
---
{data}
---

# {name}

The energy of a [VAEBM](https://arxiv.org/abs/2010.00654) for {vae}: it reweighs the images of {of}
by e^(-E(x)). {missing} not in here and not changed. Saved by `ncprior` {version}.

## How to load it

```python
{imports}
{setup}
model = VAEBM.from_pretrained({argument}, "{name}"{energy})
x = model.sample(16{start}).mean
```

## What it is

| | |
| :--- | :--- |
| Network | {kind}, {parameters:,} parameters |
| Chains | {num_steps} Langevin steps of {step_size:g} |
| Target | {langevin_target} |
| Decoder noise | {noise} |
| Noise on data | {data_noise} |
"""


def energy_card(
    model: VAEBM,
    name: str,
    configuration: Mapping[str, Any],
    *,
    card_data: Mapping[str, Any],
) -> str:
    """Fills the model card.

    Arguments:
        model: The trained model.
        name: What to load it by.
        configuration: What is saved in the file's header.
        card_data: Metadata for the Hub; its tags are added to ours.

    Returns:
        The card: Markdown below a YAML front matter.
    """
    tags = [*_TAGS, *card_data.get("tags", ())]
    data = ModelCardData(**{"library_name": "ncprior", **card_data, "tags": tags})
    base_model, sigma = card_data.get("base_model"), configuration["sigma"]
    data_noise = configuration["data_noise"]
    setup = "source = ...  # the VAE, such as ncprior.SingleGroup(prior, posterior, decoder)"
    if sigma is not None:
        setup += f"\nsource = GaussianDecoder(source, {sigma!r})"
    if model.prior is not None:
        setup += '\nprior = NCPrior.from_pretrained(source, "...")'
    on_ncp = model.prior is not None
    imports = ["from ncprior.vaebm import VAEBM"]
    if on_ncp:
        imports = [
            "from functools import partial",
            "",
            "from ncprior import NCPrior, sir",
            *imports,
        ]
    if sigma is not None:
        imports.append("from ncprior.vaebm import GaussianDecoder")
    return _CARD.format(
        data=data.to_yaml(),
        name=name,
        vae=f"[{base_model}](https://huggingface.co/{base_model})" if base_model else "a VAE",
        of="a noise contrastive prior on it" if on_ncp else "its own prior",
        missing="The VAE and the ratio heads are" if on_ncp else "The VAE is",
        version=configuration["ncprior"],
        imports="\n".join(imports) + "\n",
        setup=setup,
        start=", sampler=partial(sir, num_proposals=500)" if on_ncp else "",
        argument="prior" if on_ncp else "source",
        energy=", energy=..." if configuration["energy"]["kind"] == "custom" else "",
        kind=configuration["energy"]["kind"],
        parameters=sum(p.numel() for p in model.parameters()),
        noise=f"one σ = {sigma:.4g}" if sigma is not None else model.decoder_noise,
        data_noise=f"σ = {data_noise:.4g}" if data_noise else "none",
        **{key: configuration[key] for key in ("num_steps", "step_size", "langevin_target")},
    )
