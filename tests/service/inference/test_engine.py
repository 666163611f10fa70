import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn

from service.inference import engine
from tests.tiny import GREYS, SPEC, Fragile, Greys, Pair, flip_a_bit, make_bundle, reseal
from training.bundle import store
from training.bundle.answers import Logits
from training.bundle.golden import read_golden
from training.bundle.int8 import INT8, MAX_DEVIATION, Figures, Ranges, deviation, read_int8, write_int8
from training.bundle.manifest import CHECKPOINT, GOLDEN, MANIFEST, MODULE, BundleError, Manifest
from training.bundle.store import BundleRef, file_facts
from training.datasets import Split
from training.networks.convnet import Activation, ConvNet
from training.processors import allowed_processors
from training.quantize import golden_logits, quantize

CPU = torch.device("cpu")


def load(artifacts: Path, ref: BundleRef) -> engine.Engine:
    return engine.load(ref.path(artifacts), store.read_manifest(artifacts, ref), CPU)


@pytest.fixture
def broken(tmp_path: Path) -> Callable[[Callable[[Path], None]], str]:
    """Publish a good bundle, break its files, make the manifest agree with them again, and return why it is refused."""

    def why(damage: Callable[[Path], None], module: nn.Module | None = None) -> str:
        ref = make_bundle(tmp_path, module=module)
        folder = ref.path(tmp_path)
        damage(folder)
        record_files(folder)
        with pytest.raises(BundleError) as refusal:
            load(tmp_path, ref)
        return f"{type(refusal.value).__name__}: {refusal.value}"

    return why


