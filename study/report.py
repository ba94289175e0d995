"""What compare.py says about finished runs: a table for each question, one sentence for each arm, compare.md and compare.json."""
import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

from study import stats
from engine.options import UserError

METRICS = {"val_ap": "in percent", "val_accuracy": "as a fraction", "val_loss": "in nats"}  # a run is judged by the first that it records
DIFFERENCE = ("difference", "95% interval", "seeds won", "p (Holm)")


@dataclass
class Result:
    """A finished run: its metric at the last step, and where it got there; `evaluations` are (step, seconds, value)."""
    seed: int
    metric: str | None  # None: diverged before the first evaluation
    final: float
    diverged: str | None
    serial: bool
    evaluations: list[tuple[int, float, float]]
    last: dict
    test: float | None
    identity: dict


def lower_is_better(metric: str) -> bool:
    return metric.endswith("loss")


def best(means: dict[str, float], metric: str) -> str:
    """The key of the best of the values of `metric`."""
    return (min if lower_is_better(metric) else max)(means, key=means.get)


def read_run(folder: Path) -> Result:
    """Raises UserError where the folder holds no finished run."""
    try:
        record = json.loads((folder / "record.json").read_text())
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] if not record["diverged"] else []
    except (OSError, ValueError) as e:
        raise UserError(f"{folder} holds no finished run ({e}): remove the folder and type the command again") from None
    metric = next((name for name in METRICS if lines and name in lines[-1]), None)
    if metric is None and not record["diverged"]:
        raise UserError(f"{folder} ended without an evaluation: remove the folder and type the command again")
    evaluations = [(line["step"], line["elapsed_s"], line[metric]) for line in lines if metric in line]
    test = folder / "test.json"
    return Result(record["seed"], metric, math.nan if record["diverged"] else evaluations[-1][2], record["diverged"], record["serial"],
                  evaluations, lines[-1] if lines else {}, json.loads(test.read_text())["test_accuracy"] if test.exists() else None,
                  record["identity"])


def reached(run: Result, target: float) -> tuple[int, float] | None:
    """(step, seconds of training) at the first evaluation that is as good as `target`."""
    lower = lower_is_better(run.metric)
    return next(((step, seconds) for step, seconds, value in run.evaluations if (value <= target if lower else value >= target)), None)


def median_kappa(runs: list[Result], name: str) -> list[float]:
    """By layer, the median over the seeds of a run's last value; inf where that is infinite."""
    lists = [[math.inf if value is None else value for value in run.last[name]] for run in runs if name in run.last]
    return [statistics.median(layer) for layer in zip(*lists)]


def pairing(group: list[Result], other: list[Result], metric: str) -> dict:
    """The differences of `group` to `other` by seed. Empty where a run diverged: seeds that did would flatter the others' mean."""
    if any(run.diverged for run in group + other):
        return {}
    differences = [b.final - a.final for a, b in zip(other, group)]
    sign = 1 if lower_is_better(metric) else -1
    return {"paired": asdict(stats.paired(differences)), "differences": differences, "wins": sum(sign * d < 0 for d in differences)}


def correct(arms):
    """Add Holm's p values, and the seeds that a difference needs to be seen among as many, to those that have a pairing."""
    compared = [arm["paired"] for arm in arms if "paired" in arm]
    for pair, p in zip(compared, stats.holm([pair["p"] for pair in compared])):
        pair |= {"p_holm": p, "seeds_needed": stats.seeds_needed(pair["mean"], pair["sd"], alpha=0.05 / len(compared))}


