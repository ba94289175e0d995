"""plot.py: runs are grouped and labelled, and those that do not belong together are refused."""
import json
import shutil
import sys
from xml.etree import ElementTree

import pytest

pytest.importorskip("matplotlib", reason="pip install -r requirements-extra.txt")
pytest.importorskip("scipy", reason="pip install -r requirements-extra.txt")

import plot
import train
from conftest import ARMS, SMALL, error, teach
from drawn_runs import invent
from engine.options import UserError
from study import figures
from study.runs import Run, group


@pytest.mark.slow
def test_seeds_of_one_configuration_are_a_group(lm):
    off, on = lm["off"], lm["on"]
    assert group([off[0], on[1], off[1], on[0]]) == {
        "precond=False": off, "precond=True": [on[1], on[0]]}
    assert group([*off, *on], "plain, ours") == {"plain": off, "ours": on}


def test_labels_name_what_differs(tmp_path):
    base = [invent(tmp_path / "0"),
            invent(tmp_path / "1", seed=2, init_from="auto", overwrite=True, data_dir="/elsewhere")]
    half = invent(tmp_path / "2", precond=True, precond_power=0.5)
    full = invent(tmp_path / "3", precond=True, precond_power=1.0)
    names = {"precond=False": base, "precond=True, precond_power=0.5": [half],
             "precond=True, precond_power=1.0": [full]}
    assert group([*base, half, full]) == names
    # only an option that is not in force tells it apart
    other = invent(tmp_path / "4", precond_power=0.5)
    assert list(group([base[0], other])) == ["precond_power=1.0", "precond_power=0.5"]
    tuned = invent(tmp_path / "5", init_from="gpt2")
    assert list(group([base[1], tuned])) == ["init_from=scratch", "init_from=gpt2"]


@pytest.mark.slow
def test_figures_are_written(lra, tmp_path, call):
    code, out, _ = call(plot, *lra["off"], "--out", tmp_path / "a", *lra["on"], "--x=tokens",
                        "--layer=0", "--labels=plain,ours")
    paths = sorted((tmp_path / "a").iterdir())
    assert code == 0 and sorted(out.split()) == list(map(str, paths))
    names = ("kappa", "spectrum", "training", "validation")
    assert {p.name for p in paths} == {f"{name}.{kind}" for name in names
                                       for kind in ("png", "svg")}
    for path in paths:
        if path.suffix == ".svg":
            assert ElementTree.parse(path).getroot().tag.endswith("svg")
        else:
            content = path.read_bytes()
            assert content[:8] == b"\x89PNG\r\n\x1a\n"
            at = content.index(b"pHYs") + 4  # dots per metre
            assert int.from_bytes(content[at:at + 4]) >= 150 / 0.0254
    again = figures.draw({"plain": lra["off"], "ours": lra["on"]}, tmp_path / "b", x="tokens",
                         layer=0)
    assert [p.read_bytes() for p in sorted(again)] == [p.read_bytes() for p in paths]


