"""The optimizer of a run, and its learning rate as a function of the step alone."""

from __future__ import annotations

import math

import torch
from torch import nn

from affkd_kernels.trainer.config import OptimizerConfig


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW, or SGD with momentum 0.9; ValueError for another name."""
    if config.name == "adamw":
        return torch.optim.AdamW(model.parameters(), config.lr, weight_decay=config.weight_decay)
    if config.name == "sgd":
        return torch.optim.SGD(
            model.parameters(),
            config.lr,
            momentum=0.9,
            weight_decay=config.weight_decay,
            nesterov=config.nesterov,
        )
    raise ValueError(f"optimizer.name is {config.name!r}; valid are adamw, sgd")


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Linear warm-up, then a cosine or steps. Without state there is nothing to save or restore."""
    warmup = max(1, round(config.warmup * total_steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "step":
        # whole epochs, since a milestone is one: steps per epoch times epochs are all steps
        epoch = step * config.epochs // total_steps
        return config.lr * config.decay ** sum(epoch >= m for m in config.milestones)
    progress = (step - warmup) / max(1, total_steps - warmup)
    return config.lr * (1 + math.cos(math.pi * progress)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
