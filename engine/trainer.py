"""The training loop that every script shares. A script brings a model and a Task.

One step: the task's batch -> forward and backward pass in parts -> clip -> optimizer. Evaluation,
checkpoints, exact resume and stopping are around it.

Sample i of step s is g = s * batch_size * gradient_accumulation_steps + i of the task's endless
sequence. So a run's place in its data is its step, and nothing else has to be kept.
"""
import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Protocol

import numpy as np
import torch

from engine.device import Compute, ComputeConfig, check_compiler, tune_allocator
from engine.meter import Meter
from engine.metrics import is_better
from engine.optim import OptimConfig, learning_rate, make_optimizer, set_learning_rates
from engine.options import UserError, at_least
from engine.precond_config import PrecondConfig
from engine.run import (RunConfig, StopSignal, open_folder, restore_state, save_best,
                        save_state)
from precond import kappa_by_layer


class Task(Protocol):
    """What is learned, from which data, and how it is judged."""
    train_metrics: tuple[str, ...]  # names of what `loss` returns, "train_loss" first
    objective: str  # the metric that makes a checkpoint the best one; of equals the last
    values_per_token: int = 1  # in the first tensor of a batch

    def batch(self, first: int, count: int) -> Sequence[torch.Tensor]:
        """Samples first ... first + count - 1 of the run's endless sequence, on the CPU.

        The first tensor holds their tokens, (count, ...).
        """

    def loss(self, model: torch.nn.Module, *batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Scalars, means over the batch, as `train_metrics` names them: the loss comes first."""

    def evaluate(self, model: torch.nn.Module, compute: Compute) -> dict[str, float]:
        """{"val_loss": ..., ...}, each sample counted once over all processes."""

    def probe(self, model: torch.nn.Module, compute: Compute) -> torch.Tensor | None:
        """One forward pass on a few fixed validation samples, for kappa.

        Returns their mask of real tokens, (B, T) bool, or None where all are real.
        """

    def state(self) -> dict:
        """Plain values that identify the data, for the checkpoint."""


@dataclass
class TrainerConfig(OptimConfig, ComputeConfig, RunConfig, PrecondConfig):
    """How a model is trained, whatever the task."""
    batch_size: Annotated[int, "sequences in one forward pass of one process", at_least(1)] = 12
    gradient_accumulation_steps: Annotated[int, "a step takes batch_size times this many "
                                                "sequences, over all processes", at_least(1)] = 1
    eval_interval: Annotated[int, "steps between evaluations, each followed by a checkpoint",
                             at_least(1)] = 250
    eval_iters: Annotated[int, "evaluate on up to this many batches of batch_size",
                          at_least(1)] = 100
    log_interval: Annotated[int, "steps between records in metrics.jsonl", at_least(1)] = 10
    compile: Annotated[bool, "torch.compile the model"] = False
    tune_malloc: Annotated[bool, "on a CPU with glibc: keep freed memory for the next step"] = True

    @property
    def global_batch(self) -> int:
        """Sequences in a step, over all processes."""
        return self.batch_size * self.gradient_accumulation_steps

    def check_world(self, world: int):
        """Raises UserError where the sequences of a step cannot be split over the processes."""
        if self.global_batch % world:
            raise UserError("batch_size x gradient_accumulation_steps = "
                            f"{self.batch_size} x {self.gradient_accumulation_steps} = "
                            f"{self.global_batch} sequences cannot be split over {world} "
                            "processes: change one of the three")


class Trainer:
    """One run. run() trains to max_iters; it returns the number of the signal that stopped it, or
    None. saved: the checkpoint to go on from."""

    def __init__(self, config: TrainerConfig, task: Task, model: torch.nn.Module,
                 compute: Compute, saved: dict | None = None):
        config.check_world(compute.world)
        self.config = config
        self.task = task
        self.compute = compute
        self.folder = Path(config.out_dir)

        tuned = config.tune_malloc and compute.device.type == "cpu" and tune_allocator()
        # Checkpoints are of the raw model: compiling and DDP put prefixes before its keys.
        self.raw = model.to(compute.device)
        if config.compile:
            check_compiler(compute.device)
            model = torch.compile(self.raw)
        self.model = compute.wrap(model)
        self.optimizer = make_optimizer(self.raw, config)
        # float16 has few exponents. The scaler multiplies the loss so that small gradients do not
        # vanish, and skips a step whose gradient overflows. Disabled, it does nothing.
        half = compute.dtype == "float16"
        self.scaler = torch.amp.GradScaler(compute.device.type, enabled=half)
        if compute.main:
            print(f"speed: {getattr(self.raw, 'loss', 'plain')} loss, "
                  f"{'fused ' if config.fused else ''}{type(self.optimizer).__name__}, "
                  f"{'tuned malloc' if tuned else 'malloc as it is'}", flush=True)

        self.step = 0
        self.evaluated = -1  # the step of the last evaluation
        self.best = None  # {"metric", "value", "step"} of the best evaluation
        self.meter = Meter(task.train_metrics, compute)
        # Each process draws its own dropout.
        torch.manual_seed(config.seed * 1_000_003 + compute.rank)
        if saved:
            restore_state(self, saved)

    def run(self) -> int | None:
        config = self.config
        start = self.step if self.evaluated >= 0 else -1
        self.log = self.compute.on_main(lambda: open_folder(config, start))
        self.meter.peak_flops = self.compute.matmul_peak()
        with StopSignal(alone=not self.compute.ddp) as stop:
            try:
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
                    if done:
                        return None
                    self.train_step()
                    self.step += 1
                    if self.log:
                        self.log.advance()
                    # Processes may get a signal at different steps: all stop at the same one.
                    if number := int(self.compute.reduce([stop.number], "max")[0]):
                        self.save()
                        return number
            finally:
                if self.log:
                    self.log.close()

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
            # DDP decides in the forward pass whether the backward pass sends gradients. They
            # travel once a step, with the last part.
            last = i == len(parts) - 1
            with contextlib.nullcontext() if last or not compute.ddp else self.model.no_sync():
                with compute.autocast():
                    means = self.task.loss(self.model, *batch)
                # Parts may differ in size: each counts by its sequences. Gradients add up.
                weight = count / share
                self.scaler.scale(means[0] * weight).backward()
            values = values + torch.stack([m.detach().float() for m in means]) * weight
            self.meter.interval["tokens"] += batch[0].numel() // self.task.values_per_token

        # Clipping is about true gradients, without the scaler's factor.
        self.scaler.unscale_(self.optimizer)
        norm = self.clip_gradient()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        # None instead of zeros: the next backward pass writes gradients without reading them.
        self.optimizer.zero_grad(set_to_none=True)
        self.meter.add(self.step, values, norm, scaled=self.scaler.is_enabled())

    def clip_gradient(self) -> torch.Tensor:
        """Shorten the gradient to grad_clip where it is longer; its length before."""
        parameters = list(self.raw.parameters())
        if self.config.grad_clip:
            return torch.nn.utils.clip_grad_norm_(parameters, self.config.grad_clip)
        gradients = [p.grad for p in parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def evaluate(self):
        """Evaluate, measure kappa, write the record of this step, keep the best model."""
        self.check_finite()
        self.meter.stop()
        self.model.eval()
        record = self.task.evaluate(self.model, self.compute)
        self.model.train()
        if not all(math.isfinite(value) for value in record.values()):
            raise UserError(self.diverged(self.step))
        if self.compute.main:
            record |= self.kappa()
        self.report(record)
        self.evaluated = self.step
        metric = self.task.objective
        value = record[metric]
        # Of equals the last: it has trained longer.
        if self.best is None or is_better(metric, value, self.best["value"]):
            self.best = {"metric": metric, "value": value, "step": self.step}
            save_best(self)
        self.meter.start()

    def kappa(self) -> dict[str, list]:
        """Condition numbers by layer, before and after C, in float32, with the uncompiled model.

        In a run without C, after the C that its options would make.
        """
        config = self.config
        self.raw.eval()
        with self.compute.full_precision():
            result = kappa_by_layer(lambda: self.task.probe(self.raw, self.compute),
                                    None if config.precond else config.would_be)
        self.raw.train()
        if config.precond and config.precond_power == "learned":
            result["precond_power"] = self.raw.powers()
        return result

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
        """Raises UserError on all processes where the loss of one has not been finite.

        Looked at before anything is written: the last checkpoint stays as it is.
        """
        bad = self.meter.first_bad_step()
        if bad >= 0:
            raise UserError(self.diverged(bad))

    def diverged(self, step: int) -> str:
        kept = ""
        if self.evaluated >= 0:
            kept = f"; {self.folder / 'ckpt.pt'} holds step {self.evaluated}"
        return (f"the loss is not finite at step {step}{kept}. Lower --learning_rate, or set "
                "--grad_clip or --warmup_iters")

    def save(self):
        """ckpt.pt: all that a resumed run needs to go on bit for bit."""
        self.check_finite()
        self.meter.stop()
        save_state(self)
        self.meter.start()
