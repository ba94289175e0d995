"""Finished or running trainings as curves: reading their records, grouping those that differ only in their seed."""
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import train
import train_lra
import train_vision
from engine import options
from engine.options import UserError

SCRIPTS = (train, train_lra, train_vision)
ALL = options.options(train.Config) | options.options(train_lra.Config) | options.options(train_vision.Config)
BOOKKEEPING = {"seed"} | {name for name, option in ALL.items() if option.mark == options.FREE}
DATA = [name for name, option in ALL.items() if option.mark == options.DATA]
METRICS = {  # name: scale, what it is, unit, where the better difference lies; the first that a run has is drawn
    "val_accuracy": (100, "accuracy", "%", "above"), "val_ap": (1, "average precision", "%", "above"),
    "val_loss": (1, "loss", "nats per token", "below")}


@dataclass
class Run:
    """What a run's folder says: its configuration and its records in order."""
    folder: Path
    config: dict
    records: list[dict]

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """Raises UserError where there is no run, or nothing of it to draw yet."""
        try:
            lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
            config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        except OSError as e:
            hint = f". It holds a comparison: draw {folder / 'runs' / '*'}" if (folder / "runs").is_dir() else ""
            raise UserError(f"{folder} is not the folder of a run: {e.filename}: {e.strerror}{hint}") from None
        except ValueError as e:
            raise UserError(f"the metrics.jsonl or config.toml of {folder} is damaged: {e}") from None
        if lacking := {"seed", "precond", "n_layer", "grad_clip"} - set(config):
            raise UserError(f"{folder / 'config.toml'} lacks {', '.join(sorted(lacking))}: was it written by train.py or train_lra.py?")
        records = []
        for number, line in enumerate(lines, 1):
            if not line.endswith("\n"):
                break  # a run that is writing, or was killed while it wrote
            try:
                records.append(json.loads(line))
            except ValueError:
                raise UserError(f"{folder / 'metrics.jsonl'}: line {number} is damaged: draw without this run, or train it anew") from None
        if sum("val_loss" in r for r in records) < 2 or not any("grad_norm" in r for r in records):
            raise UserError(f"{folder} holds fewer than two evaluations: nothing to draw yet, let it train")
        return cls(folder, config, records)

    @property
    def metric(self) -> str:
        return next(name for name in METRICS if any(name in r for r in self.records))

    def along(self, x: str) -> dict[int, float]:
        """{step: x} of all records."""
        result, tokens = {}, 0
        for r in self.records:
            tokens = r.get("tokens", tokens)
            result[r["step"]] = {"step": r["step"], "tokens": tokens, "seconds": r["elapsed_s"]}[x]
        return result


Groups = dict[str, list[Run]]


def identity(run: Run) -> dict:
    """The options that decide what a run is, apart from its seed. However it was started or resumed, a run from scratch is one."""
    resumable = {"init_from": "scratch"} if run.config.get("init_from") in ("auto", "resume") else {}
    return {key: value for key, value in (run.config | resumable).items() if key not in BOOKKEEPING}


def group(folders: list[Path], labels: str = "") -> dict[str, list[Path]]:
    """Label -> folders of the runs that differ only in seed and bookkeeping. `labels`: names for them, in order of appearance."""
    kinds: list[tuple[dict, list[Run]]] = []
    for run in map(Run.read, folders):
        mine = next((runs for kind, runs in kinds if kind == identity(run)), None)
        if mine is None:
            kinds.append((identity(run), mine := []))
        mine.append(run)
    names = [name.strip() for name in labels.split(",")] if labels else name_kinds([kind for kind, _ in kinds])
    if len(names) != len(kinds) or len(set(names)) != len(names):
        raise UserError(f"--labels={labels}: give {len(kinds)} different labels, for the groups of "
                        + ", ".join(str(runs[0].folder) for _, runs in kinds))
    return {name: [run.folder for run in runs] for name, (_, runs) in zip(names, kinds)}


def name_kinds(kinds: list[dict]) -> list[str]:
    """A name for each configuration: the options in which they differ, precond's own only where it is on, if that tells them apart."""
    keys = [key for key in {key: None for kind in kinds for key in kind} if len({kind.get(key) for kind in kinds}) > 1] or ["precond"]
    keys.sort(key=lambda key: not key.startswith("precond"))

    def name(kind, terse):
        return ", ".join(f"{key}={kind.get(key)}" for key in keys if not (terse and key.startswith("precond_") and not kind.get("precond")))
    terse = [name(kind, True) or "precond=False" for kind in kinds]
    return terse if len(set(terse)) == len(kinds) else [name(kind, False) for kind in kinds]


def series(runs: list[Run], name: str, x: str, layer: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """-> x (n,), the mean over the runs, and values (runs, n) of `name` at the n steps at which all have it; None stands for inf."""
    tables = [{r["step"]: r[name] if layer is None else r[name][layer] for r in run.records if name in r} for run in runs]
    steps = sorted(set(tables[0]).intersection(*tables))
    values = [[np.inf if table[step] is None else table[step] for step in steps] for table in tables]
    places = [run.along(x) for run in runs]
    return np.array([[place[step] for step in steps] for place in places], float).mean(axis=0), np.array(values, float)
