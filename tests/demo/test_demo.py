"""The demonstration, run with few steps: the files that it writes, also when it is interrupted."""

import io
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers.problems import CorrelatedPair
from helpers.recipe import make_quick
from helpers.toys import Ladder, ladder_prior
from PIL import Image
from torch import Tensor, nn
from torch.distributions import Binomial, Independent, Normal, kl_divergence

from ncprior import NCPrior, SingleGroup, improve, sir
from ncprior.bases import JointSource
from ncprior.demo import run as demo
from ncprior.demo.arms import draw_arms, log_z
from ncprior.demo.datasets import digits
from ncprior.demo.networks import VAE, Classifier
from ncprior.demo.pictures import plot_latents, plot_samples
from ncprior.demo.run import run_demo
from ncprior.recipe import base
from ncprior.saving.tensors import load_tensors

FEW = {
    "vae_steps": 200,
    "classifier_steps": 50,
    "budget": 20,
    "num_samples": 600,
    "log_z_draws": 1000,
}
FILES = {
    *("samples.png", "latents.png", "report.html", "report.json", "vae.safetensors"),
    *("prior/ncprior.safetensors", "prior/ncprior.json", "prior/README.md"),
}


@pytest.fixture(scope="module", autouse=True)
def few_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("digits", "mnist"):
            patch.setitem(demo._SETTINGS, name, replace(demo._SETTINGS[name], **FEW))
        make_quick(patch, steps=200)
        patch.setattr(base, "_SIZES_OF_FEW", ())  # so that heads have something to learn
        yield


@pytest.fixture(scope="module")
def made() -> list[NCPrior]:
    """The prior of `run`."""
    return []


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, made: list[NCPrior]
) -> tuple[dict[str, Any], Path]:
    """A result, and the folder it was written to."""

    def noted(*parts: Any, **options: Any) -> NCPrior:
        made.append(improve(*parts, **options))
        return made[-1]

    out = tmp_path_factory.mktemp("run") / "new" / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "improve", noted)
        return run_demo(out=out, progress=False), out


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    """What a seed determines."""
    kept = {k: v for k, v in result.items() if k not in ("seconds", "summary", "seed")}
    kept["improvement"] = [result["improvement"][part] for part in ("verdict", "diagnosis")]
    return kept


def test_writes_what_it_returns(run: tuple[dict[str, Any], Path]) -> None:
    result, out = run
    assert contents(out).keys() == FILES
    assert {path.name for path in out.iterdir()} == {name.split("/")[0] for name in FILES}
    assert json.loads((out / "report.json").read_text()) == result


def test_the_result_is_whole_and_consistent(run: tuple[dict[str, Any], Path]) -> None:
    result, _ = run
    base, ours, post = (result[f"d_{arm}"] for arm in ("base", "ncp", "post"))
    assert result["gap_closed"] == pytest.approx((base - ours) / (base - post))
    assert result["gap_closed_low"] < result["gap_closed"] < result["gap_closed_high"]
    assert math.isfinite(result["log_z"])
    assert result["improvement"]["diagnosis"]["groups"][0]["verdict"]
    assert result["improvement"]["budget"] == 20
    assert result["sampler"].startswith("tempered_smc(")  # 20 evaluations are few for this gap
    assert result["strength"] > 0
    assert result["classifier_accuracy"] > 0.5
    low, value, high = (f"{100 * result[f'gap_closed{end}']:.0f}" for end in ("_low", "", "_high"))
    seconds = f"{result['seconds']:.0f} s"
    assert result["summary"] == f"gap in samples closed: {value} % ({low}–{high}), {seconds}"


def test_the_pictures_are_pictures(run: tuple[dict[str, Any], Path]) -> None:
    for name in ("samples.png", "latents.png"):
        with Image.open(run[1] / name) as picture:
            assert picture.width > 2 * picture.height > 800
            assert np.asarray(picture.convert("L")).std() > 10


def test_the_saved_head_fits_the_saved_vae(
    run: tuple[dict[str, Any], Path], made: list[NCPrior]
) -> None:
    result, out = run
    tensors, shape = load_tensors(out / "vae.safetensors")
    vae = VAE(**shape).eval()
    vae.load_state_dict(tensors)
    prior = NCPrior.from_pretrained(vae.source(), out / "prior")
    assert prior.active == [True]
    z = torch.randn(50, vae.latents)
    torch.testing.assert_close(prior.log_ratio([z]), made[0].log_ratio([z]))
    estimates = []  # r has a tail of draws: two estimates of other draws could differ by much
    for one in (prior, made[0]):
        torch.manual_seed(3)
        estimates.append(log_z(one, 1000))
    assert estimates[0] == pytest.approx(estimates[1], abs=1e-5)
    assert math.isfinite(result["log_z"])


