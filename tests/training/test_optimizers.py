"""The optimizers: what Muon keeps, how parameters are sorted, and where the learning rate ends."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.tiny import TINY
from training import recipes
from training.graph import WARM_UP, Recorded
from training.networks import build
from training.optimizers import (
    Muon,
    build_optimizers,
    clip_gradient,
    orthogonal,
    place_learning_rates,
    set_learning_rate,
    step_all,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(24, 12 * 9), (64, 24 * 9), (64, 64 * 9), (200, 50), (3, 300)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_singular_values_come_near_1(shape: tuple[int, int], size: float) -> None:
    values = torch.linalg.svdvals(orthogonal(size * normal(*shape)))
    assert 0.3 <= values.min() <= values.max() <= 1.25


def test_an_orthogonal_matrix_keeps_its_directions() -> None:
    matrix = normal(6, 40)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.T @ orthogonal(matrix) @ right.T
    assert torch.allclose(turned, torch.diag(turned.diag()), atol=1e-4)


def test_no_gradient_is_no_direction() -> None:
    assert torch.equal(orthogonal(torch.zeros(4, 9)), torch.zeros(4, 9))


def step(filters: nn.Parameter, optimizer: Muon, seed: int) -> None:
    filters.grad = normal(*filters.shape, seed=seed)
    optimizer.step()


def test_filters_are_kept_at_the_root_of_their_number() -> None:
    filters = nn.Parameter(normal(16, 3, 3, 3))
    optimizer = Muon([filters], lr=0.0, momentum=0.6)
    step(filters, optimizer, 1)
    assert filters.norm().item() == pytest.approx(16**0.5)


def test_the_learning_rate_alone_says_how_fast_filters_change() -> None:
    moved = []
    for size in (1e-3, 1.0, 1e3):
        filters = nn.Parameter(normal(16, 8, 3, 3))
        optimizer = Muon([filters], lr=0.1, momentum=0.6)
        for seed in range(20):
            before = filters.detach().clone() * 4 / filters.norm().item()
            filters.grad = size * normal(*filters.shape, seed=seed)
            optimizer.step()
            moved.append((filters.detach() - before).norm().item() / 4)
        assert filters.norm().item() == pytest.approx(4, rel=0.1)
    assert 0.05 < min(moved) <= max(moved) < 0.125


def test_momentum_remembers_earlier_gradients() -> None:
    ends = []
    for momentum in (0.0, 0.6):
        filters = nn.Parameter(normal(8, 4, 3, 3))
        optimizer = Muon([filters], lr=0.1, momentum=momentum)
        step(filters, optimizer, 1)
        step(filters, optimizer, 2)
        ends.append(filters.detach())
    assert not torch.allclose(ends[0], ends[1])


def test_filters_without_a_gradient_stay() -> None:
    filters = nn.Parameter(normal(4, 2, 3, 3))
    Muon([filters], lr=0.1, momentum=0.6).step()
    assert torch.equal(filters, normal(4, 2, 3, 3))


@pytest.mark.parametrize("whiten", [False, True])
def test_each_trainable_parameter_has_one_optimizer_of_its_kind(whiten: bool) -> None:
    network = build("convnet", TINY.arguments | {"channels": 1, "classes": 2, "whiten": whiten})
    muon, sgd = build_optimizers(network, TINY, TINY.batch_size)
    filters = [p for group in muon.param_groups for p in group["params"]]
    biases, heads = (group["params"] for group in sgd.param_groups)
    assert {p.ndim for p in filters} == {4}
    assert {p.ndim for p in biases} == {1}
    assert [p is network.head.weight for p in heads] == [True]
    trainable = [p for p in network.parameters() if p.requires_grad]
    assert sorted(map(id, [*filters, *biases, *heads])) == sorted(map(id, trainable))
    assert any(p is network.stem.weight for p in filters) != whiten


def test_weight_decay_is_a_share_per_example() -> None:
    network = build("convnet", TINY.arguments | {"channels": 1, "classes": 2})
    assert isinstance(TINY.optimizer, recipes.Muon)
    decaying = TINY.optimizer.model_copy(update={"weight_decay": 1e-4})
    recipe = TINY.model_copy(update={"optimizer": decaying})
    _, sgd = build_optimizers(network, recipe, recipe.batch_size)
    lost_per_step = [group["lr"] * group["weight_decay"] for group in sgd.param_groups]
    assert lost_per_step == pytest.approx([1e-4 * TINY.batch_size] * 2)


def test_the_learning_rate_falls_straight_from_its_peak_to_0() -> None:
    optimizers = build_optimizers(
        build("convnet", TINY.arguments | {"channels": 1, "classes": 2}), TINY, TINY.batch_size
    )

    def rates(step: int) -> list[float]:
        set_learning_rate(optimizers, TINY, step, 100)
        return [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]

    assert isinstance(TINY.optimizer, recipes.Muon)
    peaks = [TINY.optimizer.filter_lr, TINY.optimizer.bias_lr, TINY.optimizer.head_lr]
    assert rates(75) == pytest.approx([peak / 4 for peak in peaks])
    assert rates(0) == peaks
    assert rates(100) == [0, 0, 0]


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"schedule": "linear"}, [1, 0.75, 0.5, 0.25]),
        ({"schedule": "cosine"}, [1, 0.8536, 0.5, 0.1464]),
        ({"schedule": "constant"}, [1, 1, 1, 1]),
        ({"schedule": "constant", "warm_up": 0.75}, [1 / 3, 2 / 3, 1, 1]),
        ({"schedule": "linear", "warm_up": 0.5}, [0.5, 0.75, 0.5, 0.25]),
    ],
    ids=str,
)
def test_the_rate_follows_the_schedule_after_a_warm_up(changes: dict[str, object], rates: list[float]) -> None:
    recipe = TINY.model_copy(update=changes | {"optimizer": recipes.SGD(lr=1.0)})
    (optimizer,) = build_optimizers(build("convnet", TINY.arguments | {"channels": 1, "classes": 2}), recipe, 16)
    found = []
    for step in range(4):
        set_learning_rate([optimizer], recipe, step, 4)
        found.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx(rates, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        (recipes.SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01), torch.optim.SGD),
        (recipes.Adam(lr=0.1, weight_decay=0.01), torch.optim.Adam),
        (recipes.Adam(kind="adamw", lr=0.1, weight_decay=0.01), torch.optim.AdamW),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_torch_s_optimizers_let_weights_decay_and_biases_alone(
    settings: recipes.SGD | recipes.Adam, kind: type[torch.optim.Optimizer]
) -> None:
    network = build("perceptron", {"channels": 1, "classes": 2, "height": 4, "width": 4, "widths": [3]})
    (optimizer,) = build_optimizers(network, TINY.model_copy(update={"optimizer": settings}), 16)
    assert type(optimizer) is kind
    weights, biases = optimizer.param_groups
    assert [(group["lr"], group["weight_decay"]) for group in (weights, biases)] == [(0.1, 0.01), (0.1, 0.0)]
    assert [p.ndim for p in weights["params"]] == [2, 2]
    assert [p.ndim for p in biases["params"]] == [1, 1]


def test_a_gradient_that_is_too_long_is_shortened() -> None:
    layer = nn.Linear(3, 2)
    for longest, length in ((None, 30.0), (100.0, 30.0), (0.5, 0.5)):
        layer.weight.grad, layer.bias.grad = torch.zeros(2, 3), torch.full((2,), 30 / 2**0.5)
        clip_gradient(layer, longest)
        assert layer.bias.grad.norm().item() == pytest.approx(length, rel=1e-4)


def by_hand(work: Callable[[], None]) -> tuple[None, Callable[[], None]]:
    """Records as CUDA does: it isn't done yet, and each replay does it with what stands in the same memory."""
    return None, work


