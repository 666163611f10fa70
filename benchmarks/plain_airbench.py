"""The CIFAR-10 speed record of its kind (airbench94 with Muon; Jordan, 2024), brought to a CPU in the plainest way.

Weights in float32, bfloat16 by autocast, channels last, one operation after the other: what one gets by moving the
published settings here and changing nothing else. Safelight's recipes are measured against it.

    python -m benchmarks.plain_airbench --seed 0        prints one line of JSON
"""

import argparse
import json
import os
import resource
import time

BEGUN = time.perf_counter()

import torch  # noqa: E402 - the clock starts before torch is imported
import torch.nn.functional as F  # noqa: E402
from torch import Tensor, nn  # noqa: E402

BATCH, EPOCHS = 2000, 8
FILTER_LR, FILTER_MOMENTUM = 0.24, 0.6
BIAS_LR, HEAD_LR, MOMENTUM = 0.053, 0.67, 0.85
WEIGHT_DECAY = 2e-6 * BATCH
SMOOTHING = 0.2
WHITEN_BIAS_EPOCHS = 3
HEAD_SCALE = 1 / 256


class Group(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv(inputs, outputs), norm(outputs)
        self.conv2, self.norm2 = conv(outputs, outputs), norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        return F.gelu(self.norm2(self.conv2(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.whiten = nn.Conv2d(3, 24, 2)
        self.whiten.weight.requires_grad_(False)
        self.groups = nn.Sequential(Group(24, 64), Group(64, 256), Group(256, 256))
        self.head = nn.Linear(256, 10, bias=False)
        with torch.no_grad():
            self.head.weight.div_(self.head.weight.std())

    def forward(self, x: Tensor) -> Tensor:  # normalised [N, 3, 32, 32] -> logits [N, 10]
        x = self.groups(F.gelu(self.whiten(x)))
        return self.head(F.max_pool2d(x, 3).flatten(1)) * HEAD_SCALE


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.dirac_(layer.weight[: min(inputs, outputs)])
    return layer


def norm(width: int) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(width, eps=1e-12, momentum=0.4)
    layer.weight.requires_grad_(False)
    return layer


@torch.no_grad()
def set_whitening(net: Net, images: Tensor) -> None:
    patches = images.unfold(2, 2, 1).unfold(3, 2, 1).permute(0, 2, 3, 1, 4, 5).reshape(-1, 12)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    filters = (vectors / (values + 5e-4).sqrt()).T.flip(0).reshape(12, 3, 2, 2)
    net.whiten.weight.copy_(torch.cat([filters, -filters]))
    nn.init.zeros_(net.whiten.bias)  # type: ignore[arg-type]


def orthogonal(gradient: Tensor) -> Tensor:
    """Three Newton-Schulz steps in bfloat16, of filters as a matrix [outputs, inputs * 9]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = gradient.bfloat16()
    x = x / (x.norm() + 1e-7)
    tall = len(x) > x.shape[1]
    x = x.T if tall else x
    for _ in range(3):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).float()


class Muon(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for filters in group["params"]:
                state = self.state[filters]
                momentum = state.setdefault("momentum", torch.zeros_like(filters))
                momentum.mul_(FILTER_MOMENTUM).add_(filters.grad)
                update = filters.grad.add(momentum, alpha=FILTER_MOMENTUM)
                filters.mul_(len(filters) ** 0.5 / filters.norm())
                filters.add_(orthogonal(update.flatten(1)).view_as(filters), alpha=-group["lr"])


def optimizers(net: Net) -> list[torch.optim.Optimizer]:
    filters = [p for p in net.groups.parameters() if p.ndim == 4]
    biases = [p for p in net.groups.parameters() if p.ndim == 1 and p.requires_grad]
    rest = [
        {"params": [net.whiten.bias], "lr": BIAS_LR, "weight_decay": WEIGHT_DECAY / BIAS_LR},
        {"params": biases, "lr": BIAS_LR, "weight_decay": WEIGHT_DECAY / BIAS_LR},
        {"params": [net.head.weight], "lr": HEAD_LR, "weight_decay": WEIGHT_DECAY / HEAD_LR},
    ]
    found = [torch.optim.SGD(rest, lr=BIAS_LR, momentum=MOMENTUM, nesterov=True), Muon(filters, {"lr": FILTER_LR})]
    for optimizer in found:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return found


def crops(images: Tensor) -> Tensor:
    """Every image moved by up to two pixels, borders reflected."""
    padded = F.pad(images, (2,) * 4, mode="reflect")
    moved = torch.empty_like(images)
    down, right = torch.randint(0, 5, (2, len(images)))
    for y in range(5):
        for x in range(5):
            chosen = (down == y) & (right == x)
            moved[chosen] = padded[chosen, :, y : y + 32, x : x + 32]
    return moved


@torch.inference_mode()
def six_views(net: Net, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in the single view, and averaged over both sides of the picture and of two moved by a pixel."""

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        single = net(x).float()
        return single, 0.5 * single + 0.5 * net(x.flip(3)).float()

    single, centre = both(images)
    padded = F.pad(images, (1,) * 4, mode="reflect")
    moved = [both(padded[:, :, place : place + 32, place : place + 32])[1] for place in (0, 2)]
    return single, 0.5 * centre + 0.25 * moved[0] + 0.25 * moved[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="stop after so many, to measure the pace alone")
    options = parser.parse_args()

    from pathlib import Path

    from training import datasets  # decoded once and cached: of Safelight, the only part that is used
    from training.recipes import recipe

    data = datasets.load("cifar10", recipe("cifar10").input, Path(os.environ["SAFELIGHT_DATA"]))
    torch.manual_seed(options.seed)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    train, test = ((split.images / 255 - mean) / std for split in (data.train, data.test))

    net = Net().to(memory_format=torch.channels_last)
    set_whitening(net, train[torch.randperm(len(train))[:5000]])
    chosen = optimizers(net)
    per_epoch = len(train) // BATCH
    steps, step = EPOCHS * per_epoch, 0
    train = torch.where((torch.rand(len(train)) < 0.5).view(-1, 1, 1, 1), train.flip(3), train)
    first = time.perf_counter()
    for epoch in range(EPOCHS):
        images = crops(train)
        images = images.flip(3) if epoch % 2 else images
        for index in torch.randperm(len(train)).split(BATCH)[:per_epoch]:
            inputs = images[index].to(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                logits = net(inputs)
            loss = F.cross_entropy(logits.float(), data.train.labels[index], label_smoothing=SMOOTHING, reduction="sum")
            for optimizer in chosen:
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * (1 - step / steps)
            chosen[0].param_groups[0]["lr"] = BIAS_LR * max(0.0, 1 - step / (WHITEN_BIAS_EPOCHS * per_epoch))
            loss.backward()
            for optimizer in chosen:
                optimizer.step()
                optimizer.zero_grad()
            step += 1
            if step == options.steps:
                seconds = time.perf_counter() - first
                print(json.dumps({"images_per_second": round(step * BATCH / seconds, 1)}))
                return
    net.eval()
    with torch.autocast("cpu", torch.bfloat16):
        found = [six_views(net, images.to(memory_format=torch.channels_last)) for images in test.split(1000)]
    single, views = (torch.cat(logits) for logits in zip(*found, strict=True))
    done = time.perf_counter()
    facts = {
        "single": float((single.argmax(1) == data.test.labels).double().mean()),
        "views": float((views.argmax(1) == data.test.labels).double().mean()),
        "seconds": done - BEGUN,
        "to_first_step": first - BEGUN,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
