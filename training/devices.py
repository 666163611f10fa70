"""What this machine is: its device, and which number format is fast on it."""

import ctypes
import sys

import torch

from training import SafelightError


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


def training_precision(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies matrices in it, else float32.

    A CPU with AVX-512's bf16 instructions but without AMX tiles computes convolutions in bf16 at about half its float32
    rate (measured: 170 against 310 GFLOP/s on two cores), so AMX is what counts.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    has_tiles = device.type == "cpu" and torch.cpu.get_capabilities().get("amx_bf16", False)
    return torch.bfloat16 if has_tiles else torch.float32


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
