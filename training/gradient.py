"""The gradient of a batch: one pass forward and one back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from training.costs import cost, penalty
from training.devices import in_precision
from training.graph import Record, Recorded
from training.networks import Network
from training.recipes import Recipe


@dataclass(frozen=True)
class Batch:
    images: Tensor  # [B + S, C, H, W], pixels 0 … 255 of some type; the last S are strangers
    labels: Tensor  # [B]
    taught: Tensor | None  # [B, K], a teacher's logits of these very views

    def clone(self) -> "Batch":
        taught = None if self.taught is None else self.taught.clone()
        return Batch(self.images.clone(), self.labels.clone(), taught)

    def copy_(self, other: "Batch") -> None:
        self.images.copy_(other.images)
        self.labels.copy_(other.labels)
        if self.taught is not None and other.taught is not None:
            self.taught.copy_(other.taught)


Passed = tuple[Tensor, Tensor]  # the batch's mean loss, and how many of it were right: scalars, on the device


class Gradient:
    """Called with a batch, it leaves the gradients of the network's parameters in them. Recorded once for each size of
    images."""

    def __init__(
        self,
        network: Network,
        recipe: Recipe,
        scale: float,
        precision: torch.dtype,
        device: torch.device,
        record: Record[Passed] | None,
    ) -> None:
        """The loss is multiplied by `scale` before it is differentiated."""
        self._network, self._recipe, self._scale = network, recipe, scale
        self._precision, self._device, self._record = precision, device, record
        self._recorded: dict[torch.Size, tuple[Batch, Recorded[Passed]]] = {}  # with the batch that it reads

    def __call__(self, batch: Batch) -> Passed:
        if self._record is None:
            return self._pass(batch)
        if (size := batch.images.shape) not in self._recorded:
            self._recorded[size] = self._reading(batch.clone())
        place, passed = self._recorded[size]
        place.copy_(batch)
        return passed()

    def _reading(self, place: Batch) -> tuple[Batch, Recorded[Passed]]:
        return place, Recorded(lambda: self._pass(place), self._record)

    def _pass(self, batch: Batch) -> Passed:
        self._network.zero_grad(set_to_none=True)  # so that a recording writes gradients, and doesn't add to them
        with in_precision(self._precision, self._device):
            outputs = self._network(batch.images)
        loss = cost(self._recipe, outputs.float(), batch.labels, batch.taught)
        ((loss + penalty(self._recipe, self._network)) * self._scale).backward()
        right = (outputs[: len(batch.labels)].argmax(1) == batch.labels).sum()
        return loss.detach(), right
