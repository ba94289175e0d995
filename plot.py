"""Draw runs as figures for a paper, each as PNG and SVG.

    python plot.py out                                         # one run -> out/figures/
    python plot.py out out-on                                  # two runs -> figures/
    python plot.py out-compare --x=tokens                      # what compare.py has compared
    python plot.py out out-on --x=tokens --labels=softmax,preconditioned --layer=0
    python plot.py results/*.json --out=results                # several comparisons

Runs that differ only in their seed are one group, with one colour.

validation   validation loss (accuracy or average precision where the task has it), and each
             group's difference to the first, paired by seed
difference   the last validation result of each group against the first: every seed, and the mean
             with its 95% interval by Student's t
kappa        condition number of the head outputs by layer, before C (A) and after (C A)
training     learning rate and gradient norm
spectrum     singular values of A and C A in one layer of the best checkpoint, on the validation
             samples that kappa is measured on

Of compare.json files two others are drawn:

forest        every arm's difference to the first one of its comparison
conditioning  the final metric of each run against its condition number

On linear axes the line is the mean over seeds, and the band one standard deviation (n - 1 in its
denominator) to either side; on logarithmic axes they are the median and the range. Needs
requirements-extra.txt.
"""
import engine.startup  # noqa: F401  (first: it answers mistakes before PyTorch is loaded)

# isort: split
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from engine import options
from engine.options import UserError, at_least
from study import figures, runs


@dataclass
class Config(options.Options):
    x: Annotated[Literal["step", "tokens", "seconds"],
                 "the horizontal axis; seconds are those of training alone"] = "step"
    out: Annotated[str, "folder for the figures; empty: in that of the run or comparison, for "
                        "several runs figures/"] = ""
    layer: Annotated[int, "layer of the spectrum, 0 is the first; -1: the last",
                     at_least(-1)] = -1
    labels: Annotated[str, "names of the groups, separated by commas; empty: the options in which "
                           "they differ"] = ""


def main():
    folders, words = [], []
    value_follows = False
    for word in sys.argv[1:]:  # a word is a run, unless it is an option or the value of one
        if value_follows or word.startswith("-"):
            words.append(word)
        else:
            folders.append(Path(word))
        value_follows = word.startswith("--") and "=" not in word
    config, _ = options.parse(Config, words, __doc__)
    if not folders:
        raise UserError("name the folder of at least one run: python plot.py RUN [RUN ...]; "
                        "see --help")
    out = Path(config.out or "figures")
    if all(path.suffix == ".json" for path in folders):
        drawn = figures.draw_comparisons(folders, out)
    else:
        groups = runs.group(folders, config.labels)
        if len(folders) == 1 and not config.out:
            out = folders[0] if runs.compared(folders[0]) else folders[0] / out
        figures.check_folder(groups, out)
        drawn = figures.draw(groups, out, config.x, config.layer)
    for path in drawn:
        print(path)


if __name__ == "__main__":
    options.run(main)
