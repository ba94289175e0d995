"""Does it help? Train arms that differ in some options on the same seeds, and report paired differences with intervals.

    python compare.py train.py --vary precond=False,True --seeds=5
    python compare.py train_lra.py listops --max_iters=1000 --vary attention=softmax,nystrom --vary precond=False,True --seeds=3
    python compare.py train.py --arm "off: precond=False" --arm "half: precond=True precond_power=0.5" --tune learning_rate=1e-3,3e-3

The script's own options follow it as usual and hold for all arms. An arm's runs get the seeds first_seed, first_seed + 1, ..., the same
for each arm, hence the same initial parameters and batches.

--vary KEY=A,B,...              an arm of each value; given twice, an arm of each pair of values, and a table more: the second option's
                                effect for each value of the first
--arm "NAME: KEY=VALUE ..."     an arm that changes several options, or none; values with spaces in quotes

The first arm is the one that the others are compared with. --tune KEY=A,B picks each arm's value by the mean result on other seeds than
those reported. A run's folder carries a hash of its configuration, data file, thread count, torch version and code (comments and
docstrings apart), so that results of different ones never mix. Ctrl-C lets the runs save; typing the same command again keeps what is
finished and resumes what was stopped. The report goes to the terminal and to compare.md and compare.json in out_dir.
"""
import dataclasses
import fcntl
import hashlib
import importlib
import itertools
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch

from engine import options
from study import report
from engine.options import UserError
from engine.options import DATA, FREE
from engine.device import pick_device, pick_dtype
from study.runs import Progress, Run, code_hash, content

ROOT = Path(__file__).resolve().parent
SCRIPTS = ("train.py", "train_lra.py", "train_vision.py")
OURS = {"seed": "--seeds and --first_seed choose the seeds", "out_dir": "--out_dir is the comparison's",
        "overwrite": "finished runs are kept", "eval_only": "a comparison trains"}
TUNE_SEED = 100_001  # the first of the seeds that --tune uses
POLL = 0.5  # seconds between looks at the runs


@dataclass
class Config(options.Options):
    seeds: Annotated[int, "number of seeds"] = 5
    first_seed: Annotated[int, "the first of them"] = 1
    tune: Annotated[str, "KEY=A,B,...: pick the best value for each arm"] = ""
    tune_seeds: Annotated[int, f"number of seeds to pick it on, from {TUNE_SEED} on"] = 2
    jobs: Annotated[int, "runs at once; speed is reported from 1"] = 1
    threads: Annotated[int, "threads of each run"] = 1
    out_dir: Annotated[str, "folder of the runs and the report"] = "out-compare"

    def __post_init__(self):
        super().__post_init__()
        if self.seeds < 2:
            raise ValueError(f"seeds={self.seeds}: a comparison needs at least two")
        if min(self.jobs, self.threads, self.tune_seeds) < 1:
            raise ValueError("jobs, threads and tune_seeds must be at least 1")
        if self.first_seed < 0 or self.tune and self.first_seed < TUNE_SEED + self.tune_seeds and self.first_seed + self.seeds > TUNE_SEED:
            raise ValueError(f"first_seed={self.first_seed} must not be negative, nor reach the seeds of --tune, {TUNE_SEED} and on")


@dataclass
class Arm:
    name: str
    words: list[str]  # its options, as typed: ["--precond=True"]
    beside: str = ""  # in a grid: the arm that has the first value of the last --vary, and else the same
    tuned: dict[str, float] = field(default_factory=dict)  # value -> mean result on the tuning seeds


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
        if not word.startswith("--") or key not in (*known, "vary", "arm"):
            theirs.append(word)
            continue
        if not equals:
            if not words or words[0].startswith("--"):
                raise UserError(f"--{key} needs a value; see --help")
            text = words.pop(0)
        if key in known:
            ours.append(f"--{key}={text}")
        else:
            arms.append((key, text))
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
    arms = [Arm(" ".join(combination), [f"--{word}" for word in combination],
                " ".join([*combination[:-1], varied[-1][0]]) if len(varied) > 1 else "")
            for combination in itertools.product(*varied) if varied]
    for kind, text in given:
        name, colon, words = text.partition(":")
        if kind == "arm" and not (colon and name.strip()):
            raise UserError(f'--arm "{text}": write --arm "NAME: KEY=VALUE KEY=VALUE"')
        if kind == "arm":
            try:
                arms.append(Arm(name.strip(), [f"--{word.removeprefix('--')}" for word in shlex.split(words)]))
            except ValueError as e:
                raise UserError(f"--arm {text}: {e}") from None
            if wrong := [word for word in arms[-1].words if "=" not in word]:
                raise UserError(f"--arm {text}: {wrong[0][2:]!r} is not KEY=VALUE")
    if len(arms) < 2:
        raise UserError("nothing to compare: give --vary KEY=VALUE,VALUE, or --arm twice")
    if len({arm.name for arm in arms}) < len(arms):
        raise UserError("two arms have the same name: every arm and every value of --vary must be another")
    return arms


class Stopped(Exception):
    """A signal asked for the end."""