def test_a_seed_determines_the_numbers_and_disturbs_no_generator(
    run: tuple[dict[str, Any], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state(), str(np.random.get_state())
    again = run_demo(out=tmp_path / "again", seed=0, progress=False)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state()) == before[1]
    assert capsys.readouterr() == ("", "")
    assert numbers(again) == numbers(run[0])
    same = {name: data for name, data in contents(tmp_path / "again").items() if name in FILES}
    assert same["vae.safetensors"] == contents(run[1])["vae.safetensors"]
    other = run_demo(out=tmp_path / "other", seed=1)
    assert numbers(other)["d_base"] != numbers(again)["d_base"]
    out, err = capsys.readouterr()
    assert out == ""
    assert all(part in err for part in ("VAE", "classifier", "base: ", "heads", "samples"))


def stop(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("where", "written"),
    [
        ("train", set()),
        ("save_tensors", {"samples.png", "latents.png"}),
        ("_versions", FILES - {"report.json"}),
    ],
)
def test_an_interrupt_leaves_whole_files_and_the_earlier_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, written: set[str]
) -> None:
    monkeypatch.setattr(demo, where, stop)
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    (earlier / "report.json").write_text("of an earlier run")
    for out in (tmp_path / "new", earlier) if where == "train" else (earlier,):
        with pytest.raises(KeyboardInterrupt):
            run_demo(out=out, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["earlier"]
    found = contents(earlier)
    assert found.pop("report.json") == b"of an earlier run"
    assert found.keys() == written
    for name in written & {"samples.png", "latents.png"}:
        with Image.open(earlier / name) as picture:
            picture.load()  # raises if the file is cut short


def test_what_cannot_work_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="one of 'digits', 'mnist'; got 'cifar'"):
        run_demo("cifar", out=tmp_path / "a")
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"matplotlib: .*'demo' \(pip install '\.\[demo\]'"):
        run_demo(out=tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1.5}, "seed must be a whole number"),
        ({"seed": None}, "seed must be a whole number"),
        ({"out": None}, "out must be of type str or PathLike"),
        ({"progress": 0}, "progress must be True or False"),
    ],
)
def test_F26_arguments_of_the_demonstration(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TypeError, match=message):
        run_demo(**{"out": tmp_path / "a", **options})
    assert not list(tmp_path.iterdir())


def test_a_file_as_folder_is_refused_before_any_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "_run", lambda *_: pytest.fail("It trains."))
    (tmp_path / "a").touch()
    with pytest.raises(NotADirectoryError, match="out must be a folder; .* is a file"):
        run_demo(out=tmp_path / "a")


def test_F26_counts_of_networks_and_arms(tilted: NCPrior) -> None:
    for wrong in (2.0, "2", None):
        with pytest.raises(TypeError, match="must be a whole number"):
            VAE(8, latents=wrong, counts=1)
        with pytest.raises(TypeError, match="must be a whole number"):
            Classifier(8, num_features=wrong)
        with pytest.raises(TypeError, match="num_draws must be a whole number"):
            log_z(tilted, wrong)
        options = {"features": torch.sin, "num_samples": 3, "generations": wrong}
        with pytest.raises(TypeError, match="generations must be a whole number"):
            draw_arms(tilted, partial(sir, num_proposals=5), torch.ones(9, 1), **options)
    for make in (
        lambda: VAE(9, latents=2, counts=1),
        lambda: Classifier(16, num_features=2),
        lambda: log_z(tilted, 0),
    ):
        with pytest.raises(ValueError, match="must be"):
            make()
    with pytest.raises(TypeError, match="prior must be of type NCPrior"):
        log_z(tilted.source, 9)


def write_mnist(folder: Path, part: str, images: Tensor, labels: Tensor) -> None:
    cells = []
    for pixels in (255 * images[:, 0]).round().byte().numpy():
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        cells.append({"bytes": file.getvalue(), "path": None})
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": cells, "label": labels.tolist()})
    pq.write_table(table, folder / f"{part}-00000-of-00001.parquet")


@pytest.mark.filterwarnings("ignore:Reconstructions")  # few steps: they are blurred
def test_mnist_runs_from_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = digits()
    images = nn.functional.interpolate(images, size=(28, 28))
    folder = tmp_path / "data" / "ylecun" / "mnist" / "mnist"
    write_mnist(folder, "train", images[:1100], labels[:1100])
    write_mnist(folder, "test", images[1100:], labels[1100:])
    monkeypatch.setenv("NCPRIOR_DATA", str(tmp_path / "data"))
    small = {"num_features": 16, "num_samples": 200, "batch_size": 32, "vae_steps": 100}
    settings = replace(demo._SETTINGS["mnist"], **small)
    monkeypatch.setitem(demo._SETTINGS, "mnist", settings)
    result = run_demo("mnist", out=tmp_path / "out", progress=False)
    assert result["settings"]["latents"] == 16
    assert contents(tmp_path / "out").keys() == FILES


