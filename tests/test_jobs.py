"""Sampling jobs in parts: killed, in any order, by any number of processes, the same files."""

from __future__ import annotations

import errno
import os
import random
from collections import UserDict
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.toys import VAE, base, flat, ladder_prior, stir
from torch import Size, Tensor
from torch.distributions import Bernoulli, Independent

from ncprior import Draw, NCPrior, SingleGroup, langevin, sir
from ncprior import jobs as parts_module
from ncprior.bases.mixture import GaussianMixture
from ncprior.bases.rebase import rebase
from ncprior.heads.networks import MLPHead
from ncprior.jobs import _seed, read_parts, sample_parts
from ncprior.samplers.compose import at_temperature, sequence
from ncprior.samplers.identity import describe
from ncprior.samplers.mixture import within_components
from ncprior.saving.folders import LocalFolder
from ncprior.utils.batches import tensor_of
from ncprior.utils.random_state import random_state

SAMPLER = partial(sir, num_proposals=200)
JOB: dict[str, Any] = {"num_samples": 23, "part_size": 5, "seed": 7}


def made() -> NCPrior:
    """The same prior in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return stir(ladder_prior(2))


def slow_by(prior: Any, log_ratio: Any, *, sampler: Any) -> Draw:
    """Any sampler, taking its time."""
    return sampler(prior, log_ratio)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a job that one process draws at one go."""
    folder = tmp_path_factory.mktemp("whole")
    sample_parts(made(), folder, sampler=SAMPLER, **JOB)
    return contents(folder)


def test_a_job_is_its_parts(whole: dict[str, bytes], tmp_path: Path) -> None:
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    parts = list(read_parts(tmp_path))
    assert [len(part["x"]) for part in parts] == [5, 5, 5, 5, 3]
    assert all(set(part) == {"x", "z_0", "z_1"} for part in parts)
    rows = torch.cat([part["x"] for part in parts])
    assert rows.unique(dim=0).shape == (23, 3)  # no two parts have the same noise
    prior = made()
    torch.manual_seed(_seed(7, 2))
    sample = prior.sample(5, SAMPLER)
    assert torch.equal(parts[2]["x"], sample.x)
    assert torch.equal(parts[2]["z_1"], sample.latents[1])


@pytest.mark.parametrize(
    "orders", [[[4, 2, 0], [3, 1]], [[0], [1], [2, 3, 4]], [[1, 1, 0, 2, 3, 4]]]
)
def test_neither_order_nor_number_of_processes_matters(
    orders: list[list[int]], whole: dict[str, bytes], tmp_path: Path
) -> None:
    for order in orders:
        torch.manual_seed(sum(order))
        files = sample_parts(made(), tmp_path, sampler=SAMPLER, parts=order, **JOB)
        assert [file.name for file in files] == [f"part-{i:05d}.safetensors" for i in order]
    assert contents(tmp_path) == whole


def test_what_is_there_is_not_drawn_again_and_what_is_damaged_is(
    whole: dict[str, bytes], tmp_path: Path
) -> None:
    drawn = []

    def counting(prior: Any, log_ratio: Any) -> Draw:
        drawn.append(1)
        return SAMPLER(prior, log_ratio)

    for expected in (5 * 2, 0):
        drawn.clear()
        sample_parts(made(), tmp_path, sampler=counting, **JOB)
        assert len(drawn) == expected
    path = tmp_path / "part-00003.safetensors"
    before = path.read_bytes()
    path.write_bytes(before[:-3])
    drawn.clear()
    sample_parts(made(), tmp_path, sampler=counting, **JOB)
    assert len(drawn) == 2
    assert path.read_bytes() == before


def test_a_prior_with_a_sampler_needs_no_other(whole: dict[str, bytes], tmp_path: Path) -> None:
    prior = made()
    with pytest.raises(ValueError, match="This prior has no sampler yet"):
        sample_parts(prior, tmp_path / "job", **JOB)
    assert not list(tmp_path.iterdir())
    prior.sampler = SAMPLER
    sample_parts(prior, tmp_path, **JOB)
    assert contents(tmp_path) == whole


