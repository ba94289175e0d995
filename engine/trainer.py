"""The training loop that every script shares. A script brings a model and a Task.

One step: the task's batch -> forward and backward pass, in parts -> clip -> optimizer.

Sample i of step s is g = s * batch_size * gradient_accumulation_steps + i of the task's endless
sequence. So a run's place in its data is its step, and nothing else has to be kept.
"""
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
import torch

from engine.checkpoint import restore_model
from engine.device import Compute, ComputeConfig, check_compiler, tune_allocator
from engine.meter import Meter, measure_kappa
from engine.metrics import is_better
from engine.optim import OptimConfig, learning_rate, make_optimizer, set_learning_rates
from engine.options import UserError, at_least
from engine.parallel import copies, gradients, shard, whole
from engine.precond_config import PrecondConfig
from engine.run import RunConfig, open_folder, restore_state, save_best, save_state
from engine.stop import StopSignal


class Task(Protocol):
    """What is learned, from which data, and how it is judged."""
    train_metrics: tuple[str, ...]  # names of what `loss` returns, "train_loss" first
    objective: str  # the metric that makes a checkpoint the best one; of equals the last
    values_per_token: int = 1  # in the first tensor of a batch

    def batch(self, first: int, count: int) -> Sequence[torch.Tensor]:
        """`count` samples from `first` on, on the CPU; the first tensor, (count, ...): tokens."""

    def loss(self, model: torch.nn.Module, *batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Scalars, means over the batch, as `train_metrics` names them."""

    def evaluate(self, model: torch.nn.Module, compute: Compute) -> dict[str, float]:
        """{"val_loss": ..., ...}, each sample counted once over all processes."""

    def probe(self, model: torch.nn.Module, compute: Compute) -> torch.Tensor | None:
        """A forward pass on a few fixed samples, for kappa; their mask (B, T), None: all real."""

    def state(self) -> dict:
        """Plain values that identify the data, for the checkpoint."""


@dataclass
class TrainerConfig(OptimConfig, ComputeConfig, RunConfig, PrecondConfig):
    """How a model is trained, whatever the task."""
    batch_size: Annotated[int, "sequences in one forward pass of one process", at_least(1)] = 12
    gradient_accumulation_steps: Annotated[
        int, "a step takes batch_size times this many sequences, over all processes",
        at_least(1)] = 1
    eval_interval: Annotated[int, "steps between evaluations, each followed by a checkpoint",
                             at_least(1)] = 250
    eval_iters: Annotated[int, "evaluate on up to this many batches of batch_size",
                          at_least(1)] = 100
    log_interval: Annotated[int, "steps between records in metrics.jsonl", at_least(1)] = 10
    compile: Annotated[bool, "torch.compile the model"] = False
    shard: Annotated[bool, "torchrun: split parameters, gradients and optimizer state over the "
                           "processes (FSDP2)"] = False
    tune_malloc: Annotated[bool, "on a CPU with glibc: keep freed memory for the next step"] = True

    @property
    def global_batch(self) -> int:  # sequences in a step, over all processes
        return self.batch_size * self.gradient_accumulation_steps


class Trainer:
    """One run, from scratch or from the checkpoint `saved`."""

    def __init__(self, config: TrainerConfig, task: Task, model: torch.nn.Module,
                 compute: Compute, saved: dict | None = None):
        self.config, self.task, self.compute = config, task, compute
        self.folder = Path(config.out_dir)
        tuned = config.tune_malloc and compute.device.type == "cpu" and tune_allocator()
        if saved:
            restore_model(model, task, saved, self.folder)
        # Checkpoints are of the raw model: compiling and DDP put prefixes before its keys.
        self.raw = model.to(compute.device)
        if config.compile:
            check_compiler(compute.device)
        if config.shard:
            shard(self.raw, compute, config.compile)
        elif config.compile:
            model = torch.compile(self.raw)
        self.model = model if config.shard else copies(model, compute)
        self.optimizer = make_optimizer(self.raw, replace(config, dtype=compute.dtype))
        # float16 has few exponents. The scaler multiplies the loss so that small gradients do not
        # vanish, and skips a step whose gradient overflows. Disabled, it does nothing.
        self.scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.dtype == "float16")
        if compute.main:
            print(f"speed: {getattr(self.raw, 'loss', 'plain')} loss, "
                  f"{'fused ' * bool(self.optimizer.defaults.get('fused'))}"
                  f"{type(self.optimizer).__name__}, "
                  f"{'tuned malloc' if tuned else 'malloc as it is'}", flush=True)
        self.step = 0
        self.evaluated = -1  # the step of the last evaluation
        self.kept = -1  # that of ckpt.pt
        self.best = None  # {"metric", "value", "step"} of the best evaluation
        self.meter = Meter(task.train_metrics, compute)
        # Each process draws its own dropout.
        torch.manual_seed(config.seed * 1_000_003 + compute.rank)
        if saved:
            restore_state(self, saved)

    def run(self) -> int | None:
        """Train to max_iters; the number of the signal that stopped it, or None."""
        config = self.config
        start = self.step if self.evaluated >= 0 else -1
        self.log = self.compute.on_main(lambda: open_folder(config, start))
        self.meter.peak_flops = self.compute.matmul_peak()
        with StopSignal(alone=not self.compute.ddp) as stop:
            try:
                self.keep_best()  # a run that ended between its two checkpoints lacks it
                self.meter.start()
                while True:
                    # The last step is evaluated and saved too, however short the run.
                    done = self.step >= config.max_iters
                    due = done or self.step % config.eval_interval == 0
                    if due and self.evaluated != self.step:
                        self.evaluate()
                        self.save()
                    elif self.step % config.log_interval == 0 and self.meter.interval["steps"]:
                        self.meter.stop()
                        self.report({})
                    if not done:
                        self.train_step()
                        self.step += 1
                        if self.log:
                            self.log.advance()
                    # Processes may get a signal at different steps: all stop at the same one.
                    number = int(self.compute.reduce([stop.number], "max")[0])
                    if done or number:
                        if self.kept < self.step:
                            self.save()
                        return number or None
            finally:
                if self.log:
                    self.log.close(failed=sys.exc_info()[0] is not None)

    def train_step(self):
        config, compute = self.config, self.compute
        set_learning_rates(self.optimizer, config, self.step)
        # This process's sequences of the step, in parts of at most batch_size.
        share = config.global_batch // compute.world
        first = self.step * config.global_batch + compute.rank * share
        parts = np.array_split(range(share), math.ceil(share / config.batch_size))
        values = 0.0
        for i, part in enumerate(parts):
            count = len(part)
            batch = compute.move(*self.task.batch(first, count))
            first += count
            with gradients(self.model, last=i == len(parts) - 1):
                with compute.autocast():
                    means = self.task.loss(self.model, *batch)
                # Parts may differ in size: each counts by its sequences. Gradients add up.
                weight = count / share
                self.scaler.scale(means[0] * weight).backward()
            values = values + torch.stack([m.detach().float() for m in means]) * weight
            self.meter.interval["tokens"] += batch[0].numel() // self.task.values_per_token

        # Clipping is about true gradients, without the scaler's factor. norm is that before it.
        self.scaler.unscale_(self.optimizer)
        limit = config.grad_clip or math.inf
        norm = whole(torch.nn.utils.clip_grad_norm_(self.raw.parameters(), limit))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # None instead of zeros: the next backward pass writes gradients without reading them.
        self.optimizer.zero_grad(set_to_none=True)
        self.meter.add(self.step, values, norm, scaled=self.scaler.is_enabled())

    def evaluate(self):
        """Evaluate, measure kappa, write the record of this step."""
        self.check_finite()
        self.meter.stop()
        self.model.eval()
        record = self.task.evaluate(self.model, self.compute)  # the same on all processes
        self.model.train()
        if not all(math.isfinite(value) for value in record.values()):
            raise UserError(self.diverged(self.step))
        if self.compute.main or self.config.shard:  # a forward pass of shards needs all processes
            record |= measure_kappa(self.config, self.task, self.raw, self.compute)
        self.report(record)
        self.evaluated = self.step
        metric = self.task.objective
        # Of equals the last: it has trained longer.
        if self.best is None or is_better(metric, record[metric], self.best["value"]):
            self.best = {"metric": metric, "value": record[metric], "step": self.step}
        self.meter.start()

    def report(self, record: dict):
        """Write `record` with what training has done since the last one; the clock is stopped."""
        self.check_finite()
        rate = learning_rate(self.config, self.step - 1)
        trained = self.meter.read(rate, self.raw.flops_per_token())
        line = {"step": self.step, **trained, **record,
                "elapsed_s": self.meter.train_seconds,
                "peak_memory_mb": self.compute.peak_memory_mb()}
        self.compute.on_main(lambda: self.log.write(line))
        self.meter.start()

    def check_finite(self):
        """Raises UserError, before anything is written, where a loss has not been finite."""
        bad = self.meter.first_bad_step()
        if bad >= 0:
            raise UserError(self.diverged(bad))

    def diverged(self, step: int) -> str:
        kept = ""
        if self.kept >= 0:
            kept = f"; {self.folder / 'ckpt.pt'} holds step {self.kept}"
        return (f"the loss is not finite at step {step}{kept}. Lower --learning_rate, or set "
                "--grad_clip or --warmup_iters")

    def save(self):
        """ckpt.pt, all that a resumed run needs to go on bit for bit; then best.pt, never alone."""
        self.check_finite()
        self.meter.stop()
        save_state(self)
        self.kept = self.step
        self.keep_best()
        self.meter.start()

    def keep_best(self):
        if self.best and self.best["step"] == self.step:
            save_best(self)
