"""The arms of a comparison, as --vary and --arm ask for them."""
import itertools
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from engine.options import UserError


@dataclass
class Arm:
    name: str
    words: list[str]  # its options, as typed: ["--precond=True"]
    beside: str = ""  # in a grid: the arm with the first value of the last --vary, else the same
    # Of each option of --tune, value -> mean result; None: diverged.
    tuned: dict[str, dict[str, float | None]] = field(default_factory=dict)
    chosen: dict[str, str] = field(default_factory=dict)  # option -> the best of these values
    folders: list[Path] = field(default_factory=list)  # of its runs, by seed

    @property
    def keys(self) -> list[str]:
        """The options that it sets."""
        return [word[2:].partition("=")[0] for word in self.words]


def make_arms(vary: list[str], named: list[str]) -> list[Arm]:
    """The grid of all --vary, then an arm for each --arm. Raises UserError."""
    varied = [settings_of(text) for text in vary]
    arms = []
    grid = itertools.product(*varied) if varied else ()
    for settings in grid:
        words = [f"--{word}" for word in settings]
        beside = ""
        if len(varied) > 1:
            beside = " ".join([*settings[:-1], varied[-1][0]])
        arms.append(Arm(" ".join(settings), words, beside))
    arms += map(named_arm, named)
    if len(arms) < 2:
        raise UserError("nothing to compare: give --vary KEY=VALUE,VALUE, or --arm twice")
    for arm in arms:
        if len(set(arm.keys)) < len(arm.keys):
            raise UserError(f"the arm {arm.name!r} sets one option twice")
    if len({arm.name for arm in arms}) < len(arms):
        raise UserError("two arms have the same name: every arm and every value of --vary must "
                        "be another")
    return arms


def settings_of(text: str) -> list[str]:
    """"KEY=A,B" -> ["KEY=A", "KEY=B"]"""
    key, _, values = text.partition("=")
    if not (key and values):
        raise UserError(f"--vary {text}: write --vary KEY=VALUE,VALUE")
    return [f"{key}={value}" for value in values.split(",")]


def read_tunings(texts: list[str]) -> dict[str, list[str]]:
    """["KEY=A,B", ...] -> {KEY: [A, B], ...}, in the order in which they are tuned."""
    tunings = {}
    for text in texts:
        key, _, values = text.partition("=")
        values = list(dict.fromkeys(values.split(",")))
        if not key or len(values) < 2:
            raise UserError(f"--tune {text}: write --tune KEY=VALUE,VALUE")
        if key in tunings:
            raise UserError(f"--tune {key} is given twice: write all its values in one")
        tunings[key] = values
    return tunings


def beyond(values: Iterable[str], best: str) -> str | None:
    """The value to try next where the best one is at an end of the values tried, else None.

    It lies as far from the best as that lies from its neighbour, by ratio. Only positive numbers
    have such a value.
    """
    try:
        numbers = sorted(set(map(float, values)))
    except ValueError:  # words have no end
        return None
    end = float(best)
    if len(numbers) < 2 or numbers[0] <= 0:
        return None
    if end not in (numbers[0], numbers[-1]):
        return None
    neighbour = numbers[1] if end == numbers[0] else numbers[-2]
    return f"{end**2 / neighbour:.10g}"


def named_arm(text: str) -> Arm:
    """"NAME: KEY=VALUE ..." -> its arm."""
    name, colon, settings = text.partition(":")
    if not (colon and name.strip() and name.isprintable()):
        raise UserError(f'--arm {text!r}: write --arm "NAME: KEY=VALUE KEY=VALUE"')
    try:
        words = [word.removeprefix("--") for word in shlex.split(settings)]
    except ValueError as e:
        raise UserError(f"--arm {text}: {e}") from None
    for word in words:
        if word.find("=") < 1:
            raise UserError(f"--arm {text}: {word!r} is not KEY=VALUE")
    return Arm(name.strip(), [f"--{word}" for word in words])
