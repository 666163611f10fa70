"""Several processes train one network, each on its share of every batch: what `torchrun` starts.

    torchrun --nproc-per-node 2 -m -- training train mnist --run runs/two

Each computes the gradient of its own share, and all take the step that their mean says, so the networks stay alike.
The first of them alone speaks, saves and publishes. Where there are GPUs, each has its own.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, items: Tensor) -> Tensor:
        """Of a batch [B, …], what this process computes: every `count`-th, beginning with its own place."""
        return items if self.count == 1 else items[self.rank :: self.count]

    def average_gradients(self, network: nn.Module, weight: float) -> None:
        """Let all processes go on with the same gradient: the mean of theirs, each counted by its part of the batch."""
        if self.count == 1:
            return
        gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
        together = torch.cat([gradient.flatten() for gradient in gradients]) * weight  # one message for all
        dist.all_reduce(together)
        for gradient, part in zip(gradients, together.split([one.numel() for one in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def sum(self, values: Sequence[float], device: torch.device) -> Sequence[float]:
        """Sums over all processes."""
        if self.count == 1:
            return values
        together = torch.tensor(values, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        dist.all_reduce(together)
        return together.tolist()


ALONE = Ranks()


def started_together() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first() -> bool:
    """Whether this process is the one that speaks, saves and publishes."""
    return not started_together() or os.environ["RANK"] == "0"


def own_device(device: torch.device) -> torch.device:
    """Of several processes on one machine, each has a GPU of its own."""
    several = device.type == "cuda" and started_together()
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if several else device


@contextmanager
def together(device: torch.device) -> Iterator[Ranks]:
    """The processes that `torchrun` started, or this one alone."""
    if not started_together():
        yield ALONE
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
