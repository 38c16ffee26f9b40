"""Saving and loading in general: damaged and edited files, paths, fingerprints of the VAE."""

import copy
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.hub_problems import edit, equal_draws, gaussian
from helpers.problems import CorrelatedPair, SampleOnly, around, standard_normal
from torch import Tensor
from torch.distributions import Independent, Normal

from ncprior import NCPrior, SingleGroup, __version__
from ncprior.bases import Empirical, rebase
from ncprior.heads.networks import MLPHead
from ncprior.saving.heads import FILE, inspect
from ncprior.utils.fingerprints import base_fingerprint
from ncprior.vaebm import VAEBM


def test_the_file_itself_can_be_named(prior: NCPrior, saved: Path) -> None:
    for where in (saved, str(saved), saved / FILE, str(saved / FILE)):
        assert equal_draws(prior.eval(), NCPrior.from_pretrained(prior.source, where))


def test_the_readable_copy_says_the_same_and_is_never_read(prior: NCPrior, saved: Path) -> None:
    assert (
        json.loads((saved / "ncprior.json").read_text()) == inspect(saved) == inspect(saved / FILE)
    )
    (saved / "ncprior.json").write_text("nonsense")
    assert equal_draws(prior.eval(), NCPrior.from_pretrained(prior.source, saved))


def test_saving_again_replaces_and_leaves_no_trace(prior: NCPrior, saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    prior.save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    with torch.no_grad():
        next(prior.parameters()).add_(1.0)
    prior.save_pretrained(saved)
    assert equal_draws(prior.eval(), NCPrior.from_pretrained(prior.source, saved))


def test_loading_leaves_the_generator_alone(prior: NCPrior, saved: Path) -> None:
    before = torch.get_rng_state()
    NCPrior.from_pretrained(prior.source, saved)
    assert torch.equal(torch.get_rng_state(), before)


# What is refused, and leaves everything as it was


def refuses(match: str, source: Any, path: Path, **options: Any) -> None:
    """Loading is refused in one clear sentence, and heads passed in are as they were."""
    heads = MLPHead((2,), width=8, depth=1)
    before = copy.deepcopy(heads.state_dict())
    for given in ({}, {"heads": heads}):
        with pytest.raises(ValueError, match=match) as caught:
            NCPrior.from_pretrained(source, path, **given, **options)
        assert str(path) in str(caught.value)
        assert heads.training
        for name, tensor in heads.state_dict().items():
            assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("length", [0, 7, 8, 9, 300, 900, -1])
def test_a_truncated_file_is_refused(length: int, prior: NCPrior, saved: Path) -> None:
    whole = (saved / FILE).read_bytes()
    (saved / FILE).write_bytes(whole[:length])
    refuses("not a whole safetensors file", prior.source, saved)


def test_random_bytes_are_refused(prior: NCPrior, saved: Path) -> None:
    (saved / FILE).write_bytes(torch.randint(256, (3000,), dtype=torch.uint8).numpy().tobytes())
    refuses("not a whole safetensors file", prior.source, saved)


def test_text_edited_in_the_header_is_refused(prior: NCPrior, saved: Path) -> None:
    whole = (saved / FILE).read_bytes()
    edited = whole.replace(b'\\"strength\\": 1.0', b'\\"strength\\": 9.0')
    assert edited != whole
    (saved / FILE).write_bytes(edited)
    refuses("checksum differs", prior.source, saved)


EDITS: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], object]] = {
    "has format 2, and ncprior .* reads format 1": lambda c, t: c.update(format=2),
    "has format None": lambda c, t: c.pop("format"),
    "unknown keys: code, more": lambda c, t: c.update(more=1, code="import os"),
    "has no valid strength": lambda c, t: c.update(strength="1"),
    "no valid strength": lambda c, t: c.update(strength=-1.0),
    "valid strength": lambda c, t: c.pop("strength"),
    "has no valid active": lambda c, t: c.update(active=[1]),
    "no valid active": lambda c, t: c.update(active=[True, True]),
    "has no valid heads": lambda c, t: c.update(heads={}),
    "no valid heads, active": lambda c, t: c.update(num_groups=2),
    "has no valid fingerprint": lambda c, t: c.update(fingerprint={"vae": None}),
    "valid fingerprint": lambda c, t: c["fingerprint"].update(base=1),
    "has no valid ncprior": lambda c, t: c.update(ncprior=None),
    "missing: heads.0.out.bias; unexpected: heads.0.out.basis": lambda c, t: t.update(
        {"heads.0.out.basis": t.pop("heads.0.out.bias")}
    ),
    r"of another shape: heads.0.out.bias \(2,\) for \(1,\)": lambda c, t: t.update(
        {"heads.0.out.bias": torch.zeros(2)}
    ),
    "unexpected: vae.weight": lambda c, t: t.update({"vae.weight": torch.zeros(2)}),
}


