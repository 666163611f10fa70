"""What this machine is: its device, and which number format is fast on it."""

import ctypes
import functools
import sys
import time

import torch

from training import SafelightError

MEASURED_ROUNDS = 8
WORTH_IT = 1.2  # times as fast as float32, at least: bfloat16 has its own price


class DeviceUnavailable(SafelightError):
    """The device that was asked for isn't on this machine, or torch was built without it."""


def choose_device(wanted: str | None = None) -> torch.device:
    """The wanted device, or else the best there is: CUDA, then Apple's MPS, then CPU. Raises DeviceUnavailable."""
    available = available_devices()
    if not wanted or wanted == "auto":
        return torch.device(available[0])
    if wanted not in available:
        raise DeviceUnavailable(f"device {wanted!r} isn't available here; there is {', '.join(available)}, or auto")
    return torch.device(wanted)


def available_devices() -> list[str]:
    """Best first; 'cuda' is the first GPU, 'cuda:1' the second."""
    cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return (["cuda"] if cuda else []) + cuda + mps + ["cpu"]


def each_of(wanted: str) -> list[str]:
    """What jobs are spread over: every GPU, where any CUDA device will do and there are several; else the one."""
    gpus = [name for name in available_devices() if name.startswith("cuda:")] if wanted in ("auto", "cuda") else []
    return gpus if len(gpus) > 1 else [wanted]


def device_name(device: torch.device) -> str:
    """A name for people and reports: 'cuda (NVIDIA H100)', 'cpu (2 threads)'."""
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else device.type


@functools.cache
def training_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where this device convolves faster in it, else float32.

    A CPU is measured, for its instructions don't tell: with AMX tiles bfloat16 takes a quarter of the time, with
    AVX-512's alone half of it on AMD's Zen 5 and twice as long on an Intel Xeon whose tiles are hidden.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    capable = torch.cpu.get_capabilities().get("avx512_bf16", False)
    if device.type != "cpu" or not capable:
        return torch.float32
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # whose own time is told whatever else the machine is doing
    seconds = {dtype: _convolution_seconds(dtype) for dtype in (torch.float32, torch.bfloat16)}
    torch.set_num_threads(threads)
    return torch.bfloat16 if seconds[torch.bfloat16] * WORTH_IT < seconds[torch.float32] else torch.float32


def in_precision(precision: torch.dtype, device: torch.device) -> torch.autocast:
    """Within it convolutions and matrix products are computed in bfloat16, where that is the precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision is torch.bfloat16)


def _convolution_seconds(dtype: torch.dtype) -> float:
    """Processor time of a convolution of a common size, there and back: the least of a few."""
    images = torch.ones(16, 64, 16, 16, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    filters = torch.ones(64, 64, 3, 3, dtype=dtype, requires_grad=True)
    seconds = []
    for _ in range(MEASURED_ROUNDS):
        begun = time.thread_time()
        torch.autograd.grad(torch.conv2d(images, filters, padding=1).sum(), (images, filters))
        seconds.append(time.thread_time() - begun)
    return min(seconds)


def keep_freed_memory() -> None:
    """Have glibc's allocator keep large freed blocks instead of giving each back to the system.

    A training step frees and asks again for the same hundreds of megabytes; fresh pages must be zeroed by the kernel at
    first touch. Measured on two cores: 40 % more images per second at batch 512. Elsewhere than glibc: nothing.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap too
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: don't shrink the heap
        mallopt(-2, 2**28)  # M_TOP_PAD: grow it by 256 MiB at a time
