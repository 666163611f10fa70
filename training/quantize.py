"""Quantisation after training: which values each convolution's inputs take, and what it costs to keep them as bytes.

Nothing is trained. The int8 form is computed here in float32 with every weight and activation rounded to what a byte
can hold, which gives the logits of OpenVINO's int8 to the last roundings; so training needs no OpenVINO.

The first convolution stays in float32: it has few multiplications, and its inputs are pixels. Where it whitens, and
the activation behind it isn't bounded, so does the second, whose inputs are then too wide for a byte. So does the
linear layer at the end, for OpenVINO (2026.4) miscomputes it where its inputs fall below zero (docs/experiments.md has
the figures of all three).
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from training import events
from training.bundle.answers import Logits
from training.bundle.int8 import Figures, Int8, Ranges, rounded_weights
from training.bundle.manifest import InputSpec
from training.calibrate import expected_calibration_error
from training.datasets import Split
from training.drawings import golden_images
from training.evaluate import accuracy, infer
from training.loop import Emit
from training.networks import ConvNet, Network
from training.networks.network import BOUNDED

SEEN = 128  # pictures that ranges are chosen by
DRAWN = 64  # golden ones beside them; they are also those whose logits are kept, for more take time and show no more
SAMPLED = 30_000  # values of them for each layer; from 32,768 torch shares the work, and waits, on a busy machine
DRAWN_WEIGHT = 0.003  # of a golden picture's error, where a real one's counts 1
CUTS = np.linspace(0.06, 1.0, 48)  # of the largest value: what lies above is cut off
MAX_BYTE = 255


@dataclass(frozen=True)
class Seen:
    """What went into a convolution."""

    values: Tensor  # [S], some of them, with the largest and smallest of all
    means: Tensor  # [I], of each channel


def int8_form(
    network: Network, train: Split, checked: Split, spec: InputSpec, temperature: float, tell: Emit
) -> Int8 | None:
    """The int8 form of a network, or None, and a notice, where it costs too much.

    Ranges are chosen by some training pictures. What they cost is measured on `checked`, which nothing was fitted to.
    """
    if not isinstance(network, ConvNet):
        return None  # its convolutions are few, or not in a row
    int8 = quantize(network, train.images, checked, torch.from_numpy(golden_images(spec)), temperature)
    if (objection := int8.figures.objection()) is not None:
        tell(events.Notice(message=f"published without an int8 form: {objection}"))
        return None
    return int8


def quantize(network: Network, images: Tensor, checked: Split, golden: Tensor, temperature: float) -> Int8:
    """Choose ranges by pictures [N, C, H, W] and measure the int8 form on others; `golden` are the golden images."""
    device = next(network.parameters()).device
    golden = golden[:DRAWN]
    # Folded where the exporter folds, for `rounded_weights` asks for the very bits of the module's weights.
    folded = deepcopy(network).cpu().float().folded().to(device)
    some = images[:: max(1, len(images) // SEEN)][:SEEN]  # from all over: data sets may be sorted by class
    ranges = choose_ranges(inputs(folded, some), inputs(folded, golden))
    rounded = simulated(folded, ranges)
    logits, exact = (infer(form, checked.images, device) for form in (rounded, folded))
    figures = Figures(
        n=len(checked),
        accuracy=accuracy(logits, checked.labels),
        float32_accuracy=accuracy(exact, checked.labels),
        ece=expected_calibration_error(logits, checked.labels, temperature),
        float32_ece=expected_calibration_error(exact, checked.labels, temperature),
        differing=float((logits.argmax(1) != exact.argmax(1)).double().mean()),
    )
    return Int8(ranges, golden_logits(folded, ranges, golden), figures)


def golden_logits(folded: Network, ranges: Ranges, golden: Tensor) -> Logits:
    """What the int8 form says of the golden images: [N, K], on the CPU, as float32's golden logits are."""
    return infer(simulated(folded, ranges).cpu(), golden, torch.device("cpu")).numpy()


def convolutions(network: Network) -> list[nn.Conv2d]:
    """Those that run in int8, in the order of the graph."""
    too_wide = isinstance(network, ConvNet) and network.whiten and not isinstance(network.activation, BOUNDED)
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)][2 if too_wide else 1 :]


@torch.inference_mode()
def inputs(folded: Network, images: Tensor) -> list[Seen]:
    """What each convolution takes in, in the order of the graph."""
    found: list[Seen] = []

    def see(_: nn.Module, given: tuple[Tensor]) -> None:
        values = given[0].flatten()
        step = -(-len(values) // SAMPLED) | 1  # odd, so that it doesn't fall in step with the rows
        some = torch.cat([values[::step], values.amin()[None], values.amax()[None]])
        found.append(Seen(some.cpu(), given[0].mean((0, 2, 3)).cpu()))

    hooks = [convolution.register_forward_pre_hook(see) for convolution in convolutions(folded)]
    infer(folded, images, next(folded.parameters()).device, batch=len(images))
    for hook in hooks:
        hook.remove()
    return found


def choose_ranges(real: Sequence[Seen], drawn: Sequence[Seen]) -> Ranges:
    """For each layer the range with the least squared error, of real values and, with little weight, of drawn ones.

    A byte has 256 steps: a wide range makes them coarse, a narrow one cuts off large values.
    """
    layers = [(one.values, other.values) for one, other in zip(real, drawn, strict=True)]
    chosen = [min(_ranges(*values), key=lambda range_: _error(range_, *values)) for values in layers]
    scales, zeros = zip(*chosen, strict=True) if chosen else ((), ())
    means = tuple(one.means.numpy() for one in real)  # drawn ones are nothing that a network will be asked about
    return Ranges(np.array(scales, np.float32), np.array(zeros, np.uint8), means)


def _ranges(*values: Tensor) -> list[tuple[float, int]]:
    """Scales and zeros to choose among. Zero is always one of the steps: it is what convolutions pad with."""
    low = min(0.0, *(float(sample.min()) for sample in values))
    high = max(1e-6, *(float(sample.max()) for sample in values))
    scales = [float(np.float32((high * cut - low) / MAX_BYTE)) for cut in CUTS]
    return [(scale, min(MAX_BYTE, round(-low / scale))) for scale in scales]


def _error(one: tuple[float, int], real: Tensor, drawn: Tensor) -> float:
    losses = [
        float((torch.fake_quantize_per_tensor_affine(values, *one, 0, MAX_BYTE) - values).square().mean())
        for values in (real, drawn)
    ]
    return losses[0] + DRAWN_WEIGHT * losses[1]


def simulated(folded: Network, ranges: Ranges) -> Network:
    """A copy of a folded network that rounds as int8 does, though it computes in float32."""
    copy = deepcopy(folded)
    layers = zip(convolutions(copy), ranges.scales.tolist(), ranges.zeros.tolist(), ranges.means, strict=True)
    for convolution, scale, zero, means in layers:
        weight = convolution.weight.data
        weight.copy_(torch.from_numpy(rounded_weights(weight.cpu().numpy(), means)))
        convolution.register_forward_pre_hook(partial(_round_input, scale=scale, zero=zero))
    return copy


def _round_input(_: nn.Module, given: tuple[Tensor], *, scale: float, zero: int) -> None:
    """In place: what goes around the convolution is rounded as well."""
    given[0].copy_(torch.fake_quantize_per_tensor_affine(given[0], scale, zero, 0, MAX_BYTE))
