"""The gradient of a batch: a recorded pass, replayed, leaves what a plain one does, and all of it is on the device."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.tiny import TINY, squares
from training import augment
from training.costs import cost, penalty
from training.datasets import Split
from training.gradient import Batch, Gradient, Passed
from training.graph import WARM_UP
from training.loop import Batches, new_network
from training.networks import Network
from training.optimizers import Muon
from training.recipes import Affine, Recipe, Smaller, Teacher

CPU = torch.device("cpu")
TAUGHT = TINY.model_copy(update={"teacher": Teacher(recipe="tiny", temperature=2, share=0.5), "strangers": 0.25})


class ByHand:
    """Records work as CUDA does, whose graphs need a GPU: what is recorded isn't done yet, and each replay reads and
    writes the same memory."""

    def __init__(self) -> None:
        self.recordings = self.replays = 0

    def __call__(self, work: Callable[[], Passed]) -> tuple[Passed, Callable[[], None]]:
        self.recordings += 1
        filled = torch.full((), torch.nan), torch.full((), -1)

        def replay() -> None:
            self.replays += 1
            for place, found in zip(filled, work(), strict=True):
                place.copy_(found)

        return filled, replay


def batches(recipe: Recipe, device: torch.device = CPU) -> Callable[[int], Batch]:
    made = Batches(squares().train, recipe, 0, device)

    def at(step: int) -> Batch:
        batch = made.at(step)
        if recipe.teacher is None:
            return batch
        taught = torch.randn(len(batch.labels), 2, generator=torch.Generator().manual_seed(step))
        return Batch(batch.images, batch.labels, taught)

    return at


def left_in(network: Network) -> dict[str, Tensor]:
    gradients = {f"{name}.grad": one.grad.clone() for name, one in network.named_parameters() if one.grad is not None}
    return gradients | {name: one.clone() for name, one in network.named_buffers()}


@pytest.mark.parametrize("recipe", [TINY, TAUGHT, TINY.model_copy(update={"l1": 0.01})], ids=["plain", "taught", "l1"])
def test_a_replayed_pass_leaves_what_a_plain_one_does(recipe: Recipe) -> None:
    plain, replayed = (new_network(recipe, squares()).train() for _ in range(2))
    replayed.load_state_dict(plain.state_dict())
    recorder = ByHand()
    expected = Gradient(plain, recipe, 16, torch.float32, CPU, None)
    found = Gradient(replayed, recipe, 16, torch.float32, CPU, recorder)
    at = batches(recipe)
    for step in range(WARM_UP + 4):
        assert [value.item() for value in found(at(step))] == [value.item() for value in expected(at(step))]
        one, other = left_in(replayed), left_in(plain)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert (recorder.recordings, recorder.replays) == (1, 4)


def test_batches_of_another_size_have_a_recording_of_their_own() -> None:
    recipe = TINY.model_copy(update={"smaller": Smaller(share=0.5, scale=0.5)})
    made = Batches(squares().train, recipe, 0, CPU)
    at = [made.at(step) for step in (0, 1, 2, made.steps - 1) * (WARM_UP + 1)]
    assert len({batch.images.shape for batch in at}) == 2
    plain, replayed = (new_network(recipe, squares()).train() for _ in range(2))
    replayed.load_state_dict(plain.state_dict())
    recorder = ByHand()
    expected = Gradient(plain, recipe, 16, torch.float32, CPU, None)
    found = Gradient(replayed, recipe, 16, torch.float32, CPU, recorder)
    for batch in at:
        assert [value.item() for value in found(batch)] == [value.item() for value in expected(batch)]
        assert all(torch.equal(one, left_in(plain)[name]) for name, one in left_in(replayed).items())
    assert (recorder.recordings, recorder.replays) == (2, 2 * WARM_UP + 4)


def test_a_batch_that_was_given_is_not_written_over() -> None:
    gradient = Gradient(new_network(TINY, squares()).train(), TINY, 1, torch.float32, CPU, ByHand())
    at = batches(TINY)
    first = [at(step) for step in range(WARM_UP + 3)]
    for batch in first:
        gradient(batch)
    for step, batch in enumerate(first):
        assert torch.equal(batch.images, at(step).images)
        assert torch.equal(batch.labels, at(step).labels)


def place(network: Network, device: torch.device) -> None:
    """As `network.to(device)`, which can't do it with stand-ins."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = torch.empty_like(parameter, device=device)
                module._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)


def test_on_a_gpu_nothing_of_a_step_stays_behind_on_the_cpu() -> None:
    """torch's own stand-ins for tensors, which know their device and shape alone: an operation across devices fails."""
    shaken = {
        "strangers": 0.25,
        "l1": 0.01,
        "flip": True,
        "shift": 2,
        "cutout": 4,
        "smaller": Smaller(share=0.9, scale=0.5),
        "affine": Affine(degrees=10, scale=0.1, shear=5, shift=1),
    }
    recipe, cuda = TINY.model_copy(update=shaken), torch.device("cuda", 0)
    network = new_network(recipe, squares())
    with FakeTensorMode(allow_non_fake_inputs=True):
        train = squares().train
        made = Batches(Split(train.images, train.labels), recipe, 0, cuda)
        batch = made.at(5)
        assert (batch.images.device, batch.labels.device) == (cuda, cuda)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        place(network, cuda)
        with torch.no_grad():  # the way back needs a GPU
            loss = cost(recipe, network(batch.images), batch.labels, batch.taught) + penalty(recipe, network)
        assert loss.device == cuda
        for parameter in network.parameters():
            parameter.grad = torch.empty_like(parameter)
        filters = [parameter for parameter in network.parameters() if parameter.ndim == 4]
        Muon(filters, lr=torch.tensor(0.1, device=cuda), momentum=0.6).step()
        assert {one.device for one in network.parameters()} == {cuda}


@pytest.mark.parametrize("change", augment.CHANGES, ids=lambda change: change.__name__)
def test_on_a_gpu_pictures_are_changed_where_they_are(change: Callable[[Tensor, Tensor], Tensor]) -> None:
    cuda = torch.device("cuda", 0)
    with FakeTensorMode():
        images, amount = torch.empty(5, 3, 8, 8, device=cuda), torch.empty(5, 1, 1, 1, device=cuda)
        changed = change(images, amount)
    assert (changed.shape, changed.device) == (images.shape, cuda)