def record_files(folder: Path) -> None:
    """Write the digests of what is there now into the manifest, so that only the content is wrong."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"] = {name: file_facts(folder / name).model_dump() for name in manifest["files"]}
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_good_bundle_answers_its_golden_samples_whatever_the_batch_size(tmp_path: Path) -> None:
    ref = make_bundle(tmp_path)
    loaded = load(tmp_path, ref)
    golden = read_golden(ref.path(tmp_path) / GOLDEN, loaded.manifest)
    for size in (1, 2, 7, 64, 256):
        np.testing.assert_allclose(loaded.run(golden.images[:size]), golden.logits[:size], atol=1e-3)


def test_every_way_that_was_timed_is_in_the_table_and_the_cheapest_good_one_is_chosen(tmp_path: Path) -> None:
    loaded = load(tmp_path, make_bundle(tmp_path))
    good = [timing for timing in loaded.timings if timing.refused is None]
    assert {timing.name for timing in loaded.timings} & {"openvino f32", "torchscript float32"}
    assert loaded.chosen == min(good, key=lambda timing: timing.cost).name
    assert all(set(timing.milliseconds) == {1, 8, 32} for timing in loaded.timings)


@pytest.mark.parametrize(("max_batch", "seconds"), [(1, 0.004), (7, 0.004), (8, 0.001), (31, 0.001), (64, 0.0005)])
def test_the_rate_to_start_from_is_that_of_the_largest_batch_that_may_be(
    tmp_path: Path, max_batch: int, seconds: float
) -> None:
    loaded = load(tmp_path, make_bundle(tmp_path))
    timing = engine.Timing(loaded.chosen, {1: 4.0, 8: 8.0, 32: 16.0}, 0, 0.0, None)
    assert replace(loaded, timings=[timing]).seconds_per_image(max_batch) == seconds


def test_a_way_that_disagrees_with_float32_is_timed_but_not_chosen(tmp_path: Path) -> None:
    ref = make_bundle(tmp_path)
    manifest = store.read_manifest(tmp_path, ref)
    golden = read_golden(ref.path(tmp_path) / GOLDEN, manifest)

    def coarse(images: np.ndarray) -> np.ndarray:
        return np.roll(golden.logits[: len(images)], 1, axis=1)

    timing = engine._judge("coarse", engine._measure(coarse, golden), golden.logits, manifest)
    assert timing.refused is not None
    assert timing.refused.endswith("best classes differ from float32")


def sure(count: int, classes: int = 16) -> Logits:
    """Logits of `count` samples that are nearly undecided between the first two classes."""
    logits = np.full((256, classes), -20, np.float32)
    logits[:, 0], logits[:, 1] = 0.001, 0
    logits[:count, 1] = 0.002
    return logits


@pytest.mark.parametrize(
    ("candidate", "refused"),
    [
        (sure(0), None),
        (sure(1), None),
        (sure(2), "2 of 256 best classes differ from float32"),
        (sure(0) + np.eye(16, dtype=np.float32)[0] * 0.07, None),
        (sure(0) + np.eye(16, dtype=np.float32)[0] * 0.09, "a probability differs from float32 by 0.022"),
    ],
    ids=["equal", "one best class", "two best classes", "probabilities within 0.02", "probabilities beyond 0.02"],
)
def test_a_way_may_differ_from_float32_in_one_best_class_and_by_0_02_in_probability(
    tmp_path: Path, candidate: Logits, refused: str | None
) -> None:
    manifest = store.read_manifest(tmp_path, make_bundle(tmp_path))
    timing = engine._judge("near", engine.Measured(candidate, {1: 1.0}), sure(0), manifest)
    assert timing.refused == refused


@pytest.mark.parametrize("activation", ["relu", "relu6", "gelu", "silu"])
def test_openvino_computes_pool_and_activation_in_their_order(tmp_path: Path, activation: Activation) -> None:
    pytest.importorskip("openvino", reason="has wheels for x86 only")
    pixels = torch.randint(256, (64, *SPEC.shape), dtype=torch.uint8, generator=torch.manual_seed(0))
    network = ConvNet(channels=1, classes=16, widths=[16, 16], stem_width=8, stem_kernel=3, activation=activation)
    network.initialize(pixels)
    for group in network.groups:
        group.norm1.bias.data -= 1  # to where GELU and SiLU still fall
    with pytest.warns(Warning, match="torch.jit.trace"):
        ref = make_bundle(tmp_path, module=torch.jit.trace(network.folded(), pixels))
    folder, manifest = ref.path(tmp_path), store.read_manifest(tmp_path, ref)
    golden = read_golden(folder / GOLDEN, manifest)
    logits = engine._openvino_runner(engine._openvino_graph(folder / MODULE, SPEC.shape), 1, "f32")(golden.images)
    np.testing.assert_allclose(logits, golden.logits, atol=1e-4 * np.abs(golden.logits).max())


SILU = {"activation": "silu"}
RELU6 = {"activation": "relu6", "convolutions": 3}  # never falls, and what goes into a group goes around its last two


def built(arguments: dict[str, Any]) -> tuple[ConvNet, torch.Tensor]:
    """A small network, and the pictures that it begins from."""
    pixels = torch.randint(256, (64, *SPEC.shape), dtype=torch.uint8, generator=torch.manual_seed(0))
    network = ConvNet(channels=1, classes=16, widths=[16, 16], stem_width=8, stem_kernel=3, **arguments)
    network.initialize(pixels)
    return network.eval(), pixels


@pytest.fixture
def quantized(tmp_path: Path, request: pytest.FixtureRequest) -> BundleRef:
    """A bundle of a small network with an int8 form."""
    pytest.importorskip("openvino", reason="has wheels for x86 only")
    network, pixels = built(getattr(request, "param", SILU))
    with pytest.warns(Warning, match="torch.jit.trace"):
        ref = make_bundle(tmp_path, module=torch.jit.trace(network.folded(), pixels))
    folder = ref.path(tmp_path)
    golden = torch.from_numpy(read_golden(folder / GOLDEN, store.read_manifest(tmp_path, ref)).images)
    checked = Split(pixels, torch.zeros(64, dtype=torch.int64))
    write_int8(folder / INT8, quantize(network, pixels, checked, golden, 1.0))
    reseal(folder)
    return ref


def timing_of(loaded: engine.Engine) -> engine.Timing:
    (timing,) = (timing for timing in loaded.timings if timing.name == "openvino int8")
    return timing


def rewrite(folder: Path, **changes: object) -> None:
    int8 = read_int8(folder / INT8)
    assert int8 is not None
    write_int8(folder / INT8, replace(int8, **changes))
    reseal(folder)


@pytest.mark.parametrize("quantized", [SILU, RELU6], indirect=True)
def test_int8_answers_what_its_exporter_saw(tmp_path: Path, quantized: BundleRef) -> None:
    folder, manifest = quantized.path(tmp_path), store.read_manifest(tmp_path, quantized)
    int8 = read_int8(folder / INT8)
    assert int8 is not None
    graph = engine._quantized(engine._openvino_graph(folder / MODULE, SPEC.shape), int8.ranges)
    run = engine._openvino_runner(graph, 1, "f32")
    found = run(read_golden(folder / GOLDEN, manifest).images)
    assert deviation(int8.logits, found) < MAX_DEVIATION
    assert timing_of(load(tmp_path, quantized)).refused is None


@pytest.mark.parametrize(
    ("quantized", "convolutions", "pools"),
    [(SILU, ["f32", "u8", "u8", "u8", "u8"], ["f32", "f32"]), (RELU6, ["f32", *["u8"] * 6], ["u8", "u8"])],
    indirect=["quantized"],
)
def test_convolutions_after_the_first_run_on_bytes_and_where_an_activation_never_falls_pools_do(
    tmp_path: Path, quantized: BundleRef, convolutions: list[str], pools: list[str]
) -> None:
    folder = quantized.path(tmp_path)
    int8 = read_int8(folder / INT8)
    assert int8 is not None
    graph = engine._quantized(engine._openvino_graph(folder / MODULE, SPEC.shape), int8.ranges)
    compiled = engine._compiled(graph, 1, "f32").get_runtime_model()
    facts = [node.get_rt_info() for node in compiled.get_ordered_ops()]
    ways = [(fact["layerType"].value, fact["runtimePrecision"].value) for fact in facts]
    assert [way for layer, way in ways if layer == "Convolution"] == convolutions
    assert [way for layer, way in ways if layer == "Pooling"] == pools


def test_threads_are_pinned_only_where_the_engine_has_all_processors(tmp_path: Path, quantized: BundleRef) -> None:
    graph = engine._openvino_graph(quantized.path(tmp_path) / MODULE, SPEC.shape)
    for threads, pinned in [(allowed_processors(), True), (allowed_processors() - 1, allowed_processors() == 1)]:
        model = engine._compiled(graph, max(1, threads), "f32")
        assert model.get_property("INFERENCE_NUM_THREADS") == max(1, threads)
        assert model.get_property("ENABLE_CPU_PINNING") is pinned


@pytest.mark.parametrize("int8", [False, True], ids=["float32", "int8"])
def test_with_fewer_threads_the_answers_are_the_same_bytes(tmp_path: Path, quantized: BundleRef, int8: bool) -> None:
    folder = quantized.path(tmp_path)
    graph, found = engine._openvino_graph(folder / MODULE, SPEC.shape), read_int8(folder / INT8)
    assert found is not None
    if int8:
        graph = engine._quantized(graph, found.ranges)
    one, two = (engine._openvino_runner(graph, threads, "f32") for threads in (1, 2))
    images = read_golden(folder / GOLDEN, store.read_manifest(tmp_path, quantized)).images
    for size in (1, 2, 31, 256):
        assert one(images[:size]).tobytes() == two(images[:size]).tobytes()


def test_fewer_threads_that_answer_otherwise_are_not_used() -> None:
    images = (np.arange(84 * 64) % 251).astype(np.uint8).reshape(84, 1, 8, 8)
    met: list[int] = []

    def run(images: np.ndarray) -> Logits:
        met.append(len(images))
        return images[:, 0, 0, :2].astype(np.float32)

    def otherwise(batch: np.ndarray) -> Logits:
        """The last bit of the last picture's logit."""
        logits = run(batch)
        if np.shares_memory(batch, images[83]):
            logits[-1, 0] = np.nextafter(logits[-1, 0], np.float32(np.inf))
        return logits

    assert engine._meet_sizes({run}, images, max_batch=63)
    assert met == [1, 2, 3, 4, 5, 6, 7, 8, 16, 32]
    assert not engine._meet_sizes({run, otherwise}, images, max_batch=63)
    met.clear()
    assert engine._meet_sizes({run, otherwise}, images, max_batch=31)
    assert engine._meet_sizes({run, otherwise}, images[:83], max_batch=63)  # as far as there are pictures
    assert set(met) == {1, 2, 3, 4, 5, 6, 7, 8, 16}