def test_parts_are_drawn_in_batches_and_a_batch_of_a_part_is_the_part(
    whole: dict[str, bytes], tmp_path: Path
) -> None:
    sample_parts(made(), tmp_path / "at once", sampler=SAMPLER, batch_size=9, **JOB)
    assert contents(tmp_path / "at once") == whole
    sample_parts(made(), tmp_path / "by two", sampler=SAMPLER, batch_size=2, **JOB)
    (part, *_) = read_parts(tmp_path / "by two")
    torch.manual_seed(_seed(7, 0))
    prior = made()
    samples = [prior.sample(rows, SAMPLER) for rows in (2, 2, 1)]
    assert torch.equal(part["x"], torch.cat([sample.x for sample in samples]))
    assert torch.equal(part["z_1"], torch.cat([sample.latents[1] for sample in samples]))
    with pytest.raises(ValueError, match="another job, with {'batch_size': 2}; got .*None"):
        sample_parts(made(), tmp_path / "by two", sampler=SAMPLER, **JOB)


def test_x_of_a_job_is_drawn_from_p_x_given_z(tmp_path: Path) -> None:
    def likelihood(z: Tensor) -> Independent:
        return Independent(Bernoulli(logits=z[:, [0, 1, 1]]), 1)

    prior = NCPrior(flat(VAE(), likelihood=likelihood), MLPHead((2,), width=8))
    prior.sampler = SAMPLER
    for draw_x in (False, True):
        sample_parts(prior, tmp_path / str(draw_x), draw_x=draw_x, **JOB)
    means, draws = (list(read_parts(tmp_path / name)) for name in ("False", "True"))
    for mean, drawn in zip(means, draws, strict=True):
        assert torch.equal(mean["z_0"], drawn["z_0"])
        assert {*drawn["x"].unique().tolist()} == {0.0, 1.0}
    for draw_x, match in ((False, "with {'draw_x': True}; got"), (True, "got {'draw_x': True}")):
        with pytest.raises(ValueError, match=match):
            sample_parts(prior, tmp_path / str(not draw_x), draw_x=draw_x, **JOB)


def test_progress_counts_samples_of_this_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample_parts(made(), tmp_path, sampler=SAMPLER, parts=[4, 0], progress=False, **JOB)
    assert capsys.readouterr().err == ""
    sample_parts(made(), tmp_path, sampler=SAMPLER, parts=[4, 1], batch_size=None, **JOB)
    assert "8/8" in capsys.readouterr().err


def test_generators_outside_stay_as_they_are(tmp_path: Path) -> None:
    before = random_state()
    sample_parts(made(), tmp_path, sampler=SAMPLER, **JOB)
    after = random_state()
    assert torch.equal(before["torch"], after["torch"])
    assert before["python"] == after["python"]
    assert np.array_equal(before["numpy"][1], after["numpy"][1])


class NumpyBase:
    """A base that draws from other generators than torch's."""

    def sample(self, sample_shape: Size = Size()) -> Tensor:  # noqa: B008
        """Uniform, by NumPy and Python."""
        return torch.from_numpy(np.random.rand(*sample_shape, 2)).float() + random.random()


def test_the_seed_reaches_every_generator(tmp_path: Path) -> None:
    source = flat(VAE())
    source.prior = NumpyBase()
    prior = NCPrior(source, MLPHead((2,), width=8))
    for name in "ab":
        np.random.seed(ord(name))
        random.seed(name)
        sample_parts(prior, tmp_path / name, sampler=SAMPLER, **JOB)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_conditions_go_with_their_rows(tmp_path: Path) -> None:
    vae = VAE(condition=1)
    prior = NCPrior(
        flat(vae, condition=lambda x: x[1]), MLPHead((2,), context_shape=(1,), width=8)
    )
    c = torch.arange(23.0)[:, None]
    sample_parts(prior, tmp_path, sampler=SAMPLER, condition=c, **JOB)
    parts = list(read_parts(tmp_path))
    z, x = (torch.cat([part[name] for part in parts]) for name in ("z_0", "x"))
    with torch.no_grad():
        torch.testing.assert_close(x, vae.decode(z, c))
    with pytest.raises(ValueError, match="one row per sample; got 22 rows for 23 samples"):
        sample_parts(prior, tmp_path, sampler=SAMPLER, condition=c[1:], **JOB)


