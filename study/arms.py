"""The arms of a comparison, as --vary and --arm ask for them."""
import itertools
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from engine.options import UserError


@dataclass
class Arm:
    name: str
    words: list[str]  # its options, as typed: ["--precond=True"]
    beside: str = ""  # in a grid: the arm with the first value of the last --vary, else the same
    tuned: dict[str, float | None] = field(default_factory=dict)  # value -> mean; None: diverged
    chosen: str | None = None  # the best of these values
    folders: list[Path] = field(default_factory=list)  # of its runs, by seed

    @property
    def keys(self) -> list[str]:
        """The options that it sets."""
        return [word[2:].partition("=")[0] for word in self.words]


def make_arms(vary: list[str], named: list[str]) -> list[Arm]:
    """The grid of all --vary, then an arm for each --arm. Raises UserError."""
    varied = [settings_of(text) for text in vary]
    arms = []
    for settings in itertools.product(*varied) if varied else ():
        beside = " ".join([*settings[:-1], varied[-1][0]]) if len(varied) > 1 else ""
        arms.append(Arm(" ".join(settings), [f"--{word}" for word in settings], beside))
    arms += map(named_arm, named)
    if len(arms) < 2:
        raise UserError("nothing to compare: give --vary KEY=VALUE,VALUE, or --arm twice")
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


def named_arm(text: str) -> Arm:
    """"NAME: KEY=VALUE ..." -> its arm."""
    name, colon, settings = text.partition(":")
    if not (colon and name.strip()):
        raise UserError(f'--arm "{text}": write --arm "NAME: KEY=VALUE KEY=VALUE"')
    try:
        words = [word.removeprefix("--") for word in shlex.split(settings)]
    except ValueError as e:
        raise UserError(f"--arm {text}: {e}") from None
    for word in words:
        if word.find("=") < 1:
            raise UserError(f"--arm {text}: {word!r} is not KEY=VALUE")
    return Arm(name.strip(), [f"--{word}" for word in words])
