"""The commands in the documents name scripts, presets and options that exist."""
import importlib
import json
import re
import shlex

import pytest

from conftest import ROOT, shell
from engine import options, startup
from engine.metrics import METRICS

DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def commands(text: str) -> list[str]:
    """The lines of a document's shell examples, continued ones joined."""
    blocks = text.split("```sh\n")[1:]
    joined = "\n".join(block.split("```")[0] for block in blocks)
    return joined.replace("\\\n", " ").splitlines()


def known_options(script: str, words: list[str]) -> set[str]:
    """The options of train.py, ...; compare.py passes on those of the script that it compares."""
    config = importlib.import_module(script.removesuffix(".py")).Config
    known = set(options.options(config)) | {"help"}
    if script == "compare.py":
        known |= {*startup.OF_COMPARE} | known_options(words[0], [])
    return known


@pytest.mark.slow
@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_name_scripts_presets_and_options_that_exist(path):
    for command in commands(path.read_text(encoding="utf-8")):
        words = shlex.split(command, comments=True)
        scripts = [word for word in words if word.endswith(".py")]
        if not scripts or not {"python", "torchrun"} & set(words):
            continue
        script, *words = words[words.index(scripts[0]):]
        assert (ROOT / script).exists(), command
        if script.startswith("data/") or script == "precond.py":
            continue
        startup.check_names(ROOT / script, words)  # what is asked before PyTorch is loaded
        known = known_options(script, words)
        for word in words:
            if word.startswith("config/"):
                assert (ROOT / word).exists(), command
            if word.startswith("--"):
                assert word[2:].partition("=")[0] in known, command


def test_the_front_page_has_differences_of_the_results():
    front = (ROOT / "README.md").read_text(encoding="utf-8")
    differences = re.findall(r"[+-][\d.]+ \([^()]* to [^()]*\)", front)
    results = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    assert differences
    assert [difference for difference in differences if difference not in results] == []


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.slow
def test_the_walkthrough_is_what_its_script_writes():
    """Word by word; numbers may differ a little between processors."""
    written = (ROOT / "docs" / "walkthrough.md").read_text(encoding="utf-8").split()
    fresh = shell("docs/walkthrough.py").stdout.split()
    assert len(fresh) == len(written)
    for new, old in zip(fresh, written):
        try:
            assert float(new.strip(".,:()")) == pytest.approx(float(old.strip(".,:()")), rel=0.1)
        except ValueError:
            assert new == old


def told(arm: dict, metric: str) -> str:
    """An arm as RESULTS.md writes it: its mean, or its difference to the first arm."""
    digits = 1 if METRICS[metric].unit == "percent" else 3
    if "paired" not in arm:
        return f"{arm['mean']:.{digits}f}"
    pair = arm["paired"]
    difference = f"{pair['mean']:+.{digits}f}"
    if pair["n"] == 1:
        return f"{difference}, one seed"
    interval = f"({pair['low']:+.{digits}f} to {pair['high']:+.{digits}f})"
    p = f", p = {pair['p_holm']:.2g}" if pair["p_holm"] < 0.05 else ""
    return f"{difference} {interval}, {arm['wins']}/{pair['n']}{p}"


def test_results_are_those_of_the_stored_comparisons():
    """Each study has a row in RESULTS.md, an arm its column or "ARM: ..."; arms of `kappa` rows."""
    text = (ROOT / "RESULTS.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in text.splitlines() if line.startswith("|")]
    columns, = (row for row in rows if row[:2] == ["study", "off"])
    rows = {row[0]: row for row in rows}
    words = " ".join(text.split())
    stored = sorted((ROOT / "results").glob("*.json"))
    assert stored
    for path in stored:
        study = json.loads(path.read_text(encoding="utf-8"))
        mine = [row for name, row in rows.items() if name.endswith(f"(results/{path.stem}.md)")]
        assert len(mine) == 1 or f"[{path.stem}](results/{path.stem}.md)" in text, path
        for name, arm in study["arms"].items():
            cell = told(arm, study["metric"])
            if not mine:
                assert rows[name][1] == f"{arm['mean']:.3f}", (path, name)
                assert cell in rows[name][1:3], (path, name, cell)
            elif name in columns:
                assert mine[0][columns.index(name)] == cell, (path, name, cell)
            else:
                assert f"{name}: {cell}" in words, (path, name, cell)
        for name, cell in zip(columns[1:], mine[0][1:] if mine else []):
            assert bool(cell) == (name in study["arms"]), (path, name)
