"""Does it help? Train arms that differ in some options on the same seeds, and compare them.

    python compare.py train.py --vary precond=False,True --seeds=5
    python compare.py train_lra.py listops --vary attention=softmax,linear --vary precond=False,True
    python compare.py train.py --arm off: --arm "half: precond=True precond_power=0.5"

The script's own options follow its name as usual and hold for all arms. All arms get the same
seeds, hence the same initial parameters and batches. Differences to the first arm are paired by
seed and reported with 95% intervals.

--vary KEY=A,B,...              an arm for each value. Given twice, the arms are all pairs of a
                                value of the first option and one of the second. A second table
                                then shows, for each value of the first, what the second does
--arm "NAME: KEY=VALUE ..."     an arm that changes several options, or none; values with spaces
                                in quotes
--tune KEY=A,B,...              first, train each arm with each value, on seeds that serve for
                                this alone. Each arm keeps its best value for the seeds that are
                                reported. A best number at an end of those tried is followed by
                                one beyond it, up to three times. Given twice, the second option
                                is tuned at the best value of the first

Runs of another configuration, data file, thread count, torch version or code never mix in. Ctrl-C
lets the runs save. Typing the same command again keeps what is finished and resumes what was
stopped. The report is printed, and kept as compare.md and compare.json in out_dir. Needs
requirements-extra.txt.
"""
import engine.startup  # noqa: F401  (first: it answers mistakes before PyTorch is loaded)

# isort: split
import argparse
import shlex
import sys
from dataclasses import dataclass
from typing import Annotated

from engine import options
from engine.options import UserError, at_least
from engine.startup import OF_COMPARE
from study import figures, report, runs
from study.arms import make_arms, read_tunings
from study.launch import TUNE_SEED, Comparison, Stopped
from study.runs import SCRIPTS


@dataclass
class Config(options.Options):
    seeds: Annotated[int, "number of seeds; one gives no intervals", at_least(1)] = 5
    first_seed: Annotated[int, "the first of them", options.seed] = 1
    tune_seeds: Annotated[int, f"number of seeds for --tune, from {TUNE_SEED} on",
                          at_least(1)] = 2
    jobs: Annotated[int, "runs at once; speed is reported from 1", at_least(1)] = 1
    threads: Annotated[int, "threads of each run", at_least(1)] = 1
    out_dir: Annotated[str, "folder of the runs and the report",
                       options.not_empty] = "out-compare"

    def __post_init__(self):
        super().__post_init__()
        end = self.first_seed + self.seeds
        if wrong := options.seed("the last seed", end - 1, self):
            raise ValueError(wrong)


def read(argv: list[str]) -> Comparison:
    """The comparison that a command line asks for. Raises UserError."""
    if {"-h", "--help"} & set(argv):
        options.parse(Config, ["--help"], __doc__)
    script, *words = argv or [""]
    if script not in SCRIPTS:
        raise UserError(f"name the script to compare first: {', '.join(SCRIPTS)}; see --help")
    known = options.options(Config)
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in (*known, *OF_COMPARE):
        parser.add_argument(f"--{name}", action="append", default=[])
    try:
        given, theirs = parser.parse_known_args(words)
    except argparse.ArgumentError as e:
        raise UserError(f"{e.argument_name} needs a value; see --help") from None
    for word in theirs:
        if word.startswith("--"):
            options.find(word, options.options(SCRIPTS[script].Config) | known)
    ours = [f"--{name}={value}" for name in known for value in getattr(given, name)]
    config, _ = options.parse(Config, ours, __doc__)
    return Comparison(config, script, theirs, make_arms(given.vary, given.arm),
                      read_tunings(given.tune))


def main():
    comparison = read(sys.argv[1:])
    command = shlex.join(["python", "compare.py", *sys.argv[1:]])
    try:
        comparison.execute()
        print(report.write(comparison.folder, comparison.arms, command))
    except BrokenPipeError:  # `| head` has seen enough
        raise
    except OSError as e:
        raise UserError(f"cannot write to {e.filename or comparison.folder}: {e.strerror}. "
                        "Type the same command again when that is mended") from None
    except Stopped:
        print("\nstopped; the runs under way are saved. Type the same command again to go on:\n"
              + command, file=sys.stderr)
        sys.exit(128 + comparison.signal)
    try:
        for path in figures.draw(runs.compared(comparison.folder), comparison.folder):
            if path.suffix == ".png":
                print(path)
        folder = shlex.quote(str(comparison.folder))
        print(f"and as SVG. To draw them anew: python plot.py {folder}")
    except UserError as e:
        print(f"no figures: {e}")


if __name__ == "__main__":
    options.run(main)