@pytest.mark.slow
def test_figures_of_other_runs_are_kept(tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, two = invent(tmp_path / "one"), invent(tmp_path / "two", seed=2)
    for run in one, two:  # a run has a folder of its own for them
        assert f"{run}/figures/validation.svg" in call(plot, run)[1]
    moved = shutil.move(one, tmp_path / "moved")
    assert call(plot, moved)[0] == 0
    shutil.move(moved, one)
    assert call(plot, one)[0] == call(plot, one, two)[0] == 0
    assert (tmp_path / "figures" / "kappa.svg").exists()
    before = (tmp_path / "figures" / "validation.svg").read_bytes()
    for arguments in ([one, "--out=figures"], [one, two, invent(tmp_path / "three", seed=3)]):
        assert "figures holds figures of other runs: choose" in error(call(plot, *arguments))
    assert (tmp_path / "figures" / "validation.svg").read_bytes() == before
    assert call(plot, two, one, "--x=seconds")[0] == 0  # the same runs
    assert (tmp_path / "figures" / "validation.svg").read_bytes() != before


@pytest.mark.slow
def test_a_comparison_is_what_its_report_compares(tmp_path, call):
    """Of two comparisons in one folder the last has the report. The other's runs end elsewhere."""
    runs = {"off": ["off-1", "off-2"], "on": ["on-1"]}
    for name in "off-1", "off-2", "on-1":
        invent(tmp_path / "runs" / name, seed=int(name[-1]), precond=name[:2] == "on")
    invent(tmp_path / "runs" / "older", steps=(0, 10), dataset="other.txt")
    (tmp_path / "compare.json").write_text(json.dumps({"runs": runs}))
    folders = {arm: [tmp_path / "runs" / name for name in names] for arm, names in runs.items()}
    assert group([tmp_path]) == folders and group([tmp_path], "a,b") == {
        "a": folders["off"], "b": folders["on"]}
    code, out, _ = call(plot, tmp_path, "--x=tokens", "--labels=$a{$,b")  # no formula
    assert code == 0 and f"{tmp_path}/validation.png" in out.splitlines()


def test_a_line_that_is_being_written_is_left_alone(tmp_path):
    run = invent(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 30, "val_')
    assert [r["step"] for r in Run.read(run).records] == [0, 10, 20]


def test_folders_that_hold_no_run(tmp_path, call):
    run = invent(tmp_path / "run")
    assert "metrics.jsonl: No such file" in error(call(plot, run, tmp_path))
    invent(tmp_path / "comparison" / "runs" / "one")
    hint = f"It holds a comparison without a report: draw {tmp_path / 'comparison' / 'runs'}/*"
    assert hint in error(call(plot, tmp_path / "comparison"))
    for content, said in (
            ("", "nothing to draw yet"), ("\xff", "damaged"),
            ('{"step": 0, "elapsed_s": 0}\nnonsense\n', "line 2 is damaged"),
            ('{"step": 0}\n', "line 1 is damaged or of another version"), ("[0]\n", "line 1 is")):
        (run / "metrics.jsonl").write_text(content, encoding="latin-1")
        assert said in error(call(plot, run))
    (run / "config.toml").write_text("n_layer = 2\n")
    (run / "metrics.jsonl").write_text("")
    assert "lacks grad_clip, precond, seed" in error(call(plot, run))
    (run / "config.toml").write_text("n_layer = \n")
    assert "config.toml" in error(call(plot, run))
    older = invent(tmp_path / "older")
    metrics = older / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("kappa_after", "kappa"))
    assert "lacks kappa_after: of another version?" in error(call(plot, older))
    for name in "one", "two":
        invent(tmp_path / name / "runs" / "1")
        (tmp_path / name / "compare.json").write_text('{"runs": {"off": ["1"]}}')
    said = error(call(plot, tmp_path / "one", tmp_path / "two"))
    assert said.endswith("It holds a comparison: draw it alone, or several compare.json")
    (tmp_path / "one" / "compare.json").write_text("[]")
    assert "without a report" in error(call(plot, tmp_path / "one"))
    new = invent(tmp_path / "new", steps=[0])
    assert "holds fewer than two evaluations" in error(call(plot, new))


def test_runs_that_do_not_compare(tmp_path, call):
    run = invent(tmp_path / "run")
    same = invent(tmp_path / "same")
    assert f"{run} and {same} are the same run, seed 1" in error(call(plot, run, same))
    here = invent(tmp_path / "here", dataset="./text.txt", seed=2)
    assert call(plot, run, here, f"--out={tmp_path / 'here'}")[0] == 0
    short = invent(tmp_path / "short", precond=True, steps=(0, 10))
    assert f"{run} ends at step 20, {short} at step 10" in error(call(plot, run, short))
    said = error(call(plot, run, short, "--x=tokens"))
    assert "at tokens 2,000" in said and "--x=seconds" in said
    padded = invent(tmp_path / "padded", seed=2)  # as in Long Range Arena, where seeds differ
    metrics = padded / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"tokens": 2000', '"tokens": 1950'))
    assert call(plot, run, padded, "--x=tokens", f"--out={tmp_path / 'drawn'}")[0] == 0
    other = invent(tmp_path / "other", dataset="more.txt", tokenizer="bytes")
    said = "different data (dataset=text.txt, tokenizer=char; dataset=more.txt, tokenizer=bytes)"
    assert said in error(call(plot, run, other))
    many = [invent(tmp_path / f"n{n}", n_embd=n) for n in range(8)]
    assert "8 groups" in error(call(plot, *many))


def test_a_text_that_was_edited_between_runs(lm, corpus, tmp_path):
    source = tmp_path / "text.txt"
    shutil.copy(corpus[0].removeprefix("--dataset="), source)
    runs = {}
    for arm, arguments in ARMS.items():
        runs[arm] = [tmp_path / arm]
        teach(train, *SMALL, *arguments, f"--dataset={source}", f"--data_dir={tmp_path / 'data'}",
              f"--out_dir={tmp_path / arm}", "--max_iters=1")
        source.write_text(source.read_text() + "one more line\n")
    with pytest.raises(UserError, match="different data: the file has changed"):
        figures.draw(runs, tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_mistakes_on_the_command_line(lm, tmp_path, call):
    run = lm["off"][0]
    assert "name the folder of at least one run" in error(call(plot))
    assert "did you mean --layer" in error(call(plot, run, "--layr=1"))
    assert "--x=steps" in error(call(plot, run, "--x=steps"))
    assert "give 1 different labels" in error(call(plot, run, "--labels=a,b"))
    out = f"--out={tmp_path / 'figures'}"
    assert "has the layers 0 to 1" in error(call(plot, run, "--layer=2", out))
    assert "layer=-2" in error(call(plot, run, "--layer=-2"))
    (tmp_path / "file").write_text("")
    file = tmp_path / "file"
    assert f"cannot write to {file}" in error(call(plot, run, "--out", file))
    with pytest.raises(UserError, match="at least one run for each label"):
        figures.draw({"empty": []}, tmp_path / "figures")


def test_without_matplotlib(lm, tmp_path, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = error(call(plot, lm["off"][0], "--out", tmp_path / "figures"))
    assert "pip install -r requirements-extra.txt" in said