@pytest.mark.parametrize(("threads", "short"), [(1, math.inf), (2, math.inf), (3, math.inf), (2, 0.0)])
def test_a_way_beside_others_is_the_way_that_was_judged_with_a_thread_less_where_pictures_are_short(
    tmp_path: Path, quantized: BundleRef, monkeypatch: pytest.MonkeyPatch, threads: int, short: float
) -> None:
    monkeypatch.setattr(engine, "SHORT", short)  # whatever else the machine is doing
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        loaded = load(tmp_path, quantized)
    finally:
        torch.set_num_threads(before)
    images = read_golden(quantized.path(tmp_path) / GOLDEN, loaded.manifest).images
    assert loaded.run_beside(images).tobytes() == loaded.run(images).tobytes()
    assert (loaded.run_beside is loaded.run) == (threads == 1 or not short or not loaded.chosen.startswith("openvino"))


@pytest.mark.parametrize(
    ("milliseconds", "threads", "short"),
    [(2.0, 2, True), (2.1, 2, False), (3.0, 4, True), (3.1, 4, False), (0.1, 1, False)],
)
def test_a_processor_is_left_to_the_event_loop_where_a_picture_takes_the_others_half_a_millisecond_at_most(
    milliseconds: float, threads: int, short: bool
) -> None:
    timing = engine.Timing("openvino f32", {1: 1.0, 8: milliseconds, 32: 1.0}, 0, 0.0, None)
    assert engine._is_short(timing, threads) is short


