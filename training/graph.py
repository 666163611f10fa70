"""Work that is the same at every step, on the same memory: on CUDA recorded once as a graph, and replayed.

A step of a small network is hundreds of kernels of some microseconds each, which Python can't launch as fast as a GPU
computes them. As a graph they are one launch.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

WARM_UP = 3  # times the work is done before it is recorded: libraries choose kernels in them, and make their workspaces

T = TypeVar("T")
# Records work without doing it: returns what each replay fills, and the replay.
Record = Callable[[Callable[[], T]], tuple[T, Callable[[], None]]]


def cuda_graph(work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        filled = work()
    return filled, graph.replay


def recorder(device: torch.device) -> Record[T] | None:
    """What records on this device, where anything does."""
    return cuda_graph if device.type == "cuda" else None


class Recorded(Generic[T]):
    """Called, it does the work, or what its recording says; what it returns is written over by the next call."""

    def __init__(self, work: Callable[[], T], record: Record[T] | None) -> None:
        self._work, self._record = work, record
        self._warm = 0
        self._recording: tuple[T, Callable[[], None]] | None = None

    def __call__(self) -> T:
        if self._record is None:
            return self._work()
        if self._warm < WARM_UP:
            self._warm += 1
            return _apart(self._work)
        if self._recording is None:
            self._recording = self._record(self._work)
        filled, replay = self._recording
        replay()
        return filled


def _apart(work: Callable[[], T]) -> T:
    """In a stream of its own, as what comes before a recording must be."""
    if not torch.cuda.is_available():
        return work()
    stream, now = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(now)
    with torch.cuda.stream(stream):
        done = work()
    now.wait_stream(stream)
    return done
