"""Network definitions, one file a family, and their cost."""

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from training.networks.convnet import ConvNet as ConvNet
from training.recipes import Recipe, RecipeInvalid

NETWORKS: dict[str, type[ConvNet]] = {"convnet": ConvNet}


def build(name: str, arguments: dict[str, Any]) -> ConvNet:
    """Build an untrained network; raises KeyError for an unknown name, TypeError for wrong arguments."""
    return NETWORKS[name](**arguments)


def cost(recipe: Recipe) -> tuple[int, int]:
    """Parameters and multiply-accumulates of a recipe's network, for ten classes.

    Raises RecipeInvalid where it can't be built, or can't take the recipe's input.
    """
    try:
        network = build(recipe.network, recipe.arguments | {"channels": recipe.input.channels, "classes": 10})
        return parameters(network), macs(network, recipe.input.shape)
    except (KeyError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeInvalid(f"network {recipe.network} with {recipe.arguments} can't be built: {reason}") from error


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def macs(network: nn.Module, shape: tuple[int, int, int]) -> int:
    """Multiply-accumulates for one image of shape (C, H, W)."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.zeros(1, *shape))
    return int(counter.get_total_flops()) // 2
