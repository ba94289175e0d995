"""Runs as their folders tell of them, finished or still training: read, grouped, as curves."""
import itertools
import json
import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import numpy as np

import train
import train_lra
import train_vision
from engine import options
from engine.metrics import judging
from engine.options import FREE, LOCAL, SOURCE, UserError
from engine.run import RESULT

SCRIPTS = {"train.py": train, "train_lra.py": train_lra, "train_vision.py": train_vision}
NEEDED = {"seed", "precond", "n_layer", "grad_clip"}  # options without which there is no figure
Folders = dict[str, list[Path]]  # of runs, by label
COSTS = {"tokens", "peak_memory_mb"}  # what compare.py reports of a last record, beside a metric


def script_of(config: dict) -> ModuleType:
    """The script that wrote a run: its Config has all of the run's options.

    A run of another version may have options that none knows; then it is the one with most.
    """
    def unknown(script):
        return len(config.keys() - options.options(script.Config).keys())
    return min(SCRIPTS.values(), key=unknown)


@dataclass
class Run:
    """What a run's folder says."""
    folder: Path
    config: dict  # its options
    records: list[dict]  # of metrics.jsonl, in order
    ended: dict = field(default_factory=dict)  # what compare.py wrote at its end: record.json
    test: float | None = None  # accuracy on a test split

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """A run to draw. Raises UserError where there is none, or nothing to draw of it yet."""
        try:
            records = read_records(folder)
            config = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
        except OSError as e:
            hint = ""
            if (folder / "runs").is_dir():
                hint = f". It holds a comparison without a report: draw {folder}/runs/*"
                if compared(folder):
                    hint = ". It holds a comparison: draw it alone, or several compare.json"
            raise UserError(f"{folder} is not the folder of a run: "
                            f"{e.filename}: {e.strerror}{hint}") from None
        except ValueError as e:
            raise UserError("the metrics.jsonl or config.toml of "
                            f"{folder} is damaged: {e}") from None
        for key in options.marked(script_of(config).Config, SOURCE):
            if config.get(key):
                config[key] = os.path.normpath(str(config[key]))  # ./my.txt is my.txt
        if lacking := sorted(NEEDED - config.keys()):
            raise UserError(f"{folder / 'config.toml'} lacks {', '.join(lacking)}: "
                            f"was it written by {' or '.join(SCRIPTS)}?")
        run = cls(folder, config, records)
        if any("kappa_after" not in r for r in run.evaluations):
            raise UserError(f"{folder / 'metrics.jsonl'} lacks kappa_after: of another version?")
        if len(run.evaluations) < 2 or not any("grad_norm" in r for r in records):
            raise UserError(f"{folder} holds fewer than two evaluations: nothing to draw yet, "
                            "let it train")
        return run

    @classmethod
    def read_ended(cls, folder: Path) -> "Run":
        """A run of compare.py. Raises UserError unless it was trained to its end or diverged."""
        anew = "remove the folder and type the command again"
        try:
            ended = json.loads((folder / "record.json").read_text())
            run = cls(folder, ended["identity"]["config"], [], ended)
            if not run.diverged:
                run.records = read_records(folder)
            if (folder / RESULT).exists():
                run.test = json.loads((folder / RESULT).read_text())["test_accuracy"]
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"{folder} holds no finished run ({e}): {anew}") from None
        if run.diverged or (run.metric and COSTS <= run.records[-1].keys()):
            return run
        raise UserError(f"the last record of {folder} is no evaluation of this version: {anew}")

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def diverged(self) -> str | None:
        """The line with which it stopped, where its loss was not finite."""
        return self.ended.get("diverged")

    @property
    def evaluations(self) -> list[dict]:
        return [r for r in self.records if judging(r)]

    @property
    def metric(self) -> str | None:
        """What the run is judged by; None before its first evaluation."""
        return judging(self.evaluations[-1]) if self.evaluations else None

    @property
    def final(self) -> float | None:
        """The last result; None of a run that diverged."""
        return self.evaluations[-1][self.metric] if self.evaluations else None

    def along(self, x: str) -> dict[int, float]:
        """{step: x} of all records; x: step, tokens, seconds."""
        result = {}
        place = {"tokens": 0}
        for r in self.records:
            place |= {"seconds": r["elapsed_s"], **r}
            result[r["step"]] = place[x]
        return result