NEWER: dict[str, Callable[[dict[str, Any], dict[str, Tensor]], object]] = {
    "has format 2": lambda c, t: c.update(format=2),
    "unknown keys: more": lambda c, t: c.update(more=1),
    "no valid strength": lambda c, t: c.update(strength="1"),
    "head 0 must be one of": lambda c, t: c.update(heads=[{"kind": "BetterHead", "config": {}}]),
    "cannot be built as a MLPHead": lambda c, t: c["heads"][0]["config"].update(gated=True),
    "its sampler must be one of": lambda c, t: c.update(sampler={"kind": "nuts", "config": {}}),
    "its sampler sir has unknown": lambda c, t: c.update(
        sampler={"kind": "sir", "config": {"num_proposals": 3, "more": 1}}
    ),
    "unexpected: heads.0.gate": lambda c, t: t.update({"heads.0.gate": torch.zeros(2)}),
}


@pytest.mark.parametrize("match", NEWER)
def test_a_file_of_a_newer_version_says_so(match: str, prior: NCPrior, saved: Path) -> None:
    whole = (saved / FILE).read_bytes()

    def error_of(version: str) -> str:
        (saved / FILE).write_bytes(whole)
        edit(saved / FILE, lambda c, t: (NEWER[match](c, t), c.update(ncprior=version)))
        with pytest.raises(ValueError, match=match) as caught:
            NCPrior.from_pretrained(prior.source, saved)
        return str(caught.value)

    for version in ("99.0.1", "99.0.dev3", "0.999", f"{__version__}.1"):
        remedy = (
            f"written by ncprior {version}, and this is {__version__}: install a newer version "
            f"of ncprior."
        )
        assert error_of(version).endswith(remedy)
    for version in (__version__, "0.0.1", "9" * 5000, "99.0\x1b[31m", "99.0\n", "newest"):
        assert error_of(version).endswith((" again.", "the version of ncprior that wrote it."))


@pytest.mark.parametrize("match", EDITS)
def test_an_edited_file_is_refused(match: str, prior: NCPrior, saved: Path) -> None:
    edit(saved / FILE, EDITS[match])
    refuses(match, prior.source, saved)


def test_the_number_of_groups_must_be_the_sources(saved: Path) -> None:
    refuses("heads for 1 latent groups, and the source has 2", CorrelatedPair(), saved)


def test_what_is_missing_is_named(prior: NCPrior, tmp_path: Path) -> None:
    for where in (tmp_path, tmp_path / "absent", str(tmp_path / "absent.safetensors")):
        with pytest.raises(FileNotFoundError, match=str(tmp_path)):
            NCPrior.from_pretrained(prior.source, where)


@pytest.mark.parametrize("name", ["absent.safetensors", Path("absent")])
def test_a_file_that_is_missing_is_not_looked_for_on_the_hub(
    name: str | Path, prior: NCPrior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"There is no file or folder {name}"):
        NCPrior.from_pretrained(prior.source, name)


def test_a_path_that_can_be_no_repository_is_not_asked_for(prior: NCPrior) -> None:
    with pytest.raises(FileNotFoundError, match="no file or folder a/b/c"):
        NCPrior.from_pretrained(prior.source, "./a/b/c")


def test_a_local_path_has_no_revisions(prior: NCPrior, saved: Path) -> None:
    with pytest.raises(ValueError, match="is a local path"):
        NCPrior.from_pretrained(prior.source, saved, revision="main")


def test_a_model_takes_its_own_modules_only(prior: NCPrior, saved: Path) -> None:
    match = (
        r"NCPrior.from_pretrained got an unexpected keyword argument 'energy'. Its keywords are "
        r"revision, token, check_fingerprint and heads."
    )
    with pytest.raises(TypeError, match=match):
        NCPrior.from_pretrained(prior.source, saved, energy=MLPHead((3,)))
    with pytest.raises(TypeError, match="VAEBM.from_pretrained .* 'heads'. .* and energy."):
        VAEBM.from_pretrained(prior.source, saved, heads=MLPHead((3,)))


# Fingerprints


