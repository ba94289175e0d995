"""What all figures share: colours, lines with bands, axes under a title, a key below them."""
import math
from pathlib import Path

import numpy as np

from study.runs import Groups, every

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
           "#000000")  # Okabe and Ito 2008, without their yellow
DARK = "#333333"
STYLE = {"font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
         "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.6, "axes.axisbelow": True,
         "legend.frameon": False, "lines.linewidth": 1.5, "lines.markersize": 3.5,
         "savefig.dpi": 200, "svg.hashsalt": "plot"}  # the salt makes equal figures equal files
LETTER = 0.08  # the width of a letter in inches, with room to spare
X_LABELS = {"step": "Training step", "tokens": "Training tokens",
            "seconds": "Training time (s)"}
SIZES = {"n_layer": "layers", "n_head": "heads", "n_embd": "width", "block_size": "context"}
INFINITE = "^"  # the marker of a point that is off the axis


def line(ax, xs: np.ndarray, values: np.ndarray, colour, log: bool = False, edge: float = 1.0,
         **style) -> tuple[np.ndarray, np.ndarray]:
    """Draw values (runs, n) as a line with a band, or one point; returns the band's edges.

    Infinite points become triangles at `edge`, 1 being the top of the axes. Where a seed is
    infinite there is no band.
    """
    if log:  # there the mean would be that of the largest value
        middle = np.median(values, axis=0)
        low, high = values.min(axis=0), values.max(axis=0)
    else:
        middle = values.mean(axis=0)
        sd = values.std(axis=0, ddof=1) if len(values) > 1 else 0.0
        low, high = middle - sd, middle + sd
    if len(values) > 1:
        whole = np.isfinite(high)
        ax.fill_between(xs, low, high, where=whole, color=colour, alpha=0.15, linewidth=0)
    if len(xs) == 1:  # line and band would be invisible
        style = {"marker": "o"} | style
        ax.vlines(xs, low, high, color=colour)
    infinite = ~np.isfinite(middle)
    ax.plot(xs, np.where(infinite, np.nan, middle), color=colour, **style)
    if infinite.any():
        ax.plot(xs[infinite], np.full(infinite.sum(), edge), INFINITE, color=colour, markersize=5,
                clip_on=False, gid="infinite", transform=ax.get_xaxis_transform(),
                fillstyle=style.get("fillstyle"))
    return low, high


def canvas(groups: Groups, count: int, columns: int, size: tuple[float, float], title: str,
           x: str, log: bool | None = None, **shared):
    """-> (figure, axes): `count` axes of `size` inches in `columns`.

    The title says what is drawn, and of which model and data; with `log`, True or False, also
    what `line` does with several seeds.
    """
    from matplotlib.ticker import EngFormatter
    if log is not None:
        title += over_seeds(groups, log)
    said = f"{title}\n{subject(groups)}"
    figure, axes = panels(count, columns, size, (0.7, 1.1), **shared)
    figure.suptitle(said, fontsize=9)
    widen(figure, LETTER * max(map(len, said.split("\n"))))
    for ax in axes[-columns:]:
        ax.set_xlabel(X_LABELS.get(x, x))
        ax.tick_params(labelbottom=True)
        if x == "tokens":
            ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    return figure, axes


def panels(count: int, columns: int, size: tuple[float, float], margin: tuple[float, float],
           **shared):
    """-> (figure, axes): `count` axes of `size` inches in `columns`."""
    from matplotlib.figure import Figure
    rows = math.ceil(count / columns)
    inches = margin[0] + size[0] * columns, margin[1] + size[1] * rows
    figure = Figure(figsize=inches, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def widen(figure, inches: float):
    figure.set_figwidth(max(figure.get_figwidth(), inches))


def rows_of(ax, labels: list[str]):
    """Rows 0, 1, ... from the top, each with its label."""
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.grid(False, axis="y")


def key(figure, groups: Groups, styles: dict[str, str] | None = None):
    """Say below the axes which colour is which group, and what styles {meaning: style} stand for.

    A style is that of a line, or INFINITE.
    """
    from matplotlib.lines import Line2D
    colours = [Line2D([], [], color=colour, label=label) for colour, label in zip(COLOURS, groups)]
    widest = LETTER * (max(map(len, groups)) + 7)
    if styles:
        widen(figure, widest + 2.0)
        rows = max(len(groups), len(styles))
        marks = []
        for meaning, style in styles.items():
            kind = "marker" if style == INFINITE else "linestyle"
            look = {"linestyle": "", kind: style}
            marks.append(Line2D([], [], color=DARK, label=meaning, **look))
        figure.legend(handles=colours, loc="outside lower left")
        figure.legend(handles=marks, loc="outside lower right")
    else:
        widen(figure, widest)
        columns = min(len(groups), int(figure.get_figwidth() / widest))
        rows = math.ceil(len(groups) / columns)
        figure.legend(handles=colours, ncols=columns, loc="outside lower center")
    figure.set_figheight(figure.get_figheight() + 0.2 * rows)


def subject(groups: Groups) -> str:
    """What all runs have in common: data, attention, size."""
    configs = [run.config for run in every(groups)]
    same = {key: value for key, value in configs[0].items()
            if all(config.get(key) == value for config in configs)}
    parts = [same.get("task") or Path(same["dataset"]).stem]
    if "attention" in same:
        parts.append(f"{same['attention']} attention")
    return ", ".join(parts + [f"{SIZES[key]} {same[key]}" for key in SIZES if key in same])


def over_seeds(groups: Groups, log: bool) -> str:
    """The end of a title: what lines and bands are."""
    counts = sorted({len(runs) for runs in groups.values()})
    if counts == [1]:
        return ""
    shown = "median and range" if log else "mean and standard deviation"
    return f": {shown} of {' or '.join(map(str, counts))} seeds"


def focus(ax, spans: list[tuple[np.ndarray, np.ndarray, np.ndarray]], *also: float):
    """Fit the y axis to the bands (x, low, high) and `also` after a tenth of the training.

    What comes before would dwarf all that follows.
    """
    if min(len(xs) for xs, _, _ in spans) < 5:  # no beginning to leave out
        return
    edges = list(also)
    for xs, low, high in spans:
        late = xs >= 0.1 * xs[-1]
        edges += [*low[late], *high[late]]
    low, high = min(edges), max(edges)
    margin = 0.05 * (high - low) or 1.0
    ax.set_ylim(low - margin, high + margin)
