"""Draw runs as figures for a paper, each as PNG and SVG.

    python plot.py out out-on                                  # two runs -> figures/
    python plot.py out-compare/runs/* --out=out-compare        # runs that differ only in their seed become one mean line with a band
    python plot.py out out-on --x=tokens --labels=softmax,preconditioned --layer=0

validation   validation loss (accuracy or average precision where the task has it), and each group's difference to the first, paired by seed
difference   the last validation result of each group against the first: every seed, and the mean with its 95% interval by Student's t
kappa        condition number of the head outputs by layer, before C (A) and after (C A)
training     learning rate and gradient norm
spectrum     singular values of A and C A in one layer of the best checkpoint, on the validation samples that kappa is measured on

On linear axes the line is the mean over seeds and the band one standard deviation (n - 1 in its denominator) to either side; on
logarithmic axes they are the median and the range. Needs matplotlib.
"""
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

from engine import checkpoint
from engine import options
from study import stats
import train
import train_lra
import train_vision
from engine.options import UserError
from study.curves import DATA, METRICS, Groups, Run, group, identity, series
from data import text
from engine.device import Compute
from model import GPT, Classifier
from precond import condition_number, precondition, record

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito 2008, without their yellow
DARK = "#333333"
STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
         "grid.color": "#e6e6e6", "grid.linewidth": 0.6, "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 1.5,
         "lines.markersize": 3.5, "savefig.dpi": 200, "svg.hashsalt": "plot"}  # the salt makes equal figures equal files
LETTER = 0.08  # the width of a letter in inches, with room to spare
X_LABELS = {"step": "Training step", "tokens": "Training tokens", "seconds": "Training time (s)"}
BEFORE, AFTER, WOULD_BE = "--", "-", ":"  # line styles of A, of C A, and of the C A that a run without C could have


@dataclass
class Config(options.Options):
    x: Annotated[Literal["step", "tokens", "seconds"], "the horizontal axis; seconds are those of training alone"] = "step"
    out: Annotated[str, "folder for the figures"] = "figures"
    layer: Annotated[int, "layer of the spectrum, 0 is the first; -1: the last"] = -1
    labels: Annotated[str, "names of the groups, separated by commas; empty: the options in which they differ"] = ""

    def __post_init__(self):
        super().__post_init__()
        if self.layer < -1:
            raise ValueError(f"layer={self.layer} must be 0 or more, or -1 for the last")


def applied(runs: list[Run]) -> bool:
    return any(run.config["precond"] for run in runs)


def draw(groups: dict[str, list[Path]], out: Path, x: str = "step", layer: int | None = None) -> list[Path]:
    """Write the figures of the runs' folders, by label, to `out`; returns the files. x: step, tokens, seconds; layer None: the last.

    Where data or checkpoints are gone the spectrum is left out, with a line that says so. Raises UserError for runs that cannot be
    compared, and where matplotlib is missing.
    """
    try:
        from matplotlib import rc_context
    except ImportError:
        raise UserError("figures need matplotlib: pip install -r requirements-extra.txt") from None
    runs = {label: [Run.read(Path(folder)) for folder in folders] for label, folders in groups.items()}
    check(runs, x)
    with rc_context(STYLE):
        figures = {"validation": validation(runs, x), "kappa": kappa(runs, x), "training": training(runs, x)}
        if differences := final_differences(runs):
            figures["difference"] = difference(runs, differences)
        try:
            figures["spectrum"] = spectrum(runs, spectra(runs, layer), layer)
        except options.DataError as e:
            print(f"no spectrum: {e}", flush=True)
        written = []
        try:
            Path(out).mkdir(parents=True, exist_ok=True)
            for name, figure in figures.items():
                for path, metadata in (Path(out) / f"{name}.png", None), (Path(out) / f"{name}.svg", {"Date": None}):
                    figure.savefig(path, metadata=metadata)
                    written.append(path)
        except OSError as e:
            raise UserError(f"cannot write to {out}: {e.strerror or e}") from None
    return written


