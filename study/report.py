"""What compare.py says about finished runs: tables, a sentence for each arm, and both as files.

compare.md is what is printed, compare.json holds its numbers.
"""
import contextlib
import itertools
import json
import math
import shlex
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

from engine.metrics import METRICS, is_better
from engine.options import UserError
from study import stats
from study.arms import Arm, beyond
from study.runs import Run

# Of the last records, by layer: what it is called, and how runs are summed up.
BY_LAYER = {"kappa_before": ("kappa of A", statistics.median),
            "kappa_after": ("kappa of C A", statistics.median),
            "precond_power": ("power", statistics.fmean),
            "precond_scale": ("scale", statistics.fmean)}
FACTS = ("script", "threads", "torch", "code", "device", "dtype")  # that all runs share
DIFFERENCE = ("difference", "95% interval", "seeds won", "p (Holm)")


def write(folder: Path, arms: list[Arm], command: str) -> str:
    """Write compare.md and compare.json to `folder`; returns the former.

    Raises UserError where a run has not ended, or all diverged.
    """
    summary = summarise(arms)
    tuned = {arm.name: arm.tuned for arm in arms if arm.tuned}
    lines = [*heading(summary, command), *results(summary), *within_grid(summary),
             *costs(summary, f"{command} --jobs=1 --out_dir={shlex.quote(str(folder))}-alone"),
             *by_layer(summary)]
    for option in dict.fromkeys(key for arm in arms for key in arm.tuned):
        lines += tuning([arm for arm in arms if option in arm.tuned], option, summary["metric"])
    text = "\n".join(lines)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.md").write_text(text, encoding="utf-8")
    numbers = json.dumps({"command": command, "tuned": tuned, **summary}, indent=1)
    (folder / "compare.json").write_text(numbers + "\n")
    return text


# The numbers


def summarise(arms: list[Arm]) -> dict:
    """The numbers of the report. The first arm is the baseline."""
    runs = {arm.name: [Run.read_ended(path) for path in arm.folders] for arm in arms}
    every = [run for group in runs.values() for run in group]
    metric = next((run.metric for run in every if run.metric), None)
    if metric is None:
        raise UserError("every run diverged: nothing to compare. Lower --learning_rate, "
                        "or set --grad_clip or --warmup_iters")
    baseline = runs[arms[0].name]
    summaries = {name: describe(group, baseline) for name, group in runs.items()}
    within = {}
    for arm in arms:
        if arm.beside not in ("", arm.name):
            paired = pairing(runs[arm.name], runs[arm.beside])
            within[arm.name] = {"to": arm.beside} | paired
    correct(summaries.values())
    correct(within.values())
    good = {name: [run.folder.name for run in group if not run.diverged]
            for name, group in runs.items()}
    identity = baseline[0].ended["identity"]
    known = identity | identity["config"]
    return {"metric": metric, **{key: known[key] for key in FACTS},
            "serial": all(run.ended["serial"] for run in every),
            "training_seconds": sum(run.records[-1]["elapsed_s"] for run in every if run.records),
            "runs": {name: folders for name, folders in good.items() if folders},
            "arms": summaries, "within": within}


def describe(group: list[Run], baseline: list[Run]) -> dict:
    """What is said about an arm."""
    good = [run for run in group if not run.diverged]
    arm = {"seeds": [run.seed for run in group],
           "final": [run.final for run in group],
           "kappa": [conditioning(run) for run in group],
           "diverged": {run.seed: run.diverged for run in group if run.diverged}}
    if good:
        last = [run.records[-1] for run in good]
        finals = [run.final for run in good]
        arm |= {"mean": statistics.fmean(finals), "sd": spread(finals),
                "peak_memory_mb": statistics.median(r["peak_memory_mb"] for r in last)}
        for key, (_, middle) in BY_LAYER.items():
            by_layer = zip(*(r[key] for r in last if key in r))
            arm[key] = [finite(middle, values) for values in by_layer]
        if all(run.ended["serial"] for run in good):
            arm["tokens_per_s"] = statistics.median(r["tokens"] / r["elapsed_s"] for r in last)
        if all(run.test is not None for run in good):
            tests = [run.test for run in good]
            arm |= {"test_accuracy": statistics.fmean(tests), "test_sd": spread(tests)}
    # How soon each run was as good as the first arm's run of its seed was in the end.
    pairs = [(a, b) for a, b in zip(baseline, group) if not a.diverged and not b.diverged]
    hits = [reached(b, a.final) for a, b in pairs]
    count = len(hits) - hits.count(None)
    arm["reached_target"] = f"{count}/{len(hits)}"
    if 2 * count > len(hits):
        # The median over the seeds, counting what was not reached as later than any.
        steps, seconds = zip(*(hit or (math.inf, math.inf) for hit in hits))
        arm["steps_to_target"] = statistics.median(steps)
        arm["seconds_to_target"] = statistics.median(seconds)
    if group is not baseline:
        arm |= pairing(group, baseline)
    return arm


