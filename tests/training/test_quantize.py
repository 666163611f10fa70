from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from safetensors import torch as torch_file
from safetensors.numpy import save_file

from tests.tiny import squares
from training import events
from training.bundle.int8 import (
    Figures,
    Int8,
    Int8Malformed,
    Ranges,
    deviation,
    largest_weights,
    read_int8,
    rounded_weights,
    write_int8,
)
from training.bundle.manifest import InputSpec
from training.datasets import Split
from training.networks import ConvNet
from training.quantize import SEEN, Seen, choose_ranges, convolutions, int8_form, quantize, simulated

TINY = {"channels": 1, "classes": 2, "widths": [16], "stem_width": 8, "stem_kernel": 3, "activation": "silu"}
GOOD = Figures(n=10_000, accuracy=0.93, float32_accuracy=0.93, ece=0.01, float32_ece=0.01, differing=0.0)


def network(**changes: object) -> ConvNet:
    torch.manual_seed(0)
    made = ConvNet(**TINY | changes)  # type: ignore[arg-type]
    made.initialize(squares().train.images)
    return made.eval()


def whole(*channels: int) -> Ranges:
    """Inputs of so many channels each, rounded to whole numbers from 0 on."""
    count = len(channels)
    means = tuple(np.ones(number, np.float32) for number in channels)
    return Ranges(np.ones(count, np.float32), np.zeros(count, np.uint8), means)


def seen(values: torch.Tensor) -> Seen:
    return Seen(values, values.mean()[None])


def form() -> Int8:
    data = squares()
    return quantize(network(), data.train.images, data.test, data.test.images[:32], 1.0)


@pytest.mark.parametrize("changes", [{}, {"activation": "relu6", "convolutions": 3}])
def test_the_int8_form_answers_nearly_as_float32_does(changes: dict[str, object]) -> None:
    data, net = squares(), network(**changes)
    int8 = quantize(net, data.train.images, data.test, data.test.images, 1.0)
    with torch.no_grad():
        exact = net(data.test.images).numpy()
    assert 0 < deviation(int8.logits, exact) < 0.05
    assert int8.figures.n == 80
    assert int8.figures.differing <= 1 / 80


def test_the_network_itself_stays_as_it_was() -> None:
    data, net = squares(), network()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    quantize(net, data.train.images, data.test, data.test.images, 1.0)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_first_convolution_stays_in_float32_and_the_second_where_the_first_whitens_without_bounds() -> None:
    plain, whitened = network(), network(whiten=True)
    bounded = network(whiten=True, activation="relu6")
    assert convolutions(bounded) == [bounded.groups[0].conv1, bounded.groups[0].conv2]
    assert convolutions(plain) == [plain.groups[0].conv1, plain.groups[0].conv2]
    assert convolutions(whitened) == [whitened.groups[0].conv2]


def test_what_goes_around_a_convolution_is_rounded_as_well() -> None:
    net = network(activation="relu6", convolutions=3).folded()
    taken: list[torch.Tensor] = []
    net.groups[0].conv2.register_forward_pre_hook(lambda _, values: taken.append(values[0]))  # what is also added later
    coarse = simulated(net, whole(8, 16, 16))
    with torch.inference_mode():
        coarse(squares().test.images)
    assert torch.equal(taken[0], taken[0].round())
    assert taken[0].max() > 0


def test_zero_is_a_step_and_a_lone_large_value_is_cut_off() -> None:
    real = torch.cat([torch.linspace(-0.25, 1, 1000), torch.tensor([3.0])])
    ranges = choose_ranges([seen(real)], [seen(torch.zeros(1))])
    steps = (np.arange(256) - ranges.zeros[0]) * ranges.scales[0]
    assert 0 in steps
    assert 1 <= steps.max() < 3


def test_a_drawn_picture_widens_a_range_but_counts_for_little() -> None:
    real, drawn = torch.linspace(0, 1, 1000), torch.linspace(0, 10, 1000)
    alone, beside, equal = (
        choose_ranges([seen(first)], [seen(second)]).scales[0] * 255
        for first, second in ((real, real), (real, drawn), (torch.cat([real, drawn]), drawn))
    )
    assert alone < beside < equal