def check(groups: Groups, x: str):
    """Raises UserError where the groups cannot be drawn into one figure."""
    if not groups or not all(groups.values()):
        raise UserError("no runs to draw: name the folder of at least one run for each label")
    if len(groups) > len(COLOURS):
        raise UserError(f"{len(groups)} groups of runs, but {len(COLOURS)} colours that can be told apart: draw fewer at a time")
    first, *others = [run for runs in groups.values() for run in runs]
    for runs in groups.values():
        seen = {}
        for run in runs:
            other = seen.setdefault((run.config["seed"], str(identity(run))), run)
            if other is not run:
                raise UserError(f"{other.folder} and {run.folder} are the same run, seed {run.config['seed']}: leave one out")
    for run in others:
        if different := [key for key in DATA if run.config.get(key) != first.config.get(key)]:
            said = [", ".join(f"{key}={r.config[key]}" for key in different if key in r.config) for r in (first, run)]
            raise UserError(f"{first.folder} and {run.folder} were trained on different data ({said[0]}; {said[1]}): draw them separately")
        unit = "tokens" if x == "tokens" else "step"
        ends = [list(r.along(unit).values())[-1] for r in (first, run)]
        if ends[0] != ends[1]:
            raise UserError(f"{first.folder} ends at {unit} {ends[0]:,}, {run.folder} at {unit} {ends[1]:,}: finish the shorter with "
                            "--init_from=resume, or draw runs of one length")


def line(ax, xs: np.ndarray, values: np.ndarray, colour, log: bool = False, edge: float = 1.0, **style) -> tuple[np.ndarray, np.ndarray]:
    """Draw values (runs, n) as a line with a band, see the module's docstring; returns the band's edges.

    Infinite points become triangles at `edge`, 1 being the top of the axes; where a seed is infinite there is no band.
    """
    if log:
        middle, low, high = np.median(values, axis=0), values.min(axis=0), values.max(axis=0)
    else:
        middle, sd = values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else 0.0
        low, high = middle - sd, middle + sd
    if len(values) > 1:
        ax.fill_between(xs, low, high, where=np.isfinite(high), color=colour, alpha=0.15, linewidth=0)
    finite = np.isfinite(middle)
    ax.plot(xs, np.where(finite, middle, np.nan), color=colour, **style)
    if not finite.all():
        ax.plot(xs[~finite], np.full((~finite).sum(), edge), color=colour, marker="^", linestyle="none", markersize=5, clip_on=False,
                gid="infinite", transform=ax.get_xaxis_transform(), fillstyle=style.get("fillstyle"))
    return low, high