def summarise(folders: dict[str, list[Path]], beside: dict[str, str]) -> dict:
    """The numbers of the report: metric, seeds, and for each arm, in order, what `write` shows. The first arm is the baseline; in a grid
    `beside` names for an arm another one to compare it with."""
    runs = {name: [read_run(folder) for folder in group] for name, group in folders.items()}
    metric = next((run.metric for group in runs.values() for run in group if run.metric), None)
    if metric is None:
        raise UserError("every run diverged: nothing to compare. Lower --learning_rate, or set --grad_clip or --warmup_iters")
    baseline, arms = next(iter(runs.values())), {}
    for name, group in runs.items():
        good = [run for run in group if not run.diverged]
        arm = arms[name] = {"seeds": [run.seed for run in group], "final": [None if run.diverged else run.final for run in group],
                            "diverged": {run.seed: run.diverged for run in group if run.diverged}}
        if good:
            arm |= {"mean": statistics.fmean(run.final for run in good),
                    "sd": statistics.stdev(run.final for run in good) if len(good) > 1 else math.nan,
                    "peak_memory_mb": statistics.median(run.last["peak_memory_mb"] for run in good),
                    "kappa_before": median_kappa(good, "kappa_before"), "kappa_after": median_kappa(good, "kappa_after")}
            if all(run.serial for run in good):
                arm["tokens_per_s"] = statistics.median(run.last["tokens"] / run.last["elapsed_s"] for run in good)
            if all(run.test is not None for run in good):
                arm |= {"test_accuracy": statistics.fmean(run.test for run in good),
                        "test_sd": statistics.stdev(run.test for run in good) if len(good) > 1 else math.nan}
            if all("precond_power" in run.last for run in good):
                arm["precond_power"] = [statistics.fmean(layer) for layer in zip(*(run.last["precond_power"] for run in good))]
        pairs = [(a, b) for a, b in zip(baseline, group) if not a.diverged and not b.diverged]
        hits = [reached(b, a.final) for a, b in pairs]
        got = [hit for hit in hits if hit]
        if 2 * len(got) > len(hits):  # the median over the seeds, counting what was not reached as later than any
            late = [(math.inf, math.inf)] * (len(hits) - len(got))
            arm["steps_to_target"], arm["seconds_to_target"] = (statistics.median(values) for values in zip(*got, *late))
        arm["reached_target"] = f"{len(got)}/{len(hits)}"
        if group is not baseline:
            arm |= pairing(group, baseline, metric)
            if "paired" in arm and all(run.test is not None for run in baseline + group):
                arm["test_paired"] = asdict(stats.paired([b.test - a.test for a, b in pairs]))
    within = {name: {"to": other} | pairing(runs[name], runs[other], metric) for name, other in beside.items()}
    correct(arms.values())
    correct(within.values())
    identity = baseline[0].identity
    return {"metric": metric, "script": identity["script"], "threads": identity["threads"], "torch": identity["torch"],
            "device": identity["config"]["device"], "dtype": identity["config"]["dtype"], "code": identity["code"],
            "serial": all(run.serial for group in runs.values() for run in group),
            "training_seconds": sum(run.last.get("elapsed_s", 0.0) for group in runs.values() for run in group),
            "arms": arms, "within": within}


def conclusion(name: str, arm: dict, baseline: str, metric: str) -> str:
    """One sentence."""
    if arm["diverged"]:
        seeds = ", ".join(map(str, arm["diverged"]))
        return f"{name} diverged on {len(arm['diverged'])} of {len(arm['seeds'])} seeds ({seeds}): its other runs are no fair sample."
    if "paired" not in arm:
        return f"{name} cannot be compared: {baseline} diverged on some seeds."
    pair = arm["paired"]
    if pair["sd"] == 0 and pair["mean"] == 0:
        return f"{name} has exactly the {metric} of {baseline} on all {pair['n']} seeds."
    if pair["p_holm"] < 0.05:
        better = (pair["mean"] < 0) == lower_is_better(metric)
        return (f"{name} is {'better' if better else 'worse'} than {baseline}: {metric} differs by {pair['mean']:+.4f} (95% interval "
                f"{pair['low']:+.4f} to {pair['high']:+.4f}, p = {pair['p_holm']:.2g} after Holm's correction).")
    needed = f"about {pair['seeds_needed']:,} seeds" if pair["seeds_needed"] else "more than 100,000 seeds"
    return (f"{name} and {baseline} cannot be told apart with {pair['n']} seeds: to see a difference of the size observed "
            f"({pair['mean']:+.4f}) with a power of 80% takes {needed}.")


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths)] for row in [head, ["-" * width for width in widths], *rows]]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def difference(arm: dict) -> list[str]:
    """The cells of a pairing: difference, interval, seeds won, p."""
    if "paired" not in arm:
        return [""] * 4
    pair = arm["paired"]
    return [f"{pair['mean']:+.4f}", f"{pair['low']:+.4f} to {pair['high']:+.4f}", f"{arm['wins']}/{pair['n']}", f"{pair['p_holm']:.2g}"]


def number(value: float | None, form: str) -> str:
    return "" if value is None else "inf" if value == math.inf else "n/a" if math.isnan(value) else format(value, form)


