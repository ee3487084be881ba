"""AdamW and the schedule of its learning rate, as a `RunConfig` asks for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from mixhead.errors import MixheadError
from mixhead.training.config import RunConfig

Group = Literal["decay", "keep", "router"]


def adamw(
    model: nn.Module,
    config: RunConfig,
    group_of: Callable[[str, nn.Parameter], Group],
    router_factor: float = 1.0,
    **adam: Any,
) -> torch.optim.AdamW:
    """AdamW over the weights that require a gradient.

    Args:
        model: whose weights are trained.
        config: learning rate and weight decay.
        group_of: from name and weight to its group: "decay" and "keep" say whether it decays; a "router" does not, and
            has a learning rate of its own.
        router_factor: that of the routers, as a multiple of all others'.
        **adam: `betas` and `eps`, where they are not PyTorch's.

    Raises:
        MixheadError: where no weight requires a gradient.
    """
    weights: dict[Group, list[nn.Parameter]] = {"decay": [], "keep": [], "router": []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            weights[group_of(name.removeprefix("module."), parameter)].append(parameter)
    groups = [
        {
            "params": parameters,
            "kind": group,
            "lr": config.learning_rate * (router_factor if group == "router" else 1.0),
            "weight_decay": config.weight_decay if group == "decay" else 0.0,
        }
        for group, parameters in weights.items()
        if parameters
    ]
    if not groups:
        raise MixheadError("The model has no parameter that requires a gradient, so there is nothing to train.")
    fused = all(p.device.type in ("cpu", "cuda") for of_group in weights.values() for p in of_group)
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=fused, **adam)


def schedule(optimizer: torch.optim.Optimizer, config: RunConfig, steps: int) -> LambdaLR:
    """The learning rates of a run of so many steps: those of transformers, from the second one on.

    Their first is 0 wherever there is a warm-up, and a step at 0 is lost; short runs have few.
    """
    warmup = math.ceil(round(config.warmup * steps, 6))
    if config.schedule == "timm_cosine":
        return LambdaLR(optimizer, partial(timm_cosine, config=config, steps=steps))
    name, last = "constant_with_warmup", steps
    settings: dict[str, Any] = {}
    if config.schedule == "linear":
        name, settings = "polynomial", {"lr_end": config.final_learning_rate}
    elif config.schedule == "cosine":
        name, settings = "cosine_with_min_lr", {"min_lr": config.final_learning_rate}
    elif config.schedule == "inverse_sqrt":
        name, settings = "inverse_sqrt", {"timescale": max(warmup, 1)}
    elif config.schedule == "warmup_stable_decay":
        cooldown = min(math.ceil(round(config.cooldown * steps, 6)), steps - warmup)
        name, last = "warmup_stable_decay", steps + 1
        settings = {"num_decay_steps": cooldown, "decay_type": "linear"}
    [factor, *_] = get_scheduler(name, optimizer, warmup + 1, max(last, warmup + 2), settings).lr_lambdas
    return LambdaLR(optimizer, lambda step: factor(step + 1))


def timm_cosine(step: int, config: RunConfig, steps: int) -> float:
    """The learning rate of a step (counted from 0) as a share of the highest, as the published MoH-ViT had it.

    By hand: the cosine spans all steps, and in the first of them the warm-up replaces it. The library's begins after
    the warm-up.
    """
    warmup = config.warmup * steps
    if step < warmup:
        first = config.warmup_learning_rate / config.learning_rate
        return first + (1.0 - first) * step / warmup
    last = config.final_learning_rate / config.learning_rate
    return last + (1.0 - last) * 0.5 * (1.0 + math.cos(math.pi * step / max(steps - 1, 1)))