def canvas(groups: Groups, count: int, columns: int, size: tuple[float, float], title: str, x: str, **shared):
    """A figure of `count` axes of `size` inches in `columns`, under a title that says what is drawn, and of which model and data."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter
    rows = -(-count // columns)
    figure = Figure(figsize=(0.7 + size[0] * columns, 1.1 + size[1] * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
    for ax in axes[count:]:
        ax.remove()
    for i, ax in enumerate(axes[:count]):
        if i + columns >= count:
            ax.set_xlabel(X_LABELS.get(x, x))
            ax.tick_params(labelbottom=True)
        if x == "tokens":
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    said = f"{title}\n{subject(groups)}"
    figure.suptitle(said, fontsize=9)
    figure.set_figwidth(max(figure.get_figwidth(), LETTER * max(map(len, said.split("\n")))))
    return figure, axes[:count]


def tiling(count: int) -> int:
    """Columns for `count` panels: at most 4, and few gaps in the last row."""
    return 3 if count in (5, 6, 9) else min(count, 4)


def key(figure, groups: Groups, styles: dict[str, str] | None = None):
    """Say below the axes which colour is which group, and what the markers and line styles {meaning: style} stand for."""
    from matplotlib.lines import Line2D
    styles, row = styles or {}, 0.2  # inches
    widest = LETTER * (max(map(len, groups)) + 7)
    figure.set_figwidth(max(figure.get_figwidth(), widest + (2.0 if styles else 0.0)))
    columns = 1 if styles else min(len(groups), int(figure.get_figwidth() / widest))
    figure.set_figheight(figure.get_figheight() + row * max(-(-len(groups) // columns), len(styles)))
    figure.legend(handles=[Line2D([], [], color=colour, label=label) for colour, label in zip(COLOURS, groups)], ncols=columns,
                  loc="outside lower left" if styles else "outside lower center")
    if styles:
        marks = [Line2D([], [], color=DARK, label=meaning, marker=style if style == "^" else "", linestyle="" if style == "^" else style)
                 for meaning, style in styles.items()]
        figure.legend(handles=marks, loc="outside lower right")


def subject(groups: Groups) -> str:
    """What all runs have in common: data, attention, size."""
    runs = [run.config for of in groups.values() for run in of]
    same = {key: value for key, value in runs[0].items() if all(run.get(key) == value for run in runs)}
    names = {"n_layer": "layers", "n_head": "heads", "n_embd": "width", "block_size": "context"}
    sizes = [f"{name} {same[key]}" for key, name in names.items() if key in same]
    return ", ".join([same["task"] if "task" in same else Path(same["dataset"]).stem]
                     + ([f"{same['attention']} attention"] if "attention" in same else []) + sizes)


def over_seeds(groups: Groups, log: bool) -> str:
    """The end of a title that says what lines and bands are."""
    low, high = (f(map(len, groups.values())) for f in (min, max))
    if high == 1:
        return ""
    return f": {'median and range' if log else 'mean and standard deviation'} of {low if low == high else f'{low} to {high}'} seeds"


def focus(ax, spans: list[tuple[np.ndarray, np.ndarray, np.ndarray]], *also: float):
    """Fit the y axis to the bands (x, low, high) and `also` after the first tenth of training, which would dwarf all that follows."""
    late = [xs >= 0.1 * xs[-1] for xs, _, _ in spans]
    if min(sum(here) for here in late) > 3:
        edges = [*np.concatenate([edge[here] for (_, *both), here in zip(spans, late) for edge in both]), *also]
        margin = 0.05 * (max(edges) - min(edges)) or 1.0
        ax.set_ylim(min(edges) - margin, max(edges) + margin)


def validation(groups: Groups, x: str):
    """The metric over training; below it, where the groups share seeds and x, the paired difference to the first group."""
    baseline, *others = groups
    metric = groups[baseline][0].metric
    scale, name, unit, better = METRICS[metric]
    xs = {label: series(runs, metric, x)[0] for label, runs in groups.items()}
    by_seed = {label: {run.config["seed"]: run for run in runs} for label, runs in groups.items()}
    pairs = {label: shared for label in others if (shared := sorted(set(by_seed[baseline]) & set(by_seed[label])))
             and np.array_equal(xs[baseline], xs[label])}
    figure, axes = canvas(groups, 2 if pairs else 1, 1, (4.8, 2.5), f"Validation {name}" + over_seeds(groups, False), x, sharex=True)
    above, below = [], []
    for colour, (label, runs) in zip(COLOURS, groups.items()):
        values = scale * series(runs, metric, x)[1]
        above.append((xs[label], *line(axes[0], xs[label], values, colour, label=label, marker="o")))
        if label in pairs:
            mine, its = (scale * series([by_seed[of][seed] for seed in pairs[label]], metric, x)[1] for of in (label, baseline))
            below.append((xs[label], *line(axes[1], xs[label], mine - its, colour, marker="o")))
    axes[0].set_ylabel(f"Validation {name} ({unit})")
    focus(axes[0], above)
    if pairs:
        axes[1].axhline(0, color=COLOURS[0], linewidth=1)
        said = textwrap.fill(f"Difference to {baseline}", int(2.5 / LETTER))
        axes[1].set_ylabel(f"{said}\n({'points' if unit == '%' else unit}; {better} 0 is better)")
        focus(axes[1], below, 0.0)
    key(figure, groups)
    return figure


def final_differences(groups: Groups) -> dict[str, list[float]]:
    """By label, the differences of the last validation result to the first group's, for the groups that share two seeds or more with it."""
    scale = METRICS[next(iter(groups.values()))[0].metric][0]
    final = {label: {run.config["seed"]: scale * next(r[run.metric] for r in reversed(run.records) if run.metric in r) for run in runs}
             for label, runs in groups.items()}
    baseline, *others = groups
    shared = {label: sorted(final[baseline].keys() & final[label].keys()) for label in others}
    return {label: [final[label][seed] - final[baseline][seed] for seed in seeds] for label, seeds in shared.items() if len(seeds) > 1}