class Comparison:
    """The arms of one command, their runs, and what is known of them."""

    def __init__(self, argv: list[str]):
        self.script, self.theirs, ours, given = split_arguments(argv)
        self.module = importlib.import_module(self.script.removesuffix(".py"))
        known = options.options(self.module.Config) | options.options(Config)
        for word in [*self.theirs, *ours]:
            if word.startswith("--"):
                options.find(word[2:].partition("=")[0], known)
        self.config, _ = options.parse(Config, ours, __doc__)
        self.folder, self.arms, self.code = Path(self.config.out_dir), make_arms(given), code_hash(ROOT / self.script)
        self.tune_key, equals, values = self.config.tune.partition("=")
        self.tune_values = list(dict.fromkeys(values.split(","))) if values else []
        if self.config.tune and len(self.tune_values) < 2:
            raise UserError(f"--tune {self.config.tune}: write --tune KEY=VALUE,VALUE")
        self.signal, self.active = 0, []
        self.check()

    def check(self):
        """Raises UserError for anything that would stop a run before it begins."""
        typed = self.parse([])[1]
        for name in OURS.keys() & typed.keys():
            raise UserError(f"--{name} cannot be given here: {OURS[name]}")
        evaluated = set()
        for arm in self.arms:
            mine = [word[2:].partition("=")[0] for word in arm.words]
            settings = [(key, f"the arm {arm.name!r}") for key in mine] + [(self.tune_key, "--tune")] * bool(self.config.tune)
            for key, who in settings:
                options.find(key, options.options(self.module.Config))
                if key in OURS or options.options(self.module.Config)[key].mark == DATA:
                    raise UserError(f"{who} sets {key}: " + OURS.get(key, "arms on different data cannot be paired"))
            if self.tune_key in mine:
                raise UserError(f"{self.tune_key} is tuned, and set by the arm {arm.name!r}: choose one")
            for value in self.tune_values or [None]:
                run = self.run_of(arm, self.config.first_seed, value)
                if run.steps < 1:
                    raise UserError("max_iters=0 trains nothing that could be compared")
                evaluated.add(run.identity["config"]["batch_size"] * run.identity["config"]["eval_iters"])
        if len(evaluated) > 1:
            raise UserError(f"batch_size x eval_iters would be {' or '.join(map(str, sorted(evaluated)))}: arms that are evaluated on different "
                            "samples cannot be paired. Give both options in each --arm, with one product")

    def parse(self, words: list[str]) -> tuple[Any, dict]:
        """-> (the script's configuration with these options, those typed). Raises UserError."""
        argv = [*self.theirs, *words]
        if hasattr(self.module, "preset_of_task"):
            argv = self.module.preset_of_task(argv)
        return options.parse(self.module.Config, argv, "")

    def run_of(self, arm: Arm, seed: int, tuning: str | None = None) -> Run:
        """Raises UserError for options that the script refuses."""
        tuned = [f"--{self.tune_key}={tuning}"] if tuning is not None else []
        words = [*arm.words, *tuned, f"--seed={seed}"]
        config, _ = self.parse(words)
        device = pick_device(config.device)
        values = {k: v for k, v in dataclasses.asdict(config).items() if k not in options.marked(type(config), FREE)}
        values |= {"device": device.type, "dtype": pick_dtype(config.dtype, device, config.n_embd),
                   "init_from": "scratch" if config.init_from in ("auto", "resume") else config.init_from}
        files = {k: content(values[k]) for k in ("dataset", "source", "init_from") if os.path.exists(values.get(k) or "")}
        identity = {"script": self.script, "config": values, "files": files, "threads": self.config.threads, "torch": torch.__version__,
                    "code": self.code}
        digest = hashlib.sha256(json.dumps([arm.name, identity], sort_keys=True).encode()).hexdigest()[:12]
        name = re.sub(r"[^A-Za-z0-9._=-]+", "_", arm.name)[:60]
        return Run(arm.name, seed, words, self.folder / "runs" / f"{name}-{seed}-{digest}", config.max_iters, values["init_from"], identity)

    def command(self, run: Run) -> list[str]:
        start = run.init_from if run.init_from != "scratch" and not (run.folder / "ckpt.pt").exists() else "auto"
        return [sys.executable, str(ROOT / self.script), *self.theirs, *run.words, f"--out_dir={run.folder}", f"--init_from={start}"]

    def start(self, run: Run):
        if code_hash(ROOT / self.script) != self.code:
            raise UserError(f"{self.script} or a module that it imports was changed meanwhile: type the command again to compare the new "
                            "code")
        run.folder.mkdir(parents=True, exist_ok=True)
        if self.config.jobs > 1:
            (run.folder / "parallel").touch()  # its seconds count no longer, whoever finishes it
        threads = {name: str(self.config.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
        with open(run.folder / "log.txt", "a", encoding="utf-8") as log:
            # its own session: Ctrl-C reaches it once, through `stop`; it holds the lock for as long as it lives
            run.process = subprocess.Popen(self.command(run), stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=os.environ | threads,
                                           start_new_session=True, pass_fds=[self.lock.fileno()])
        self.active.append(run)

    def finish(self, run: Run) -> str:
        """Write the record of a run whose process has ended -> how it ended. Raises UserError where it failed and did not diverge."""
        code = run.process.returncode
        last = ((run.folder / "log.txt").read_text(encoding="utf-8").strip().splitlines() or [""])[-1]
        diverged = last if code == 2 and "is not finite" in last else None
        if code and not diverged:
            raise UserError(f"the run in {run.folder} ended with exit code {code}: {last}")
        record = {"arm": run.arm, "seed": run.seed, "words": run.words, "serial": not (run.folder / "parallel").exists(),
                  "diverged": diverged, "identity": run.identity}
        temporary = run.folder / "record.tmp"
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        temporary.replace(run.folder / "record.json")
        result = report.read_run(run.folder)
        return "diverged" if diverged else f"{result.metric} {result.final:.4f}"

    def train(self, runs: list[Run], progress: Progress):
        """Bring all runs to their end, jobs at a time. Raises Stopped; however this ends, the runs under way save."""
        waiting = list({run.folder: run for run in runs if not run.ended()}.values())  # --tune with 1e-3,0.001: one run
        done = {run.folder: run.step() for run in runs}
        for run in runs:
            progress.keep(run)
        try:
            while waiting or self.active:
                while waiting and len(self.active) < self.config.jobs and not self.signal:
                    self.start(waiting.pop(0))
                time.sleep(POLL)
                if self.signal:
                    raise Stopped
                for run in list(self.active):
                    if run.process.poll() is not None:
                        self.active.remove(run)
                        how = self.finish(run)
                    step = run.step()
                    progress.advance(step - done[run.folder], f"{run.arm}, seed {run.seed}")
                    done[run.folder] = step
                    if run.ended():
                        progress.say(run, how)
        finally:
            for run in self.active:
                run.process.terminate()
            for run in self.active:
                run.process.wait()
            self.active.clear()

    def stop(self, number: int, frame):
        """The first signal lets the runs save, a second one ends them at once."""
        for run in self.active if self.signal else []:
            run.process.kill()
        self.signal = number

    def execute(self) -> dict[str, list[Run]]:
        """Tune where asked, run every arm on every seed -> {arm: runs}. Raises Stopped, UserError."""
        config = self.config
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / "lock", "w")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another comparison, or a run that one left behind, is at work in {self.folder}: wait for it, end it, or "
                            "choose another --out_dir") from None
        except OSError as e:
            raise UserError(f"cannot write to {self.folder}: {e.strerror}") from None
        tuning = {(arm.name, value): [self.run_of(arm, TUNE_SEED + i, value) for i in range(config.tune_seeds)]
                  for arm in self.arms for value in self.tune_values}
        trials = [run for group in zip(*tuning.values()) for run in group]
        steps = sum(run.steps for run in trials) + sum(self.run_of(arm, config.first_seed).steps for arm in self.arms) * config.seeds
        before = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}
        progress = Progress(steps, len(trials) + len(self.arms) * config.seeds)
        try:
            self.train(trials, progress)
            best = {arm.name: self.pick(arm, tuning) for arm in self.arms}
            seeds = range(config.first_seed, config.first_seed + config.seeds)
            result = {arm.name: [self.run_of(arm, seed, best[arm.name]) for seed in seeds] for arm in self.arms}
            # seed by seed: an early stop leaves whole pairs, and a slow hour of the machine slows all arms
            self.train([run for group in zip(*result.values()) for run in group], progress)
        finally:
            progress.close()
            self.lock.close()
            for number, handler in before.items():
                signal.signal(number, handler)
        return result

    def pick(self, arm: Arm, tuning: dict) -> str | None:
        """The value with the best mean result on the tuning seeds, of those that never diverged; the means are kept in arm.tuned."""
        if not self.tune_values:
            return None
        for value in self.tune_values:
            results = [report.read_run(run.folder) for run in tuning[arm.name, value]]
            if all(result.diverged is None for result in results):
                arm.tuned[value] = statistics.fmean(result.final for result in results)
                metric = results[0].metric
        if not arm.tuned:
            raise UserError(f"every value of --tune {self.config.tune} diverged for the arm {arm.name}: give lower ones")
        return report.best(arm.tuned, metric)


def main():
    comparison = Comparison(sys.argv[1:])
    try:
        runs = comparison.execute()
    except Stopped:
        print("\nstopped; the runs under way are saved. Type the same command again to go on", file=sys.stderr)
        sys.exit(128 + comparison.signal)
    folders = {name: [run.folder for run in group] for name, group in runs.items()}
    tuned = {arm.name: {value: arm.tuned.get(value) for value in comparison.tune_values} for arm in comparison.arms if arm.tuned}
    beside = {arm.name: arm.beside for arm in comparison.arms if arm.beside not in ("", arm.name)}
    text = report.write(comparison.folder, folders, beside, shlex.join(["python", "compare.py", *sys.argv[1:]]), comparison.tune_key, tuned)
    print(text)
    report.draw(comparison.folder, folders)


if __name__ == "__main__":
    options.run(main)