Groups = dict[str, list[Run]]


def every(groups: Groups) -> list[Run]:
    return list(itertools.chain.from_iterable(groups.values()))


def read_records(folder: Path) -> list[dict]:
    """The records of a run. Raises OSError, ValueError and, for a damaged line, UserError."""
    path = folder / "metrics.jsonl"
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(True), 1):
        if not line.endswith("\n"):
            break  # a run that is writing, or was killed while it wrote
        try:
            record = json.loads(line)
            if not {"step", "elapsed_s"} <= record.keys():
                raise ValueError
            records.append(record)
        except (ValueError, AttributeError):
            raise UserError(f"{path}: line {number} is damaged or of another version: "
                            "leave this run out, or train it anew") from None
    return records


def identity(config: dict) -> dict:
    """The options that decide a run's result.

    However it was started or resumed, a run from scratch is one.
    """
    free = set(options.marked(script_of(config).Config, FREE, LOCAL))
    free.remove("device")  # runs are compared by their seconds, too
    decisive = {key: value for key, value in config.items() if key not in free}
    if decisive.get("init_from") in ("auto", "resume"):
        decisive["init_from"] = "scratch"
    return decisive


def compared(folder: Path) -> Folders:
    """The runs in a comparison's report that did not diverge, by arm; empty without a report."""
    try:
        arms = json.loads((folder / "compare.json").read_text())["runs"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {arm: [folder / "runs" / name for name in names] for arm, names in arms.items()}


def group(folders: list[Path], labels: str = "") -> Folders:
    """Label -> folders of the runs that differ only in their seed and in what changes no result.

    A comparison's folder alone stands for the arms in its report. labels: names for the groups,
    separated by commas, in order of appearance. Raises UserError.
    """
    kinds = compared(folders[0]) if len(folders) == 1 else {}
    names = list(kinds)
    if not kinds:
        for folder in folders:
            common = identity(Run.read(folder).config) | {"seed": None}
            kinds.setdefault(json.dumps(common, sort_keys=True), []).append(folder)
        names = name_kinds([json.loads(kind) for kind in kinds])
    if labels:
        names = [name.strip() for name in labels.split(",")]
    if len(names) != len(kinds) or len(set(names)) != len(names):
        firsts = ", ".join(str(members[0]) for members in kinds.values())
        raise UserError(f"--labels={labels}: give {len(kinds)} different labels, "
                        f"for the groups of {firsts}")
    return dict(zip(names, kinds.values()))


def name_kinds(kinds: list[dict]) -> list[str]:
    """Each configuration's name: the options in which they differ.

    precond's own are named only where it is on, if that tells the configurations apart.
    """
    keys = [key for key in dict.fromkeys(key for kind in kinds for key in kind)
            if len({kind.get(key) for kind in kinds}) > 1] or ["precond"]
    keys.sort(key=lambda key: not key.startswith("precond"))

    def name(kind: dict, terse: bool) -> str:
        silent = terse and not kind.get("precond")
        return ", ".join(f"{key}={kind.get(key)}" for key in keys
                         if not (silent and key.startswith("precond_")))

    for terse in True, False:
        names = [name(kind, terse) or "precond=False" for kind in kinds]
        if len(set(names)) == len(kinds):
            break
    return names


def series(runs: list[Run], name: str, x: str, layer: int | None = None
           ) -> tuple[np.ndarray, np.ndarray]:
    """-> x (n,), its mean over the runs, and values (runs, n) of the metric `name`.

    The n steps are those at which all runs have it. None stands for infinity.
    """
    tables = [{r["step"]: r[name] for r in run.records if name in r} for run in runs]
    steps = sorted(set(tables[0]).intersection(*tables))
    values = np.array([[table[step] for step in steps] for table in tables], float)
    if layer is not None:
        values = values[..., layer]  # (runs, n, layers) -> (runs, n)
    values[np.isnan(values)] = np.inf  # None
    places = [run.along(x) for run in runs]
    xs = np.array([[place[step] for step in steps] for place in places], float)
    return xs.mean(axis=0), values