def difference(groups: Groups, differences: dict[str, list[float]]):
    """A row for each group of `final_differences`."""
    baseline = next(iter(groups))
    _, name, unit, better = METRICS[groups[baseline][0].metric]
    side = {"above": "right", "below": "left"}[better]
    title = f"Validation {name} at the last step, paired by seed:\nevery seed, and the mean with its 95% interval"
    said = textwrap.fill(f"Difference to {baseline} ({'points' if unit == '%' else unit}; {side} of 0 is better)", int(4.8 / LETTER))
    figure, (ax,) = canvas(groups, 1, 1, (4.8, 0.3 + 0.4 * len(differences)), title, said)
    ax.axvline(0, color=COLOURS[0], linewidth=1)
    for row, (label, values) in enumerate(differences.items()):
        colour, result = COLOURS[list(groups).index(label)], stats.paired(values)
        ax.plot(values, np.full(len(values), row), color=colour, marker="o", linestyle="none", alpha=0.3)
        ax.errorbar(result.mean, row, xerr=[[result.mean - result.low], [result.high - result.mean]], color=colour, marker="D", markersize=5,
                    capsize=4)
    ax.set_yticks(range(len(differences)), [textwrap.fill(label, 30) for label in differences])
    ax.set_ylim(len(differences) - 0.5, -0.5)
    ax.grid(False, axis="y")
    return figure


def kappa(groups: Groups, x: str):
    """One panel a layer: kappa(A) and kappa(C A) of each group."""
    from matplotlib.colors import to_rgb
    depths = {label: runs[0].config["n_layer"] for label, runs in groups.items()}
    count = max(depths.values())
    title, size = "Condition number of head outputs" + over_seeds(groups, True), (2.0, 1.9) if len(groups) < 4 else (2.5, 2.4)
    figure, axes = canvas(groups, count, tiling(count), size, title, x, sharex=True, sharey=True)
    for layer, ax in enumerate(axes):
        ax.set_title(f"layer {layer}")
        ax.set_yscale("log")
        for i, (colour, (label, runs)) in enumerate(zip(COLOURS, groups.items())):
            if layer < depths[label]:
                common = dict(log=True, edge=1 - 0.06 * i, marker="o", markersize=2)  # the marker shows a point between infinite ones
                line(ax, *series(runs, "kappa_after", x, layer), colour, linestyle=AFTER if applied(runs) else WOULD_BE, **common)
                dark = [0.6 * part for part in to_rgb(colour)]  # A stays visible where C changes nothing
                line(ax, *series(runs, "kappa_before", x, layer), dark, linestyle=BEFORE, linewidth=1, fillstyle="none", **common)
    styles = {"A, before C": BEFORE} | {"C A, after C" if applied(runs) else "C A, if C were applied":
                                        AFTER if applied(runs) else WOULD_BE for runs in groups.values()}
    if any(drawn.get_gid() == "infinite" for ax in axes for drawn in ax.lines):
        styles["infinite (A: hollow)"] = "^"
    key(figure, groups, styles)
    figure.supylabel(r"$\kappa = \sigma_{\max} / \sigma_{\min}$", fontsize=9)
    return figure


