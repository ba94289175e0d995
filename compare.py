"""Does it help? Train arms that differ in some options on the same seeds, and report paired differences with intervals.

    python compare.py train.py --vary precond=False,True --seeds=5
    python compare.py train_lra.py listops --max_iters=1000 --vary precond=False,True --vary attention=softmax,nystrom --seeds=3
    python compare.py train.py --arm "off: precond=False" --arm "half: precond=True precond_power=0.5" --tune learning_rate=1e-3,3e-3

The script's own options follow it as usual and hold for all arms. An arm's runs get the seeds first_seed, first_seed + 1, ..., the same
for each arm, hence the same initial parameters and batches. --vary KEY=A,B makes an arm of each value (given twice: a grid); --arm NAME: KEY=VALUE ...
names one that changes several options. The first arm is the one that the others are compared with. --tune KEY=A,B picks each arm's value
by the mean result on other seeds than those reported. A run's folder carries a hash of its configuration, thread count and code, so that
results of different ones never mix; typing the same command again keeps what is finished and resumes what was stopped.
"""
import ast
import dataclasses
import hashlib
import importlib
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from tqdm import tqdm

import config as options
import report
from config import UserError

ROOT = Path(__file__).resolve().parent
SCRIPTS = ("train.py", "train_lra.py", "train_vision.py")
FREE = {"out_dir", "init_from", "overwrite", "tensorboard", "wandb_log", "wandb_project", "wandb_run_name"}  # change no result


@dataclass
class Config:
    seeds: Annotated[int, "number of seeds"] = 5
    first_seed: Annotated[int, "the first of them"] = 1
    tune: Annotated[str, "KEY=A,B,...: pick the best value for each arm"] = ""
    tune_seeds: Annotated[int, "seeds to pick it on, from 100001 on"] = 2
    jobs: Annotated[int, "runs at once; speed is reported from 1"] = 1
    threads: Annotated[int, "threads of each run"] = 1
    out_dir: Annotated[str, "folder of the runs and the report"] = "out-compare"

    def __post_init__(self):
        if self.seeds < 2:
            raise ValueError(f"seeds={self.seeds}: a comparison needs at least two")
        if min(self.jobs, self.threads, self.tune_seeds) < 1:
            raise ValueError("jobs, threads and tune_seeds must be at least 1")


@dataclass
class Arm:
    name: str
    words: list[str]  # its options, as typed: ["--precond=True"]
    tuned: dict[str, float] = field(default_factory=dict)  # value -> mean result on the tuning seeds


