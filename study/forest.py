"""The paired differences of several comparisons in one figure, from their compare.json files."""
import json
from pathlib import Path

from engine.metrics import METRICS
from engine.options import UserError
from study.canvas import COLOURS


def read(path: Path) -> dict:
    """compare.json -> its metric, its first arm, and {arm: the difference to the first} as pairs.

    Raises UserError.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        pairs = {name: arm["paired"] for name, arm in report["arms"].items() if "paired" in arm}
        return {"metric": METRICS[report["metric"]], "pairs": pairs,
                "first": next(iter(report["arms"]))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path} is no compare.json of this version ({e!r})") from None


def forest(paths: list[Path]):
    """A row for each arm of each comparison: its mean difference and 95% interval.

    Right of 0 is better, whatever the metric: where lower is better the axis runs to the left.
    """
    from matplotlib.figure import Figure
    studies = {path.stem: read(path) for path in paths}
    if empty := [name for name, study in studies.items() if not study["pairs"]]:
        raise UserError(f"{', '.join(empty)}: no arm could be paired with the first")
    heights = [len(study["pairs"]) + 1.5 for study in studies.values()]
    figure = Figure(figsize=(6.5, 0.9 + 0.27 * sum(heights)), layout="constrained")
    figure.suptitle("Difference to the first arm, paired by seed: mean and 95% interval.\n"
                    "Right of 0 is better", fontsize=9)
    axes = figure.subplots(len(studies), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax, (name, study) in zip(axes, studies.items()):
        metric = study["metric"]
        scale = metric.scale
        furthest = 0.0
        for row, pair in enumerate(study["pairs"].values()):
            low, high = pair["low"], pair["high"]
            if low is None:  # without a spread there is no interval
                low = high = pair["mean"]
            ax.plot([scale * low, scale * high], [row, row], color=COLOURS[0])
            ax.plot(scale * pair["mean"], row, color=COLOURS[0], marker="D", markersize=5)
            furthest = max(furthest, scale * abs(low), scale * abs(high))
        labels = [f"{arm} ({pair['n']} seeds)" for arm, pair in study["pairs"].items()]
        ax.set_yticks(range(len(labels)), labels)
        ax.set_ylim(len(labels) - 0.5, -0.5)
        side = furthest * 1.1 or 1.0
        ax.set_xlim((side, -side) if metric.better == "lower" else (-side, side))
        ax.axvline(0, color=COLOURS[-1], linewidth=1)
        ax.set_title(f"{name}: {metric.label} ({metric.difference_unit}), to {study['first']}",
                     loc="left")
        ax.grid(False, axis="y")
    return figure