def conditioning(run: Run) -> float | None:
    """Kappa of the matrices that the model used, C A or A, at the last step: the layers' median.

    None: infinite, or the run diverged.
    """
    if run.diverged:
        return None
    used = "kappa_after" if run.config["precond"] else "kappa_before"
    return finite(statistics.median, run.records[-1][used])


def spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def finite(middle: Callable, values: Iterable[float | None]) -> float | None:
    """The median or mean of the values; None is infinite, among them and here."""
    result = middle([math.inf if value is None else value for value in values])
    return result if math.isfinite(result) else None


def reached(run: Run, target: float) -> tuple[int, float] | None:
    """(step, seconds of training) at the first evaluation that is as good as `target`."""
    for r in run.evaluations:
        if is_better(run.metric, r[run.metric], target):
            return r["step"], r["elapsed_s"]


def pairing(group: list[Run], other: list[Run]) -> dict:
    """The differences of `group` to `other` by seed.

    Empty where a run diverged: seeds that did would flatter the others' mean.
    """
    both = group + other
    if any(run.diverged for run in both):
        return {}
    differences = [b.final - a.final for a, b in zip(other, group)]
    scale = max(abs(run.final) for run in both)
    won = [d != 0 and is_better(both[0].metric, d, 0) for d in differences]
    result = {"paired": asdict(stats.paired(differences, scale)), "differences": differences,
              "wins": sum(won)}
    if all(run.test is not None for run in both):
        tests = [b.test - a.test for a, b in zip(other, group)]
        result["test_paired"] = asdict(stats.paired(tests))
    return result


def correct(arms):
    """Add Holm's p values to the pairs that were tested, and the seeds that a difference needs.

    These are as many as show it among as many comparisons.
    """
    compared = [arm["paired"] for arm in arms if "paired" in arm and arm["paired"]["p"] is not None]
    for pair, p in zip(compared, stats.holm([pair["p"] for pair in compared])):
        alpha = 0.05 / len(compared)  # the level of Holm's first, strictest test
        pair["p_holm"] = p
        pair["seeds_needed"] = stats.seeds_needed(pair["mean"], pair["sd"], alpha=alpha)


# The words


def heading(summary: dict, command: str) -> list[str]:
    baseline, arm = next(iter(summary["arms"].items()))
    metric = summary["metric"]
    n = len(arm["seeds"])
    return [f"`{command}`", "",
            f"torch {summary['torch']}, {summary['device']}, {summary['dtype']}, "
            f"threads={summary['threads']}, {summary['training_seconds']:,.0f} s of training "
            "in the runs below.",
            f"{metric} ({METRICS[metric].unit}) at the last step, {n} seed{'s' * (n > 1)}; "
            f"differences are paired by seed, to {baseline}.", ""]


def results(summary: dict) -> list[str]:
    metric, arms = summary["metric"], summary["arms"]
    baseline, *others = arms
    head = ["arm", "mean", "sd", *DIFFERENCE]
    rows = [[name, *cells(arm, mean=".4f", sd=".4f"), *difference(arm)]
            for name, arm in arms.items()]
    if any("test_accuracy" in arm for arm in arms.values()):
        head += ["test accuracy", "sd", "difference, 95% interval"]
        for row, arm in zip(rows, arms.values()):
            row += [*cells(arm, test_accuracy=".4f", test_sd=".4f"),
                    ", ".join(interval(arm["test_paired"])) if "test_paired" in arm else ""]
    lines = table(head, rows)
    lines += [conclusion(name, arms[name], baseline, metric) for name in others]
    if seeds := arms[baseline]["diverged"]:
        lines.append(f"The baseline {baseline} diverged on the seeds {', '.join(map(str, seeds))}.")
    return [*lines, ""]


def within_grid(summary: dict) -> list[str]:
    within, arms = summary["within"], summary["arms"]
    if not within:
        return []
    rows = [[name, arm["to"], *difference(arm)] for name, arm in within.items()]
    return ["Within the grid, the last --vary alone, the other option being equal; "
            "p is corrected over this table:", "",
            *table(["arm", "compared with", *DIFFERENCE], rows),
            *(conclusion(name, arms[name] | {"paired": None} | arm, arm["to"], summary["metric"])
              for name, arm in within.items()), ""]


def costs(summary: dict, alone: str) -> list[str]:
    """alone: the command for runs that do not share the machine."""
    baseline = next(iter(summary["arms"]))
    serial = summary["serial"]
    head = ["arm", f"median steps to the result of {baseline}", "seeds that reach it"]
    head += ["seconds", "tokens/s"] * serial + ["peak memory (MB)"]
    rows = []
    for name, arm in summary["arms"].items():
        row = [name, *cells(arm, steps_to_target=".0f"), arm["reached_target"]]
        if serial:
            row += cells(arm, seconds_to_target=".1f", tokens_per_s=",.0f")
        rows.append(row + cells(arm, peak_memory_mb=",.0f"))
    lines = table(head, rows)
    if not serial:
        lines += [f"Runs shared the machine. For seconds and tokens/s: `{alone}`.", ""]
    return lines