def training(groups: Groups, x: str):
    """Learning rate and gradient norm side by side; one line where all runs have the same learning rate."""
    from matplotlib.ticker import LogLocator, NullFormatter
    figure, (left, right) = canvas(groups, 2, 2, (3.3, 2.6), "Learning rate and gradient norm" + over_seeds(groups, True), x)
    rates = {label: series(runs, "learning_rate", x) for label, runs in groups.items()}
    spans = []
    same = len({rate.tobytes() for _, values in rates.values() for rate in values}) == 1
    for colour, (label, runs) in zip(COLOURS, groups.items()):
        if not same:
            line(left, *rates[label], colour, log=True, label=label)
        spans += line(right, *series(runs, "grad_norm", x), colour, log=True, label=label)
    if same:
        line(left, *rates[label], DARK, log=True, label="all runs")
        left.legend()
    left.set_ylabel("Learning rate")
    left.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    ends = np.concatenate(spans)
    if ends.max() > 5 * ends.min():
        right.set_yscale("log")
        right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.yaxis.set_major_formatter("{x:g}")
        right.yaxis.set_minor_formatter(NullFormatter())
    right.set_ylabel("Gradient norm, before clipping")
    clips = {run.config["grad_clip"] for runs in groups.values() for run in runs}
    if len(clips) == 1 and (clip := clips.pop()):
        right.legend(handles=[right.axhline(clip, color=DARK, linewidth=1, linestyle=":", label=f"clipped at {clip:g}")])
    key(figure, groups)
    return figure


def load(run: Run):
    """-> (model of the best or else the latest checkpoint, in evaluation mode, on the CPU; task with the run's data; configuration).

    Text and sequences are not prepared or downloaded: their data is the folder of data_dir that the checkpoint was trained on. Raises
    DataError where the data or the checkpoint is gone.
    """
    path = checkpoint.choose(run.folder, best=True)
    if not path.exists():
        raise options.DataError(f"{run.folder} holds no checkpoint")
    saved = checkpoint.read(path)
    if not {"config", "model", "task"} <= set(saved):
        raise UserError(f"{path} was not written by this project")
    if saved["config"].get("task") in train_vision.TASKS:
        config = options.resume(train_vision.Config, saved["config"], {})
        with Compute("cpu", "float32", config.n_embd) as compute:
            task, model = train_vision.open(config, compute)
        model.eval()
        checkpoint.restore_model(model, task, saved, run.folder)
        return model, task, config
    script = train_lra if "task" in saved["config"] else train
    config = options.resume(script.Config, saved["config"], {})
    for meta_file in sorted(Path(config.data_dir).glob("*/meta.json")):
        meta = text.read_meta(meta_file.parent)
        meta["data_sha256"] = {name: split["sha256"] for name, split in meta.get("splits", {}).items()}
        if all(meta.get(key) == value for key, value in saved["task"].items()):
            break
    else:
        raise options.DataError(f"the data of {run.folder} is not in {config.data_dir}; training prepares it again")
    if script is train:
        return GPT.from_checkpoint(saved), train.LanguageModelling(config, meta_file.parent), config
    task = train_lra.Classification(config, meta_file.parent)
    model = Classifier(config, meta["vocab_size"], meta["classes"], meta["towers"]).eval()
    checkpoint.restore_model(model, task, saved, run.folder)
    return model, task, config


