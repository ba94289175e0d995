"""What a run measures: sums, seconds and tokens between two records, and kappa by layer."""
import math
import time

import torch

from engine.device import Compute
from engine.precond_config import PrecondConfig
from precond import condition_number, precondition, record


class Meter:
    """Adds up what the steps since the last record have measured, on the device.

    Reading a number would make the CPU wait for a GPU, so nothing is read before a record is due.
    names: of the task's metrics, the loss first.
    """

    def __init__(self, names: tuple[str, ...], compute: Compute):
        self.names = names
        self.compute = compute
        self.sums = torch.zeros(len(names) + 1, device=compute.device)  # the last: gradient norms
        self.bad_step = torch.full((), -1, device=compute.device)  # the first non-finite one
        self.interval = {"steps": 0, "seconds": 0.0, "tokens": 0}
        self.tokens = 0  # of the whole run, over all processes
        self.train_seconds = 0.0
        self.clock = 0.0
        self.peak_flops = 1.0

    def start(self):
        self.clock = time.perf_counter()

    def stop(self):
        """Count the time since `start`. Evaluating and saving are not training."""
        self.compute.synchronize()
        now = time.perf_counter()
        self.interval["seconds"] += now - self.clock
        self.train_seconds += now - self.clock
        self.clock = now

    def add(self, step: int, values: torch.Tensor, norm: torch.Tensor, scaled: bool):
        """A step's metrics (n,) and gradient norm; scaled: the float16 scaler is at work."""
        self.sums[:-1] += values
        self.sums[-1] += norm.where(norm.isfinite(), 0.0)
        finite = values[0].isfinite()
        if not scaled:  # the scaler skips a step whose gradient overflows: that is no failure
            finite = finite & norm.isfinite()
        self.bad_step = torch.where((self.bad_step < 0) & ~finite, step, self.bad_step)
        self.interval["steps"] += 1

    def first_bad_step(self) -> int:
        """The first step at which a process had a loss that is not finite; -1: none."""
        return int(self.compute.reduce([self.bad_step.item()], "max")[0])

    def read(self, learning_rate: float, flops_per_token: float) -> dict:
        """The record of the steps since the last one, over all processes; empty without steps."""
        *sums, tokens = self.compute.reduce([*self.sums.tolist(), self.interval["tokens"]])
        self.tokens += int(tokens)
        steps = self.interval["steps"]
        seconds = self.interval["seconds"]
        self.sums.zero_()
        self.interval = {"steps": 0, "seconds": 0.0, "tokens": 0}
        if not steps:
            return {}
        world = self.compute.world
        *means, norm = [s / steps / world for s in sums]
        return dict(zip(self.names, means)) | {
            "grad_norm": norm, "learning_rate": learning_rate, "tokens": self.tokens,
            "tokens_per_s": tokens / seconds, "ms_per_step": 1e3 * seconds / steps,
            "mfu": flops_per_token * tokens / seconds / (self.peak_flops * world)}

    def state(self) -> dict:
        """Of this process, for the checkpoint."""
        return {"sums": self.sums.cpu(), "interval": self.interval}

    def restore(self, ranks: list[dict]):
        """From the `state` of each process that saved, of which there may be another number."""
        world = self.compute.world
        if len(ranks) == world:
            mine = ranks[self.compute.rank]
            self.sums.copy_(mine["sums"])
            self.interval = mine["interval"]
        else:  # the same means
            self.sums.copy_(sum(r["sums"] for r in ranks) / len(ranks))
            tokens = sum(r["interval"]["tokens"] for r in ranks) // world
            self.interval = ranks[0]["interval"] | {"tokens": tokens}


def measure_kappa(config: PrecondConfig, task, model: torch.nn.Module, compute: Compute) -> dict:
    """Condition numbers of the head outputs by layer, before and after C, in float32.

    Of the raw model: a compiled one has no place to record from. A run without C reports the C
    that its options would make.
    """
    model.eval()
    with compute.full_precision():
        result = kappa_by_layer(lambda: task.probe(model, compute),
                                None if config.precond else config.would_be)
    model.train()
    if config.precond and config.precond_power == "learned":
        result["precond_power"] = model.powers()
    if config.precond and config.precond_scale == "learned":
        result["precond_scale"] = model.scales()
    return result


def kappa_by_layer(forward, would_be: dict | None = None) -> dict[str, list]:
    """Condition numbers of the head outputs in one forward pass, as lists over layers.

    forward() runs the model and returns a (B, T) bool mask of the real tokens, the only rows that
    count, or None. kappa_before and kappa_after are medians of kappa(A) and kappa(C A) over samples
    and heads, None where that is infinite; kappa_*_infinite counts the infinite ones. would_be, for
    a model without C: arguments of `precondition` for the C that kappa_after is to have.
    """
    with torch.no_grad(), record() as calls:
        mask = forward()
    names = ("before", "after", "before_infinite", "after_infinite")
    result = {f"kappa_{name}": [] for name in names}
    for a, ca in calls:
        if would_be is not None:
            ca = precondition(a, **would_be)
        for name, x in ("kappa_before", a), ("kappa_after", ca):
            if mask is None:
                kappa = condition_number(x).flatten()
            else:
                # Samples differ in their number of real tokens: (n_head, t, D) each.
                samples = [sample[:, real] for sample, real in zip(x, mask)]
                kappa = torch.cat([condition_number(sample) for sample in samples])
            # A mean would be infinite as soon as one head is: count those, and take the median.
            median = kappa.median().item()
            result[name].append(median if math.isfinite(median) else None)
            result[f"{name}_infinite"].append(int(kappa.isinf().sum()))
    return result