def test_another_vae_is_refused_and_both_are_named(prior: NCPrior, saved: Path) -> None:
    other = gaussian(seed=1)
    both = f"{prior.source.fingerprint()}.*{other.fingerprint()}"
    refuses(f"on the VAE {both}.*check_fingerprint=False", other, saved)
    loaded = NCPrior.from_pretrained(other, saved, check_fingerprint=False)
    assert torch.equal(loaded.log_ratio([torch.ones(3, 2)]), prior.log_ratio([torch.ones(3, 2)]))


def test_another_base_is_refused_and_both_are_named(prior: NCPrior, saved: Path) -> None:
    other = Independent(Normal(torch.zeros(2), torch.full((2,), 1.1)), 1)
    both = f"{base_fingerprint(prior.source.prior)}.*{base_fingerprint(other)}"
    refuses(f"on the base prior {both}", gaussian(base=other), saved)
    NCPrior.from_pretrained(gaussian(base=other), saved, check_fingerprint=False)


def test_a_missing_fingerprint_is_warned_of(prior: NCPrior, saved: Path) -> None:
    source = SingleGroup(standard_normal(2), around(0.5), lambda z: z)
    with pytest.warns(UserWarning, match="The source has no fingerprint of the VAE") as caught:
        NCPrior.from_pretrained(source, saved)
    assert [warning.filename for warning in caught] == [__file__]
    NCPrior.from_pretrained(source, saved, check_fingerprint=False)


def test_a_base_that_is_only_sampled_is_another_one_than_a_known_one(saved: Path) -> None:
    """Heads on stored latents were put on N(0, I), in silence."""
    base = SampleOnly(standard_normal(2))
    assert base_fingerprint(base) is None
    refuses("and the source's is without a fingerprint", gaussian(base=base), saved)
    NCPrior.from_pretrained(gaussian(base=base), saved, check_fingerprint=False)
    on_stored = NCPrior(rebase(gaussian(), Empirical(torch.randn(9, 2))), MLPHead((2,), width=8))
    on_stored.save_pretrained(saved.parent / "stored")
    refuses("on the base prior without a fingerprint", gaussian(), saved.parent / "stored")
    NCPrior.from_pretrained(on_stored.source, saved.parent / "stored")


# Files that cannot be written


def full(limit: int) -> Callable[[Path, bytes], int]:
    """Writing on a disk of some bytes."""

    def write(path: Path, content: bytes) -> int:
        if len(content) > limit:
            raise OSError(28, "No space left on device")
        return len(content) if path.open("wb").write(content) else 0

    return write


def test_F31_a_full_disk_leaves_all_files_as_they_were(
    prior: NCPrior, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with torch.no_grad():
        next(prior.parameters()).add_(1.0)
    prior.strength = 0.5
    smallest = min(len(content) for content in before.values())
    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match="left on device. New files there: none; all") as caught,
    ):
        patch.setattr(Path, "write_bytes", full(smallest))
        prior.save_pretrained(saved)
    assert caught.value.errno == errno.ENOSPC and str(caught.value).count("Make room") == 1
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


@pytest.mark.parametrize("name", ["README.md", "ncprior.json", FILE])
def test_F31_a_folder_in_the_place_of_a_file_changes_nothing(
    name: str, prior: NCPrior, saved: Path
) -> None:
    (saved / name).unlink()
    (saved / name).mkdir()
    before = {path.name: path.read_bytes() for path in saved.iterdir() if path.is_file()}
    with torch.no_grad():
        next(prior.parameters()).add_(1.0)
    with pytest.raises(OSError, match=f"{name} is a folder.* all others are as before"):
        prior.save_pretrained(saved)
    left = {path.name: path.read_bytes() for path in saved.iterdir() if path.is_file()}
    assert left == before and len(list(saved.iterdir())) == 3


@pytest.mark.parametrize("directory", [None, 3, b"x", []])
def test_what_is_no_path_is_named(directory: Any, prior: NCPrior) -> None:
    with pytest.raises(TypeError, match="directory must be of type str or PathLike"):
        prior.save_pretrained(directory)
    with pytest.raises(TypeError, match="check_fingerprint must be True or False"):
        NCPrior.from_pretrained(prior.source, "x", check_fingerprint="no")  # type: ignore[arg-type]


def test_M1_the_message_names_other_wrappers(prior: NCPrior, saved: Path) -> None:
    refuses("without other wrappers around its modules", gaussian(seed=1), saved)


def test_F33_the_same_vae_in_a_wrapper_of_torch_is_accepted(prior: NCPrior, saved: Path) -> None:
    vae = torch.nn.DataParallel(prior.source.module).eval()
    source = SingleGroup(standard_normal(2), around(0.5), vae, module=vae)
    assert equal_draws(prior.eval(), NCPrior.from_pretrained(source, saved))
