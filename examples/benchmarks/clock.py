"""What the benchmarks of speed share: contenders timed by turns, the roofline, peaks of memory.

Not a benchmark itself. Contenders take turns in one process, so that whatever else the machine does
falls on all of them alike. With one thread, time is that of the core: waiting for it is not counted.
"""

import argparse
import ctypes
import gc
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Contender = Callable[[], Any]


def add_device(made: argparse.ArgumentParser) -> None:
    """The options of a benchmark of speed."""
    made.add_argument("--device", default="cpu", metavar="cuda", help="where to (%(default)s)")
    made.add_argument("--threads", type=int, default=1, metavar="N", help="of a CPU (%(default)s)")


def seconds(contender: Contender, device: torch.device) -> float:
    """The time of one call; on a GPU, between two events on the device."""
    if device.type != "cuda":
        started = now()
        contender()
        return now() - started
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    contender()
    last.record()
    torch.cuda.synchronize(device)
    return first.elapsed_time(last) / 1000


def now(device_type: str = "cpu") -> float:
    """Seconds on this core where one thread does the work, else on the clock."""
    is_alone = device_type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time() if is_alone else time.perf_counter()


def by_turns(
    contenders: Mapping[str, Contender], device: torch.device, *, rounds: int
) -> dict[str, list[float]]:
    """Seconds of every contender, once a round; a first round is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 1):
        for name, contender in contenders.items():
            spent = seconds(contender, device)
            if round_ > 0:
                times[name].append(spent)
    return times


def ratio(times: Mapping[str, list[float]], slow: str, fast: str) -> float:
    """How many times as fast: the median over rounds, each of which had both."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def roofline(device: torch.device) -> Contender:
    """(4096×256) @ (256×256), of which ``FLOPS`` says what it costs."""
    a, b = torch.randn(4096, 256, device=device), torch.randn(256, 256, device=device)
    out = torch.empty(4096, 256, device=device)
    return lambda: torch.mm(a, b, out=out)


FLOPS = 2 * 4096 * 256 * 256


def mlp_flops(latents: int, width: int, blocks: int) -> int:
    """Operations in the matrix products of one evaluation of an MLPHead without context."""
    return 2 * (latents * width + 2 * blocks * width**2 + width)


def peak_mib(make: Callable[..., Contender], *args: Any) -> float | None:  # noqa: ANN401
    """The peak of resident memory in a fresh process over that before a call, in MiB."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (make, *args))


def _peak(make: Callable[..., Contender], *args: Any) -> float | None:  # noqa: ANN401
    torch.set_num_threads(1)
    return peak_growth(make(*args))


def peak_growth(contender: Contender) -> float:
    """The peak of this process' resident memory in a call over that before, in MiB; NaN off Linux."""
    status = Path("/proc/self/status")
    if not status.exists():
        return math.nan

    def mib(field: str) -> float:
        (line,) = (x for x in status.read_text().splitlines() if x.startswith(field))
        return int(line.split()[1]) / 1024

    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc: what is free goes back
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = mib("VmRSS")
    contender()
    return mib("VmHWM") - before