class Tilt(nn.Module):
    """log r = shift z - shift²/2, between N(shift, 1) and N(0, 1)."""

    def forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        return (z - 0.5).sum(-1)


@pytest.fixture
def tilted() -> NCPrior:
    """A prior whose posterior is N(x, 0.1²), around the training images x = 1, and exact head."""
    base = Independent(Normal(torch.zeros(1), 1.0), 1)
    source = SingleGroup(base, lambda x: Independent(Normal(x, 0.1), 1), lambda z: 2 * z)
    return NCPrior(source, Tilt())


def test_the_number_of_threads_is_put_back() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with demo._threads(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with demo._threads(None):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_arms_are_what_they_are_called(tilted: NCPrior) -> None:
    features, first = draw_arms(
        tilted,
        partial(sir, num_proposals=50),
        torch.ones(300, 1),
        features=lambda x: x,
        num_samples=2000,
        generations=3,
        progress=False,
    )
    assert all(len(arms) == 3 and arms[0].shape == (2000, 1) for arms in features.values())
    # The table of exact values has 0.9087 for the mean of SIR with 50 proposals at KL 1; the
    # shift of 1 here is KL 0.5, whose bias is below a third of that.
    for arm, mean, sd in (("base prior", 0.0, 1.0), ("NCP", 1.0, 1.0), ("posterior", 1.0, 0.1)):
        bias = 0.03 if arm == "NCP" else 0.0
        assert abs(first[arm].latents[0].mean() - mean) < bias + 4 * sd / 2000**0.5
        assert torch.equal(first[arm].x, 2 * first[arm].latents[0])
        assert torch.equal(features[arm][0], first[arm].x)
        assert not torch.equal(features[arm][1], features[arm][0])
        assert bool(first[arm].ess.isnan().all()) is (arm != "NCP")


@pytest.mark.filterwarnings("ignore:Reconstructions of a row")  # two latents of ten
def test_the_base_below_a_joint_head_is_the_prior_of_the_vae() -> None:
    """One draw from each arm: without the heads below, a joint head would draw from the aggregate."""
    problem = CorrelatedPair()
    first = NCPrior(problem, problem.heads())
    first.sampler = partial(sir, num_proposals=50)
    x = problem.data(2000)
    whole = NCPrior.for_source(JointSource(first), x, width=8)

    def correlations(base: Any) -> dict[str, float]:
        _, arms = draw_arms(
            *(whole, partial(sir, num_proposals=2), x),
            features=lambda x: x,
            num_samples=2000,
            generations=1,
            base=base,
            progress=False,
        )
        return {arm: torch.corrcoef(one.x.T)[0, 1].item() for arm, one in arms.items()}

    for vae, old in ((problem, 0.0), (None, 0.8), (JointSource(first), 0.8)):
        assert correlations(vae) == {
            "base prior": pytest.approx(old, abs=0.1),
            "NCP": pytest.approx(0.8, abs=0.05),
            "posterior": pytest.approx(0.8, abs=0.05),
        }


def test_the_posterior_arm_takes_every_training_image_as_often(tilted: NCPrior) -> None:
    x = torch.arange(10.0)[:, None]
    source = SingleGroup(
        tilted.source.prior, lambda x: Independent(Normal(x, 1e-3), 1), nn.Flatten().eval()
    )
    _, first = draw_arms(
        NCPrior(source, Tilt()),
        partial(sir, num_proposals=2),
        x,
        features=lambda x: x,
        num_samples=25,
        generations=1,
        progress=False,
    )
    counts = first["posterior"].latents[0].flatten().round().long().bincount()
    assert set(counts.tolist()) == {2, 3}
    assert counts.sum() == 25


def test_the_arms_share_their_conditions_and_keep_every_group() -> None:
    """Of a hierarchy, with a condition that the walk without x is given."""

    class Conditioned(Ladder):
        """A ladder whose images tell the condition that they were walked with."""

        def encode(self, x: tuple[Tensor, Tensor]) -> Tensor:
            return torch.cat([super().encode(x[0]), x[1]], -1)

        def start(self, batch_size: int, encoding: Any = None, condition: Any = None) -> Any:
            c = condition if encoding is None else encoding[:, -1:]
            s = None if encoding is None else encoding[:, :-1]
            self.seen = c
            return super().start(batch_size, s)

        def decode(self, state: Any) -> Tensor:
            return self.seen.expand(len(state.h), 1)

    prior = NCPrior(Conditioned(), ladder_prior().heads)
    x, c = torch.randn(50, 3), torch.arange(50.0)[:, None]
    features, first = draw_arms(
        prior,
        partial(sir, num_proposals=5),
        (x, c),
        features=lambda x: x,
        num_samples=20,
        generations=2,
        condition=lambda batch: batch[1],
        progress=False,
    )
    for i in range(2):
        assert torch.equal(features["base prior"][i], features["posterior"][i])
        assert torch.equal(features["NCP"][i], features["posterior"][i])
    assert not torch.equal(features["NCP"][0], features["NCP"][1])
    for arm in first.values():
        assert [z.shape for z in arm.latents] == [(20, 2)] * 3
        assert arm.ess.shape == (20, 3)


def test_log_z_is_that_of_a_known_ratio(tilted: NCPrior) -> None:
    # Var r = e - 1 under the base, so that log of the mean of N has standard error 1.31 / √N.
    assert abs(log_z(tilted, 20_000)) < 4 * 1.31 / 20_000**0.5


def test_the_loss_of_the_vae_is_its_negative_elbo() -> None:
    vae, x = VAE(8, latents=6, counts=16), digits().images[:20]
    torch.manual_seed(3)
    loss = vae.negative_elbo(x)
    torch.manual_seed(3)
    q = vae.posterior(x)
    log_likelihood = Binomial(16, logits=vae.decoder(q.rsample())).log_prob((16 * x).round())
    coefficients = Binomial(16, probs=torch.tensor(0.5)).log_prob(
        (16 * x).round()
    ) + 16 * math.log(2)
    expected = kl_divergence(q, vae.prior()) - (log_likelihood - coefficients).sum((1, 2, 3))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("size", [8, 28])
def test_networks_of_both_sizes(size: int) -> None:
    vae, x = VAE(size, latents=5, counts=1), torch.rand(3, 1, size, size)
    image = vae.decode(vae.posterior(x).sample())
    assert image.shape == x.shape
    assert 0 <= image.min() < image.max() <= 1
    assert Classifier(size, num_features=7).features(x).shape == (3, 7)


def test_the_picture_shows_the_images_in_their_rows() -> None:
    rows = {"data": torch.rand(3, 1, 8, 8), "prior": torch.rand(3, 1, 8, 8)}
    for axes, (label, images) in zip(plot_samples(rows).axes, rows.items(), strict=True):
        assert axes.get_ylabel() == label
        shown = torch.from_numpy(axes.images[0].get_array().data)
        assert shown.shape == (8, 3 * 9 - 1)  # one white column between images
        assert torch.equal(shown[:, 9:17], images[1, 0])
        assert torch.equal(shown[:, 8], torch.zeros(8))


def test_images_in_colour_stand_apart_by_white() -> None:
    images = torch.rand(3, 3, 8, 8)
    shown = plot_samples({"data": images}).axes[0].images[0].get_array().data
    assert shown.shape == (8, 3 * 9 - 1, 3)
    assert torch.equal(torch.from_numpy(shown)[:, 9:17], images[1].movedim(0, -1))
    assert (shown[:, 8] == 1).all()


def test_pictures_take_tensors_with_gradients_and_of_any_dtype() -> None:
    images = torch.rand(3, 1, 8, 8, requires_grad=True)
    shown = plot_samples({"decoded": images, "half": images.bfloat16()}).axes[0].images[0]
    assert torch.equal(torch.from_numpy(shown.get_array().data)[:, :8], images[0, 0])
    z = torch.randn(5, 3, requires_grad=True)
    assert len(plot_latents({"z": z, "half": z.bfloat16()}, torch.eye(3)[:, :2]).axes) == 2


def test_the_clouds_are_projected() -> None:
    z, axes = torch.randn(50, 4), torch.eye(4)[:, [2, 0]]
    figure = plot_latents({"base prior": z, "NCP": z + 1}, axes)
    assert [panel.get_title() for panel in figure.axes] == ["base prior", "NCP"]
    points = torch.from_numpy(figure.axes[1].collections[0].get_offsets().data).float()
    torch.testing.assert_close(points, z[:, [2, 0]] + 1)


def test_arms_leave_the_generator_where_it_is(tilted: NCPrior) -> None:
    """Its seed is a part of what is measured afterwards."""
    torch.manual_seed(123)
    options = {"features": torch.sin, "num_samples": 3, "generations": 2}
    draw_arms(tilted, partial(sir, num_proposals=5), torch.ones(9, 1), **options)
    assert torch.initial_seed() == 123
