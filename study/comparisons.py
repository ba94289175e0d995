"""Several comparisons in one figure, from their compare.json files."""
import itertools
import json
import math
from pathlib import Path

import numpy as np

from engine.metrics import METRICS
from engine.options import UserError
from study import stats
from study.canvas import COLOURS, INFINITE, panels, rows_of


def read_comparison(path: Path) -> dict:
    """compare.json -> its metric, its first arm, {arm: the difference to the first} as pairs, and
    {arm: [(kappa, final metric) of each run]}.

    Raises UserError.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        pairs = {name: arm["paired"] for name, arm in report["arms"].items() if "paired" in arm}
        # Reports of before kappa was kept for each run have no points.
        points = {name: [(math.inf if kappa is None else kappa, final)
                         for kappa, final in zip(arm["kappa"], arm["final"]) if final is not None]
                  for name, arm in report["arms"].items() if "kappa" in arm}
        return {"metric": METRICS[report["metric"]], "pairs": pairs, "points": points,
                "first": next(iter(report["arms"]))}
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is no compare.json of this version ({e!r})") from None


def forest(studies: dict[str, dict]):
    """Of what `read_comparison` gives, a row for each arm: its mean difference and 95% interval.

    Right of 0 is better, whatever the metric: where lower is better the axis runs to the left.
    """
    if empty := [name for name, study in studies.items() if not study["pairs"]]:
        raise UserError(f"{', '.join(empty)}: no arm could be paired with the first")
    columns = 1 if len(studies) <= 6 else 2
    lines = [len(study["pairs"]) + 1.5 for study in studies.values()]
    heights = [max(lines[i:i + columns]) for i in range(0, len(lines), columns)]
    size = 5.0, 0.27 * sum(heights) / len(heights)
    figure, axes = panels(len(studies), columns, size, (1.5, 0.9), height_ratios=heights)
    figure.suptitle("Difference to the first arm, paired by seed: mean and 95% interval.\n"
                    "Right of 0 is better", fontsize=9)
    for ax, (name, study) in zip(axes, studies.items()):
        metric = study["metric"]
        scale = metric.scale
        furthest = 0.0
        for row, pair in enumerate(study["pairs"].values()):
            ends = [pair["low"], pair["high"]]
            if None in ends:  # without a spread there is no interval
                ends = [pair["mean"]] * 2
            ends = [scale * end for end in ends]
            ax.plot(ends, [row, row], color=COLOURS[0])
            ax.plot(scale * pair["mean"], row, color=COLOURS[0], marker="D", markersize=5)
            furthest = max(furthest, *map(abs, ends))
        side = furthest * 1.1 or 1.0
        if metric.better == "lower":
            side = -side
        ax.set_xlim(-side, side)
        counts = {arm: pair["n"] for arm, pair in study["pairs"].items()}
        rows_of(ax, [f"{arm} ({n} seed{'s' * (n > 1)})" for arm, n in counts.items()])
        ax.axvline(0, color=COLOURS[-1], linewidth=1)
        ax.set_title(f"{name}: {metric.label} ({metric.difference_unit}), to {study['first']}",
                     loc="left")
    return figure


def has_correlation(study: dict) -> bool:
    kappas = [kappa for points in study["points"].values() for kappa, _ in points]
    return len(kappas) > 3 and len(set(kappas)) > 1


def conditioning(studies: dict[str, dict]):
    """A panel for each comparison: the final metric of each run against its kappa. None: no panel.

    kappa is of the matrices that the trained model used, C A or A: the median over layers. A panel
    says Spearman's rank correlation over all its runs; of three or fewer there is none, nor where
    kappa is infinite for all.
    """
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
    studies = {name: study for name, study in studies.items() if has_correlation(study)}
    if not studies:
        return None
    arms = dict.fromkeys(arm for study in studies.values() for arm in study["points"])
    looks = {}
    styles = itertools.product("osDv", COLOURS)  # the next marker when the colours are used up
    for arm, (marker, colour) in zip(arms, itertools.cycle(styles)):
        looks[arm] = {"color": colour, "marker": marker}
    columns = min(3, len(studies))
    figure, axes = panels(len(studies), columns, (3.4, 2.4), (0.6, 1.2))
    figure.suptitle("Each run's final metric against the condition number of its head outputs as "
                    "used,\nthe median over layers. Triangles at the edge: infinite", fontsize=9)
    for ax, (name, study) in zip(axes, studies.items()):
        metric = study["metric"]
        ax.set_xscale("log")
        ax.xaxis.set_minor_formatter(NullFormatter())  # labels are too wide for small panels
        for arm, points in study["points"].items():
            kappas, finals = np.reshape(points, (-1, 2)).T
            finals = metric.scale * finals
            infinite = np.isinf(kappas)
            ax.plot(kappas[~infinite], finals[~infinite], linestyle="", **looks[arm])
            if infinite.any():  # most of the matrices are rank-deficient: at the right edge
                edge = np.ones(infinite.sum())
                ax.plot(edge, finals[infinite], INFINITE, color=looks[arm]["color"],
                        clip_on=False, transform=ax.get_yaxis_transform(), gid="infinite")
        kappas, finals = zip(*itertools.chain.from_iterable(study["points"].values()))
        rank = stats.scipy_stats().spearmanr(kappas, finals)
        ax.set_title(f"{name}\n{len(kappas)} runs, rank correlation {rank.statistic:+.2f} "
                     f"(p {rank.pvalue:.2g})", loc="left")
        ax.set_ylabel(f"{metric.label} ({metric.drawn_unit}; {metric.better} is better)")
        ax.set_xlabel("kappa")
        low, high = ax.get_xlim()
        if high < 5 * low:  # too narrow for LogLocator, which would give ten ticks
            ax.xaxis.set_major_locator(MaxNLocator(3))
        elif high < 30 * low:  # it holds one power of ten at most
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    marks = [Line2D([], [], linestyle="", label=arm, **look) for arm, look in looks.items()]
    figure.legend(handles=marks, ncols=min(len(marks), 2 * columns), loc="outside lower center")
    return figure
