"""One loaded bundle on one device: a uint8 batch in, logits out.

At load the bundle is verified, and the ways to run it that this machine offers are timed; the fastest that agrees with
float32 on the golden samples, or in int8 with what its exporter measured, is kept. Knows nothing of HTTP, of picture
files, or of who is waiting. One of the two places that know `torch.jit`.
"""

import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from service.inference.sizes import sizes
from service.telemetry import logger
from training.bundle import store
from training.bundle.answers import Logits
from training.bundle.golden import Agreement, Golden, GoldenMismatch, compare, read_golden
from training.bundle.int8 import (
    INT8,
    MAX_DEVIATION,
    Int8,
    Ranges,
    deviation,
    largest_weights,
    read_int8,
    rounded_weights,
)
from training.bundle.manifest import GOLDEN, MODULE, BundleError, Manifest
from training.processors import allowed_processors

Images = NDArray[np.uint8]  # [N, C, H, W]
Runner = Callable[[Images], Logits]
Make = Callable[[int], Runner]  # with so many threads; TorchScript's are those of the process
Precision = Literal["auto", "float32"]

# How far a faster way may stray from float32 on the golden samples, and float32 here from float32 at the exporter's.
MAX_ARGMAX_DIFFERENCES = 1
MAX_PROBABILITY_DIFFERENCE = 0.02
MAX_LOGIT_DIFFERENCE = 1e-3

TIMED_BATCHES = (1, 8)
CHUNK = 32  # the golden samples are run in batches of this size, which times it too
MEETS = 64  # pictures in the largest batch that is met at load
WARM_UP = 2  # runs of a shape; TorchScript profiles two before it is fast
REPEATS = 3
TORCHSCRIPT_F32, OPENVINO_F32 = "torchscript float32", "openvino f32"
WITHOUT_MEANS = f"{INT8} is from before it had means; export the model again"
OTHER_BYTES = "with fewer threads it answers otherwise"
SHORT = 0.5  # milliseconds; a request takes the event loop and the system 0.3 to 0.7, by machine
CLEARLY = 0.8  # of another way's time, or less: what is measured beside other programs' work is uncertain


class ModuleUnreadable(BundleError):
    """model.ts isn't TorchScript, or doesn't run."""


@dataclass(frozen=True)
class Measured:
    """One way's answers to the golden samples, and its median milliseconds by batch size."""

    logits: Logits
    milliseconds: dict[int, float]


@dataclass(frozen=True)
class Timing:
    """One way to run a bundle: median milliseconds by batch size, and how far it is from float32."""

    name: str
    milliseconds: dict[int, float]
    argmax_differences: int
    probability_difference: float
    refused: str | None  # why it can't be chosen

    @property
    def cost(self) -> float:
        """Geometric mean over batch sizes: a lone request and a full batch count alike."""
        return statistics.geometric_mean(self.milliseconds.values())


@dataclass(frozen=True)
class Engine:
    """`run` has all processors; `run_beside` leaves one of them to the event loop, where that has enough to do."""

    manifest: Manifest
    run: Runner
    run_beside: Runner
    chosen: str
    timings: list[Timing]
    device: str

    def describe(self) -> dict[str, Any]:
        """For /info: what was chosen, and the table that it was chosen by."""
        return {"engine": self.chosen, "device": self.device, "timings": [asdict(timing) for timing in self.timings]}

    def seconds_per_image(self, max_batch: int) -> float:
        """At the largest timed batch that may be: with 1, of a picture alone, else the rate the batcher starts from."""
        timing = next(timing for timing in self.timings if timing.name == self.chosen)
        batch = max(size for size in timing.milliseconds if size <= max_batch)
        return timing.milliseconds[batch] / 1000 / batch


