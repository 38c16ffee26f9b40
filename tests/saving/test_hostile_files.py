"""Damaged and hostile files of priors and energies: one clear error, little memory, no harm."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.damage import damaged_file, raw
from helpers.hub_problems import edit, equal_draws, gaussian, trained
from helpers.toys import same, weights
from torch import Tensor, nn

from ncprior import NCPrior
from ncprior.bases import FlowMatching, GaussianMixture, fit_flow, rebase
from ncprior.bases.flow_matching import VelocityNet
from ncprior.heads.networks import MLPHead
from ncprior.heads.product import ProductHead
from ncprior.saving import inspect, load_tensors, read_metadata, save_tensors
from ncprior.saving.heads import FILE
from ncprior.vaebm import VAEBM, GaussianDecoder
from ncprior.vaebm.saved import FILE as ENERGY_FILE

Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


def flow_matching() -> FlowMatching:
    with torch.random.fork_rng(devices=[]):
        return FlowMatching(VelocityNet(2, width=8, depth=1), torch.zeros(2), torch.ones(2))


BASES: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "mixture": lambda: GaussianMixture(torch.zeros(3), torch.randn(3, 2), torch.ones(3, 2)),
    "full": lambda: GaussianMixture(
        torch.zeros(3), torch.randn(3, 2), torch.eye(2).repeat(3, 1, 1)
    ),
    "flow": lambda: fit_flow(torch.randn(50, 2), steps=0, progress=False),
    "flow matching": flow_matching,
}


def prior_on(base: Any) -> NCPrior:
    return trained(gaussian() if base is None else rebase(gaussian(), base))


def saved_on(name: str, folder: Path) -> Path:
    prior_on(BASES[name]()).save_pretrained(folder)
    return folder / FILE


def saved_energy(folder: Path) -> Path:
    VAEBM(GaussianDecoder(gaussian(), 0.1), MLPHead((3,), width=8, depth=1)).save_pretrained(
        folder
    )
    return folder / ENERGY_FILE


def refuses(path: Path, match: str = "Cannot load") -> None:
    with pytest.raises(ValueError, match=match) as caught:
        NCPrior.from_pretrained(gaussian(), path)
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1500


@pytest.mark.parametrize("name", BASES)
def test_a_prior_on_any_base_comes_back(name: str, tmp_path: Path) -> None:
    prior = prior_on(BASES[name]()).eval()
    prior.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    loaded = NCPrior.from_pretrained(gaussian(), tmp_path)
    assert torch.equal(before, torch.get_rng_state())
    assert equal_draws(prior, loaded)
    assert not any(t.is_meta for t in loaded.state_dict().values())


def test_C2_heads_loaded_in_inference_mode_can_be_trained(tmp_path: Path) -> None:
    saved_on("flow matching", tmp_path)
    with torch.inference_mode():
        prior = NCPrior.from_pretrained(gaussian(), tmp_path)
    prior.nce_loss(torch.rand(4, 2)).sum().backward()


@pytest.mark.parametrize("source", [nn.Linear(2, 3), None, 3, "vae"])
def test_F36_what_is_no_source_is_named(source: Any, tmp_path: Path) -> None:
    saved_on("none", tmp_path), saved_energy(tmp_path)
    for model in (NCPrior, VAEBM):
        with pytest.raises(TypeError, match=r"LatentSource|source"):
            model.from_pretrained(source, tmp_path)  # type: ignore[attr-defined]


# F2: sizes

MLP = {"kind": "MLPHead", "config": {"event_shape": [2], "width": 8, "depth": 1, "dropout": 0.0}}


def head(**changes: Any) -> Change:
    return lambda c, t: c["heads"][0]["config"].update(changes)


def base_of(name: str, **changes: Any) -> Change:
    return lambda c, t: c["base"]["config"].update(changes)


def head_of(kind: str, **config: Any) -> Change:
    return lambda c, t: c.update(heads=[{"kind": kind, "config": config}])


SIZES: dict[str, tuple[str, Change]] = {
    "width": ("none", head(width=20_000)),
    "a width beyond memory": ("none", head(width=2**30)),
    "depth": ("none", head(depth=10**9)),
    "layers of one number": (
        "none",
        lambda c, t: (
            head(depth=2500)(c, t),
            t.update({f"heads.0.{i}": torch.zeros(1) for i in range(3000)}),
        ),
    ),
    "axes": ("none", head(event_shape=[1] * 10_000)),
    "latents": ("none", head(event_shape=[2**30, 2**30])),
    "context": ("none", head(context_shape=[10**8])),
    "factors": ("none", head_of("ProductHead", heads=[MLP] * 20_000)),
    "convolutions": ("none", head_of("ConvHead", event_shape=[3, 8, 8], width=8000, depth=2)),
    "deep convolutions": ("none", head_of("ConvHead", event_shape=[3, 8, 8], depth=10**8)),
    "codes": ("none", head_of("CategoricalHead", event_shape=[], num_categories=2 * 10**7)),
    "heads": ("none", lambda c, t: c.update(num_groups=1, heads=[MLP] * 10_000)),
    "velocity": ("flow matching", base_of("", width=30_000)),
    "deep velocity": ("flow matching", base_of("", depth=10**8)),
    "steps": ("flow matching", base_of("", num_steps=10**9)),
    "splines": ("flow", base_of("", spline={"transforms": 4, "width": 30_000, "bins": 8})),
    "bins": ("flow", base_of("", spline={"transforms": 4, "width": 128, "bins": 10**7})),
    "transforms": ("flow", base_of("", spline={"transforms": 10**7, "width": 128, "bins": 8})),
    "masks": (
        "flow",
        lambda c, t: t.update({"base.loc": torch.zeros(50_000), "base.scale": torch.ones(50_000)}),
    ),
}

LOADS = """
    import resource, sys, time
    import torch
    from helpers.hub_problems import gaussian
    from ncprior import NCPrior
    from ncprior.bases import fit_flow  # imports zuko at its first use
    from ncprior.vaebm import VAEBM, GaussianDecoder
    fit_flow(torch.randn(50, 2), steps=1, progress=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in sys.argv[1:]:
        model, source = NCPrior, gaussian()
        if "energy" in path:
            model, source = VAEBM, GaussianDecoder(source, 0.1)
        start = time.process_time()
        try:
            model.from_pretrained(source, path)
        except ValueError as error:
            assert "Cannot load" in str(error) or "Cannot read" in str(error), error
        else:
            raise AssertionError(f"{path} was accepted")
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        assert more < 50 and time.process_time() - start < 5, (path, more, time.process_time() - start)
"""


def loads_in_little_memory(paths: list[Path]) -> None:
    """Loading each of the files raises an error of ours, within 50 MiB and seconds."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LOADS), *map(str, paths)],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(sys.platform == "win32", reason="needs resource")
def test_F2_sizes_in_a_file_take_neither_memory_nor_time(tmp_path: Path) -> None:
    paths = []
    originals = {n: saved_on(n, tmp_path / n).read_bytes() for n in BASES}
    for number, (base, change) in enumerate(SIZES.values()):
        paths.append(tmp_path / f"prior-{number}.safetensors")
        paths[-1].write_bytes(originals[base])
        edit(paths[-1], change)
    energy = saved_energy(tmp_path).read_bytes()
    net = {"image_shape": [3, 32, 32], "width": 3000}
    for number, changes in enumerate(
        (
            {"energy": {"kind": "EnergyNet", "config": net}},
            {"energy": {"kind": "MLPHead", "config": {"event_shape": [3], "depth": 10**9}}},
            {"num_steps": 10**12},
        )
    ):
        paths.append(tmp_path / f"energy-{number}.safetensors")
        paths[-1].write_bytes(energy)
        edit(paths[-1], lambda c, t, changes=changes: c.update(changes))  # type: ignore[misc]
    header = {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    paths.append(tmp_path / "larger than it is.safetensors")
    paths[-1].write_bytes(raw(header, b"\0" * 8))
    loads_in_little_memory(paths)


def test_F2_steps_that_no_tensor_bounds_have_a_range(tmp_path: Path) -> None:
    path = saved_on("flow matching", tmp_path)
    edit(path, base_of("", num_steps=10**9))
    refuses(path, "its base cannot be built as a FlowMatching .no valid num_steps")
    path = saved_energy(tmp_path)
    edit(path, lambda c, t: c.update(num_steps=10**9))
    with pytest.raises(ValueError, match="has no valid num_steps"):
        VAEBM.from_pretrained(GaussianDecoder(gaussian(), 0.1), path)


# F20: dtypes and values


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64])
@pytest.mark.parametrize("own", [False, True])
def test_F20_a_head_of_another_dtype_raises(dtype: torch.dtype, own: bool, tmp_path: Path) -> None:
    path = saved_on("none", tmp_path)
    edit(path, lambda c, t: t.update({n: part.to(dtype) for n, part in t.items()}))
    heads = {"heads": MLPHead((2,), width=8, depth=1)} if own else {}
    before = weights(heads["heads"]) if own else {}
    with pytest.raises(ValueError, match=f"of another dtype: heads.0.*{dtype}"):
        NCPrior.from_pretrained(gaussian(), path, **heads)
    assert not own or same(weights(heads["heads"]), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float8_e4m3fn])