def test_one_picture_goes_where_it_is_clearly_quicker() -> None:
    sizes: dict[str, list[int]] = {"fewer": [], "all": []}

    def runner(name: str, seconds: float) -> engine.Runner:
        def run(images: np.ndarray) -> Logits:
            time.sleep(seconds)
            sizes[name].append(len(images))
            return np.zeros((len(images), 16), np.float32)

        return run

    images = np.zeros((5, *SPEC.shape), np.uint8)
    for fewer, everything, taken in [(0.001, 0.02, "fewer"), (0.02, 0.001, "all"), (0.02, 0.02, "all")]:
        run = engine._quicker_for_one(runner("fewer", fewer), runner("all", everything), images[:1])
        for found in sizes.values():
            found.clear()
        for size in (1, 5):
            run(images[:size])
        assert sizes == ({"fewer": [1], "all": [5]} if taken == "fewer" else {"fewer": [], "all": [1, 5]})


def test_ranges_other_than_those_that_were_measured_are_refused(tmp_path: Path, quantized: BundleRef) -> None:
    folder = quantized.path(tmp_path)
    int8 = read_int8(folder / INT8)
    assert int8 is not None
    rewrite(folder, ranges=replace(int8.ranges, scales=int8.ranges.scales * np.float32(1.03)))
    refused = timing_of(load(tmp_path, quantized)).refused
    assert refused is not None
    assert refused.startswith("its golden logits deviate from the exporter's by 0.0")


def test_ranges_for_another_number_of_convolutions_are_passed_over(tmp_path: Path, quantized: BundleRef) -> None:
    folder = quantized.path(tmp_path)
    six = Ranges(np.ones(6, np.float32), np.zeros(6, np.uint8), (np.ones(16, np.float32),) * 6)
    rewrite(folder, ranges=six)
    assert "openvino int8" not in [timing.name for timing in load(tmp_path, quantized).timings]


def test_means_for_another_number_of_channels_are_passed_over(tmp_path: Path, quantized: BundleRef) -> None:
    folder = quantized.path(tmp_path)
    int8 = read_int8(folder / INT8)
    assert int8 is not None
    rewrite(folder, ranges=replace(int8.ranges, means=tuple(means[1:] for means in int8.ranges.means)))
    assert "openvino int8" not in [timing.name for timing in load(tmp_path, quantized).timings]


