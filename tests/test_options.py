"""options.py: types, checks, marks, precedence, errors, help, and the round trip through TOML."""
import re
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from conftest import shell
from engine import options
from engine.options import DATA, FIXED, FIXED_IN_TRAINING, Options, UserError, at_least, one_of

RULES = {"adam": 1, "sgd": 2}


@dataclass
class Example(Options):
    width: Annotated[int, "how wide", FIXED, at_least(1)] = 8
    rate: Annotated[float, "how fast", FIXED_IN_TRAINING] = 0.1
    power: Annotated[float | Literal["learned"], "how strong"] = 1.0
    name: Annotated[str, "how called", DATA] = "x"
    on: Annotated[bool, "whether", options.FREE] = False
    kind: Annotated[Literal["cosine", "linear"], "which"] = "cosine"
    rule: Annotated[str, "by which rule", one_of(RULES)] = "adam"
    parts: Annotated[int, "how many parts", options.divides("width")] = 2
    share: Annotated[float, "how much of it", options.in_range(0, 1)] = 0.5
    kernel: Annotated[int, "how far", options.odd_or_zero] = 3


@dataclass
class Narrow(Example):
    """Another default, and nothing else said of the option."""
    width: int = 4


def parse(*argv, cls=Example):
    return options.parse(cls, list(argv), "Doc.")


@pytest.mark.parametrize("argv, expected", [
    (["--width=4"], {"width": 4}),
    (["--width", "4"], {"width": 4}),
    (["--rate=1e-3"], {"rate": 1e-3}),
    (["--rate", "-2"], {"rate": -2.0}),
    (["--on"], {"on": True}),
    (["--on", "--width=2"], {"on": True, "width": 2}),
    (["--on", "False"], {"on": False}),
    (["--on=yes"], {"on": True}),
    (["--name=a=b"], {"name": "a=b"}),
    (["--kind=linear"], {"kind": "linear"}),
    (["--rule=sgd"], {"rule": "sgd"}),
    (["--power=0.5"], {"power": 0.5}),
    (["--power=learned"], {"power": "learned"}),
    (["--kernel=0"], {"kernel": 0}),
    (["--share=0"], {"share": 0.0}),
    (["--width=2", "--width=4"], {"width": 4}),
])
def test_values(argv, expected):
    config, typed = parse(*argv)
    assert typed == expected
    for key, value in expected.items():
        got = getattr(config, key)
        assert got == value and type(got) is type(value)


def test_preset_lies_between_defaults_and_command_line(tmp_path):
    preset = tmp_path / "p.toml"
    preset.write_text("width = 4\nrate = 2\n")
    config, typed = parse(str(preset), "--rate=5")
    assert (config.width, config.rate, config.name, typed) == (4, 5.0, "x", {"rate": 5.0})


@pytest.mark.parametrize("argv, words", [
    (["--widht=3"], "did you mean --width?"),
    (["--zzzzzz=3"], "unknown option --zzzzzz"),
    (["--width=x"], "--width='x' is not of type int"),
    (["--width=1.5"], "is not of type int"),
    (["--on=perhaps"], "is not of type bool: choose True or False"),
    (["--kind=cosin"], "did you mean cosine? choose cosine or linear"),
    (["--rule=adm"], "--rule=adm: did you mean adam? choose adam or sgd"),
    (["--power=learnt"], "is not of type float or learned"),
    (["--width"], "needs a value of type int"),
    (["--width=0"], "width=0 must be at least 1"),
    (["--width=3"], "parts=2 does not divide width=3: choose a divisor of 3"),
    (["--share=1"], "share=1.0 must be in [0, 1)"),
    (["--kernel=2"], "kernel=2 must be odd, or 0"),
    (["--rate=nan"], "rate=nan must be a finite number"),
    (["word"], "unexpected argument 'word'"),
    (["nothere.toml"], "no preset nothere.toml"),
])
def test_mistakes(argv, words):
    with pytest.raises(UserError, match="(?s)" + re.escape(words)):
        parse(*argv)


@pytest.mark.parametrize("content, words", [
    ("width = [", "cannot read the preset"),
    ("widht = 3", "did you mean --width"),
    ("width = 'x'", "is not of type int"),
    ("width = 2.5", "is not of type int"),
    ("rule = 'adm'", "p.toml: rule=adm: did you mean adam"),
    ("width = 0", "width=0 must be at least 1"),
])
def test_mistakes_in_a_preset(tmp_path, content, words):
    (tmp_path / "p.toml").write_text(content)
    with pytest.raises(UserError, match=words):
        parse(str(tmp_path / "p.toml"))


def test_a_registry_can_grow(tmp_path, monkeypatch):
    monkeypatch.setitem(RULES, "lion", 3)
    (tmp_path / "p.toml").write_text("rule = 'lion'")
    assert parse(str(tmp_path / "p.toml"))[0].rule == parse("--rule=lion")[0].rule == "lion"