@torch.no_grad()
def spectra(groups: Groups, layer: int | None) -> dict[str, list[tuple[np.ndarray, float]]]:
    """By label, for A, then C A of a layer: singular values over the largest (matrices, r), largest first, and the median kappa.

    A matrix is a head's output for one sample, real tokens only, of one run; r is the most values that any has, and those with fewer
    rows than r are left out.
    """
    result, data = {}, None
    for label, runs in groups.items():
        found: tuple[list, list] = [], []
        for run in runs:
            model, task, config = load(run)
            data = data or (run.folder, task.state())
            if task.state() != data[1]:
                raise UserError(f"{data[0]} and {run.folder} were trained on different data: the file has changed between them. Draw them "
                                "separately")
            if layer is not None and not 0 <= layer < config.n_layer:
                raise UserError(f"layer={layer}, but {run.folder} has the layers 0 to {config.n_layer - 1}")
            with Compute("cpu", "float32", config.n_embd) as compute, record() as calls:
                mask = task.probe(model, compute)
            a, ca = calls[config.n_layer - 1 if layer is None else layer]  # (B, n_head, T, head_dim)
            if not config.precond:
                ca = precondition(a, **config.would_be)
            for heads, x in zip(found, (a, ca)):
                heads += [head for i, sample in enumerate(x) for head in (sample if mask is None else sample[:, mask[i]])]
        rank = max(min(head.shape) for head in found[0])
        result[label] = []
        for heads in found:
            heads = [head for head in heads if min(head.shape) == rank]
            values = torch.stack([torch.linalg.svdvals(head.double()) for head in heads])
            kappas = torch.stack([condition_number(head) for head in heads])
            result[label].append(((values / values[:, :1]).numpy(), kappas.median().item()))
    return result


def spectrum(groups: Groups, values: dict[str, list[tuple[np.ndarray, float]]], layer: int | None):
    """One panel a group: the median spectrum of A and of C A, with a band from the 10th to the 90th percentile."""
    depths = {run.config["n_layer"] for runs in groups.values() for run in runs}
    where = f"layer {layer}" if layer is not None else f"layer {depths.pop() - 1}" if len(depths) == 1 else "the last layer"
    title = f"Singular values of head outputs in {where}, best checkpoint:\nmedian and 10% to 90% of heads, samples and seeds"
    figure, axes = canvas(groups, len(groups), tiling(len(groups)), (2.6, 2.5), title, "Index i", sharex=True, sharey=True)
    for ax, colour, (label, runs) in zip(axes, COLOURS, groups.items()):
        ax.set_yscale("log")
        ax.set_title(textwrap.fill(label + ("" if applied(runs) else " (C not applied)"), int(2.6 / LETTER)))
        keys = ("A", BEFORE, DARK), ("C A", AFTER if applied(runs) else WOULD_BE, colour)
        for (s, median), (name, style, shade) in zip(values[label], keys):
            index = np.arange(1, s.shape[1] + 1)
            low, middle, high = np.quantile(s, (0.1, 0.5, 0.9), axis=0)
            ax.fill_between(index, low, high, color=shade, alpha=0.15, linewidth=0)
            digits = f"{float(f'{median:.3g}'):,.10g}" if np.isfinite(median) else r"$\infty$"
            ax.plot(index, middle, color=shade, linestyle=style, label=rf"{name}, median $\kappa$ = {digits}")
        ax.legend(loc="upper right")
    smallest = min(s.min() for of in values.values() for s, _ in of)
    bottom = max(smallest / 1.5, 2.0**-24)  # float32's resolution
    axes[0].set_ylim(bottom, bottom**-0.35)  # above 1 there is room for the legend
    figure.supylabel(r"$\sigma_i / \sigma_1$", fontsize=9)
    return figure


def main():
    runs, words, previous = [], [], ""
    for word in sys.argv[1:]:  # a word is a run, unless it is an option or the value of one
        value = previous.startswith("--") and "=" not in previous
        (words if word.startswith("-") or value else runs).append(word)
        previous = word
    config, _ = options.parse(Config, words, __doc__)
    if not runs:
        raise UserError("name the folder of at least one run: python plot.py RUN [RUN ...]; see --help")
    groups = group([Path(run) for run in runs], config.labels)
    for path in draw(groups, Path(config.out), config.x, None if config.layer == -1 else config.layer):
        print(path)


if __name__ == "__main__":
    options.run(main)