def test_a_condition_may_be_a_list_of_numbers(tmp_path: Path) -> None:
    """`prior.sample` takes one."""
    source = SingleGroup(
        base(),
        lambda x, c: base().expand(x.shape[:1]),
        lambda z, c: z + c[:, None],
        condition=lambda batch: batch[1],
        context=lambda c: c[:, None].float(),
    )
    prior = NCPrior(source, MLPHead((2,), context_shape=(1,), width=8))
    sample_parts(prior, tmp_path, sampler=SAMPLER, condition=list(range(23)), **JOB)
    part = next(iter(read_parts(tmp_path)))
    shift = part["x"] - part["z_0"]
    torch.testing.assert_close(shift, torch.arange(5.0)[:, None].expand(5, 2))


def _other_heads() -> NCPrior:
    return stir(made(), 0.01)


def _on(base: GaussianMixture) -> NCPrior:
    """Untrained heads on another base of the same VAE."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return NCPrior(rebase(flat(VAE().eval()), base), MLPHead((2,), width=8))


def _mixture(shift: float) -> GaussianMixture:
    return GaussianMixture(torch.zeros(2), torch.eye(2) + shift, torch.ones(2, 2))


def _weaker() -> NCPrior:
    prior = made()
    prior.strength = 0.5
    return prior


@pytest.mark.parametrize(
    ("prior", "sampler", "changes", "named"),
    [
        (made, SAMPLER, {"seed": 8}, "'seed': 7"),
        (made, SAMPLER, {"part_size": 6}, "'part_size': 5"),
        (made, partial(sir, num_proposals=100), {}, "num_proposals=200"),
        (_other_heads, SAMPLER, {}, "'prior'"),
        (_weaker, SAMPLER, {}, "'prior'"),
    ],
)
def test_parts_of_another_job_are_not_mixed_in(
    prior: Any, sampler: Any, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    sample_parts(made(), tmp_path, sampler=SAMPLER, parts=[0], **JOB)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="parts of another job") as error:
        sample_parts(prior(), tmp_path, sampler=sampler, **{**JOB, **changes})
    assert named in str(error.value)
    assert contents(tmp_path) == before


def test_parts_of_another_decorated_sampler_are_not_mixed_in(tmp_path: Path) -> None:
    def decorated(sampler: Any) -> Any:
        @wraps(sampler)
        def inner(prior: Any, log_ratio: Any) -> Draw:
            return sampler(prior, log_ratio)

        return inner

    few, many = (decorated(partial(sir, num_proposals=m)) for m in (2, 999))
    sample_parts(made(), tmp_path, sampler=few, parts=[0], **JOB)
    with pytest.raises(ValueError, match="parts of another job.*num_proposals=999"):
        sample_parts(made(), tmp_path, sampler=many, **JOB)


def test_parts_of_another_base_are_not_mixed_in(tmp_path: Path) -> None:
    sample_parts(_on(_mixture(0.0)), tmp_path, sampler=SAMPLER, parts=[0], **JOB)
    sample_parts(_on(_mixture(0.0)), tmp_path, sampler=SAMPLER, parts=[1], **JOB)
    with pytest.raises(ValueError, match="parts of another job"):
        sample_parts(_on(_mixture(0.1)), tmp_path, sampler=SAMPLER, **JOB)


@pytest.mark.parametrize(
    "make",
    [
        within_components,
        partial(at_temperature, temperature=0.5),
        lambda sampler: sequence(sampler, partial(langevin, num_steps=2, step_size=0.1)),
        lambda sampler: sequence(within_components(sampler), partial(langevin, step_size=0.1)),
        lambda sampler: partial(slow_by, sampler=sampler),
    ],
)
def test_samplers_made_of_samplers_are_told_apart_and_known_again(
    make: Any, tmp_path: Path
) -> None:
    few, more = (make(partial(sir, num_proposals=m)) for m in (5, 6))
    assert describe(few) == describe(make(partial(sir, num_proposals=5)))
    assert describe(few) != describe(more)
    assert "0x" not in describe(few)  # no addresses, which differ between processes


def test_what_cannot_be_a_job_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"parts must be a whole number in \[0, 4\]; got 5"):
        sample_parts(made(), tmp_path, sampler=SAMPLER, parts=[5], **JOB)
    with pytest.raises(ValueError, match="num_samples must be a whole number in .*; got 0"):
        sample_parts(made(), tmp_path, sampler=SAMPLER, **{**JOB, "num_samples": 0})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [
        *({"num_samples": 23.0}, {"num_samples": "23"}, {"part_size": None}, {"part_size": 0.5}),
        *({"parts": 3}, {"parts": "ab"}, {"parts": [1.0]}, {"prior": None}, {"sampler": 3}),
        *(
            {"prior": NCPrior},
            {"sampler": "sir"},
            {"batch_size": 0},
            {"draw_x": 1},
            {"progress": 2},
        ),
        *({"batch_size": 2.0}, {"folder": None}, {"condition": 3}),
    ],
)
def test_F26_counts_and_objects_of_a_job(wrong: dict[str, Any], tmp_path: Path) -> None:
    given = {"prior": made(), "sampler": SAMPLER, "folder": tmp_path / "job", **JOB, **wrong}
    with pytest.raises((TypeError, ValueError), match="must be|Expected tensors"):
        sample_parts(**given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", [None, 1.5, "a", True])
def test_F35_a_seed_is_a_whole_number(seed: Any, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="seed must be a whole number"):
        sample_parts(made(), tmp_path, sampler=SAMPLER, **{**JOB, "seed": seed})
    assert not list(tmp_path.iterdir())


def test_F26_whole_numbers_of_numpy_are_whole_numbers(
    whole: dict[str, bytes], tmp_path: Path
) -> None:
    job = {name: np.int64(value) for name, value in JOB.items()}
    sample_parts(made(), tmp_path, sampler=SAMPLER, parts=np.arange(5), **job)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("has_links", [True, False])
@pytest.mark.parametrize("seed", [7, 8])
def test_F10_of_two_jobs_that_claim_a_folder_at_once_one_is_refused(
    seed: int,
    has_links: bool,
    whole: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The other job runs after this one found the folder empty, and before it has claimed it."""
    fsync = os.fsync

    def fsync_after_the_other(descriptor: int) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        sample_parts(made(), tmp_path, sampler=SAMPLER, **JOB)
        fsync(descriptor)

    def without_links(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fsync", fsync_after_the_other)
    if not has_links:
        monkeypatch.setattr(os, "link", without_links)
    if seed == JOB["seed"]:
        sample_parts(made(), tmp_path, sampler=SAMPLER, **JOB)
    else:
        with pytest.raises(ValueError, match="of another job"):
            sample_parts(made(), tmp_path, sampler=SAMPLER, **{**JOB, "seed": seed})
    assert contents(tmp_path) == whole  # no temporary file, too
    sample_parts(made(), tmp_path / "alone", sampler=SAMPLER, **JOB)
    assert contents(tmp_path / "alone") == whole


def test_F10_a_part_of_another_seed_or_with_another_number_is_refused(
    whole: dict[str, bytes], tmp_path: Path
) -> None:
    sample_parts(made(), tmp_path / "other", sampler=SAMPLER, **{**JOB, "seed": 8}, parts=[1])
    strange = (tmp_path / "other" / "part-00001.safetensors").read_bytes()
    for content in (strange, whole["part-00000.safetensors"]):
        folder = tmp_path / "job"
        sample_parts(made(), folder, sampler=SAMPLER, **JOB)
        path = folder / "part-00001.safetensors"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"part-00001.* is not this part .* delete it"):
            list(read_parts(folder))
        with pytest.raises(ValueError, match=r"part-00001.* is not this part .* delete it"):
            sample_parts(made(), folder, sampler=SAMPLER, **JOB)
        assert path.read_bytes() == content
        path.unlink()
    sample_parts(made(), folder, sampler=SAMPLER, **JOB)
    assert contents(folder) == whole


