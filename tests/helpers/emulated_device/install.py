"""The Python's part: what torch asks its own C code for is answered by the library."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torchgen
from helpers.emulated_device.build import loaded
from helpers.emulated_device.waits import REPORTS

# Kernels that wait for the device, and how often; all others reach item or a copy.
_WAITING = {
    "aten::nonzero": 1,
    "aten::masked_select": 1,
    "aten::equal": 1,
    "aten::bincount": 1,
    "aten::histc": 1,
    "aten::_unique2": 1,
    "aten::unique_dim": 1,
    "aten::unique_consecutive": 1,
    "aten::repeat_interleave.Tensor": 1,
    "aten::_linalg_eigh.eigenvalues": 1,
    "aten::_linalg_svd.U": 1,
    "aten::normal.Tensor_Tensor": 2,  # are all standard deviations positive?
    "aten::normal.float_Tensor": 2,
}

# Kernels that are registered by other names than in native_functions.yaml.
_ALSO = ["aten::convolution", "aten::convolution_backward"]
_ALSO_OF_MPS = ["aten::native_batch_norm_backward"]


def install(kind: str) -> None:
    """Makes "cuda" (of two devices) or "mps" a device of this process."""
    library = loaded(kind)
    kernels = list(_kernels())
    existing = [name for name, keys, _ in kernels if kind.upper() in keys] + _ALSO
    existing += [name for name, _, _ in kernels if "flash_attention_for_cpu" in name]
    existing += _ALSO_OF_MPS if kind == "mps" else []
    library.configure({name for name, _, free in kernels if free}, set(existing), _WAITING)
    library.on_wait(REPORTS)
    (_answer_for_cuda if kind == "cuda" else _answer_for_mps)(library)
    _answer_for_storages()


def _kernels() -> Iterator[tuple[str, set[str], bool]]:
    """Name, devices, and whether devices are unchecked, as torch's own code is generated."""
    path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    for block in re.split(r"\n(?=- func: )", path.read_text()):
        name = re.match(r"- func: ([\w.]+)\(", block)
        if name is None:
            continue
        keys = {"CUDA", "CPU"} if "ufunc_inner_loop" in block else set()
        dispatch = re.search(r"\n  dispatch:\n((?:    .*\n?)+)", block)
        for line in dispatch.group(1).splitlines() if dispatch else ():
            if ":" in line and not line.strip().startswith("#"):
                keys |= {key.strip() for key in line.split(":")[0].split(",")}
        yield "aten::" + name.group(1), keys, "device_check: NoCheck" in block


def _answer_for_cuda(library: ModuleType) -> None:
    c: Any = torch._C
    cuda: Any = torch.cuda
    c._cuda_getDeviceCount = library.device_count
    c._cuda_getDevice = library.current_device
    c._cuda_setDevice = library.exchange_device
    c._cuda_exchangeDevice = c._cuda_maybeExchangeDevice = library.exchange_device
    c._cuda_isInBadFork = c._cuda_isCurrentStreamCapturing = lambda: False
    c._cuda_getCurrentRawStream = lambda index: 0
    c._cuda_synchronize = lambda: REPORTS("synchronize")
    c._cuda_emptyCache = lambda: None
    cuda._lazy_init = lambda: None
    cuda._initialized = True
    cuda.is_available = lambda: True
    cuda.device_count = library.device_count
    cuda.is_bf16_supported = lambda *a, **k: True
    cuda.default_generators = tuple(map(library.default_generator, range(library.device_count())))
    cuda.is_current_stream_capturing = cuda._is_in_bad_fork = lambda: False
    cuda._exchange_device = cuda._maybe_exchange_device = library.exchange_device
    cuda.get_device_capability = lambda device=None: (8, 0)
    cuda.get_device_name = lambda device=None: "emulated"
    cuda.synchronize = lambda device=None: REPORTS("synchronize")

    def index(device: Any) -> int:
        device = torch.device("cuda", device) if isinstance(device, int) else device
        given = None if device is None else torch.device(device).index
        return library.current_device() if given is None else given

    class Stream(torch.Stream):
        def __new__(cls, device: Any = None, priority: int = 0, **kwargs: Any) -> Any:
            if not kwargs:
                kwargs = {"device": torch.device("cuda", index(device)), "priority": priority}
            return super().__new__(cls, **kwargs)

        def wait_stream(self, other: torch.Stream) -> None:
            """No stream is ever behind."""

        def synchronize(self) -> None:
            REPORTS("synchronize")

    def current_stream(device: Any = None) -> Stream:
        s = c._accelerator_getStream(index(device))
        return Stream(
            stream_id=s.stream_id, device_index=s.device_index, device_type=s.device_type
        )

    cuda.Stream, cuda.current_stream = Stream, current_stream
    cuda.stream = lambda stream: stream  # a context of its own


def _answer_for_mps(library: ModuleType) -> None:
    c: Any = torch._C
    mps: Any = torch.backends.mps
    generator = library.default_generator(0)
    mps.is_available = mps.is_built = lambda: True
    mps.is_macos_or_newer = lambda *a: True
    c._has_mps = True
    c._mps_is_available = lambda: True
    c._mps_get_default_generator = lambda: generator
    c._mps_is_in_bad_fork = lambda: False
    c._mps_deviceSynchronize = lambda: REPORTS("synchronize")
    c._mps_emptyCache = lambda: None
    sys.modules["torch.mps"]._default_mps_generator = None  # type: ignore[attr-defined]


def _answer_for_storages() -> None:
    """Storages for deepcopy and torch.load are made by names that a CPU's build does not know."""
    storage: Any = torch.UntypedStorage
    clone = storage.clone

    def bytes_of(given: Any) -> torch.Tensor:
        t = torch.empty(0, dtype=torch.uint8, device=given.device)
        return t.set_(given, 0, (given.nbytes(),), (1,))

    def own_clone(self: Any) -> Any:
        on_cpu = self.device.type == "cpu"
        return clone(self) if on_cpu else bytes_of(self).clone().untyped_storage()

    def own_to(self: Any, *, device: torch.device, non_blocking: bool = False) -> Any:
        return bytes_of(self).to(device, non_blocking=non_blocking).untyped_storage()

    storage.clone, storage._to = own_clone, own_to
