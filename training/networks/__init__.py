"""Network definitions, one file a family, and their cost."""

from typing import Any

import torch
from torch import Tensor, nn

from training.networks.convnet import ConvNet as ConvNet
from training.networks.lenet import LeNet
from training.networks.network import Network as Network
from training.networks.perceptron import Perceptron
from training.networks.resnet import ResNet
from training.recipes import Recipe, RecipeInvalid

NETWORKS: dict[str, type[Network]] = {
    "convnet": ConvNet,
    "perceptron": Perceptron,
    "lenet": LeNet,
    "resnet": ResNet,
}


def build(name: str, arguments: dict[str, Any]) -> Network:
    """Build an untrained network; raises KeyError for an unknown name, TypeError for wrong arguments."""
    return NETWORKS[name](**arguments)


def cost(recipe: Recipe) -> tuple[int, int]:
    """Parameters and multiply-accumulates of a recipe's network, for ten classes.

    Raises RecipeInvalid where it can't be built, or can't take the recipe's input.
    """
    try:
        network = build(recipe.network, recipe.arguments | {"channels": recipe.input.channels, "classes": 10})
        if recipe.smaller.share:  # it must take those too
            macs(network, (recipe.input.channels, *recipe.smaller.size(*recipe.input.shape[1:])))
        return parameters(network), macs(network, recipe.input.shape)
    except (KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeInvalid(f"network {recipe.network} with {recipe.arguments} can't be built: {reason}") from error


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@torch.no_grad()
def macs(network: nn.Module, shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates of convolutions and linear layers for one image of shape (C, H, W).

    As torch's FlopCounterMode has them, which imports torch's compiler first: a second for a sum.
    """
    counts: list[int] = []

    def count(layer: nn.Module, _: object, output: Tensor) -> None:
        assert isinstance(layer.weight, Tensor)
        counts.append(output.numel() * layer.weight[0].numel())

    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    network.eval()(torch.zeros(1, *shape))
    for hook in hooks:
        hook.remove()
    return sum(counts)