def test_F22_temporary_files_of_a_dead_job_are_removed_by_the_next(
    whole: dict[str, bytes], tmp_path: Path
) -> None:
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
        (tmp_path / f".{name}.0badcafe.tmp").write_bytes(content[:9])
    sample_parts(made(), tmp_path, sampler=SAMPLER, **JOB)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize(
    "text",
    [
        *("", "garbage", "[]", "null", "{}", "3", '"job"', "[" * 100_000, "\ufeff{}"),
        '{"num_samples": 23, "part_size": 5, "seed": 7}',
        '{"num_samples": 23, "part_size": 0, "seed": 7, "sampler": "", "prior": ""}',
        '{"num_samples": 23.5, "part_size": 5, "seed": 7, "sampler": "", "prior": ""}',
        '{"num_samples": NaN, "part_size": [], "seed": null, "sampler": "", "prior": ""}',
    ],
)
def test_F23_a_damaged_job_is_one_clear_error(
    text: str, whole: dict[str, bytes], tmp_path: Path
) -> None:
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    path = tmp_path / "job.json"
    path.write_text(text, encoding="utf-8")
    message = r"job.json holds no job of sample_parts .* Delete it and call sample_parts"
    with pytest.raises(ValueError, match=message):
        list(read_parts(tmp_path))
    with pytest.raises(ValueError, match=message):
        sample_parts(made(), tmp_path, sampler=SAMPLER, **JOB)
    path.unlink()
    sample_parts(made(), tmp_path, sampler=SAMPLER, parts=[], **JOB)
    assert contents(tmp_path) == whole


