"""optim.py: schedules against nanoGPT's formula, weight decay, impossible options."""
import math

import pytest

from engine.optim import learning_rate, make_optimizer
from engine.trainer import TrainerConfig
from model import GPT, ModelConfig


def nanogpt_lr(it, rate, warmup, decay, low):
    if it < warmup:
        return rate * (it + 1) / (warmup + 1)
    if it > decay:
        return low
    return low + 0.5 * (1 + math.cos(math.pi * (it - warmup) / (decay - warmup))) * (rate - low)


def test_cosine_schedule_is_nanogpts():
    config = TrainerConfig(learning_rate=1e-3, min_lr=1e-4, warmup_iters=10, lr_decay_iters=50,
                           max_iters=70)
    for it in range(70):
        expected = nanogpt_lr(it, 1e-3, 10, 50, 1e-4)
        assert learning_rate(config, it) == pytest.approx(expected, rel=1e-12)
    assert learning_rate(config, 0) > 0


def test_other_schedules():
    linear = TrainerConfig(learning_rate=1.0, min_lr=0.0, warmup_iters=0, max_iters=10,
                           lr_schedule="linear")
    assert [learning_rate(linear, it) for it in (0, 5, 10, 11)] == [1.0, 0.5, 0.0, 0.0]
    constant = TrainerConfig(learning_rate=1.0, warmup_iters=1, max_iters=10,
                             lr_schedule="constant")
    assert [learning_rate(constant, it) for it in (0, 1, 10)] == [0.5, 1.0, 1.0]
    no_room = TrainerConfig(warmup_iters=5, max_iters=5)  # for a decay
    assert learning_rate(no_room, 5) == TrainerConfig().min_lr


def test_weight_decay_acts_on_matrices_only():
    model = GPT(ModelConfig(bias=True), 65)
    decayed, free = make_optimizer(model, TrainerConfig(weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3 and free["weight_decay"] == 0
    assert all(p.dim() == 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in free["params"])
    count = sum(p.numel() for group in (decayed, free) for p in group["params"])
    assert count == model.n_parameters()


@pytest.mark.parametrize("option, value", [
    ("learning_rate", -1.0), ("max_iters", -1), ("grad_clip", math.nan), ("beta1", 1.5),
    ("min_lr", -1e-5)])
def test_impossible_options(option, value):
    with pytest.raises(ValueError, match=option):
        TrainerConfig(**{option: value})


def test_a_schedule_that_would_rise_is_refused():
    with pytest.raises(ValueError, match="min_lr=0.0003 is above learning_rate=0.0001"):
        TrainerConfig(learning_rate=1e-4)
    TrainerConfig(learning_rate=1e-4, lr_schedule="constant")
    TrainerConfig(learning_rate=3e-4)