def test_the_largest_weights_times_the_largest_inputs_are_summed_whole(tmp_path: Path) -> None:
    """Processors without VNNI instructions add two products in 16 bits, which hold no more than 255 * 128.

    Those with them add in 32, whatever the weights are: there, test_quantize.py alone sees to it.
    """
    pytest.importorskip("openvino", reason="has wheels for x86 only")
    network, pixels = built(SILU)
    network.groups[0].conv1.weight.data.fill_(0.01)
    with pytest.warns(Warning, match="torch.jit.trace"):
        ref = make_bundle(tmp_path, module=torch.jit.trace(network.folded(), pixels))
    ranges = quantize(network, pixels, Split(pixels, torch.zeros(64, dtype=torch.int64)), pixels, 1.0).ranges
    scales, zeros = ranges.scales.copy(), ranges.zeros.copy()
    scales[0], zeros[0] = scales[0] / 4, 0  # so a tenth of what goes into the first is cut off at 255
    ranges = replace(ranges, scales=scales, zeros=zeros)
    graph = engine._quantized(engine._openvino_graph(ref.path(tmp_path) / MODULE, SPEC.shape), ranges)
    found = engine._openvino_runner(graph, 1, "f32")(pixels.numpy())
    assert deviation(golden_logits(network.folded(), ranges, pixels), found) < MAX_DEVIATION


def test_an_int8_form_from_before_there_were_means_is_passed_over_and_that_is_said(
    tmp_path: Path, quantized: BundleRef, caplog: pytest.LogCaptureFixture
) -> None:
    folder = quantized.path(tmp_path)
    tensors = load_file(folder / INT8)
    with safe_open(folder / INT8, framework="np") as file:
        metadata = file.metadata()
    save_file({name: tensors[name] for name in ("scales", "zeros", "logits")}, folder / INT8, metadata)
    reseal(folder)
    loaded = load(tmp_path, quantized)
    assert "openvino int8" not in [timing.name for timing in loaded.timings]
    (said,) = (record for record in caplog.records if record.message == "candidate failed")
    assert said.reason == "int8.safetensors is from before it had means; export the model again"  # type: ignore[attr-defined]


def test_an_int8_form_that_costs_too_much_is_refused(tmp_path: Path, quantized: BundleRef) -> None:
    figures = Figures(n=10_000, accuracy=0.9, float32_accuracy=0.91, ece=0.01, float32_ece=0.01, differing=0.01)
    rewrite(quantized.path(tmp_path), figures=figures)
    assert timing_of(load(tmp_path, quantized)).refused == "1.00% of 10000 pictures are lost"


def test_float32_alone_can_be_asked_for(tmp_path: Path, quantized: BundleRef) -> None:
    loaded = engine.load(quantized.path(tmp_path), store.read_manifest(tmp_path, quantized), CPU, "float32")
    assert [timing.name for timing in loaded.timings] == ["openvino f32"]


def test_a_bundle_without_an_int8_form_has_no_int8_to_choose(tmp_path: Path) -> None:
    loaded = load(tmp_path, make_bundle(tmp_path))
    assert "openvino int8" not in [timing.name for timing in loaded.timings]


def test_a_way_that_fails_to_start_is_passed_over(tmp_path: Path) -> None:
    loaded = load(tmp_path, make_bundle(tmp_path, module=Fragile()))
    assert [timing.name for timing in loaded.timings] == ["torchscript float32"]


class Amplified(Greys):
    """Greys whose logits have the rounding of a sum in them, ten thousand times as large."""

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = pixels.flatten(1).float() / 255
        rounding = (x * 1.1).sum(1) - 1.1 * x.double().sum(1)
        return self.by_mean(pixels) + (1e4 * rounding).float()[:, None]


def test_where_openvino_misses_the_golden_logits_torchscript_says_whether_it_is_the_module(tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="has wheels for x86 only")
    loaded = load(tmp_path, make_bundle(tmp_path, module=Amplified()))
    differences = {timing.name: timing.probability_difference for timing in loaded.timings}
    assert list(differences) == ["openvino f32", "torchscript float32"]
    assert differences["torchscript float32"] == 0 < differences["openvino f32"]