def test_a_channels_mean_is_that_of_all_pictures_and_places() -> None:
    data, net = squares(), network()
    given: list[torch.Tensor] = []
    ranges = quantize(net, data.train.images, data.test, data.test.images, 1.0).ranges
    folded = net.folded()
    for convolution in convolutions(folded):
        convolution.register_forward_pre_hook(lambda _, values: given.append(values[0].mean((0, 2, 3))))
    with torch.inference_mode():
        folded(data.train.images[:: max(1, len(data.train.images) // SEEN)][:SEEN])
    assert [means.shape for means in ranges.means] == [(8,), (16,)]
    for means, values in zip(ranges.means, given, strict=True):
        np.testing.assert_allclose(means, values.numpy(), atol=1e-4)


def test_weights_are_rounded_to_steps_that_two_of_them_share() -> None:
    net = network().folded()
    rounded = convolutions(simulated(net, whole(8, 16)))[0].weight.detach().numpy()
    weights = net.groups[0].conv1.weight.detach().numpy()  # [16, 8, 3, 3]
    largest = np.maximum(np.abs(weights), np.abs(weights[:, 0::2] + weights[:, 1::2]).repeat(2, 1)).max((1, 2, 3))
    np.testing.assert_allclose(largest_weights(weights).ravel(), largest, rtol=1e-6)
    steps = rounded / (largest[:, None, None, None] / 127)
    np.testing.assert_allclose(steps, steps.round(), atol=1e-3)


WEIGHTS = st.tuples(st.just(3), st.integers(1, 5), st.just(3), st.just(3)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=st.floats(-2, 2, width=32))
)
FIVE_MEANS = arrays(np.float32, 5, elements=st.floats(-4, 4, width=32))


def kernels(*weights: float) -> NDArray[np.float32]:
    """Of one place each."""
    return np.array(weights, np.float32).reshape(1, -1, 1, 1)


@given(WEIGHTS, FIVE_MEANS)
# In float32 the first two come to 127, and they are more.
@example(kernels(1 + 2**-20, 126 + 2**-17, 10.49, 0, 5), np.array([0.2, 0.2, 1, 0, 0], np.float32))
@example(kernels(10.49, 0, 127.1), np.array([1, 0, 0.5, 0, 0], np.float32))  # 127.1 / (127.1 / 127) is above 127
def test_rounded_weights_are_beside_theirs_keep_the_mean_and_fit_16_bits_in_pairs(
    weights: NDArray[np.float32], five: NDArray[np.float32]
) -> None:
    means = five[: weights.shape[1]]
    step = largest_weights(weights) / 127
    steps = rounded_weights(weights, means) / step
    errors = steps - weights / step
    assert np.abs(errors).max() < 1 + 1e-3
    assert np.abs((errors.sum((2, 3)) * means).sum(1)).max() <= np.abs(means).max() * 0.5 + 0.02
    assert np.abs(steps).max().round() <= 127
    for first in range(0, weights.shape[1], 2):  # what a processor without VNNI adds in 16 bits, for inputs of 255
        assert np.abs(steps[:, first : first + 2].round().sum(1)).max() * 255 < 2**15


def test_what_a_smooth_picture_gives_is_kept_better_than_by_the_nearest_steps() -> None:
    generator = np.random.default_rng(0)
    weights = generator.normal(size=(64, 16, 3, 3)).astype(np.float32)
    step = largest_weights(weights) / 127
    smooth = generator.uniform(0, 6, (16, 1, 1)) + generator.normal(0, 0.1, (16, 3, 3))
    means = smooth.mean((1, 2)).astype(np.float32)
    given = [
        np.einsum("oihw,ihw->o", one - weights, smooth)
        for one in (rounded_weights(weights, means), np.round(weights / step) * step)
    ]
    kept, nearest = (float(np.sqrt(np.square(errors).mean())) for errors in given)
    assert kept < nearest / 4


def test_there_is_a_mean_for_each_input_channel() -> None:
    with pytest.raises(ValueError, match="there are 2 input channels and 3 means"):
        rounded_weights(np.ones((1, 2, 3, 3), np.float32), np.ones(3, np.float32))


def test_a_form_that_costs_too_much_is_not_published_and_that_is_said() -> None:
    data, told = squares(), []
    spec = InputSpec(channels=1, height=12, width=12, fit="stretch")
    net = network(head_bias=True)
    with torch.no_grad():  # one channel so large that the others of its layer are nothing beside it
        net.groups[0].norm1.bias[0] = 1e6
        net.groups[0].conv2.weight[:, 0] = 0
        logits = net(data.test.images)
        net.head.bias[1] += (logits[:, 0] - logits[:, 1]).median()  # half of them are of each class
        checked = Split(data.test.images, net(data.test.images).argmax(1))
    assert int8_form(net, data.train, checked, spec, 1.0, told.append) is None
    assert [type(event) for event in told] == [events.Notice]
    assert told[0].message.startswith("published without an int8 form: ")
    assert told[0].message.endswith("of 80 pictures are lost")


def test_a_form_that_costs_nothing_is_published_in_silence() -> None:
    data, told = squares(), []
    spec = InputSpec(channels=1, height=12, width=12, fit="stretch")
    int8 = int8_form(network(), data.train, data.test, spec, 1.0, told.append)
    assert int8 is not None
    assert int8.logits.shape == (64, 2)
    assert told == []


@pytest.mark.parametrize(
    ("changes", "objection"),
    [
        ({}, None),
        ({"accuracy": 0.929}, None),
        ({"accuracy": 0.9289}, "0.11% of 10000 pictures are lost"),
        ({"accuracy": 0.94}, None),
        ({"differing": 0.01}, None),
        ({"differing": 0.0101}, "1.01% of 10000 best classes differ from float32"),
        ({"ece": 0.016}, "the ECE of 10000 pictures rises by 0.60%"),
        ({"n": 100, "accuracy": 0.92, "differing": 0.01}, None),
        ({"n": 100, "accuracy": 0.91}, "2.00% of 100 pictures are lost"),
        ({"n": 100, "differing": 0.02}, "2.00% of 100 best classes differ from float32"),
    ],
)
def test_int8_may_cost_a_tenth_of_a_point_or_one_picture(changes: dict[str, float], objection: str | None) -> None:
    assert GOOD.model_copy(update=changes).objection() == objection


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    written = form()
    write_int8(tmp_path / "int8.safetensors", written)
    read = read_int8(tmp_path / "int8.safetensors")
    assert read is not None
    assert read.figures == written.figures
    np.testing.assert_array_equal(read.ranges.scales, written.ranges.scales)
    np.testing.assert_array_equal(read.ranges.zeros, written.ranges.zeros)
    np.testing.assert_array_equal(read.logits, written.logits)
    for means, expected in zip(read.ranges.means, written.ranges.means, strict=True):
        np.testing.assert_array_equal(means, expected)


def test_a_bundle_without_the_file_has_no_int8_form(tmp_path: Path) -> None:
    assert read_int8(tmp_path / "int8.safetensors") is None


def test_a_file_from_before_there_were_means_is_passed_over(tmp_path: Path) -> None:
    path, written = tmp_path / "int8.safetensors", form()
    ranges = written.ranges
    tensors = {"scales": ranges.scales, "zeros": ranges.zeros, "logits": written.logits}
    save_file(tensors, path, {"figures": GOOD.model_dump_json()})
    assert read_int8(path) is None


MEANS = {"means.0": np.ones(8, np.float32), "means.1": np.ones(16, np.float32)}
GOOD_RANGES = {"scales": np.ones(2, np.float32), "zeros": np.zeros(2, np.uint8), **MEANS}


WHOLE = GOOD.model_dump_json()


@pytest.mark.parametrize(
    ("tensors", "figures", "message"),
    [
        ({"scales": np.ones(2, np.float32)}, WHOLE, "can't be read: "),
        (GOOD_RANGES | {"zeros": np.zeros(3, np.uint8)}, WHOLE, r"scales are float32 \(2,\), zeros uint8 \(3,\)"),
        (
            GOOD_RANGES | {"scales": np.array(1, np.float32), "zeros": np.array(0, np.uint8)},
            WHOLE,
            r"scales are float32 \(\), zeros uint8 \(\)",
        ),
        (GOOD_RANGES | {"scales": np.zeros(2, np.float32)}, WHOLE, "scales must be above 0"),
        (GOOD_RANGES | {"scales": np.full(2, np.nan, np.float32)}, WHOLE, "scales must be above 0"),
        (GOOD_RANGES | {"logits": np.zeros((0, 2), np.float32)}, WHOLE, r"logits are float32 \(0, 2\)"),
        (GOOD_RANGES | {"logits": np.zeros(2, np.float32)}, WHOLE, r"logits are float32 \(2,\)"),
        (
            {name: values for name, values in GOOD_RANGES.items() if name != "means.1"},
            WHOLE,
            r"there are 2 scales, and means are \['float32 \(8,\)'\]",
        ),
        (
            GOOD_RANGES | {"means.1": np.ones((1, 16), np.float32)},
            WHOLE,
            r"means are \['float32 \(8,\)', 'float32 \(1, 16\)'\]",
        ),
        (GOOD_RANGES | {"means.1": np.full(16, np.inf, np.float32)}, WHOLE, "all numbers finite"),
        (GOOD_RANGES, "{}", "can't be read: "),
    ],
    ids=[
        "zeros are missing",
        "of other lengths",
        "one scale for all",
        "a scale of 0",
        "a scale that is no number",
        "no logits",
        "logits of one picture",
        "means of one layer",
        "means of two dimensions",
        "means without end",
        "figures are missing",
    ],
)
def test_a_malformed_file_is_refused(
    tmp_path: Path, tensors: dict[str, np.ndarray], figures: str, message: str
) -> None:
    path = tmp_path / "int8.safetensors"
    save_file({"logits": np.zeros((1, 2), np.float32)} | tensors, path, {"figures": figures})
    with pytest.raises(Int8Malformed, match=rf"^int8\.safetensors:? .*{message}"):
        read_int8(path)


def test_numbers_that_numpy_has_not_are_refused(tmp_path: Path) -> None:
    tensors = {name: torch.from_numpy(values) for name, values in GOOD_RANGES.items()}
    tensors |= {"logits": torch.zeros(1, 2), "means.0": torch.ones(8, dtype=torch.bfloat16)}
    torch_file.save_file(tensors, tmp_path / "int8.safetensors", {"figures": GOOD.model_dump_json()})
    with pytest.raises(Int8Malformed, match=r"^int8\.safetensors can't be read: "):
        read_int8(tmp_path / "int8.safetensors")


def test_what_a_later_safelight_adds_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "int8.safetensors"
    tensors = GOOD_RANGES | {"logits": np.zeros((1, 2), np.float32), "medians": np.zeros(3, np.float32)}
    save_file(tensors, path, {"figures": GOOD.model_dump_json()})
    assert read_int8(path) is not None