@dataclass
class Run:
    arm: Arm
    seed: int
    words: list[str]
    folder: Path
    steps: int
    process: subprocess.Popen | None = None

    def record(self) -> dict | None:
        path = self.folder / "record.json"
        return json.loads(path.read_text()) if path.exists() else None

    def step(self) -> int:
        """The last step in its metrics.jsonl."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = re.match(r'\{"step": (\d+)', lines[-1]) if lines else None
        return int(found[1]) if found else 0


def split_arguments(argv: list[str]) -> tuple[str, list[str], list[str], list[tuple[str, str]]]:
    """-> (script, its arguments, the comparison's own arguments, [("vary" or "arm", text)]). Raises UserError."""
    if not argv or argv[0] not in SCRIPTS:
        if argv and argv[0] in ("-h", "--help"):
            options.parse(Config, ["--help"], __doc__)
        raise UserError(f"name the script to compare first: {', '.join(SCRIPTS)}; see --help")
    script, theirs, ours, arms = argv[0], [], [], []
    words = list(argv[1:])
    known = options.options(Config)
    while words:
        word = words.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        if word in ("-h", "--help"):
            options.parse(Config, ["--help"], __doc__)
        elif word.startswith("--") and key in ("vary", "arm"):
            if not equals and not words:
                raise UserError(f"--{key} needs a value, such as --vary precond=False,True")
            arms.append((key, text if equals else words.pop(0)))
        elif word.startswith("--") and key in known:
            ours.append(word if equals or not words else f"{word}={words.pop(0)}")
        else:
            theirs.append(word)
    return script, theirs, ours, arms


def make_arms(given: list[tuple[str, str]]) -> list[Arm]:
    """The grid of all --vary, then each --arm. Raises UserError."""
    varied = []
    for kind, text in given:
        key, equals, values = text.partition("=")
        if kind == "vary" and not (equals and values):
            raise UserError(f"--vary {text}: write --vary KEY=VALUE,VALUE")
        if kind == "vary":
            varied.append([f"{key}={value}" for value in values.split(",")])
    arms = [Arm(" ".join(combination), [f"--{word}" for word in combination]) for combination in itertools.product(*varied) if varied]
    for kind, text in given:
        name, colon, words = text.partition(":")
        if kind == "arm" and not (colon and name.strip()):
            raise UserError(f'--arm "{text}": write --arm "NAME: KEY=VALUE KEY=VALUE"')
        if kind == "arm":
            arms.append(Arm(name.strip(), [f"--{word}" for word in words.split()]))
    if len(arms) < 2:
        raise UserError("nothing to compare: give --vary KEY=VALUE,VALUE, or --arm twice")
    if len({arm.name for arm in arms}) < len(arms):
        raise UserError("two arms have the same name")
    return arms


def code_hash(script: str) -> str:
    """Of the sources of the script and of every module of this project that it imports, directly or not."""
    pending, seen = [ROOT / script], set()
    while pending:
        path = pending.pop()
        if path in seen:
            continue
        seen.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{name}" for name in names)]
            files = [ROOT / (name.replace(".", "/") + ".py") for name in names]
            pending += [file for file in files if file.exists()]
    digest = hashlib.sha256()
    for path in sorted(seen):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


class Comparison:
    """The arms of one command, their runs, and what is known of them."""

    def __init__(self, argv: list[str]):
        self.script, self.theirs, ours, given = split_arguments(argv)
        self.config, _ = options.parse(Config, ours, __doc__)
        self.module = importlib.import_module(self.script.removesuffix(".py"))
        self.folder, self.arms, self.code = Path(self.config.out_dir), make_arms(given), code_hash(self.script)
        self.tune_key, equals, values = self.config.tune.partition("=")
        self.tune_values = values.split(",") if values else []
        if self.config.tune and not self.tune_values:
            raise UserError(f"--tune {self.config.tune}: write --tune KEY=VALUE,VALUE")
        configurations = [json.dumps(self.resolve(arm.words)[1], sort_keys=True) for arm in self.arms]
        for i, j in itertools.combinations(range(len(self.arms)), 2):
            if configurations[i] == configurations[j]:
                raise UserError(f"the arms {self.arms[i].name!r} and {self.arms[j].name!r} are the same configuration")

    def resolve(self, words: list[str]) -> tuple[Any, dict]:
        """-> (the script's configuration with these options, the part of it that can change a result). Raises UserError."""
        argv = [*self.theirs, *words]
        if hasattr(self.module, "preset_of_task"):
            argv = self.module.preset_of_task(argv)
        config, typed = options.parse(self.module.Config, argv, "")
        if taken := {"seed", "out_dir", "overwrite", "eval_only"} & typed.keys() - {word[2:].split("=")[0] for word in words}:
            raise UserError(f"--{min(taken)} is set by the comparison itself: leave it out (--first_seed and --seeds choose seeds)")
        return config, {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}

    def run_of(self, arm: Arm, seed: int, tuning: str | None = None) -> Run:
        tuned = [f"--{self.tune_key}={tuning}"] if tuning is not None else []
        words = [*arm.words, *tuned, f"--seed={seed}"]
        config, identity = self.resolve(words)
        identity = {"script": self.script, "config": identity, "threads": self.config.threads, "torch": torch.__version__, "code": self.code}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        name = re.sub(r"[^A-Za-z0-9._=-]+", "_", arm.name)[:60]
        return Run(arm, seed, words, self.folder / "runs" / f"{name}-seed{seed}-{digest}", config.max_iters)

    def start(self, run: Run):
        run.folder.mkdir(parents=True, exist_ok=True)
        words = [*run.words, f"--out_dir={run.folder}"]
        if (run.folder / "ckpt.pt").exists():
            words.append("--init_from=resume")
        threads = {name: str(self.config.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        with open(run.folder / "log.txt", "a", encoding="utf-8") as log:
            run.process = subprocess.Popen([sys.executable, str(ROOT / self.script), *self.theirs, *words], stdout=log, stderr=log,
                                           stdin=subprocess.DEVNULL, env=os.environ | threads, start_new_session=True)

    def finish(self, run: Run):
        """Write the record of a run whose process has ended. Raises UserError where it failed for another reason than divergence."""
        code = run.process.returncode
        last = ((run.folder / "log.txt").read_text(encoding="utf-8").strip().splitlines() or [""])[-1]
        diverged = last if code == 2 and "is not finite" in last else None
        if code and not diverged:
            raise UserError(f"the run in {run.folder} ended with exit code {code}: {last}")
        record = {"arm": run.arm.name, "seed": run.seed, "words": run.words, "threads": self.config.threads, "code": self.code,
                  "serial": self.config.jobs == 1, "diverged": diverged}
        temporary = run.folder / "record.tmp"
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.replace(run.folder / "record.json")

    def train(self, runs: list[Run], bar: tqdm):
        """Bring all runs to their end, jobs at a time. KeyboardInterrupt (Ctrl-C, SIGTERM) lets them save and passes on."""
        waiting, active = [run for run in runs if run.record() is None], []
        bar.update(sum(run.steps for run in runs if run not in waiting))
        done = {id(run): 0 for run in waiting}
        try:
            while waiting or active:
                while waiting and len(active) < self.config.jobs:
                    active.append(waiting.pop(0))
                    self.start(active[-1])
                time.sleep(0.2)
                for run in list(active):
                    ended = run.process.poll() is not None
                    step = run.steps if ended else run.step()
                    bar.update(step - done[id(run)])
                    bar.set_postfix_str(f"{run.arm.name}, seed {run.seed}")
                    done[id(run)] = step
                    if ended:
                        self.finish(run)
                        active.remove(run)
        finally:
            for run in active:
                if run.process.poll() is None:
                    run.process.send_signal(signal.SIGTERM)
            for run in active:
                run.process.wait()

    def execute(self) -> dict[str, list[Run]]:
        """Tune where asked, run every arm on every seed -> {arm: runs}."""
        config = self.config
        tuning = {(arm.name, value): [self.run_of(arm, 100_001 + i, value) for i in range(config.tune_seeds)]
                  for arm in self.arms for value in self.tune_values}
        steps = sum(run.steps for runs in tuning.values() for run in runs)
        steps += sum(self.run_of(arm, config.first_seed).steps for arm in self.arms) * config.seeds
        with tqdm(total=steps, unit="step", dynamic_ncols=True, disable=not sys.stderr.isatty()) as bar:
            self.train([run for runs in tuning.values() for run in runs], bar)
            best = {arm.name: self.pick(arm, tuning) for arm in self.arms}
            seeds = range(config.first_seed, config.first_seed + config.seeds)
            result = {arm.name: [self.run_of(arm, seed, best[arm.name]) for seed in seeds] for arm in self.arms}
            by_seed = [run for group in zip(*result.values()) for run in group]  # an early stop leaves whole pairs
            self.train(by_seed, bar)
        return result

    def pick(self, arm: Arm, tuning: dict) -> str | None:
        """The value with the best mean result on the tuning seeds; all of them are kept in arm.tuned."""
        if not self.tune_values:
            return None
        for value in self.tune_values:
            finals = [report.read_run(run.folder) for run in tuning[arm.name, value]]
            if all(not final.diverged for final in finals):
                arm.tuned[value] = statistics.fmean(final.final for final in finals)
        if not arm.tuned:
            raise UserError(f"every value of --tune {self.config.tune} diverged for the arm {arm.name}: give lower ones")
        metric = report.read_run(tuning[arm.name, next(iter(arm.tuned))][0].folder).metric
        return (min if report.lower_is_better(metric) else max)(arm.tuned, key=arm.tuned.get)


def main():
    comparison = Comparison(sys.argv[1:])

    def interrupt(*_):
        raise KeyboardInterrupt
    signal.signal(signal.SIGTERM, interrupt)
    try:
        runs = comparison.execute()
    except KeyboardInterrupt:
        print("\nstopped; the runs are saved. Type the same command again to go on", file=sys.stderr)
        sys.exit(130)
    command = "python compare.py " + " ".join(f"'{word}'" if re.search(r"[^\w.,=/+-]", word) else word for word in sys.argv[1:])
    tuned = {arm.name: arm.tuned for arm in comparison.arms if arm.tuned}
    folders = {name: [run.folder for run in group] for name, group in runs.items()}
    text = report.write(comparison.folder, folders, command, comparison.config.tune, tuned)
    print(text)
    report.draw(comparison.folder, folders)


if __name__ == "__main__":
    options.run(main)
