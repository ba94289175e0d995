"""config.py: types, precedence, errors, help, and the round trip through TOML."""
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from engine import options
from engine.options import FIXED, Options, UserError, at_least


@dataclass
class Example(Options):
    width: Annotated[int, "how wide", FIXED, at_least(1)] = 8
    rate: Annotated[float, "how fast"] = 0.1
    power: Annotated[float | Literal["learned"], "how strong"] = 1.0
    name: Annotated[str, "how called"] = "x"
    on: Annotated[bool, "whether"] = False
    kind: Annotated[Literal["cosine", "linear"], "which"] = "cosine"


def parse(*argv):
    return options.parse(Example, list(argv), "Doc.")


@pytest.mark.parametrize("argv, expected", [
    (["--width=3"], {"width": 3}),
    (["--width", "3"], {"width": 3}),
    (["--rate=1e-3"], {"rate": 1e-3}),
    (["--rate", "-2"], {"rate": -2.0}),
    (["--on"], {"on": True}),
    (["--on", "--width=2"], {"on": True, "width": 2}),
    (["--on", "False"], {"on": False}),
    (["--on=yes"], {"on": True}),
    (["--name=a=b"], {"name": "a=b"}),
    (["--kind=linear"], {"kind": "linear"}),
    (["--power=0.5"], {"power": 0.5}),
    (["--power=learned"], {"power": "learned"}),
    (["--width=3", "--width=4"], {"width": 4}),
])
def test_values(argv, expected):
    config, typed = parse(*argv)
    assert typed == expected
    assert all(getattr(config, key) == value and type(getattr(config, key)) is type(value) for key, value in expected.items())


def test_preset_lies_between_defaults_and_command_line(tmp_path):
    preset = tmp_path / "p.toml"
    preset.write_text("width = 3\nrate = 2\n")
    config, typed = parse(str(preset), "--rate=5")
    assert (config.width, config.rate, config.name, typed) == (3, 5.0, "x", {"rate": 5.0})


@pytest.mark.parametrize("argv, words", [
    (["--widht=3"], "did you mean --width?"),
    (["--zzzzzz=3"], "unknown option --zzzzzz"),
    (["--width=x"], "--width='x' is not of type int"),
    (["--width=1.5"], "is not of type int"),
    (["--on=perhaps"], "is not of type bool"),
    (["--kind=cosin"], "did you mean cosine? choose cosine or linear"),
    (["--power=learnt"], "is not of type float or learned"),
    (["--width"], "needs a value of type int"),
    (["--width=0"], "width=0 must be at least 1"),
    (["word"], "unexpected argument 'word'"),
    (["nothere.toml"], "no preset nothere.toml"),
])
def test_mistakes(argv, words):
    with pytest.raises(UserError, match="(?s)" + words.replace("?", r"\?")):
        parse(*argv)


@pytest.mark.parametrize("content, words", [("width = [", "cannot read the preset"), ("widht = 3", "did you mean --width"),
                                            ("width = 'x'", "is not of type int"), ("width = 2.5", "is not of type int")])
def test_mistakes_in_a_preset(tmp_path, content, words):
    (tmp_path / "p.toml").write_text(content)
    with pytest.raises(UserError, match=words):
        parse(str(tmp_path / "p.toml"))


def test_saved_configuration_can_be_given_back(tmp_path):
    config, _ = parse("--width=3", "--rate=1e-30", '--name=say "hi"\\ \n\té', "--on", "--power=learned")
    options.save(config, tmp_path / "c.toml")
    assert parse(str(tmp_path / "c.toml"))[0] == config


def test_resume_changes_only_what_was_typed():
    saved = {"width": 3, "rate": 5.0}
    assert options.resume(Example, saved, {"rate": 1.0, "width": 3}) == Example(width=3, rate=1.0)
    with pytest.raises(UserError, match="--width=4 cannot change on resume: the run has width=3"):
        options.resume(Example, saved, {"width": 4})
    with pytest.raises(UserError, match="options that this script does not know"):
        options.resume(Example, saved | {"height": 1}, {})


def test_help_shows_every_option(capsys):
    with pytest.raises(SystemExit) as e:
        parse("--help")
    shown = capsys.readouterr().out
    assert not e.value.code and "Doc." in shown
    for option in options.options(Example).values():
        assert f"--{option.name}={option.default}" in shown and option.help in shown
