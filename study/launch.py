"""A comparison at work: its jobs, what identifies each, and their training, some at a time.

A job's folder carries a hash of its configuration, data files, thread count, torch version and
code (comments and docstrings apart): results of different ones never mix.
"""
import dataclasses
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from engine import options
from engine.device import pick_device, pick_dtype
from engine.lock import Lock
from engine.metrics import METRICS
from engine.options import DATA, SOURCE, UserError
from engine.pretrained import exported_options
from engine.run import OWN
from study import stats
from study.arms import Arm, beyond
from study.fingerprint import code_hash, content, hash_of
from study.runs import SCRIPTS, Run, identity

ROOT = Path(__file__).resolve().parents[1]
OURS = {"seed": "--seeds and --first_seed choose the seeds",
        "out_dir": "--out_dir is the comparison's", "overwrite": "finished runs are kept",
        "eval_only": "a comparison trains"}
SIZES = {"block_size", "image_size"}  # of a sample
TUNE_SEED = 100_001  # the first of the seeds that --tune uses
WIDENINGS = 3  # values beyond those given that --tune may try
POLL = 0.5  # seconds between looks at the jobs
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass
class Job:
    arm: str
    seed: int
    chosen: dict[str, str]  # values of tuned options
    words: list[str]
    folder: Path
    identity: dict
    takes_gpu: bool  # whichever it is given: it names none
    process: subprocess.Popen | None = None
    gpu: str | None = None  # the one that it was given


class Stopped(Exception):
    """A signal asked for the end."""


