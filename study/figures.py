"""Runs as figures for a paper; plot.py says which, and what their lines and bands are."""
import os
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np

from engine.metrics import METRICS, Metric
from engine.options import DATA, SOURCE, DataError, UserError, marked, need
from engine.run import writing
from study import stats
from study.canvas import COLOURS, DARK, INFINITE, LETTER, STYLE, canvas, focus, key, line, rows_of
from study.comparisons import conditioning, forest, read_comparison
from study.fingerprint import hash_of
from study.runs import Folders, Groups, Run, every, script_of, series
from study.spectra import spectra

# Line styles of A, of C A, and of the C A that a run without C could have.
BEFORE, AFTER, WOULD_BE = "--", "-", ":"


def owner(groups: Folders, out: Path) -> str:
    """What identifies the runs in the metadata of their figures in `out`, moved with it or not."""
    return hash_of(sorted(os.path.relpath(path.resolve(), out.resolve())
                          for paths in groups.values() for path in paths))


def check_folder(groups: Folders, out: Path):
    """Raises UserError where `out` holds the figures of other runs."""
    there = out / "validation.svg"
    if there.exists() and owner(groups, out) not in there.read_text(encoding="utf-8"):
        raise UserError(f"{out} holds figures of other runs: choose another folder with "
                        f"--out=NAME, or remove them")


def draw(groups: Folders, out: Path, x: str = "step", layer: int = -1) -> list[Path]:
    """Write the figures of the runs' folders, by label, to `out`; returns the files.

    x: step, tokens, seconds; layer: the spectrum's, -1 for the last. Where data or checkpoints are
    gone there is no spectrum, and a line says so. Raises UserError for runs that do not belong in
    one figure, and where matplotlib is missing.
    """
    in_style = rc_context()
    # A dollar sign would begin a formula.
    runs = {label.replace("$", r"\$"): [Run.read(Path(folder)) for folder in folders]
            for label, folders in groups.items()}
    check(runs, x, layer)
    with in_style(STYLE):
        figures = {"validation": validation(runs, x), "kappa": kappa(runs, x),
                   "training": training(runs, x)}
        if differences := final_differences(runs):
            figures["difference"] = difference(runs, differences)
        try:
            figures["spectrum"] = spectrum(runs, spectra(runs, layer), layer)
        except DataError as e:
            print(f"no spectrum: {e}", flush=True)
        return write(figures, out, owner(groups, out))


def draw_comparisons(paths: list[Path], out: Path) -> list[Path]:
    """Write the two figures of compare.json files to `out`; returns the files.

    Raises UserError.
    """
    with rc_context()(STYLE):
        studies = {}
        for path in paths:
            # As compare.py names it, or as it was kept.
            name = path.resolve().parent.name if path.stem == "compare" else path.stem
            if name in studies:
                raise UserError(f"two comparisons have the name {name}: rename one")
            studies[name] = read_comparison(path)
        figures = {"forest": forest(studies)}
        if against_kappa := conditioning(studies):
            figures["conditioning"] = against_kappa
        return write(figures, out, hash_of(sorted(map(str, paths))))


def rc_context() -> Callable:
    """matplotlib's. Raises UserError where it is missing."""
    return need("matplotlib", "figures need").rc_context


def write(figures: dict, out: Path, identifier: str) -> list[Path]:
    """Each as PNG and SVG. Raises UserError where `out` cannot be written to."""
    written = []
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            svg = {"Date": None, "Identifier": identifier}
            for kind, metadata in ("png", None), ("svg", svg):
                path = out / f"{name}.{kind}"
                figure.savefig(path, metadata=metadata)
                written.append(path)
    return written


def check(groups: Groups, x: str, layer: int):
    """Raises UserError where the groups cannot be drawn into one figure."""
    if not groups or not all(groups.values()):
        raise UserError("no runs to draw: name the folder of at least one run for each label")
    if len(groups) > len(COLOURS):
        raise UserError(f"{len(groups)} groups of runs, but {len(COLOURS)} colours that can be "
                        "told apart: draw fewer at a time")
    for runs in groups.values():
        seen = {}
        for run in runs:
            other = seen.setdefault(run.seed, run)
            if other is not run:
                raise UserError(f"{other.folder} and {run.folder} are the same run, "
                                f"seed {run.seed}: leave one out")
    first, *others = every(groups)
    unit = "tokens" if x == "tokens" else "step"
    for run in others:
        one, two = data_of(first), data_of(run)
        if one != two:
            raise UserError(f"{first.folder} and {run.folder} were trained on different data "
                            f"({named(one - two)}; {named(two - one)}): draw them separately")
        end, its_end = [max(r.along(unit).values()) for r in (first, run)]
        # Runs of other lengths race along seconds.
        if end != its_end and x != "seconds" and training_of(first) != training_of(run):
            raise UserError(f"{first.folder} ends at {unit} {end:,}, {run.folder} at {unit} "
                            f"{its_end:,}: finish the shorter with --init_from=resume, "
                            "draw runs of one length, or race them with --x=seconds")
    for run in [first, *others]:
        depth = run.config["n_layer"]
        if layer >= depth:
            raise UserError(f"layer={layer}, but {run.folder} has the layers 0 to {depth - 1}")


