"""What a run reports: metrics.jsonl (an object a line), a progress bar, TensorBoard, wandb.

METRICS is the one home of what is known about a metric. To add one, enter it here and let a
task's `evaluate` return it: the progress bar, compare.py and plot.py follow.
"""
import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from engine.lock import Lock
from engine.options import UserError, need


@dataclass(frozen=True)
class Metric:
    label: str  # in figures and sentences
    unit: str  # of the number as it is recorded
    better: str = ""  # "lower" or "higher" where runs can be judged by it
    short: str = ""  # its name beside the progress bar; empty: not shown there
    digits: int = 4
    percent: bool = False  # figures show 100 times the number, in %

    @property
    def scale(self) -> int:
        """By which the number is multiplied in figures."""
        return 100 if self.percent else 1

    @property
    def drawn_unit(self) -> str:
        return "%" if self.percent or self.unit == "percent" else self.unit

    @property
    def difference_unit(self) -> str:
        return "points" if self.drawn_unit == "%" else self.unit


# In the order in which they are shown. A run is judged by the last one that can judge it.
METRICS = {
    "train_loss": Metric("training loss", "nats per token", short="train"),
    "train_accuracy": Metric("training accuracy", "fraction", percent=True),
    "val_loss": Metric("loss", "nats per token", "lower", short="val"),
    "val_accuracy": Metric("accuracy", "fraction", "higher", short="accuracy", percent=True),
    "val_bpb": Metric("bits per byte", "bits per byte of text"),
    "val_ap": Metric("average precision", "percent", "higher", short="AP", digits=1),
    "val_ap50": Metric("average precision at IoU 0.5", "percent", digits=1),
    "val_ap75": Metric("average precision at IoU 0.75", "percent", digits=1),
}


def judging(record: dict) -> str | None:
    """The metric by which a run with such a record is judged."""
    able = [name for name, metric in METRICS.items() if metric.better and name in record]
    return able[-1] if able else None


def is_better(metric: str, value: float, than: float) -> bool:
    """Whether `value` is at least as good as `than`."""
    return value <= than if METRICS[metric].better == "lower" else value >= than


def summary(record: dict, terse: bool = False) -> str:
    """The few numbers of a record that a person watches; terse: as they fit beside a bar."""
    parts = []
    for name, metric in METRICS.items():
        if name in record and (metric.short or not terse):
            label = metric.short if terse else name.replace("_", " ")
            parts.append(f"{label} {record[name]:.{metric.digits}f}")
    if "tokens_per_s" in record:
        parts.append(f"{record['tokens_per_s']:,.0f} tokens/s")
    return ", ".join(parts)


class MetricsLog:
    """Writes records {"step": int, name: number, list or None} to metrics.jsonl and elsewhere.

    step: where a resumed run goes on, -1 for a new one. total: the steps of the whole run. wandb:
    arguments of wandb.init, None without it. lock: the folder's, released with the rest.
    """

    def __init__(self, folder: Path, step: int, total: int, tensorboard: bool,
                 wandb: dict | None, lock: Lock | None = None):
        self.lock = lock
        self.path = folder / "metrics.jsonl"
        self.latest = {}
        self.first, self.total = max(step, 0), total
        self.begun = time.monotonic()
        # What can fail comes before anything is lost.
        self.board = open_tensorboard(folder, step + 1) if tensorboard else None
        self.wandb = open_wandb(folder, wandb, resumed=step >= 0) if wandb else None
        self.keep_until(step)
        self.file = open(self.path, "a", encoding="utf-8")
        form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
        self.bar = tqdm(total=total, initial=self.first, dynamic_ncols=True, bar_format=form,
                        disable=None)  # where the output is no terminal

    def keep_until(self, step: int):
        """Drop the records after `step`, and what a crash left behind the last whole record.

        Raises UserError where whole records follow a damaged line.
        """
        kept = []
        if step >= 0 and not self.path.exists():
            print(f"{self.path} is gone: it begins anew at step {step}")
        elif step >= 0:
            lines = self.path.read_bytes().splitlines(keepends=True)
            steps = [step_of(line) for line in lines]
            whole = [*steps, None].index(None)
            if lines and not whole or any(after is not None for after in steps[whole:]):
                raise UserError(f"{self.path} is damaged after {whole} lines: mend it or move "
                                "it away, and resume again")
            kept = [line for line, its in zip(lines, steps[:whole]) if its <= step]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_bytes(b"".join(kept))
        os.replace(temporary, self.path)

    def advance(self):
        """One step is done."""
        self.bar.update()

    def write(self, record: dict):
        try:
            self.file.write(json.dumps(record, allow_nan=False) + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())
        except OSError as e:
            raise UserError(f"cannot write {self.path}: {e.strerror}. Make room and use "
                            "--init_from=resume") from e
        self.send(record)
        self.latest |= record
        evaluated = any(name.startswith("val_") for name in record)
        self.bar.set_postfix_str(summary(self.latest, terse=True))
        if self.bar.disable or evaluated:
            self.say(f"step {record['step']}: {summary(record)}{self.left(record['step'])}")

    def send(self, record: dict):
        """To TensorBoard and wandb; a list becomes a number for each layer."""
        numbers = {}
        for name, value in record.items():
            if isinstance(value, list):
                numbers |= {f"{name}/{layer}": v for layer, v in enumerate(value) if v is not None}
            elif value is not None:
                numbers[name] = value
        if self.board is not None:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, record["step"])
        if self.wandb is not None:
            self.wandb.log(numbers, step=record["step"])

    def left(self, step: int) -> str:
        """The time that the rest will take, where no bar shows it."""
        done = step - self.first
        if not self.bar.disable or done <= 0 or step >= self.total:
            return ""
        seconds = (time.monotonic() - self.begun) / done * (self.total - step)
        return f", {tqdm.format_interval(seconds)} left"

    def say(self, text: str):
        """Print a line above the bar."""
        self.bar.clear()
        print(text, flush=True)

    def close(self, failed: bool = False):
        with contextlib.suppress(OSError):  # a line that `write` could not write, and said so
            self.file.close()
        self.bar.close()
        if self.board is not None:
            self.board.close()
        if self.wandb is not None:
            self.wandb.finish(exit_code=int(failed))
        if self.lock is not None:
            self.lock.release()


def step_of(line: bytes) -> int | None:
    """The step of a record; None where the line is none, or was cut."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None


def open_tensorboard(folder: Path, first: int):
    """A writer of the steps from `first` on; TensorBoard hides those that are there already."""
    tensorboard = need("torch.utils.tensorboard", "--tensorboard needs the package")
    return tensorboard.SummaryWriter(str(folder), purge_step=first)


def open_wandb(folder: Path, settings: dict, resumed: bool):
    """A run at Weights & Biases, whose id the folder keeps: a resumed run goes on there too."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb_log needs the wandb package: pip install wandb") from None
    kept = folder / "wandb_id.txt"
    if resumed and kept.exists():
        settings = settings | {"id": kept.read_text().strip(), "resume": "allow"}
    run = wandb.init(**settings)
    kept.write_text(run.id + "\n")
    return run