def test_F20_one_tensor_of_another_floating_dtype_raises(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    path = saved_on("none", tmp_path)
    edit(path, lambda c, t: t.update({"heads.0.out.bias": t["heads.0.out.bias"].to(dtype)}))
    refuses(path, "dtype")


VALUES: dict[str, tuple[str, Change]] = {
    "not finite: heads.0.out.bias": (
        "none",
        lambda c, t: t["heads.0.out.bias"].fill_(torch.nan),
    ),
    "not positive: heads.0.scale.sd": ("none", lambda c, t: t["heads.0.scale.sd"].fill_(0)),
    "no real numbers: loc": ("mixture", lambda c, t: t.update({"base.loc": t["base.loc"].long()})),
    "no real numbers: lo": ("mixture", lambda c, t: t.update({"base.loc": t["base.loc"] + 0j})),
    "not finite: base.loc": ("mixture", lambda c, t: t["base.loc"].fill_(torch.nan)),
    "not positive: base.scale": ("mixture", lambda c, t: t["base.scale"].fill_(-1)),
    "not positive: base.scal": ("full", lambda c, t: t["base.scale"].fill_(0)),
    "not positive: base.sca": ("flow matching", lambda c, t: t["base.scale"].fill_(0)),
    "not finite: base.flow": (
        "flow",
        lambda c, t: t["base.flow.transform.transforms.0.hyper.0.weight"].fill_(torch.inf),
    ),
    "another dtype: flow": (
        "flow",
        lambda c, t: t.update({n: part.float() for n, part in t.items() if n.endswith("order")}),
    ),
    "no valid event_shape": ("mixture", base_of("", event_shape=[-1, -2])),
    "no valid event_shap": ("mixture", base_of("", event_shape=None)),
    "no valid event_sha": ("flow", base_of("", event_shape=[True, 2])),
    "no valid spline": ("flow", base_of("", spline={"transforms": 1})),
    "no valid dropout": ("none", head(dropout=2)),
    "no valid width": ("none", head(width=True)),
    "its base has latents of shape .1, 2., and the source of .2,.": (
        "mixture",
        base_of("", event_shape=[1, 2]),
    ),
    "no valid strength": ("none", lambda c, t: c.update(strength=True)),
    "has no valid strength": ("none", lambda c, t: c.update(strength=10**400)),
    "valid num_groups": ("none", lambda c, t: c.update(num_groups=True)),
}


@pytest.mark.parametrize("match", VALUES)
def test_F20_values_that_cannot_be_used_raise(match: str, tmp_path: Path) -> None:
    base, change = VALUES[match]
    path = saved_on(base, tmp_path)
    try:
        edit(path, change)
    except ValueError as error:
        assert "4300 digits" in str(error)  # Python does not read such a number again
        return
    refuses(path, match)


def test_F20_an_energy_of_other_dtypes_or_values_raises(tmp_path: Path) -> None:
    content = saved_energy(tmp_path).read_bytes()
    path, source = tmp_path / ENERGY_FILE, GaussianDecoder(gaussian(), 0.1)
    for change, match in (
        (lambda c, t: t.update({n: p.int() for n, p in t.items()}), "of another dtype"),
        (lambda c, t: t["out.bias"].fill_(torch.inf), "not finite: out.bias"),
        (lambda c, t: c.update(sigma=True), "no valid sigma"),
        (lambda c, t: c.update(data_noise=True), "no valid data_noise"),
        (lambda c, t: c.update(step_size=True), "no valid step_size"),
    ):
        path.write_bytes(content)
        edit(path, change)
        with pytest.raises(ValueError, match=match):
            VAEBM.from_pretrained(source, path)


# F18: what can be saved can be loaded


def test_F18_what_could_not_be_loaded_is_not_saved(tmp_path: Path) -> None:
    kept = saved_on("none", tmp_path / "kept")
    before = kept.read_bytes()

    def nan(prior: NCPrior) -> None:
        prior.state_dict()["heads.0.out.bias"].fill_(torch.nan)

    changes: dict[str, Callable[[NCPrior], object]] = {
        "strength": lambda prior: prior.__dict__.update(strength=-1.0, _strength=-1.0),
        "active": lambda prior: prior.__dict__.update(active=[True, True], _active=[True, True]),
        "heads.0.out.bias": nan,
    }
    for match, change in changes.items():
        prior = prior_on(None)
        change(prior)
        told = "strength must be" if match == "strength" else "This NCPrior is not saved, as .*"
        with pytest.raises(ValueError, match=told if match in told else told + match):
            prior.save_pretrained(tmp_path / "kept")
        assert kept.read_bytes() == before


def test_a_product_of_products_is_one_product_and_comes_back(tmp_path: Path) -> None:
    parts = [MLPHead((2,), width=8, depth=1) for _ in range(3)]
    head = ProductHead([ProductHead(parts[:2]), parts[2]])
    assert list(head.heads) == parts
    prior = trained(gaussian(), head).eval()
    prior.save_pretrained(tmp_path)
    assert equal_draws(prior, NCPrior.from_pretrained(gaussian(), tmp_path))


class Remembering(nn.Module):
    """A head of one's own with extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(()))

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 1}

    def set_extra_state(self, state: dict[str, int]) -> None: ...

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return self.a * z.sum(-1)


def test_C3_extra_state_that_a_file_cannot_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="heads.0._extra_state is an object of type dict"):
        NCPrior(gaussian(), Remembering()).save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_tensors_that_a_file_cannot_hold_are_named(tmp_path: Path) -> None:
    for tensor in (torch.eye(2).to_sparse(), torch.zeros(2, device="meta"), torch.zeros(2) + 0j):
        if tensor.is_complex():
            tensor = tensor.to(torch.complex128)
        with pytest.raises(TypeError, match="a is a (sparse |meta |)tensor of"):
            save_tensors(tmp_path / "a", {"a": tensor}, {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "tensors", "metadata", "error"),
    [
        (None, {}, {}, TypeError),
        (3, {}, {}, TypeError),
        ("", {}, {}, ValueError),
        ("a\0b", {}, {}, ValueError),
        ("a", [torch.zeros(1)], {}, TypeError),
        ("a", {1: torch.zeros(1)}, {}, TypeError),
        ("a", {"a": [1.0]}, {}, TypeError),
        ("a", {}, None, TypeError),
    ],
)
def test_F26_wrong_arguments_of_save_tensors_are_named(
    path: Any, tensors: Any, metadata: Any, error: type[Exception], tmp_path: Path
) -> None:
    where = str(tmp_path / path) if path == "a" else path
    with pytest.raises(error, match="must|can be saved"):
        save_tensors(where, tensors, metadata)
    for read in (load_tensors, read_metadata):
        if path != "a":
            with pytest.raises(error, match="path must"):
                read(path)
    assert not list(tmp_path.iterdir())


# F23, F30, F35: structure and texts


def test_F23_a_header_of_any_structure_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    whole = {"sha256": "", "configuration": {}}
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    texts = [
        '{"a":' * 100_000,
        "NaN",
        '{"a": 1e999}',
        '{"sha256": "", "configuration": {"a": NaN}}',
    ]
    headers: list[Any] = [
        *({"__metadata__": {"ncprior": text}} for text in texts),
        *({"__metadata__": {"ncprior": value}} for value in (1, None, [], {})),
        *({"__metadata__": value} for value in (1, None, [])),
        *(1, None, [], "x"),
        *({"a": value} for value in (1, None, [], {}, {**entry, "dtype": "F4"})),
        {"a": {**entry, "shape": [True]}},
        {"a": {**entry, "shape": [-1]}},
        {"a": {**entry, "shape": [0, 2**62, 4], "data_offsets": [0, 0]}},
        {"a": {**entry, "shape": [1] * 100}},
        {"a": {**entry, "data_offsets": [0, 8]}},
        {"a": {**entry, "data_offsets": [-4, 0]}},
        {"a": entry, "b": entry},
        {"a": entry, "b": {**entry, "data_offsets": [8, 12]}},
        {"\ud800": entry},
    ]
    for header in headers:
        path.write_bytes(raw(header, bytes(4)))
        for read in (load_tensors, read_metadata, inspect):
            with pytest.raises(ValueError, match="Cannot read") as caught:
                read(path)
            assert str(caught.value).isprintable()
    path.write_bytes(raw({"__metadata__": {"ncprior": '{"sha256": "", "configuration": {}}'}}))
    assert read_metadata(path) == whole["configuration"]


def test_a_bool_of_a_file_is_true_or_false(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"a": torch.tensor([True])}, {})
    path.write_bytes(path.read_bytes()[:-1] + b"\2")
    with pytest.raises(ValueError, match="checksum|no bool"):
        load_tensors(path)


TEXTS: dict[str, Change] = {
    "a class": lambda c, t: c.update(
        heads=[{"kind": "custom", "config": {"class": "\x1b]0;owned\x07\x1b[31mHead"}}]
    ),
    "a kind": lambda c, t: c.update(heads=[{"kind": "\x1b[31m", "config": {}}]),
    "a long kind": lambda c, t: c.update(heads=[{"kind": "x" * 10**6, "config": {}}]),
    "a list": lambda c, t: c.update(heads=[["\x1b[31m"] * 1000]),
    "an argument": head(**{"\x1b[31m": 1}),
    "a tensor": lambda c, t: t.update({"\x1b[31m\n": torch.zeros(1)}),
    "a fingerprint": lambda c, t: c["fingerprint"].update(vae="\x1b[31m"),
    "a format": lambda c, t: c.update(format="\x1b[31m"),
    "a key": lambda c, t: c.update({"\x1b[31m": 1}),
    "an override": lambda c, t: c.update({"\u202egnp.exe": 1}),
}


@pytest.mark.parametrize("case", TEXTS)
def test_F30_texts_of_a_file_are_printed_without_control_characters(
    case: str, tmp_path: Path
) -> None:
    path = saved_on("none", tmp_path)
    edit(path, TEXTS[case])
    refuses(path)


def test_F35_tensors_of_a_base_that_is_not_named_raise(tmp_path: Path) -> None:
    path = saved_on("none", tmp_path)
    edit(path, lambda c, t: t.update({"base.loc": torch.zeros(2)}))
    refuses(path, "it has tensors of a base, and its configuration names no such base")


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_is_one_error_or_harmless(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    prior, source = tmp_path / FILE, gaussian()
    saved_on(rng.choice(sorted(BASES)), tmp_path)
    whole = prior.read_bytes()
    heads = MLPHead((2,), width=8, depth=1)
    before = weights(heads)
    for _ in range(25):
        what, content = damaged_file(prior, rng)
        prior.write_bytes(content)
        for own in ({}, {"heads": heads}):
            try:
                loaded = NCPrior.from_pretrained(source, prior, check_fingerprint=False, **own)
            except ValueError as error:
                assert "Cannot" in str(error) and str(error).isprintable(), what
                assert same(weights(heads), before), what
            else:
                assert all(t.isfinite().all() for t in loaded.state_dict().values()) or own, what
                heads = MLPHead((2,), width=8, depth=1)
                before = weights(heads)
        prior.write_bytes(whole)


# Old files

OLD = Path(__file__).parent / "format1"


def test_files_of_format_1_go_on_loading() -> None:
    """Files that an earlier commit wrote: header, digest and draws stay."""
    prior = NCPrior.from_pretrained(gaussian(), OLD / FILE)
    assert prior.strength == 0.75 and prior.active == [True]
    assert type(prior.source.prior) is GaussianMixture
    z = torch.tensor([[0.5, -1.0], [2.0, 0.25]])
    expected = torch.tensor([[3.558348], [3.401000]])
    torch.testing.assert_close(prior.log_ratio([z]), expected, rtol=1e-4, atol=1e-4)
    energy = VAEBM.from_pretrained(GaussianDecoder(gaussian(), 0.1), OLD / ENERGY_FILE)
    assert energy.num_steps == 3 and energy.step_size == 0.3