def load(
    folder: Path, manifest: Manifest, device: torch.device, precision: Precision = "auto", max_batch: int = CHUNK
) -> Engine:
    """Verify a bundle, choose how to run it, and warm it up. Raises BundleError with the reason for a bad one."""
    store.check_files(folder, manifest)
    store.check_checkpoint(folder, manifest)
    golden = read_golden(folder / GOLDEN, manifest)
    int8 = _int8_form(folder, manifest)
    threads = torch.get_num_threads()
    makers = dict(_candidates(folder / MODULE, manifest, device, precision, int8))
    runners, measured, timings = {}, {}, []
    for name, make in makers.items():
        with _passed_over(name):
            runners[name] = make(threads)
            measured[name] = _measure(runners[name], golden)
    reference = measured.get(OPENVINO_F32)
    if reference is None or _miss(reference, golden, manifest) > MAX_LOGIT_DIFFERENCE:
        runner, reference = _torch_reference(folder / MODULE, golden, manifest)
        if device.type == "cpu":  # it is a way to serve as well
            runners[TORCHSCRIPT_F32], measured[TORCHSCRIPT_F32] = runner, reference
    for name, found in measured.items():
        with _passed_over(name):
            own = int8 if name == OPENVINO_INT8 else None
            timings.append(_judge(name, found, reference.logits, manifest, own))
    good = [timing for timing in timings if timing.refused is None]
    if not good:
        raise GoldenMismatch("no way to run the module on this machine agrees with its golden samples")
    best = min(good, key=lambda timing: timing.cost)
    run = beside = runners[best.name]
    if best.name.startswith("openvino"):
        if _is_short(best, threads):
            beside = makers[best.name](threads - 1)
        if not _meet_sizes({run, beside}, golden.images, max_batch):
            logger.warning("candidate failed", extra={"candidate": best.name, "reason": OTHER_BYTES})
            beside = run
        elif beside is not run:
            run = _quicker_for_one(beside, run, golden.images[:1])
    return Engine(manifest, run, beside, best.name, timings, str(device))


def _int8_form(folder: Path, manifest: Manifest) -> Int8 | None:
    if INT8 not in manifest.files:
        return None
    if (int8 := read_int8(folder / INT8)) is None:
        logger.warning("candidate failed", extra={"candidate": OPENVINO_INT8, "reason": WITHOUT_MEANS})
    return int8


def _is_short(timing: Timing, threads: int) -> bool:
    """Whether pictures take a thread fewer so little time that the event loop needs a processor to keep up with it."""
    return threads > 1 and timing.milliseconds[8] / 8 * threads / (threads - 1) <= SHORT


def _meet_sizes(runners: set[Runner], images: Images, max_batch: int) -> bool:
    """Whether the way that was judged and the same with fewer threads answer the same pictures with the same bytes, in
    batches of each size that there are pictures for. A size that OpenVINO hasn't met takes it 3 to 16 ms more."""
    places = pairwise(accumulate(sizes(min(max_batch, MEETS)), initial=0))  # other pictures in each
    batches = [images[start:end] for start, end in places if end <= len(images)]
    return all(len({run(batch).tobytes() for run in runners}) == 1 for batch in batches)


def _quicker_for_one(fewer: Runner, all_threads: Runner, image: Images) -> Runner:
    """One picture may be so little that threads wait for each other longer than they compute."""
    seconds = [_median_milliseconds(runner, image) for runner in (fewer, all_threads)]
    if seconds[0] > CLEARLY * seconds[1]:
        return all_threads
    return lambda images: (fewer if len(images) == 1 else all_threads)(images)


@contextmanager
def _passed_over(name: str) -> Iterator[None]:
    """A backend that can't run this module, whatever it raises, is merely not chosen."""
    try:
        yield
    except Exception as error:
        logger.warning("candidate failed", extra={"candidate": name, "reason": _last_line(error)})


def _torch_reference(path: Path, golden: Golden, manifest: Manifest) -> tuple[Runner, Measured]:
    """Run the golden samples in float32 on the CPU, by TorchScript: this is the module, or it is refused.

    OpenVINO's float32 has said so already where it gives the exporter's logits, in less time.
    """
    module = _read_module(path)
    try:
        runner = _torch_runner(module, torch.device("cpu"), torch.float32)
        measured = _measure(runner, golden)
    except Exception as error:  # TorchScript is a program of somebody's: it raises and returns what it likes
        raise ModuleUnreadable(f"{MODULE} doesn't run: {_last_line(error)}") from error
    if (difference := _miss(measured, golden, manifest)) > MAX_LOGIT_DIFFERENCE:
        raise GoldenMismatch(
            f"the module misses its golden logits by {difference:.1e} (allowed: {MAX_LOGIT_DIFFERENCE:.0e})"
        )
    return runner, measured


def _miss(measured: Measured, golden: Golden, manifest: Manifest) -> float:
    return compare(golden.logits, measured.logits, manifest.calibration.temperature).logit_difference


def _measure(runner: Runner, golden: Golden) -> Measured:
    answers, seconds = [], []
    for start in range(0, len(golden.images), CHUNK):
        begun = time.perf_counter()
        answers.append(runner(golden.images[start : start + CHUNK]))
        seconds.append(time.perf_counter() - begun)
    milliseconds = {batch: _median_milliseconds(runner, golden.images[:batch]) for batch in TIMED_BATCHES}
    milliseconds[CHUNK] = statistics.median(seconds[WARM_UP:] or seconds) * 1000
    return Measured(np.concatenate(answers), milliseconds)


