"""Heads in the folder of their VAE: its own files stay, and cards of ours are replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.hub_problems import equal_draws

from ncprior import NCPrior
from ncprior.heads import MLPHead
from ncprior.saving.heads import FILE
from ncprior.saving.readme import is_ours
from ncprior.vaebm import VAEBM, GaussianDecoder

OTHERS = {
    "text": "# My VAE\n",
    "empty": "",
    "metadata": "---\nlibrary_name: pythae\ntags:\n- ncprior\n---\n# My VAE\n",
    "a longer name": "---\nlibrary_name: ncprior-fork\n---\n",
    "in a list": "---\nmodels:\n  library_name: ncprior\n---\n",
    "in the text": "# My VAE\n---\nlibrary_name: ncprior\n---\n",
    "without an end": "---\nlibrary_name: ncprior\n",
    "another encoding": "\xff\xfe",
}

OURS = {
    "plain": "---\nlibrary_name: ncprior\n---\n",
    "quoted": "---\nlicense: mit\nlibrary_name: 'ncprior'\n---\ntext",
    "of Windows": "\ufeff---\r\nlibrary_name: ncprior\r\ntags: []\r\n---\r\n",
}


@pytest.mark.parametrize("readme", OTHERS.values(), ids=list(OTHERS))
def test_the_vaes_own_files_stay(readme: str, prior: NCPrior, tmp_path: Path) -> None:
    files = {"config.json": b'{"latent_dim": 2}', "README.md": readme.encode("latin-1")}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for _ in range(2):
        prior.save_pretrained(tmp_path)
        assert {name: (tmp_path / name).read_bytes() for name in files} == files
    assert {path.name for path in tmp_path.iterdir()} == {*files, FILE, "ncprior.json"}
    assert equal_draws(prior.eval(), NCPrior.from_pretrained(prior.source, tmp_path))


@pytest.mark.parametrize("readme", OURS.values(), ids=list(OURS))
def test_a_card_of_ours_is_replaced(readme: str, prior: NCPrior, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(readme)
    prior.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_bytes()
    assert b"# " in card and is_ours(card)


def test_a_prior_and_an_energy_share_the_folder_of_their_vae(
    prior: NCPrior, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    prior.save_pretrained(tmp_path)
    on_noise = NCPrior(GaussianDecoder(prior.source, 0.1), prior.heads)
    VAEBM(on_noise, MLPHead((3,), width=8)).save_pretrained(tmp_path)
    names = {FILE, "ncprior.json", "vaebm.safetensors", "vaebm.json", "README.md", "config.json"}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.parametrize(
    "card",
    [{"base_model": "someone/vae"}, {"card_data": {"license": "mit"}, "base_model": "a/b"}],
)
def test_a_card_that_was_asked_for_is_not_left_out_in_silence(
    card: dict[str, Any], prior: NCPrior, tmp_path: Path
) -> None:
    (tmp_path / "README.md").write_text("# My VAE\n")
    with pytest.warns(UserWarning, match="stays as it is: no card was written") as caught:
        prior.save_pretrained(tmp_path, **card)
    assert [warning.filename for warning in caught] == [__file__]
    assert all(name in str(caught[0].message) for name in card)
    assert (tmp_path / "README.md").read_text() == "# My VAE\n"