def training_of(run: Run) -> tuple:
    """The last step, and what a step takes. Where that is equal, tokens differ by padding alone.

    Long Range Arena pads a batch to its longest sequence, and the seed says which is in it.
    """
    sizes = "batch_size", "gradient_accumulation_steps", "block_size", "patch_size"
    return max(run.along("step").values()), *(run.config.get(name) for name in sizes)


def named(options: set[tuple]) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(options))


def data_of(run: Run) -> set[tuple]:
    """The options that choose its data, with their values."""
    names = marked(script_of(run.config).Config, DATA, SOURCE)
    return {item for item in run.config.items() if item[0] in names}


def after(runs: list[Run]) -> str:
    """The style of their line of C A."""
    return AFTER if any(run.config["precond"] for run in runs) else WOULD_BE


def judged(groups: Groups) -> tuple[str, Metric]:
    """The metric that the first run is judged by."""
    name = next(iter(groups.values()))[0].metric
    return name, METRICS[name]


def better_side(metric: Metric, lower: str, higher: str) -> str:
    """For an axis of differences: their unit, and where they are good, `lower` or `higher`."""
    side = lower if metric.better == "lower" else higher
    return f"({metric.difference_unit}; {side} 0 is better)"


def pairs(groups: Groups) -> dict[str, list[tuple[Run, Run]]]:
    """For each group but the first, its runs beside the first group's of the same seeds."""
    baseline, *others = groups
    first = {run.seed: run for run in groups[baseline]}
    return {label: [(first[run.seed], run) for run in groups[label] if run.seed in first]
            for label in others}


def validation(groups: Groups, x: str):
    """The metric over training.

    Below it, where the groups share seeds and x, the difference to the first, paired by seed.
    """
    baseline = next(iter(groups))
    name, metric = judged(groups)
    curves = {group: series(runs, name, x) for group, runs in groups.items()}
    apart = {}  # differences by seed: (runs, n)
    for group, both in pairs(groups).items():
        if both and np.array_equal(curves[group][0], curves[baseline][0]):
            theirs, mine = (series(runs, name, x)[1] for runs in zip(*both))
            apart[group] = mine - theirs
    title = f"Validation {metric.label}"
    count = 2 if apart else 1
    figure, axes = canvas(groups, count, 1, (4.8, 2.5), title, x, log=False, sharex=True)
    above, below = [], []
    for colour, (group, (xs, values)) in zip(COLOURS, curves.items()):
        band = line(axes[0], xs, metric.scale * values, colour, label=group, marker="o")
        above.append((xs, *band))
        if group in apart:
            band = line(axes[1], xs, metric.scale * apart[group], colour, marker="o")
            below.append((xs, *band))
    axes[0].set_ylabel(f"{title} ({metric.drawn_unit})")
    focus(axes[0], above)
    if apart:
        axes[1].axhline(0, color=COLOURS[0], linewidth=1)
        said = textwrap.fill(f"Difference to {baseline}", int(2.5 / LETTER))
        axes[1].set_ylabel(f"{said}\n{better_side(metric, 'below', 'above')}")
        focus(axes[1], below, 0.0)
    key(figure, groups)
    return figure


def final_differences(groups: Groups) -> dict[str, list[float]]:
    """By label, the differences of the last validation results to the first group's, as drawn.

    Of the groups that share two seeds or more with it.
    """
    _, metric = judged(groups)
    return {label: [metric.scale * (run.final - first.final) for first, run in both]
            for label, both in pairs(groups).items() if len(both) > 1}


def difference(groups: Groups, differences: dict[str, list[float]]):
    """A row for each group of `final_differences`."""
    baseline = next(iter(groups))
    _, metric = judged(groups)
    title = (f"Validation {metric.label} at the last step, paired by seed:\n"
             "every seed, and the mean with its 95% interval")
    said = f"Difference to {baseline} {better_side(metric, 'left of', 'right of')}"
    figure, (ax,) = canvas(groups, 1, 1, (4.8, 0.3 + 0.4 * len(differences)), title,
                           textwrap.fill(said, int(4.8 / LETTER)))
    ax.axvline(0, color=COLOURS[0], linewidth=1)
    colours = dict(zip(groups, COLOURS))
    for row, (group, values) in enumerate(differences.items()):
        pair = stats.paired(values)
        colour = colours[group]
        ax.plot(values, [row] * len(values), "o", color=colour, alpha=0.3)
        ends = None  # without a spread there is no interval
        if pair.low is not None:
            ends = [[pair.mean - pair.low], [pair.high - pair.mean]]
        ax.errorbar(pair.mean, row, xerr=ends, color=colour, marker="D", markersize=5, capsize=4)
    rows_of(ax, [textwrap.fill(group, 30) for group in differences])
    return figure


