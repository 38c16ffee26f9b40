"""How much of the gap in samples the demonstration closes, seed by seed, and their median.

    python examples/benchmarks/demo_seeds.py                             # digits, seeds 0 to 4
    python examples/benchmarks/demo_seeds.py --data mnist --seeds 0 1 2

Every seed draws its own split, VAE, classifier and prior, in a process of its own, as `ncprior demo`
does. Expected: digits, median at least 0.90, about a minute each on two cores with AVX-512, and two without;
mnist, at least 0.92.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

COLUMNS = ("gap_closed", "gap_closed_low", "gap_closed_high", "d_base", "d_ncp", "d_post")
COLUMNS += ("strength", "log_z", "seconds")


def run(data: str, seed: int) -> dict[str, Any]:
    """Runs the command once; its progress bars go to standard error."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "ncprior", "demo", "--json"]
        command += ["--data", data, "--seed", str(seed), "--out", folder]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def machine() -> str:
    return f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}; " + ", ".join(
        (f"python {platform.python_version()}", f"torch {torch.__version__}")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("digits", "mnist"), default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all results here")
    options = parser.parse_args()

    print("seed", *(f"{name:>15}" for name in COLUMNS))
    results = []
    for seed in options.seeds:
        results.append(run(options.data, seed))
        print(f"{seed:>4}", *(f"{results[-1][name]:>15.3f}" for name in COLUMNS), flush=True)
    gap = median(result["gap_closed"] for result in results)
    seconds = max(result["seconds"] for result in results)
    print(f"{options.data}: median gap closed {gap:.3f}, slowest {seconds:.0f} s; {machine()}")
    if options.json is not None:
        summary = {"data": options.data, "median": gap, "machine": machine(), "seeds": results}
        options.json.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