def test_GC6_rows_of_a_condition_go_to_the_device_of_the_vae(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device stands for a GPU."""
    seen = []

    def sample(self: NCPrior, num: int, *, condition: dict[str, Tensor], **options: Any) -> Any:
        assert options == {"sampler": SAMPLER, "draw_x": False}
        seen.extend((c.device.type, len(c)) for c in condition.values())
        return SimpleNamespace(x=torch.zeros(num, 3), latents=[torch.zeros(num, 2)])

    monkeypatch.setattr(NCPrior, "sample", sample)
    monkeypatch.setattr(parts_module, "device_of", lambda source: torch.device("meta"))
    condition = UserDict(a=torch.zeros(23), b=torch.zeros(23, 2))
    sample_parts(made(), tmp_path, sampler=SAMPLER, condition=condition, **JOB)
    assert seen == 8 * [("meta", 5)] + 2 * [("meta", 3)]


def test_conditions_of_a_mapping_type_are_part_of_the_job(tmp_path: Path) -> None:
    job = {"condition": UserDict(a=torch.zeros(23)), "parts": [], **JOB}
    sample_parts(made(), tmp_path, sampler=SAMPLER, **job)
    with pytest.raises(ValueError, match="parts of another job"):
        sample_parts(made(), tmp_path, sampler=SAMPLER, **{**job, "condition": np.ones(23)})


def test_names_and_texts_of_conditions_are_part_of_the_job(tmp_path: Path) -> None:
    """Rows drawn in one style were taken for those of another."""
    a, b = torch.zeros(23), torch.ones(23)
    conditions: list[Any] = [{"a": a, "b": b, "style": "oil"}, {"a": a, "b": b, "style": "ink"}]
    conditions += [{"b": a, "a": b, "style": "oil"}, UserDict(a=a, b=b, style="ink")]
    for number, condition in enumerate(conditions):
        job = {"parts": [], **JOB}
        for _ in range(2):
            sample_parts(
                made(), tmp_path / str(number), sampler=SAMPLER, condition=condition, **job
            )
        for other in conditions[:number]:
            with pytest.raises(ValueError, match="parts of another job"):
                sample_parts(
                    made(), tmp_path / str(number), sampler=SAMPLER, condition=other, **job
                )


def test_arrays_in_a_condition_are_converted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def count(array: Any) -> Tensor:
        seen.append(len(array))
        return tensor_of(array)

    def sample(self: NCPrior, num: int, *, condition: Any, **options: Any) -> Any:
        assert len(condition["a"]) == num and condition["scale"].ndim == 0
        return SimpleNamespace(x=torch.zeros(num, 3), latents=[torch.zeros(num, 2)])

    monkeypatch.setattr(NCPrior, "sample", sample)
    monkeypatch.setattr("ncprior.utils.batches.tensor_of", count)
    condition = {"a": np.zeros((23, 2)), "scale": torch.tensor(2.0)}
    sample_parts(made(), tmp_path, sampler=SAMPLER, condition=condition, **JOB)
    assert seen == [23]


def test_a_huge_job_file_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: dict[str, bytes]
) -> None:
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content)
    assert list(read_parts(tmp_path))
    monkeypatch.setattr(parts_module, "_JOB_BYTES", len(whole["job.json"]) - 3)
    with pytest.raises(ValueError, match="holds no job"):
        list(read_parts(tmp_path))


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    sample_parts(made(), tmp_path, sampler=SAMPLER, parts=[0, 1, 3, 4], **JOB)
    with pytest.raises(FileNotFoundError, match="part-00002"):
        list(read_parts(tmp_path))


def test_no_two_parts_of_a_job_share_a_seed() -> None:
    assert len({_seed(0, i) for i in range(200_000)}) == 200_000
    assert len({_seed(seed, 0) for seed in range(1000)}) == 1000


def test_a_part_that_another_process_has_finished_meanwhile_is_left_to_it(
    whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both draw part 3; the other is done first, and has tidied up what was unfinished."""

    def write_late(self: LocalFolder, name: str, data: bytes) -> None:
        self.at(name).write_bytes(whole[name])
        raise FileNotFoundError(name)

    monkeypatch.setattr(LocalFolder, "write", write_late)
    sample_parts(made(), tmp_path, sampler=SAMPLER, parts=[3], **JOB)
    assert contents(tmp_path) == {
        name: whole[name] for name in ("job.json", "part-00003.safetensors")
    }


def test_a_sampler_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="The result of a sampler"):
        sample_parts(made(), tmp_path / "job", sampler=lambda prior, log_ratio: None, **JOB)
    assert not list(tmp_path.iterdir())