def kappa(groups: Groups, x: str):
    """One panel a layer: kappa(A) and kappa(C A) of each group."""
    from matplotlib.colors import to_rgb
    depths = {label: runs[0].config["n_layer"] for label, runs in groups.items()}
    count = max(depths.values())
    size = (2.0, 1.9) if len(groups) < 4 else (2.5, 2.4)
    figure, axes = canvas(groups, count, min(count, 4), size, "Condition number of head outputs",
                          x, log=True, sharex=True, sharey=True)
    for layer, ax in enumerate(axes):
        ax.set_title(f"layer {layer}")
        ax.set_yscale("log")
        for i, (colour, (label, runs)) in enumerate(zip(COLOURS, groups.items())):
            if layer >= depths[label]:
                continue
            # The marker shows a point between infinite ones.
            common = dict(log=True, edge=1 - 0.06 * i, marker="o", markersize=2)
            line(ax, *series(runs, "kappa_after", x, layer), colour, linestyle=after(runs),
                 **common)
            dark = [0.6 * part for part in to_rgb(colour)]  # A stays visible where C does nothing
            line(ax, *series(runs, "kappa_before", x, layer), dark, linestyle=BEFORE, linewidth=1,
                 fillstyle="none", **common)
    styles = line_styles(groups)
    if any(drawn.get_gid() == "infinite" for ax in axes for drawn in ax.lines):
        styles["infinite (A: hollow)"] = INFINITE
    key(figure, groups, styles)
    figure.supylabel(r"$\kappa = \sigma_{\max} / \sigma_{\min}$", fontsize=9)
    return figure


def line_styles(groups: Groups) -> dict[str, str]:
    """{meaning: style} of the lines of A and of C A."""
    meanings = {AFTER: "C A, after C", WOULD_BE: "C A, if C were applied"}
    used = dict.fromkeys(map(after, groups.values()))
    return {"A, before C": BEFORE} | {meanings[style]: style for style in used}


def training(groups: Groups, x: str):
    """Learning rate and gradient norm; one line where all runs have the same learning rate."""
    from matplotlib.ticker import LogLocator, NullFormatter
    figure, (left, right) = canvas(groups, 2, 2, (3.3, 2.6), "Learning rate and gradient norm",
                                   x, log=True)
    rates = {label: series(runs, "learning_rate", x) for label, runs in groups.items()}
    spans = []
    distinct = {rate.tobytes() for _, values in rates.values() for rate in values}
    same = len(distinct) == 1
    for colour, (label, runs) in zip(COLOURS, groups.items()):
        if not same:  # equal lines would hide one another
            line(left, *rates[label], colour, log=True, label=label)
        spans += line(right, *series(runs, "grad_norm", x), colour, log=True, label=label)
    if same:
        line(left, *rates[label], DARK, log=True, label="all runs")
        left.legend()
    left.set_ylabel("Learning rate")
    left.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    norms = np.concatenate(spans)
    if norms.max() > 5 * norms.min():
        right.set_yscale("log")
        right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        right.yaxis.set_major_formatter("{x:g}")
        right.yaxis.set_minor_formatter(NullFormatter())
    right.set_ylabel("Gradient norm, before clipping")
    clip, *others = {run.config["grad_clip"] for run in every(groups)}
    if clip and not others:
        label = f"clipped at {clip:g}"
        drawn = right.axhline(clip, color=DARK, linewidth=1, linestyle=":", label=label)
        right.legend(handles=[drawn])
    key(figure, groups)
    return figure


def spectrum(groups: Groups, values: dict[str, list[tuple[np.ndarray, float]]], layer: int):
    """One panel a group: the median spectrum of A and of C A, and 80% of them as a band."""
    depths = {run.config["n_layer"] for run in every(groups)}
    where = "the last layer"
    if layer >= 0 or len(depths) == 1:
        where = f"layer {layer % depths.pop()}"
    title = (f"Singular values of head outputs in {where}, best checkpoint:\n"
             "median and 10% to 90% of heads, samples and seeds")
    count = len(groups)
    figure, axes = canvas(groups, count, min(count, 4), (2.6, 2.5), title, "Index i",
                          sharex=True, sharey=True)
    for ax, colour, (label, runs) in zip(axes, COLOURS, groups.items()):
        ax.set_yscale("log")
        kappas = []
        looks = (BEFORE, DARK), (after(runs), colour)
        for (s, median), (style, shade) in zip(values[label], looks):
            index = np.arange(1, s.shape[1] + 1)
            low, middle, high = np.quantile(s, (0.1, 0.5, 0.9), axis=0)
            ax.fill_between(index, low, high, color=shade, alpha=0.15, linewidth=0)
            ax.plot(index, middle, color=shade, linestyle=style)
            rounded = float(f"{median:.3g}")  # three digits, also of a large number
            kappas.append(f"{rounded:,.10g}" if np.isfinite(median) else r"$\infty$")
        said = textwrap.fill(label, int(2.6 / LETTER))
        before, behind = kappas
        ax.set_title(f"{said}\nmedian $\\kappa$: A {before}, C A {behind}")
    smallest = min(s.min() for pair in values.values() for s, _ in pair)
    axes[0].set_ylim(max(smallest / 1.5, 2.0**-24), 1.5)  # float32's resolution
    key(figure, groups, line_styles(groups))
    figure.supylabel(r"$\sigma_i / \sigma_1$", fontsize=9)
    return figure