@pytest.mark.parametrize(
    "optimizer",
    [
        recipes.Muon(filter_lr=0.1, bias_lr=0.05, head_lr=1e-3, weight_decay=1e-4),
        recipes.SGD(lr=0.1, momentum=0.9, weight_decay=1e-3),
        recipes.Adam(kind="adamw", lr=0.01, weight_decay=1e-2),
    ],
    ids=["muon", "sgd", "adamw"],
)
def test_a_recorded_step_reads_its_rates_anew(optimizer: recipes.Muon | recipes.SGD | recipes.Adam) -> None:
    recipe = TINY.model_copy(update={"optimizer": optimizer})
    plain, recorded = (build("convnet", TINY.arguments | {"channels": 1, "classes": 2}) for _ in range(2))
    recorded.load_state_dict(plain.state_dict())
    theirs, ours = build_optimizers(plain, recipe, 16), build_optimizers(recorded, recipe, 16)
    for group in (group for one in ours for group in one.param_groups):
        group["lr"] = torch.tensor(group["lr"])  # as on CUDA
    take_step = Recorded(lambda: step_all(ours), by_hand)
    for step in range(WARM_UP + 5):
        for network in (plain, recorded):
            for number, parameter in enumerate(network.parameters()):
                parameter.grad = normal(*parameter.shape, seed=100 * step + number)
        set_learning_rate(theirs, recipe, step, 10)
        set_learning_rate(ours, recipe, step, 10)
        step_all(theirs)
        take_step()
    for one, other in zip(plain.parameters(), recorded.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_rates_of_a_run_that_was_begun_elsewhere_are_numbers_again_on_the_cpu() -> None:
    network = build("convnet", TINY.arguments | {"channels": 1, "classes": 2})
    optimizers = build_optimizers(network, TINY, 16)
    for group in (group for one in optimizers for group in one.param_groups):
        group["lr"] = torch.tensor(0.25)
    place_learning_rates(optimizers, torch.device("cpu"))
    assert [group["lr"] for one in optimizers for group in one.param_groups] == [0.25] * 3
    assert all(isinstance(group["lr"], float) for one in optimizers for group in one.param_groups)