def _judge(name: str, measured: Measured, reference: Logits, manifest: Manifest, int8: Int8 | None = None) -> Timing:
    """Hold a way to run a bundle against float32 on the golden samples, or against what `int8` should be."""
    agreement = compare(reference, measured.logits, manifest.calibration.temperature)
    refused = _beyond_float32(agreement, len(reference)) if int8 is None else _beyond_measured(int8, measured.logits)
    return Timing(name, measured.milliseconds, agreement.argmax_differences, agreement.probability_difference, refused)


def _beyond_float32(agreement: Agreement, samples: int) -> str | None:
    if agreement.argmax_differences > MAX_ARGMAX_DIFFERENCES:
        return f"{agreement.argmax_differences} of {samples} best classes differ from float32"
    if agreement.probability_difference > MAX_PROBABILITY_DIFFERENCE:
        return f"a probability differs from float32 by {agreement.probability_difference:.3f}"
    return None


def _beyond_measured(int8: Int8, logits: Logits) -> str | None:
    """Golden samples are nearer to a tie than int8 is to float32; so they only show that this is what was measured."""
    if (found := deviation(int8.logits, logits)) > MAX_DEVIATION:
        return f"its golden logits deviate from the exporter's by {found:.4f} (allowed: {MAX_DEVIATION})"
    return int8.figures.objection()


def _median_milliseconds(runner: Runner, images: Images) -> float:
    for _ in range(WARM_UP):
        runner(images)
    seconds = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        runner(images)
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds) * 1000


def _candidates(
    path: Path, manifest: Manifest, device: torch.device, precision: Precision, int8: Int8 | None
) -> Iterator[tuple[str, Make]]:
    """Every way to run a module on this device, by name, but for TorchScript's float32 on the CPU, which is the last
    resort."""
    lower = precision == "auto"
    if device.type != "cpu":
        yield TORCHSCRIPT_F32, lambda _: _torch_runner(_read_module(path), device, torch.float32)
        if lower:
            yield "torchscript float16", lambda _: _torch_runner(_read_module(path), device, torch.float16)
        return
    amx = lower and torch.cpu.get_capabilities().get("amx_bf16", False)
    if amx:
        yield "torchscript bfloat16", lambda _: _torch_runner(_read_module(path), device, torch.bfloat16)
    if not _has_openvino():
        return
    graph = cache(partial(_openvino_graph, path, manifest.input.shape))  # converted once
    yield OPENVINO_F32, lambda threads: _openvino_runner(graph(), threads, "f32")
    if amx:  # without its tiles bf16 is slower than f32
        yield "openvino bf16", lambda threads: _openvino_runner(graph(), threads, "bf16")
    if lower and int8:
        on_bytes = cache(lambda: _quantized(graph(), int8.ranges))
        yield OPENVINO_INT8, lambda threads: _openvino_runner(on_bytes(), threads, "f32")


# --- TorchScript ------------------------------------------------------------------------------------------------------


