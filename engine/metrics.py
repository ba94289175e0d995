"""What a run reports: metrics.jsonl (one object a line), the progress bar, TensorBoard, Weights & Biases, and kappa by layer."""
import contextlib
import json
import math
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from engine.options import UserError
from precond import condition_number, precondition, record


class Metrics:
    """Writes records {"step": int, name: number | list | None}. On resume the file is cut back to the checkpoint's step."""

    def __init__(self, folder: Path, step: int, total: int, tensorboard: bool, wandb: dict | None):
        self.path, self.latest = folder / "metrics.jsonl", {}
        self.board = open_tensorboard(folder, step + 1) if tensorboard else None  # what can fail comes before what is lost
        self.wandb = open_wandb(wandb) if wandb else None
        self.keep_until(step if step >= 0 else None)
        self.file = open(self.path, "a", encoding="utf-8")
        bar_format = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self.bar = tqdm(total=total, initial=max(step, 0), dynamic_ncols=True, bar_format=bar_format) if sys.stderr.isatty() else None

    def keep_until(self, step: int | None):
        """Drop the records after `step` (None: all of them), and a last line that a kill left unfinished."""
        kept = []
        if step is not None and self.path.exists():
            try:
                for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
                    if not line.endswith("\n") or json.loads(line)["step"] > step:
                        break
                    kept.append(line)
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.path} is damaged after {len(kept)} lines: mend it or move it away, and resume again") from None
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def advance(self):
        if self.bar is not None:
            self.bar.update()

    def write(self, record: dict):
        try:
            self.file.write(json.dumps(record, allow_nan=False) + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as e:
            raise UserError(f"cannot write {self.path}: {e.strerror}. Make room and use --init_from=resume") from e
        numbers = {k: v for k, v in record.items() if isinstance(v, (int, float))}
        for name, values in record.items():
            if isinstance(values, list):
                numbers |= {f"{name}/{layer}": v for layer, v in enumerate(values) if v is not None}
        if self.board is not None:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, record["step"])
        if self.wandb is not None:
            self.wandb.log(numbers, step=record["step"])
        self.latest |= record
        evaluated = any(name.startswith("val_") for name in record)
        if self.bar is not None:
            self.bar.set_postfix_str(summary(self.latest, terse=True))
        if self.bar is None or evaluated:
            self.say(f"step {record['step']}: {summary(record)}")

    def say(self, text: str):
        """Print a line above the bar."""
        if self.bar is not None:
            self.bar.clear()
        print(text, flush=True)

    def close(self):
        with contextlib.suppress(OSError):  # a line that `write` could not write, and said so
            self.file.close()
        for part in (self.bar, self.board):
            if part is not None:
                part.close()
        if self.wandb is not None:
            self.wandb.finish()


def summary(record: dict, terse: bool = False) -> str:
    """The few numbers of a record that a person watches; terse: as they fit beside a progress bar."""
    shown = [(name, "{:.4f}") for name in ("train_loss", "train_accuracy", "val_loss", "val_accuracy", "val_bpb")]
    shown += [(name, "{:.1f}") for name in ("val_ap", "val_ap50")]
    if terse:
        names = {"train_loss": "train", "val_loss": "val", "val_accuracy": "accuracy", "val_ap": "AP"}
        parts = [f"{names[name]} {form.format(record[name])}" for name, form in shown if name in names and name in record]
    else:
        parts = [name.replace("_", " ") + " " + form.format(record[name]) for name, form in shown if name in record]
    if "tokens_per_s" in record:
        parts.append(f"{record['tokens_per_s']:,.0f} tokens/s")
    return ", ".join(parts)


def open_tensorboard(folder: Path, first: int):
    """A writer of the steps from `first` on; TensorBoard hides those that are there already."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the tensorboard package: pip install -r requirements-extra.txt") from None
    return SummaryWriter(str(folder), purge_step=first)


def open_wandb(settings: dict):
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb_log needs the wandb package: pip install wandb") from None
    return wandb.init(**settings)


def layer_kappa(forward, power: float | None = None) -> dict[str, list]:
    """Condition numbers of head outputs in one forward pass: lists over layers.

    forward() runs the model and returns None or a (B, T) bool mask of the real tokens, the only rows that count. kappa_before is the median
    of kappa(A) over samples and heads, kappa_after that of kappa(C A); None stands for an infinite median, and kappa_*_infinite counts the
    infinite ones. Give a `power` for a model that runs without C: it is measured with the C = diag(||A_i||^-power) that it could have.
    """
    with torch.no_grad(), record() as calls:
        mask = forward()
    result = {name: [] for name in ("kappa_before", "kappa_after", "kappa_before_infinite", "kappa_after_infinite")}
    for a, ca in calls:
        for name, x in (("before", a), ("after", ca if power is None else precondition(a, power=power))):
            if mask is None:
                kappa = condition_number(x).flatten()
            else:
                kappa = torch.cat([condition_number(sample[:, real]) for sample, real in zip(x, mask)])
            median = kappa.median().item()
            result[f"kappa_{name}"].append(median if math.isfinite(median) else None)
            result[f"kappa_{name}_infinite"].append(int(kappa.isinf().sum()))
    return result
