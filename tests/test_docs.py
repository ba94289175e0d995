"""The commands in the documents name scripts, presets and options that exist."""
import importlib
import json
import shlex

import pytest

from conftest import ROOT, shell
from engine import options, startup
from study import report

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


def test_results_are_those_of_the_stored_comparisons():
    """A study whose compare.json is kept has a section in RESULTS.md that names it."""
    sections = (ROOT / "RESULTS.md").read_text(encoding="utf-8").split("\n## ")
    stored = sorted((ROOT / "results").glob("*.json"))
    assert stored
    for path in stored:
        section, = (part for part in sections if f"results/{path.name}" in part)
        for name, arm in json.loads(path.read_text(encoding="utf-8"))["arms"].items():
            row = f"| {name} | {arm['mean']:.4f} |"
            if "paired" in arm:
                cells = filter(None, report.difference(arm))  # of one seed there is no p
                row += f" {' | '.join(cells)} |"
                assert row in section, row
            else:  # the first arm: a row of its own, or beside the name of the study
                assert row in section or f"; {name} {arm['mean']:.4f}" in section, row