def test_whole_numbers_of_numpy_are_numbers_of_a_job(
    whole: dict[str, bytes], tmp_path: Path
) -> None:
    job = {name: np.int64(number) for name, number in JOB.items()}
    sample_parts(made(), tmp_path, sampler=SAMPLER, parts=np.arange(5), **job)
    assert contents(tmp_path) == whole
    for parts in (np.array(3), torch.tensor(3)):
        with pytest.raises(TypeError, match="parts must be of type Iterable"):
            sample_parts(made(), tmp_path, sampler=SAMPLER, parts=parts, **JOB)


def test_the_cost_of_a_part_does_not_grow_with_the_number_of_parts(
    whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a process, not once a part: 4,000 whole parts took 18 ms each, and 250 took 1 ms."""
    looks: list[str] = []

    def counted(function: Any, name: str) -> Any:
        def counting(*arguments: Any) -> Any:
            looks.append(name)
            return function(*arguments)

        return counting

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, counted(getattr(os, name), "scan"))
    monkeypatch.setattr(parts_module, "_read_job", counted(parts_module._read_job, "job"))
    for _ in range(2):  # new parts, and whole ones
        looks.clear()
        sample_parts(made(), tmp_path, sampler=SAMPLER, **JOB)
        assert sorted(looks) == ["job", "scan"]
    monkeypatch.undo()
    assert contents(tmp_path) == whole


@pytest.mark.parametrize("others", [True, False])
def test_a_folder_that_changes_hands_meanwhile_is_claimed_again(
    others: bool, whole: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While part 1 is drawn, someone deletes the job, and perhaps begins another one there."""
    save = parts_module._save

    def save_and_change(folder: Any, name: str, *arguments: Any) -> None:
        save(folder, name, *arguments)
        if name == "part-00001.safetensors":
            (tmp_path / "job.json").unlink()
            if others:
                sample_parts(made(), tmp_path, sampler=SAMPLER, parts=[], **{**JOB, "seed": 8})

    monkeypatch.setattr(parts_module, "_save", save_and_change)
    if others:
        with pytest.raises(ValueError, match="parts of another job, with {'seed': 8}"):
            sample_parts(made(), tmp_path, sampler=SAMPLER, **JOB)
        assert not (tmp_path / "part-00002.safetensors").exists()
    else:
        sample_parts(made(), tmp_path, sampler=SAMPLER, **JOB)
        assert contents(tmp_path) == whole


def test_temporary_files_of_parts_of_other_processes_are_left_to_them(
    whole: dict[str, bytes], tmp_path: Path
) -> None:
    for i in (1, 2):
        (tmp_path / f".part-0000{i}.safetensors.0badcafe.tmp").write_bytes(b"half")
    sample_parts(made(), tmp_path, sampler=SAMPLER, parts=[2, 3], **JOB)
    left = {path.name for path in tmp_path.iterdir()} - whole.keys()
    assert left == {".part-00001.safetensors.0badcafe.tmp"}
    sample_parts(made(), tmp_path, sampler=SAMPLER, **JOB)
    assert contents(tmp_path) == whole