def write(folder: Path, folders: dict[str, list[Path]], beside: dict[str, str], command: str, tune: str,
          tuned: dict[str, dict[str, float | None]]) -> str:
    """Write compare.md and compare.json to `folder`; return the former. beside: see `summarise`; tuned: by arm, value of `tune` -> mean
    result, None: diverged."""
    summary = summarise(folders, beside)
    metric, arms = summary["metric"], summary["arms"]
    baseline = next(iter(arms))
    lines = [f"`{command}`", "", f"torch {summary['torch']}, {summary['device']}, {summary['dtype']}, threads={summary['threads']}, "
             f"{summary['training_seconds']:,.0f} s of training in the runs below.",
             f"{metric}, {METRICS[metric]}, at the last step, {len(arms[baseline]['seeds'])} seeds; differences are paired by seed, to "
             f"{baseline}.", ""]
    tested = any("test_accuracy" in arm for arm in arms.values())
    rows = []
    for name, arm in arms.items():
        rows.append([name, number(arm.get("mean"), ".4f"), number(arm.get("sd"), ".4f"), *difference(arm)]
                    + [number(arm.get("test_accuracy"), ".4f"), number(arm.get("test_sd"), ".4f"), test_difference(arm)] * tested)
    lines += table(["arm", "mean", "sd", *DIFFERENCE]
                   + ["test accuracy", "sd", "difference, 95% interval"] * tested, rows)
    lines += [conclusion(name, arm, baseline, metric) for name, arm in list(arms.items())[1:]] + [""]
    if arms[baseline]["diverged"]:
        lines[-1:] = [f"The baseline {baseline} diverged on the seeds {', '.join(map(str, arms[baseline]['diverged']))}.", ""]
    if summary["within"]:
        within = summary["within"]
        lines += ["Within the grid, the last --vary alone, the other option being equal; p is corrected over this table:", ""]
        lines += table(["arm", "compared with", *DIFFERENCE], [[name, arm["to"], *difference(arm)] for name, arm in within.items()])
        lines += [conclusion(name, {key: arms[name][key] for key in ("seeds", "diverged")} | arm, arm["to"], metric)
                  for name, arm in within.items()] + [""]
    serial = summary["serial"]
    lines += table(["arm", f"median steps to the result of {baseline}", "seeds that reach it"] + ["seconds", "tokens/s"] * serial
                   + ["peak memory (MB)"],
                   [[name, number(arm.get("steps_to_target"), ".0f"), arm["reached_target"]]
                    + ([number(arm.get("seconds_to_target"), ".1f"), number(arm.get("tokens_per_s"), ",.0f")] if serial else [])
                    + [number(arm.get("peak_memory_mb"), ",.0f")] for name, arm in arms.items()])
    if not serial:
        lines += ["Runs shared the machine: for seconds and tokens/s, run with --jobs=1 in another --out_dir.", ""]
    rows = [[name, which, *(number(value, ".4g") for value in arm.get(key, []))] for name, arm in arms.items()
            for which, key in (("A", "kappa_before"), ("C A", "kappa_after")) if arm.get(key)]
    if rows:
        lines += ["Median condition number by layer at the last step (for an arm without C, C A is what C would make of it):", ""]
        lines += table(["arm", "of", *(f"layer {i}" for i in range(len(rows[0]) - 2))], rows)
    if powers := {name: arm["precond_power"] for name, arm in arms.items() if "precond_power" in arm}:
        lines += ["Learned power by layer at the last step, the mean over heads and seeds:", ""]
        lines += table(["arm", *(f"layer {i}" for i in range(len(next(iter(powers.values())))))],
                       [[name, *(f"{p:.3f}" for p in power)] for name, power in powers.items()])
    if tuned:
        values = list(next(iter(tuned.values())))
        chosen = {name: best({v: mean for v, mean in means.items() if mean is not None}, metric) for name, means in tuned.items()}
        lines += [f"Mean {metric} by {tune}, on other seeds; each arm has its best one (*):", ""]
        lines += table(["arm", *values], [[name, *("diverged" if mean is None else f"{mean:.4f}" + "*" * (value == chosen[name])
                                                   for value, mean in means.items())] for name, means in tuned.items()])
        ordered = sorted(filter(is_number, values), key=float)
        if edge := [name for name, value in chosen.items() if ordered and value in (ordered[0], ordered[-1])]:
            lines += [f"The best {tune} of {', '.join(edge)} is at the end of the values tried: a wider range may change the result.", ""]
    text = "\n".join(lines)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.md").write_text(text, encoding="utf-8")
    (folder / "compare.json").write_text(json.dumps({"command": command, "tuned": tuned, **finite(summary)}, indent=1) + "\n")
    return text


def is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def test_difference(arm: dict) -> str:
    pair = arm.get("test_paired")
    return f"{pair['mean']:+.4f}, {pair['low']:+.4f} to {pair['high']:+.4f}" if pair else ""


def finite(value):
    """JSON has no inf and nan: None."""
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def draw(folder: Path, folders: dict[str, list[Path]]):
    """The figures of plot.py, where matplotlib is there; of the runs that did not diverge."""
    import plot

    finished = {name: [path for path in group if not read_run(path).diverged] for name, group in folders.items()}
    try:
        for path in plot.draw({name: group for name, group in finished.items() if group}, folder):
            if path.suffix == ".png":
                print(path)
    except UserError as e:
        print(f"no figures: {e}")