def by_layer(summary: dict) -> list[str]:
    rows = []
    for name, arm in summary["arms"].items():
        for key, (what, _) in BY_LAYER.items():
            if values := arm.get(key):
                numbers = ["inf" if value is None else f"{value:.4g}" for value in values]
                rows.append([name, what, *numbers])
    if not rows:
        return []
    depth = max(map(len, rows)) - 2  # arms can differ in it
    return ["By layer at the last step: the median condition number kappa (for an arm without C, "
            "that of C A is what C would make of it), and learned powers, the mean over heads and "
            "seeds:", "",
            *table(["arm", "what", *(f"layer {i}" for i in range(depth))], rows)]


def tuning(arms: list[Arm], option: str, metric: str) -> list[str]:
    values = dict.fromkeys(value for arm in arms for value in arm.tuned[option])
    with contextlib.suppress(ValueError):  # words have no order
        values = sorted(values, key=float)
    rows = []
    for arm in arms:
        said = {value: "diverged" if mean is None else f"{mean:.4f}"
                for value, mean in arm.tuned[option].items()}
        said[arm.chosen[option]] += "*"
        rows.append([arm.name, *(said.get(value, "") for value in values)])
    edge = [arm.name for arm in arms if beyond(arm.tuned[option], arm.chosen[option])]
    lines = [f"Mean {metric} by {option}, on other seeds; each arm has its best one (*):", "",
             *table(["arm", *values], rows)]
    if edge:
        lines += [f"The best {option} of {', '.join(edge)} is at the end of the values tried: "
                  "a wider range may change the result.", ""]
    return lines


def conclusion(name: str, arm: dict, baseline: str, metric: str) -> str:
    """One sentence."""
    if seeds := arm["diverged"]:
        return (f"{name} diverged on {len(seeds)} of {len(arm['seeds'])} seeds "
                f"({', '.join(map(str, seeds))}): its other runs are no fair sample.")
    pair = arm.get("paired")
    if not pair:
        return f"{name} cannot be compared: {baseline} diverged on some seeds."
    if pair["n"] == 1:
        return (f"{name} differs from {baseline} by {pair['mean']:+.4f} on one seed, which says "
                "nothing of another: take more.")
    if pair["p"] is None:
        return (f"{name} differs from {baseline} by {pair['mean']:+.4f} on each of {pair['n']} "
                "seeds: without a spread that cannot be tested. Take more seeds, or more samples "
                f"to evaluate on where {metric} has few values.")
    if pair["low"] == pair["high"]:
        exactly = "exactly" if pair["sd"] == 0 else "but for rounding"
        return f"{name} has {exactly} the {metric} of {baseline} on all {pair['n']} seeds."
    if pair["p_holm"] < 0.05:
        than = "better" if is_better(metric, pair["mean"], 0) else "worse"
        mean, low_high = interval(pair)
        return (f"{name} is {than} than {baseline}: {metric} differs by {mean} "
                f"(95% interval {low_high}, p = {pair['p_holm']:.2g} after Holm's correction).")
    needed = "more than 100,000 seeds"
    if pair["seeds_needed"]:
        needed = f"about {pair['seeds_needed']:,} seeds"
    return (f"{name} and {baseline} cannot be told apart with {pair['n']} seeds: to see a "
            f"difference of the size observed ({pair['mean']:+.4f}) with a power of 80% takes "
            f"{needed}.")


def interval(pair: dict) -> list[str]:
    """The difference and its interval."""
    if pair["low"] is None:
        return [f"{pair['mean']:+.4f}", "one seed" if pair["n"] == 1 else "no spread"]
    return [f"{pair['mean']:+.4f}", f"{pair['low']:+.4f} to {pair['high']:+.4f}"]


def difference(arm: dict) -> list[str]:
    """The cells of a pairing: difference, interval, seeds won, p."""
    if "paired" not in arm:
        return [""] * len(DIFFERENCE)
    pair = arm["paired"]
    return [*interval(pair), f"{arm['wins']}/{pair['n']}", *cells(pair, p_holm=".2g")]


def cells(values: dict, **formats: str) -> list[str]:
    """The values of these names as text, "" where there is none."""
    return ["" if values.get(name) is None else format(values[name], form)
            for name, form in formats.items()]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Rows can be shorter than the head."""
    columns = list(itertools.zip_longest(head, *rows, fillvalue=""))
    columns = [[cell.replace("|", "\\|") for cell in column] for column in columns]
    widths = [max(map(len, column)) for column in columns]
    head, *rows = zip(*columns)
    lines = [head, ["-" * width for width in widths], *rows]
    return [f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines] + [""]