DROPPED_ELSEWHERE = """
import gc, os, signal, sys, threading
from dataclasses import replace
from pathlib import Path
import torch
from service.inference import engine
from training.bundle import store
from training.bundle.store import BundleRef

signal.signal(signal.SIGUSR1, lambda *_: print("handled", flush=True))
artifacts, ref = Path(sys.argv[1]), BundleRef("greys", "1")
engines = [engine.load(ref.path(artifacts), store.read_manifest(artifacts, ref), torch.device("cpu"))]
thread = threading.Thread(target=lambda: engines.clear() or gc.collect())
thread.start()
thread.join()
os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_signal_ends_no_process_whose_engine_was_dropped_in_another_thread(tmp_path: Path) -> None:
    make_bundle(tmp_path)
    command = [sys.executable, "-X", "faulthandler", "-c", DROPPED_ELSEWHERE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


def test_weights_that_are_nan_are_refused(tmp_path: Path) -> None:
    ref = make_bundle(tmp_path)
    folder = ref.path(tmp_path)
    torch.jit.script(Greys(scale=float("nan"))).save(folder / MODULE)
    record_files(folder)
    with pytest.raises(BundleError, match="answers the golden inputs with NaN or infinity"):
        load(tmp_path, ref)


def test_a_module_that_returns_two_things_is_refused(broken: Callable[[Callable[[Path], None]], str]) -> None:
    reason = broken(lambda folder: torch.jit.script(Pair()).save(folder / MODULE))
    assert reason == "ModuleUnreadable: model.ts doesn't run: 'tuple' object has no attribute 'cpu'"


def test_other_weights_than_the_exporter_saw_are_refused(broken: Callable[[Callable[[Path], None]], str]) -> None:
    reason = broken(lambda folder: torch.jit.script(Greys(scale=1.01)).save(folder / MODULE))
    assert reason.startswith("GoldenMismatch: the module misses its golden logits by 8.")


def test_a_module_with_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    ref = make_bundle(tmp_path, classes=GREYS[:10])
    with pytest.raises(
        BundleError, match=r"golden logits are float32 \(256, 16\); the manifest says float32 \(256, 10\)"
    ):
        load(tmp_path, ref)


def test_a_flipped_bit_is_found(tmp_path: Path) -> None:
    ref = make_bundle(tmp_path)
    flip_a_bit(ref.path(tmp_path) / MODULE)
    with pytest.raises(BundleError, match=r"model\.ts has sha256 [0-9a-f]{12}…; the manifest says [0-9a-f]{12}…"):
        load(tmp_path, ref)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    ref = make_bundle(tmp_path)
    (ref.path(tmp_path) / GOLDEN).unlink()
    with pytest.raises(BundleError, match=r"golden\.safetensors is missing"):
        load(tmp_path, ref)


def test_a_pickle_in_place_of_the_checkpoint_is_not_opened(broken: Callable[[Callable[[Path], None]], str]) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return (pytest.fail, ("the pickle was executed",))

    reason = broken(lambda folder: torch.save({"weights": Bomb()}, folder / CHECKPOINT))
    assert reason.startswith("FileMalformed: checkpoint.safetensors isn't a safetensors file")


def test_a_pickle_in_place_of_the_module_is_not_opened(broken: Callable[[Callable[[Path], None]], str]) -> None:
    reason = broken(lambda folder: torch.save({"a": 1}, folder / MODULE))
    assert reason.startswith("ModuleUnreadable: model.ts isn't a TorchScript file")


def test_golden_samples_of_another_input_are_refused(tmp_path: Path) -> None:
    ref = make_bundle(tmp_path)
    path = ref.path(tmp_path) / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["input"]["height"] = 9
    path.write_text(Manifest.model_validate(manifest).model_dump_json())
    with pytest.raises(
        BundleError, match=rf"golden images are uint8 \(256, 1, 8, 8\); the input is uint8 \(1, 9, {SPEC.width}\)"
    ):
        load(tmp_path, ref)