class Comparison:
    """The arms of one command, their jobs, and what is known of them.

    config: compare.py's options. script: "train.py", and `theirs` its options as typed.
    tunings: the values of each option of --tune.
    """

    def __init__(self, config, script: str, theirs: list[str], arms: list[Arm],
                 tunings: dict[str, list[str]]):
        self.config = config
        self.script = script
        self.theirs = theirs
        self.arms = arms
        self.folder = Path(config.out_dir)
        self.module = SCRIPTS[script]
        self.code = code_hash(ROOT / script)
        self.tunings = tunings
        self.seeds = range(config.first_seed, config.first_seed + config.seeds)
        self.tune_seeds = range(TUNE_SEED, TUNE_SEED + config.tune_seeds)
        self.signal = 0
        self.active = []
        self.check()

    def check(self):
        """Raises UserError for anything that would stop a job before it begins."""
        stats.scipy_stats()
        first = self.seeds[0]
        if self.tunings and set(self.tune_seeds).intersection(self.seeds):
            raise UserError(f"first_seed={first}: the seeds must not reach those of --tune, "
                            f"{TUNE_SEED} and on")
        for name in OURS.keys() & self.parse([])[1].keys():
            raise UserError(f"--{name} cannot be given here: {OURS[name]}")
        known = options.options(self.module.Config)
        evaluated = {}  # what decides it -> its values
        arms = {}  # hash of an arm's run -> its name
        for arm in self.arms:
            for key in self.tunings.keys() & arm.keys:
                raise UserError(f"{key} is tuned, and set by the arm {arm.name!r}: choose one")
            for key in (*arm.keys, *self.tunings):
                if key in OURS or options.find(key, known).mark in (DATA, SOURCE):
                    who = "--tune" if key in self.tunings else f"the arm {arm.name!r}"
                    reason = OURS.get(key, "arms on different data cannot be paired")
                    raise UserError(f"{who} sets {key}: {reason}")
            tried = [{key: value} for key, values in self.tunings.items() for value in values]
            for chosen in tried or [{}]:
                job = self.job(arm, first, chosen)
                values = job.identity["config"]
                twin = arms.setdefault(hash_of(job.identity), arm.name)
                if twin != arm.name:
                    start = values["init_from"]
                    why = "" if start in OWN else f". Where one names no C, it has that of {start}"
                    raise UserError(f"the arms {twin!r} and {arm.name!r} are the same: all options "
                                    f"have the same values{why}")
                idle = [key for key in arm.keys if key.startswith("precond_")]
                if idle and not values["precond"]:
                    raise UserError(f"the arm {arm.name!r} sets {', '.join(sorted(idle))}, which "
                                    "changes nothing without --precond=True: give that too")
                if values["max_iters"] < 1:
                    raise UserError("max_iters=0 trains nothing that could be compared")
                product = values["batch_size"] * values["eval_iters"]
                evaluated.setdefault("batch_size x eval_iters", set()).add(product)
                for key in SIZES & values.keys():
                    evaluated.setdefault(key, set()).add(values[key])
        for name, found in evaluated.items():
            if len(found) > 1:
                raise UserError(f"{name} would be {' or '.join(map(str, sorted(found)))}: arms "
                                "that are evaluated on different samples cannot be paired. It "
                                "must be the same for all")

    def parse(self, words: list[str]):
        """-> (the script's configuration with these options, those typed). Raises UserError."""
        argv = [*self.theirs, *words]
        if hasattr(self.module, "preset_of_task"):
            argv = self.module.preset_of_task(argv)
        return options.parse(self.module.Config, argv, "")

    def job(self, arm: Arm, seed: int, chosen: dict[str, str]) -> Job:
        """chosen: the tuned options' values. Raises UserError for what the script refuses."""
        tuned = [f"--{key}={value}" for key, value in chosen.items()]
        words = [*arm.words, *tuned, f"--seed={seed}"]
        config, given = self.parse(words)
        if config.init_from not in OWN:  # the script does as its weights say where no option does
            exported = exported_options(config.init_from)
            kept = {key: value for key, value in exported.items() if key not in given}
            config = dataclasses.replace(config, **kept)
        device = pick_device(config.device)
        values = identity(dataclasses.asdict(config))
        values |= {"device": device.type, "dtype": pick_dtype(config.dtype, device, config.n_embd)}
        files = {key: content(values[key]) for key in ("dataset", "source", "init_from")
                 if os.path.exists(values.get(key) or "")}
        mine = {"script": self.script, "config": values, "files": files,
                "threads": self.config.threads, "torch": torch.__version__, "code": self.code}
        name = re.sub(r"[^A-Za-z0-9._=-]+", "_", arm.name)[:60]
        folder = self.folder / "runs" / f"{name}-{seed}-{hash_of([arm.name, mine])[:12]}"
        takes_gpu = device.type == "cuda" and config.device in ("auto", "cuda")
        return Job(arm.name, seed, chosen, words, folder, mine, takes_gpu)

    def command(self, job: Job) -> list[str]:
        start = job.identity["config"]["init_from"]
        if start == "scratch" or (job.folder / "ckpt.pt").exists():
            start = "auto"
        return [sys.executable, str(ROOT / self.script), *self.theirs, *job.words,
                f"--out_dir={job.folder}", f"--init_from={start}"]

    def free_gpu(self) -> str:
        """Of the GPUs that are seen the one with the fewest jobs."""
        seen = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(
            map(str, range(torch.cuda.device_count())))
        taken = [other.gpu for other in self.active]
        return min(seen.split(","), key=taken.count)

    def start(self, job: Job):
        if code_hash(ROOT / self.script) != self.code:
            raise UserError(f"{self.script} or a module that it imports was changed meanwhile: "
                            "type the command again to compare the new code")
        job.folder.mkdir(parents=True, exist_ok=True)
        if self.config.jobs > 1:
            # Its seconds count no longer, whoever finishes it.
            (job.folder / "parallel").touch()
        environment = os.environ | dict.fromkeys(THREADS, str(self.config.threads))
        if job.takes_gpu:
            job.gpu = environment["CUDA_VISIBLE_DEVICES"] = self.free_gpu()
        with open(job.folder / "log.txt", "a", encoding="utf-8") as log:
            # In its own session Ctrl-C reaches it once, through `stop`. It holds the lock for as
            # long as it lives.
            job.process = subprocess.Popen(
                self.command(job), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env=environment, start_new_session=True, pass_fds=[self.lock.fileno()])
        self.active.append(job)

    def finish(self, job: Job) -> str:
        """Write the record of a job whose process has ended; returns how it ended.

        Raises UserError where it failed and did not diverge.
        """
        code = job.process.returncode
        log = (job.folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip()
        last = log.rpartition("\n")[2]
        diverged = last if code == 2 and "is not finite" in last else None
        if code and not diverged:
            raise UserError(f"the run in {job.folder} ended with exit code {code}: {last}")
        record = {"arm": job.arm, "seed": job.seed, "words": job.words,
                  "serial": not (job.folder / "parallel").exists(), "diverged": diverged,
                  "identity": job.identity}
        temporary = job.folder / "record.tmp"
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        temporary.replace(job.folder / "record.json")
        run = Run.read_ended(job.folder)
        return "diverged" if diverged else f"{run.metric} {run.final:.4f}"

    def train(self, jobs: list[list[Job]]):
        """Bring all of each arm's jobs, which are in the order of the seeds, to their end.

        Raises Stopped; however this ends, the jobs under way save.
        """
        self.left -= sum(map(len, jobs))
        # Seed after seed: an early stop leaves whole pairs, and a slow hour of the machine slows
        # all arms. By folder: --tune with 1e-3,0.001 asks for one job twice.
        waiting = {job.folder: job for pair in zip(*jobs) for job in pair}
        waiting = [job for job in waiting.values() if not (job.folder / "record.json").exists()]
        self.left += len(waiting)
        try:
            while waiting or self.active:
                while waiting and len(self.active) < self.config.jobs and not self.signal:
                    self.start(waiting.pop(0))
                time.sleep(POLL)
                if self.signal:
                    raise Stopped
                for job in list(self.active):
                    if job.process.poll() is not None:
                        self.active.remove(job)
                        self.say(job, self.finish(job))
        finally:
            for job in self.active:
                job.process.terminate()
            for job in self.active:
                job.process.wait()
            self.active.clear()

    def say(self, job: Job, how: str):
        """How a job ended, and how long the others will take."""
        self.ended += 1
        self.left -= 1
        seconds = (time.monotonic() - self.since) / self.ended * self.left
        left = f" ({self.left} to go, about {tqdm.format_interval(seconds)})" if self.left else ""
        tuned = "".join(f", {key}={value}" for key, value in job.chosen.items())
        print(f"{job.arm}{tuned}, seed {job.seed}: {how}{left}", flush=True)

    def stop(self, number: int, frame):
        """The first signal lets the jobs save, a second one ends them at once."""
        for job in self.active if self.signal else []:
            job.process.kill()
        self.signal = number

    def execute(self):
        """Tune where asked, then train every arm on every seed.

        Raises Stopped, UserError, and OSError where out_dir cannot be written to.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = Lock(self.folder / "lock", str(self.folder))
        values = sum(map(len, self.tunings.values()))
        self.left = (len(self.seeds) + len(self.tune_seeds) * values) * len(self.arms)
        self.ended = 0  # by this command
        self.since = time.monotonic()
        before = {number: signal.signal(number, self.stop)
                  for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for key in self.tunings:
                self.tune(key)
            jobs = []
            for arm in self.arms:
                jobs.append([self.job(arm, seed, arm.chosen) for seed in self.seeds])
                arm.folders = [job.folder for job in jobs[-1]]
            self.train(jobs)
        finally:
            self.lock.release()
            for number, handler in before.items():
                signal.signal(number, handler)

    def tune(self, key: str):
        """Give each arm its best value of this option, at its best ones of those before.

        An arm whose best is at an end of its values gets one more beyond, up to WIDENINGS times.
        """
        new = [(arm, value) for arm in self.arms for value in self.possible(arm, key)]
        self.left -= len(self.tune_seeds) * (len(self.arms) * len(self.tunings[key]) - len(new))
        arms = list({arm.name: arm for arm, _ in new}.values())
        for arm in arms:
            arm.tuned[key] = {}
        for widening in range(WIDENINGS + 1):
            jobs = []
            for arm, value in new:
                chosen = arm.chosen | {key: value}
                jobs.append([self.job(arm, seed, chosen) for seed in self.tune_seeds])
            self.train(jobs)
            for (arm, value), its_jobs in zip(new, jobs):
                arm.tuned[key][value] = self.mean(its_jobs)
            for arm in arms:
                arm.chosen[key] = self.best_value(arm, key)
            new = self.widen(arms, key) if widening < WIDENINGS else []
            if not new:  # every arm's best lies between others
                break

    def possible(self, arm: Arm, key: str) -> list[str]:
        """The values of this option that the arm can have beside those chosen before.

        None for an option of C, if the arm has no C. Raises UserError where none can be had else.
        """
        values = []
        for value in self.tunings[key]:
            try:
                job = self.job(arm, TUNE_SEED, arm.chosen | {key: value})
            except UserError as e:
                print(f"{arm.name}: {key}={value} is left out: {e}", flush=True)
                continue
            if key.startswith("precond_") and not job.identity["config"]["precond"]:
                return []
            values.append(value)
        if not values:
            raise UserError(f"the arm {arm.name!r} can have no value of --tune {key}: see above")
        return values

    def mean(self, jobs: list[Job]) -> float | None:
        """Of the final results; None where a job diverged."""
        runs = [Run.read_ended(job.folder) for job in jobs]
        if any(run.diverged for run in runs):
            return None
        self.metric = runs[0].metric
        return statistics.fmean(run.final for run in runs)

    def best_value(self, arm: Arm, key: str) -> str:
        """The value with the best mean on the tuning seeds, if it never diverged."""
        means = {value: mean for value, mean in arm.tuned[key].items() if mean is not None}
        if not means:
            raise UserError(f"every value of --tune {key}={','.join(arm.tuned[key])} diverged for "
                            f"the arm {arm.name}: give lower ones")
        pick = min if METRICS[self.metric].better == "lower" else max
        return pick(means, key=means.get)

    def widen(self, arms: list[Arm], key: str) -> list[tuple[Arm, str]]:
        """The arms whose best value is at an end of those tried, each with the next one."""
        whole = options.options(self.module.Config)[key].type is int
        new = []
        for arm in arms:
            best = arm.chosen[key]
            value = beyond(arm.tuned[key], best)
            if value is None:
                continue
            if whole:
                value = str(round(float(value)))
            if value in arm.tuned[key]:  # no whole number is left between
                continue
            try:
                self.job(arm, TUNE_SEED, arm.chosen | {key: value})
            except UserError:  # the script knows no such value: the end is the option's own
                continue
            print(f"{arm.name}: {key}={best} is the best yet and at the end of the "
                  f"values tried; {value} is next", flush=True)
            new.append((arm, value))
            self.left += len(self.tune_seeds)
        return new
