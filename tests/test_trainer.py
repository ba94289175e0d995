"""trainer.py: one step of a run, and impossible options. Whole runs are in test_end_to_end.py."""
import pytest
import torch

from engine.device import Compute
from engine.trainer import Task, Trainer, TrainerConfig


@pytest.mark.parametrize("option, value", [
    ("batch_size", 0), ("eval_interval", 0), ("log_interval", -1), ("seed", 2**40)])
def test_impossible_options(option, value):
    with pytest.raises(ValueError, match=option):
        TrainerConfig(**{option: value})


class Means(Task):
    """The mean of numbers (count, 2) times a vector: its gradient is their mean."""
    train_metrics = ("train_loss",)
    objective = "val_loss"

    def batch(self, first, count):
        return (torch.arange(2.0 * first, 2.0 * (first + count)).view(count, 2) ** 2,)

    def loss(self, model, x):
        return (model(x).mean(),)


def step(tmp_path, world=1, rank=0, first=0, **options) -> Trainer:
    """A trainer that has taken one step as one of `world` processes, at a rate of 0."""
    config = TrainerConfig(learning_rate=0.0, min_lr=0.0, out_dir=str(tmp_path), device="cpu",
                           tune_malloc=False, **options)
    compute = Compute("cpu", "float32", 2)
    compute.world = world
    compute.rank = rank
    trainer = Trainer(config, Means(), torch.nn.Linear(2, 1, bias=False), compute)
    trainer.gradients = []
    # The optimizer is the last to see the gradients.
    trainer.optimizer.register_step_pre_hook(lambda *_: trainer.gradients.append(
        trainer.raw.weight.grad.clone()))
    trainer.step = first
    trainer.train_step()
    return trainer


@pytest.mark.parametrize("batch_size, parts", [(6, 1), (3, 2), (2, 3), (1, 6)])
def test_parts_of_a_step_add_up(batch_size, parts, tmp_path):
    trainer = step(tmp_path, batch_size=batch_size, gradient_accumulation_steps=parts,
                   grad_clip=0.0)
    x = Means().batch(0, 6)[0]
    torch.testing.assert_close(trainer.gradients[0][0], x.mean(0))
    loss, norm = trainer.meter.sums
    torch.testing.assert_close(loss, trainer.raw(x).mean().detach())
    torch.testing.assert_close(norm, x.mean(0).norm())
    assert trainer.meter.interval == {"steps": 1, "seconds": 0.0, "tokens": 12}


@pytest.mark.parametrize("rank", [0, 1])
def test_parts_of_different_size_count_by_their_sequences(rank, tmp_path):
    """Step 2 of two processes with 3 of its 6 sequences each, in parts of 2 and 1."""
    trainer = step(tmp_path, world=2, rank=rank, first=2, batch_size=2,
                   gradient_accumulation_steps=3, grad_clip=0.0)
    x = Means().batch(2 * 6 + 3 * rank, 3)[0]
    torch.testing.assert_close(trainer.gradients[0][0], x.mean(0))
    torch.testing.assert_close(trainer.meter.sums[0], trainer.raw(x).mean().detach())


def test_each_process_draws_its_own_dropout(tmp_path):
    drawn = []
    for rank in (0, 1):
        step(tmp_path, world=2, rank=rank, batch_size=2)
        drawn.append(torch.rand(4))
    assert not torch.equal(*drawn)


def test_gradients_are_clipped_and_their_norm_is_recorded_before(tmp_path):
    trainer = step(tmp_path, batch_size=4, grad_clip=0.5)
    mean = Means().batch(0, 4)[0].mean(0)
    torch.testing.assert_close(trainer.gradients[0][0], 0.5 * mean / mean.norm())
    torch.testing.assert_close(trainer.meter.sums[1], mean.norm())
    assert trainer.raw.weight.grad is None