@contextmanager
def _quiet() -> Iterator[None]:
    """TorchScript is deprecated, and says so at each call. We know; see docs/decisions.md."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*torch\.jit.*", FutureWarning)
        warnings.filterwarnings("ignore", r".*torch\.jit.*", DeprecationWarning)
        yield


def _read_module(path: Path) -> nn.Module:
    try:
        with _quiet():
            module: nn.Module = torch.jit.load(path, map_location="cpu")
    except (RuntimeError, ValueError) as error:
        raise ModuleUnreadable(f"{MODULE} isn't a TorchScript file: {_last_line(error)}") from error
    return module.eval()


def _torch_runner(module: nn.Module, device: torch.device, dtype: torch.dtype) -> Runner:
    """The module casts pixels to the type of its own buffers, so `to(dtype)` is all that a precision takes."""
    placed = module.to(device, dtype)
    if device.type == "cpu":
        with _quiet():
            placed = torch.jit.optimize_for_inference(torch.jit.freeze(placed))

    @torch.inference_mode()
    def run(images: Images) -> Logits:
        return placed(torch.from_numpy(images).to(device)).cpu().numpy()

    return run


def _last_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1][:200]


# --- OpenVINO ---------------------------------------------------------------------------------------------------------


OPENVINO_INT8 = "openvino int8"


def _has_openvino() -> bool:
    try:
        import openvino  # noqa: F401 - 0.2 s to import, and absent where it has no wheels
    except ImportError:
        return False
    return True


def _openvino_runner(graph: Any, threads: int, precision: str) -> Runner:
    request = _compiled(graph, threads, precision).create_infer_request()

    def run(images: Images) -> Logits:
        request.infer({0: images}, share_inputs=True)
        return request.get_output_tensor(0).data.copy()  # the next run writes over it

    return run


def _openvino_graph(path: Path, shape: tuple[int, int, int]) -> Any:
    """The module as OpenVINO reads it, for uint8 pictures [N, C, H, W]."""
    import openvino
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    example = torch.zeros(1, *shape, dtype=torch.uint8)
    with _quiet():
        decoder = TorchScriptPythonDecoder(_read_module(path), example_input=example)
    frontend = FrontEndManager().load_by_framework("pytorch")
    model = frontend.convert(frontend.load(decoder))
    if len(model.outputs) != 1:
        raise ValueError(f"the module returns {len(model.outputs)} things")
    pixels = model.inputs[0].get_node()
    pixels.set_element_type(openvino.Type.u8)
    pixels.set_partial_shape(openvino.PartialShape([-1, *shape]))
    _move_biases_behind_pools(model)
    model.validate_nodes_and_infer_types()
    return model


def _compiled(graph: Any, threads: int, precision: str) -> Any:
    """What works on bytes does so whatever the `precision` is."""
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        # Each process pins to the first processors that it may use: several, with a part each, would share those.
        "ENABLE_CPU_PINNING": threads >= allowed_processors(),
    }
    return _openvino_core().compile_model(graph, "CPU", options)


@cache
def _openvino_core() -> Any:
    """One for the life of the process. OpenVINO (2026.4) gives the thread that makes the first a stack for its signals,
    and unmaps it with the last, in whichever thread that is: the next signal would end the process."""
    import openvino

    return openvino.Core()


def _move_biases_behind_pools(model: Any) -> None:
    """Turn pool(x + bias) into pool(x) + bias: the same, and it keeps OpenVINO from a mistake.

    In float32 its CPU plugin fuses convolution, pool and activation by computing the activation first. That is right
    for ReLU only; SiLU and GELU fall before they rise. With the bias in between it leaves the order alone.
    """
    from openvino import opset13

    for pool in (node for node in model.get_ordered_ops() if node.get_type_name() == "MaxPool"):
        add = pool.input_value(0).get_node()
        if add.get_type_name() != "Add":
            continue
        x, bias = add.input_values()
        if bias.partial_shape.is_dynamic or list(bias.shape)[-2:] != [1, 1]:  # what is the same all over a channel
            continue
        users = pool.output(0).get_target_inputs()
        pool.input(0).replace_source_output(x)
        shifted = opset13.add(pool.output(0), bias)
        for user in users:
            user.replace_source_output(shifted.output(0))


def _quantized(graph: Any, ranges: Ranges) -> Any:
    """A copy that rounds what goes into the last convolutions, one for each range; the compiler computes them on bytes.

    What else takes it in gets it rounded too. The largest of rounded values is the largest one rounded: what goes into
    a maximum is rounded already, so that the convolution above writes bytes. Weights are rounded here, and once more to
    the same steps by what tells the compiler so.
    """
    from openvino import opset13

    def rounded(values: Any, low: NDArray[np.float32], high: NDArray[np.float32], levels: int) -> Any:
        bounds = opset13.constant(low), opset13.constant(high)
        return opset13.fake_quantize(values, *bounds, *bounds, levels).output(0)

    model = graph.clone()
    convolutions = [node for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"]
    if not 0 < len(ranges) <= len(convolutions):
        raise ValueError(f"there are {len(convolutions)} convolutions and {len(ranges)} ranges")
    convolutions = convolutions[-len(ranges) :]
    layers = zip(convolutions, ranges.scales, ranges.zeros.astype(np.float32), ranges.means, strict=True)
    for node, scale, zero, means in layers:
        x, weights = node.input_values()
        if x.get_node().get_type_name() == "MaxPool":
            x = x.get_node().input_value(0)
        users = x.get_target_inputs()
        as_bytes = rounded(x, -zero * scale, (255 - zero) * scale, 256)
        for user in users:
            user.replace_source_output(as_bytes)
        floats = weights.get_node().data
        largest = largest_weights(floats)
        steps = opset13.constant(rounded_weights(floats, means))
        node.input(1).replace_source_output(rounded(steps, -largest, largest, 255))
    model.validate_nodes_and_infer_types()
    return model