def test_another_default_keeps_what_is_known_of_an_option():
    before, after = (options.options(cls)["width"] for cls in (Example, Narrow))
    assert (before.default, after.default) == (8, 4) and after.help == "how wide"
    assert (after.type, after.mark, after.checks) == (before.type, before.mark, before.checks)
    assert parse(cls=Narrow)[0].width == 4 and options.marked(Narrow, FIXED) == ["width"]
    with pytest.raises(UserError, match="width=0 must be at least 1"):
        parse("--width=0", cls=Narrow)


def test_saved_configuration_can_be_given_back(tmp_path):
    config, _ = parse("--width=4", "--rate=1e-30", '--name=say "hi"\\ \n\té\x7f', "--on",
                      "--power=learned")
    options.save(config, tmp_path / "c.toml")
    assert parse(str(tmp_path / "c.toml"))[0] == config


def test_resume_changes_only_what_was_typed():
    saved = {"width": 4, "rate": 5.0}
    typed = {"kind": "linear", "width": 4}
    assert options.resume(Example, saved, typed) == Example(width=4, rate=5.0, kind="linear")
    with pytest.raises(UserError, match="--width=2 cannot change on resume: the run has width=4"):
        options.resume(Example, saved, {"width": 2})
    with pytest.raises(UserError, match="width=2, which the preset sets, cannot change on resume"):
        options.resume(Example, saved, {}, preset={"width": 2})
    with pytest.raises(UserError, match="options that this script does not know"):
        options.resume(Example, saved | {"height": 1}, {})


def test_an_evaluation_may_change_what_training_fixes_but_not_the_data():
    typed = {"rate": 1.0}
    assert options.resume(Example, {"rate": 5.0}, typed, evaluate=True).rate == 1.0
    with pytest.raises(UserError, match="--rate=1.0 cannot change on resume"):
        options.resume(Example, {"rate": 5.0}, typed)
    for evaluate in (False, True):
        with pytest.raises(UserError, match="--name=y cannot change on resume"):
            options.resume(Example, {}, {"name": "y"}, evaluate=evaluate)


@pytest.mark.parametrize("columns, widest", [(40, 76), (120, 120)])
def test_help_shows_every_option_as_wide_as_the_terminal(columns, widest, capsys, monkeypatch):
    @dataclass
    class Wordy(Example):
        long: Annotated[str, "one or another word " * 8 + "and an end"] = "a default\n" * 4
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as e:
        parse("--help", cls=Wordy)
    shown = capsys.readouterr().out
    assert not e.value.code and "Doc." in shown
    lines = shown.split("\n\n", 1)[0].splitlines() + shown.splitlines()[3:]
    assert widest - 20 < max(map(len, lines)) <= widest
    words = " ".join(shown.split())
    for option in options.options(Wordy).values():
        default = str(option.default).replace("\n", "\\n")
        assert f"--{option.name}={default} {option.help}" in words
    assert "which [cosine or linear]" in words and "by which rule [adam or sgd]" in words


def test_an_interrupted_program_says_so(capsys):
    def interrupted():
        raise KeyboardInterrupt
    with pytest.raises(SystemExit) as e:
        options.run(interrupted)
    assert e.value.code == 130 and capsys.readouterr().err == "\ninterrupted\n"


@pytest.mark.parametrize("problem, said", [
    (MemoryError(), "MemoryError"), (MemoryError("Unable to allocate 9 GiB"), "Unable to allocate"),
    (RuntimeError("CUDA out of memory. Tried to allocate 9 GiB\nmore"), "Tried to allocate")])
def test_out_of_memory_is_one_line(problem, said, capsys):
    def full():
        raise problem
    with pytest.raises(SystemExit) as e:
        options.run(full)
    err = capsys.readouterr().err
    assert e.value.code == 2 and said in err and err.count("\n") == 1 and "--batch_size" in err


def test_a_path_that_may_not_be_used_is_one_line(capsys):
    def locked():
        raise PermissionError(13, "Permission denied", "out/ckpt.pt")
    with pytest.raises(SystemExit) as e:
        options.run(locked)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.endswith("error: out/ckpt.pt: Permission denied: name another "
                                              "path\n")


@pytest.mark.parametrize("local, kind, said", [("0", "DataError", "-c: error: no room\n"),
                                               ("1", "DataError", ""),
                                               ("1", "OwnError", "-c: error: no room\n")])
def test_of_a_nodes_processes_the_first_prints_the_error(local, kind, said):
    program = (f"from engine import options\ndef main():\n    raise options.{kind}('no room')\n"
               "options.run(main)")
    done = shell("-c", program, check=False, RANK="2", LOCAL_RANK=local)
    assert done.returncode == 2 and done.stderr == said
