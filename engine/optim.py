"""Optimizers by name, and the learning rate over time.

To add an optimizer, write a function (model, config) -> torch.optim.Optimizer and enter it in
OPTIMIZERS. Groups may differ in peak rates, all follow one schedule. Only its state is saved.
"""
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from engine.muon import muon
from engine.options import FIXED, Options, at_least, in_range, one_of


def adamw(model: torch.nn.Module, config: "OptimConfig") -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019). Weight decay acts on matrices, not on vectors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() >= 2]
    vectors = [p for p in trained if p.dim() < 2]  # biases, gains, learned powers and scales
    groups = [{"params": matrices, "weight_decay": config.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                             eps=config.adam_eps, fused=config.fused)


OPTIMIZERS = {"adamw": adamw, "muon": muon}


def not_above_peak(name, value, config):
    if value > config.learning_rate and config.lr_schedule != "constant":
        return (f"{name}={value} is above learning_rate={config.learning_rate}, to which it would "
                "rise: lower it, too, or set --lr_schedule=constant")


@dataclass
class OptimConfig(Options):
    """How parameters are updated."""
    optimizer: Annotated[str, "update rule", FIXED, one_of(OPTIMIZERS)] = "adamw"
    max_iters: Annotated[int, "training steps", at_least(0)] = 2000
    learning_rate: Annotated[float, "peak learning rate", at_least(0)] = 3e-3
    matrix_learning_rate: Annotated[float, "muon: peak learning rate of the blocks' matrices",
                                    at_least(0)] = 5e-3
    matrix_interval: Annotated[int, "muon: each of the blocks' matrices moves once in so many "
                                    "steps, as far as in all of them", at_least(1)] = 1
    momentum: Annotated[float, "muon: of its mean of gradients", in_range(0, 1)] = 0.95
    lr_schedule: Annotated[Literal["cosine", "linear", "constant"],
                           "decay after the warm-up"] = "cosine"
    warmup_iters: Annotated[int, "steps of linear warm-up", at_least(0)] = 100
    lr_decay_iters: Annotated[int, "step at which min_lr is reached; 0: max_iters", at_least(0)] = 0
    min_lr: Annotated[float, "learning rate at the end", at_least(0), not_above_peak] = 3e-4
    weight_decay: Annotated[float, "on matrices only", at_least(0)] = 0.1
    beta1: Annotated[float, "AdamW's", in_range(0, 1)] = 0.9
    beta2: Annotated[float, "AdamW's", in_range(0, 1)] = 0.99
    adam_eps: Annotated[float, "AdamW's epsilon", in_range(0, math.inf, closed="high")] = 1e-8
    grad_clip: Annotated[float, "clip the gradient to this norm; 0: never", at_least(0)] = 1.0
    fused: Annotated[bool, "AdamW as one kernel; off: an operation at a time"] = True


def learning_rate(config: OptimConfig, step: int) -> float:
    """Linear warm-up, then decay to min_lr at lr_decay_iters; "cosine" is nanoGPT's schedule."""
    if step < config.warmup_iters:  # never zero, not even at step 0
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if config.lr_schedule == "constant":
        return config.learning_rate
    end = config.lr_decay_iters or config.max_iters
    if step >= end:
        return config.min_lr
    progress = (step - config.warmup_iters) / (end - config.warmup_iters)  # from 0 to 1
    if config.lr_schedule == "cosine":
        left = 0.5 * (1 + math.cos(math.pi * progress))  # from 1 to 0
    else:
        left = 1 - progress
    return config.min_lr + left * (config.learning_rate - config.min_lr)


def make_optimizer(model: torch.nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    optimizer = OPTIMIZERS[config.optimizer](model, config)
    for group in optimizer.param_groups:
        # Exactly 1 for a group that has the configured rate, so that its rates are exact too.
        group["share"] = group["lr"] / config.learning_rate if config.learning_rate else 1.0
    return optimizer


def set_learning_rates(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int) -> float:
    """Give each group its share of the rate of this step; returns the latter."""
    rate = learning_rate(config, step)
    for group in optimizer.param_groups:
        group["lr"] = group["share"] * rate
    return rate
