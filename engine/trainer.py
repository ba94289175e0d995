"""The training loop that every script shares: optimizer, schedule, evaluation, checkpoints, exact resume, stopping.

A script brings a model and a task:

    task.batch(first, count)      the samples first ... first + count - 1 of the run's endless sequence -> CPU tensors; the first
                                  holds their tokens, each task.values_per_token values (1 where the task does not say)
    task.loss(model, *batch)      -> (loss, ...): mean values over the batch, named by task.train_metrics, the loss first
    task.evaluate(model, compute) -> {"val_loss": ..., ...}, every sample counted once over all processes
    task.probe(model, compute)    one forward pass on a few fixed validation samples, for kappa; returns their mask or None
    task.objective                ("val_loss", "min") or ("val_accuracy", "max"): what makes a checkpoint the best one, of equals the last
    task.state()                  plain values for the checkpoint that identify the data

Sample g of step s at position i is g = s * batch_size * gradient_accumulation_steps + i: the run's place in the data is its step.
"""
import contextlib
import math
import shutil
import signal
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

from engine import checkpoint
from engine import options
from engine import fast
from engine.options import UserError
from engine.device import Compute
from engine.metrics import Metrics, layer_kappa
from precond import LEARNED_FROM


@dataclass
class TrainerConfig:
    """How a model is trained, whatever the task."""
    out_dir: Annotated[str, "folder of the run: checkpoints, metrics, configuration"] = "out"
    init_from: Annotated[Literal["scratch", "resume", "auto"], "auto: resume if there is something to resume, else start"] = "scratch"
    overwrite: Annotated[bool, "start from scratch in an out_dir that holds a run, and lose that run"] = False
    eval_only: Annotated[bool, "evaluate the checkpoint and exit"] = False
    seed: Annotated[int, "of parameters, data order and dropout", "fixed"] = 1337
    batch_size: Annotated[int, "sequences in one forward pass of one process"] = 12
    gradient_accumulation_steps: Annotated[int, "a step takes batch_size times this many sequences, over all processes"] = 1
    max_iters: Annotated[int, "training steps"] = 2000
    learning_rate: Annotated[float, "peak learning rate"] = 3e-3
    lr_schedule: Annotated[Literal["cosine", "linear", "constant"], "decay after the warm-up"] = "cosine"
    warmup_iters: Annotated[int, "steps of linear warm-up"] = 100
    lr_decay_iters: Annotated[int, "step at which min_lr is reached; 0: max_iters"] = 0
    min_lr: Annotated[float, "learning rate at the end"] = 3e-4
    weight_decay: Annotated[float, "AdamW's, on matrices only"] = 0.1
    beta1: Annotated[float, "AdamW's"] = 0.9
    beta2: Annotated[float, "AdamW's"] = 0.99
    adam_eps: Annotated[float, "AdamW's epsilon"] = 1e-8
    grad_clip: Annotated[float, "clip the gradient to this norm; 0: never"] = 1.0
    eval_interval: Annotated[int, "steps between evaluations, each followed by a checkpoint"] = 250
    eval_iters: Annotated[int, "evaluate on up to this many batches of batch_size"] = 100
    log_interval: Annotated[int, "steps between records in metrics.jsonl"] = 10
    device: Annotated[str, "auto, cpu, cuda, cuda:1, mps"] = "auto"
    dtype: Annotated[Literal["auto", "float32", "bfloat16", "float16"], "of the forward and backward pass"] = "auto"
    compile: Annotated[bool, "torch.compile the model"] = False
    fused: Annotated[bool, "AdamW as one kernel; off: an operation at a time"] = True
    tune_malloc: Annotated[bool, "on a CPU with glibc: keep freed memory for the next step"] = True
    tensorboard: Annotated[bool, "write TensorBoard events to out_dir"] = False
    wandb_log: Annotated[bool, "log to Weights & Biases"] = False
    wandb_project: Annotated[str, "Weights & Biases project"] = "precond"
    wandb_run_name: Annotated[str, "Weights & Biases run name; empty: theirs"] = ""

    def __post_init__(self):
        for name in ("batch_size", "gradient_accumulation_steps", "eval_interval", "eval_iters", "log_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.adam_eps >= 0):
            raise ValueError(f"beta1={self.beta1} and beta2={self.beta2} must be in [0, 1), adam_eps={self.adam_eps} not negative")
        if self.seed >= 2**32:
            raise ValueError(f"seed={self.seed} must be below {2**32}")
        for name in ("seed", "max_iters", "warmup_iters", "lr_decay_iters", "learning_rate", "min_lr", "weight_decay", "grad_clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.gradient_accumulation_steps


def check_world(config: TrainerConfig, compute: Compute):
    if config.global_batch % compute.world:
        raise UserError(f"batch_size x gradient_accumulation_steps = {config.batch_size} x {config.gradient_accumulation_steps} = "
                        f"{config.global_batch} sequences cannot be split over {compute.world} processes: change one of the three")


def learning_rate(config: TrainerConfig, step: int) -> float:
    """Linear warm-up (never zero), then decay to min_lr at lr_decay_iters; nanoGPT's schedule where it is "cosine"."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / (config.warmup_iters + 1)
    if config.lr_schedule == "constant":
        return config.learning_rate
    end = config.lr_decay_iters or config.max_iters
    if step >= end:
        return config.min_lr
    progress = (step - config.warmup_iters) / (end - config.warmup_iters)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if config.lr_schedule == "cosine" else 1 - progress
    return config.min_lr + left * (config.learning_rate - config.min_lr)


def make_optimizer(model: torch.nn.Module, config: TrainerConfig) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices, none on vectors and scalars."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=config.fused)


class Trainer:
    """One run. `Trainer(...).run()` trains to max_iters, or returns the number of the signal that stopped it (else None)."""

    def __init__(self, config: TrainerConfig, task, model: torch.nn.Module, compute: Compute, saved: dict | None = None):
        check_world(config, compute)
        self.config, self.task, self.compute, self.folder = config, task, compute, Path(config.out_dir)
        tuned = config.tune_malloc and compute.device.type == "cpu" and fast.tune_allocator()
        self.raw = model.to(compute.device)
        if compute.main:
            print(f"speed: {getattr(model, 'loss', 'plain')} loss, {'fused ' if config.fused else ''}AdamW, "
                  f"{'tuned malloc' if tuned else 'malloc as it is'}", flush=True)
        if config.compile:
            check_compiler(compute)
        self.model = compute.wrap(torch.compile(self.raw) if config.compile else self.raw)
        self.optimizer = make_optimizer(self.raw, config)
        self.scaler = torch.amp.GradScaler(compute.device.type, enabled=compute.dtype == "float16")
        self.step, self.evaluated, self.best = 0, -1, None
        self.train_seconds, self.clock, self.tokens = 0.0, 0.0, 0
        # since the last record, on the device: sums of the task's metrics and of the gradient norm
        self.sums = torch.zeros(len(task.train_metrics) + 1, device=compute.device)
        self.interval = {"steps": 0, "seconds": 0.0, "tokens": 0}
        self.bad_step = torch.full((), -1, device=compute.device)  # the first step with a non-finite loss or gradient
        self.signal = 0
        if saved:
            self.restore(saved)
        else:
            torch.manual_seed(config.seed * 1_000_003 + compute.rank)  # each process its own dropout

    def run(self) -> int | None:
        config = self.config
        resuming = self.evaluated >= 0
        self.metrics = self.compute.together(lambda: self.open_metrics(resuming), alone=self.compute.main)
        self.peak_flops = self.compute.matmul_peak()
        before = self.catch_signals()
        try:
            self.clock = time.perf_counter()
            while True:
                due = self.step % config.eval_interval == 0 or self.step >= config.max_iters
                if due and self.evaluated != self.step:
                    self.evaluate()
                    self.save()
                if self.step >= config.max_iters:
                    return None
                self.train_step()
                self.step += 1
                if self.metrics:
                    self.metrics.advance()
                if self.step % config.log_interval == 0 and self.step % config.eval_interval and self.step < config.max_iters:
                    self.stop_clock()
                    self.report({})
                if number := int(self.compute.reduce([self.signal], "max")[0]):  # a later signal is seen after the next step
                    self.save()
                    return number
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            if self.metrics:
                self.metrics.close()

    def train_step(self):
        config, compute = self.config, self.compute
        rate = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        share = config.global_batch // compute.world  # this process's sequences
        first = self.step * config.global_batch + compute.rank * share
        values = 0.0
        counts = [len(part) for part in np.array_split(range(share), math.ceil(share / config.batch_size))]
        for i, count in enumerate(counts):
            batch = compute.move(*self.task.batch(first, count))
            first += count
            last = i == len(counts) - 1
            with contextlib.nullcontext() if last or not compute.ddp else self.model.no_sync():
                with compute.autocast():
                    means = self.task.loss(self.model, *batch)
                self.scaler.scale(means[0] * (count / share)).backward()
            values = values + torch.stack([m.detach().float() for m in means]) * (count / share)
            self.interval["tokens"] += batch[0].numel() // getattr(self.task, "values_per_token", 1)
        self.scaler.unscale_(self.optimizer)
        parameters = list(self.raw.parameters())
        if config.grad_clip:
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.sums[:-1] += values
        self.sums[-1] += norm.where(norm.isfinite(), 0.0)  # the float16 scaler skips such a step; elsewhere bad_step tells
        # the float16 scaler skips steps whose gradient overflows: there only the loss tells
        finite = values[0].isfinite() if self.scaler.is_enabled() else values[0].isfinite() & norm.isfinite()
        self.bad_step = torch.where((self.bad_step < 0) & ~finite, self.step, self.bad_step)
        self.interval["steps"] += 1

    def evaluate(self):
        """Evaluate, measure kappa, write the record of this step, keep the best model."""
        self.check_finite()
        self.stop_clock()
        self.model.eval()
        record = self.task.evaluate(self.model, self.compute)
        self.model.train()
        if not all(math.isfinite(v) for v in record.values()):
            raise UserError(self.diverged(self.step))
        if self.compute.main:
            record |= self.kappa()
        self.report(record)
        self.evaluated = self.step
        metric, direction = self.task.objective
        if self.best is None or (record[metric] <= self.best["value"] if direction == "min" else record[metric] >= self.best["value"]):
            self.best = {"metric": metric, "value": record[metric], "step": self.step}
            best = {"model": self.raw.state_dict(), **self.identity()}
            self.compute.together(lambda: checkpoint.save(self.folder / "best.pt", best), alone=self.compute.main)
        self.clock = time.perf_counter()

    def kappa(self) -> dict[str, list]:
        """Before and after C, by layer, in float32, with the uncompiled model; what C would do where the run has none."""
        power = self.config.precond_power
        self.raw.eval()
        with self.compute.full_precision():
            result = layer_kappa(lambda: self.task.probe(self.raw, self.compute),
                                 None if self.config.precond else LEARNED_FROM if power == "learned" else power)
        self.raw.train()
        if self.config.precond and power == "learned":
            result["precond_power"] = self.raw.powers()
        return result

    def report(self, record: dict):
        """Write `record` with what training has done since the last one; the clock is stopped."""
        self.check_finite()
        *sums, tokens = self.compute.reduce([*self.sums.tolist(), self.interval["tokens"]])
        self.tokens += int(tokens)
        steps, seconds = self.interval["steps"], self.interval["seconds"]
        trained = {}
        if steps:
            means = [s / steps / self.compute.world for s in sums]
            trained = dict(zip(self.task.train_metrics, means)) | {
                "grad_norm": means[-1], "learning_rate": learning_rate(self.config, self.step - 1), "tokens": self.tokens,
                "tokens_per_s": tokens / seconds, "ms_per_step": 1e3 * seconds / steps,
                "mfu": self.raw.flops_per_token() * tokens / seconds / (self.peak_flops * self.compute.world)}
        line = {"step": self.step} | trained | record | {
            "elapsed_s": self.train_seconds, "peak_memory_mb": self.compute.peak_memory_mb()}
        self.compute.together(lambda: self.metrics.write(line), alone=self.compute.main)
        self.sums.zero_()
        self.interval = {"steps": 0, "seconds": 0.0, "tokens": 0}
        self.clock = time.perf_counter()

    def stop_clock(self):
        """Add the training time since the clock was started; evaluation and saving are not training."""
        self.compute.synchronize()
        now = time.perf_counter()
        self.interval["seconds"] += now - self.clock
        self.train_seconds += now - self.clock
        self.clock = now

    def check_finite(self):
        """Raises UserError on all processes when the loss of any has been non-finite; the last checkpoint stays as it is."""
        bad = int(self.compute.reduce([float(self.bad_step)], "max")[0])
        if bad >= 0:
            raise UserError(self.diverged(bad))

    def diverged(self, step: int) -> str:
        kept = f"; {self.folder / 'ckpt.pt'} holds step {self.evaluated}" if self.evaluated >= 0 else ""
        return f"the loss is not finite at step {step}{kept}. Lower --learning_rate, or set --grad_clip or --warmup_iters"

    def save(self):
        """ckpt.pt: all that a resumed run needs to go on bit for bit."""
        self.check_finite()
        self.stop_clock()
        ranks = self.compute.gather({"random": self.compute.random_state(), "sums": self.sums.cpu(), "interval": self.interval})
        state = {"model": self.raw.state_dict(), "optimizer": self.optimizer.state_dict()["state"], "scaler": self.scaler.state_dict(),
                 "ranks": ranks, "train_seconds": self.train_seconds, "tokens": self.tokens, "evaluated": self.evaluated, **self.identity()}
        self.compute.together(lambda: checkpoint.save(self.folder / "ckpt.pt", state), alone=self.compute.main)
        self.clock = time.perf_counter()

    def identity(self) -> dict:
        return {"config": asdict(self.config) | {"overwrite": False}, "task": self.task.state(), "step": self.step, "best": self.best,
                "dtype": self.compute.dtype}

    def restore(self, saved: dict):
        checkpoint.restore_model(self.raw, self.task, saved, self.folder)
        self.optimizer.load_state_dict({"state": saved["optimizer"], "param_groups": self.optimizer.state_dict()["param_groups"]})
        if saved["scaler"]:  # empty where the run was not in float16
            self.scaler.load_state_dict(saved["scaler"])
        self.step, self.evaluated, self.best = saved["step"], saved["evaluated"], saved["best"]
        self.train_seconds, self.tokens = saved["train_seconds"], saved["tokens"]
        ranks, rank, world = saved["ranks"], self.compute.rank, self.compute.world
        if len(ranks) == world:
            self.compute.set_random_state(ranks[rank]["random"])
            self.sums.copy_(ranks[rank]["sums"])
            self.interval = ranks[rank]["interval"]
        else:  # another number of processes: the same means, new dropout
            torch.manual_seed(self.config.seed * 1_000_003 + rank + self.step)
            self.sums.copy_(sum(r["sums"] for r in ranks) / len(ranks))
            self.interval = ranks[0]["interval"] | {"tokens": sum(r["interval"]["tokens"] for r in ranks) // world}

    def open_metrics(self, resuming: bool) -> Metrics:
        config = self.config
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not resuming or self.step < config.max_iters:
                options.save(replace(config, overwrite=False), self.folder / "config.toml")
            wandb = {"project": config.wandb_project, "name": config.wandb_run_name or None, "config": asdict(config)}
            metrics = Metrics(self.folder, self.step if resuming else -1, config.max_iters, config.tensorboard, wandb if config.wandb_log else None)
            if not resuming:
                for name in ("ckpt.pt", "best.pt"):
                    (self.folder / name).unlink(missing_ok=True)
            return metrics
        except OSError as e:
            raise UserError(f"cannot write to {self.folder}: {e.strerror}") from None

    def catch_signals(self) -> dict:
        """Ctrl-C and SIGTERM finish the step and save. A second Ctrl-C aborts a run of one process."""
        def stop(number, frame):
            if self.signal and not self.compute.ddp:
                raise KeyboardInterrupt
            self.signal = number
        return {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}


def check_compiler(compute: Compute):
    if compute.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise UserError("--compile on a CPU needs a C++ compiler (g++ or clang++) on the PATH: install one, or leave --compile off")
