"""Options: a dataclass's defaults <- a TOML preset <- --key=value on the command line.

A field of a configuration is declared once, with all that is known of it:

    n_head: Annotated[int, "attention heads per block", FIXED, at_least(1)] = 4

Its type is int, float, bool, str, Literal[...] or a union of these. After its meaning come a mark
and checks, both optional. `--help`, presets, error messages, resuming and comparisons follow.
A subclass that only wants another default writes `n_head: int = 2`.
"""
import dataclasses
import difflib
import functools
import importlib
import json
import math
import os
import shutil
import sys
import textwrap
import tomllib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from engine.nanogpt_names import answer
from engine.values import BOOLEANS, convert, fits, not_among, suggest, type_name

# Marks: what may happen to an option after a run has begun.
FIXED = "fixed"  # decides what a run is: cannot change on resume
FIXED_IN_TRAINING = "fixed in training"  # the same, but an evaluation may change it
DATA = "data"  # chooses the data: fixed, and the same for all arms of a comparison
SOURCE = "source"  # where it is read from: as DATA, but a resumed run may find it elsewhere
FREE = "free"  # changes no result
LOCAL = "local"  # where a process works: like FREE, each process may have its own


class UserError(Exception):
    """Something the user can mend. `run` prints its message as one line and exits with code 2."""


class OwnError(UserError):
    """What one process has met, unknown to the others: it says so itself, whatever its rank."""


class DataError(UserError):
    """Data that cannot be used: the message says what is wrong, where, and what to do."""


def need(module: str, why: str):
    """The module. Raises DataError, which says how to install it, where it is missing.

    why: how the message begins, before the package: "figures need".
    """
    try:
        return importlib.import_module(module)
    except ImportError as e:
        package = {"PIL": "pillow"}.get(e.name, e.name or module)
        raise DataError(f"{why} {package}: pip install -r requirements-extra.txt") from None


def run(main: Callable[[], None]):
    """Call main(). A UserError ends the program with one line and exit code 2.

    Of the processes of a node the first prints it, where it is not an OwnError.
    """
    try:
        try:
            main()
        except (RuntimeError, MemoryError) as e:
            text = str(e) or type(e).__name__
            if isinstance(e, RuntimeError) and not ("memory" in text and "alloc" in text):
                raise
            raise OwnError(f"out of memory ({text.splitlines()[0][:200]}): lower --batch_size, "
                           "--block_size or the model's size") from e
        except PermissionError as e:
            if not e.filename:
                raise
            raise OwnError(f"{e.filename}: {e.strerror}: name another path") from e
        finally:
            sys.stdout.flush()
    except UserError as e:
        if isinstance(e, OwnError) or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: error: {e}", file=sys.stderr)
        if "RANK" in os.environ:
            # Freeing a DDP model waits, with the GIL, for gloo's threads. After an error these may
            # want the GIL themselves. So leave without freeing anything.
            sys.stderr.flush()
            os._exit(2)
        sys.exit(2)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


# Checks: functions (option's name, its value, configuration) -> what is wrong, or None.


def at_least(least: float):
    def check(name, value, config):
        if not value >= least:
            rule = f"be at least {least}" if least else "not be negative"
            return f"{name}={value} must {rule}"
    return check


def in_range(low: float, high: float, closed: str = "low"):
    """The interval [low, high), or with closed="high" (low, high]."""
    def check(name, value, config):
        inside = low <= value < high if closed == "low" else low < value <= high
        if not inside:
            interval = f"[{low}, {high})" if closed == "low" else f"({low}, {high}]"
            return f"{name}={value} must be in {interval}"
    return check


def not_empty(name, value, config):
    if not value.strip():
        return f"--{name}= is empty: give a name"


def divides(other: str):
    def check(name, value, config):
        whole = getattr(config, other)
        if whole % value:
            return f"{name}={value} does not divide {other}={whole}: choose a divisor of {whole}"
    return check


def odd_or_zero(name, value, config):
    if value < 0 or (value and value % 2 == 0):
        return f"{name}={value} must be odd, or 0"


def one_of(names: Collection[str]):
    """One of `names`, looked up when the check runs: a registry can grow meanwhile."""
    def check(name, value, config):
        return not_among(name, value, names)
    check.names = names
    return check


seed = in_range(0, 2**32)  # what torch and numpy both take


@dataclasses.dataclass
class Options:
    """Base of all configurations: looks at every field when one is made. Raises ValueError."""

    def __post_init__(self):
        for option in options(type(self)).values():
            value = getattr(self, option.name)
            if not fits(value, option.type):
                raise ValueError(f"{option.name}={value!r} is not of type {type_name(option.type)}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{option.name}={value} must be a finite number")
            for check in option.checks:
                if wrong := check(option.name, value, self):
                    raise ValueError(wrong)


@dataclasses.dataclass(frozen=True)
class Option:
    name: str
    type: Any
    default: Any
    declared: Any  # the default of the class that declares it: what was done before it was there
    help: str
    mark: str  # one of those above, or ""
    checks: tuple[Callable, ...]

    @property
    def kind(self) -> Any:
        """Its type; of `one_of` the names as they are now."""
        for check in self.checks:
            if hasattr(check, "names"):
                return Literal[tuple(check.names)]
        return self.type

    def convert(self, name: str, text: str) -> Any:
        """The value that `text` stands for. Raises UserError, in which it is called `name`."""
        try:
            return convert(name, text, self.kind)
        except ValueError as e:
            raise UserError(str(e)) from None


@functools.cache
def options(cls: type) -> dict[str, Option]:
    """The fields of a configuration as Options, in the order of their declaration."""
    hints = {}
    declared = {}
    for base in reversed(cls.__mro__):
        for name, hint in get_type_hints(base, include_extras=True).items():
            if get_origin(hint) is Annotated:
                hints[name] = hint
                declared.setdefault(name, getattr(base, name))
    result = {}
    for field in dataclasses.fields(cls):
        kind, help, *rest = get_args(hints[field.name])
        mark = next((part for part in rest if isinstance(part, str)), "")
        checks = tuple(part for part in rest if callable(part))
        result[field.name] = Option(field.name, kind, field.default,
                                    declared[field.name], help, mark, checks)
    return result


def marked(cls: type, *marks: str) -> list[str]:
    """The names of the options that carry one of the marks."""
    return [option.name for option in options(cls).values() if option.mark in marks]


def parse(cls: type, argv: list[str], doc: str) -> tuple[Any, dict]:
    """-> (an instance of `cls`, {option: value} of those typed on the command line)."""
    preset, typed = read(cls, argv, doc)
    return build(cls, preset | typed), typed


def read(cls: type, argv: list[str], doc: str) -> tuple[dict, dict]:
    """-> ({option: value} of the presets, the same of the options that were typed).

    An argument without dashes is a preset, a TOML file. --help prints `doc` and all options and
    exits. Raises UserError for an unknown option or a bad value.
    """
    known = options(cls)
    preset, typed = {}, {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            print_help(doc, known)
            sys.exit(0)
        if word.endswith(".toml") and not word.startswith("--"):
            preset |= read_toml(Path(word), known)
            continue
        key, equals, text = word.removeprefix("--").partition("=")
        if (here := answer(word)) and not (key in known and Path(text).exists()):
            raise UserError(here)
        if not word.startswith("--"):
            raise UserError(f"unexpected argument {word!r}: give a preset (config/NAME.toml) and "
                            "--key=value options, a task's name first; see --help")
        option = find(key, known)
        if not equals:
            text = value_of_next_word(option, words)
        typed[key] = option.convert(f"--{key}", text)
    return preset, typed


def value_of_next_word(option: Option, words: list[str]) -> str:
    """The value in `--key value`; for a switch alone, True. Takes the word out of `words`."""
    follows = bool(words) and not words[0].startswith("--")
    if option.type is bool and not (follows and words[0].lower() in BOOLEANS):
        return "True"
    if not follows:
        raise UserError(f"--{option.name} needs a value of type {type_name(option.type)}, "
                        f"as in --{option.name}={option.default!r}")
    return words.pop(0)


def preset_of_task(argv: list[str], tasks: tuple[str, ...], prefix: str) -> list[str]:
    """A task's name in first place stands for its preset, the small one where there is one.

    The presets are config/<prefix>_<task>.toml. Raises UserError for an unknown name.
    """
    if not argv or argv[0].startswith("-") or argv[0].endswith(".toml"):
        return argv
    task, *rest = argv
    if task not in tasks:
        raise UserError(f"unknown task {task!r}: {suggest(task, tasks)}choose {', '.join(tasks)}")
    folder = Path(__file__).resolve().parents[1] / "config"
    small = folder / f"{prefix}_{task}_small.toml"
    preset = small if small.exists() else folder / f"{prefix}_{task}.toml"
    return [str(preset), *rest]


def resume(cls: type, saved: dict, typed: dict,
           preset: dict | None = None, evaluate: bool = False) -> Any:
    """The configuration of a resumed run: the saved one, in which only `typed` options change.

    Options that are newer than the checkpoint have their declared defaults.
    evaluate: it will not be trained on. Raises UserError where a fixed option, typed or of a
    preset, is not the run's.
    """
    known = options(cls)
    if unknown := sorted(set(saved) - set(known)):
        raise UserError("the checkpoint has options that this script does not know "
                        f"({', '.join(unknown)}): another script or version wrote it")
    saved = {option.name: option.declared for option in known.values()} | saved
    fixed = {FIXED, DATA} if evaluate else {FIXED, DATA, FIXED_IN_TRAINING}
    for key, value in ((preset or {}) | typed).items():
        before = saved[key]
        if known[key].mark in fixed and before != value:
            has = f"cannot change on resume: the run has {key}={before}"
            if key in typed:
                raise UserError(f"--{key}={value} {has}")
            raise UserError(f"{key}={value}, which the preset sets, {has}. Leave out the preset, "
                            "or the name of the task that stands for it")
    return build(cls, saved | typed)


def build(cls: type, values: dict) -> Any:
    """cls(**values), its ValueErrors as UserErrors."""
    try:
        return cls(**values)
    except ValueError as e:
        raise UserError(str(e)) from None


def save(config: Any, path: Path):
    """Write the options as TOML that can be given back as a preset."""
    lines = []
    for key, value in dataclasses.asdict(config).items():
        # What JSON writes is TOML too, but for one control character.
        text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
        lines.append(f"{key} = {text}\n")
    path.write_text("".join(lines), encoding="utf-8", errors="replace")


def close(key: str, known: Collection[str]) -> list[str]:
    return difflib.get_close_matches(key, known, n=1, cutoff=0.7)


def find(word: str, known: dict[str, Option]) -> Option:
    """The option of a word such as "name" or "--name=value". Raises UserError."""
    key = word.removeprefix("--").partition("=")[0]
    if key not in known:
        if here := answer(f"--{word.removeprefix('--')}"):
            raise UserError(here)
        near = close(key, known)
        hint = f"did you mean --{near[0]}?" if near else "see --help"
        raise UserError(f"unknown option --{key}: {hint}")
    return known[key]


def read_toml(path: Path, known: dict[str, Option]) -> dict:
    """The values in a flat TOML file, checked against the options. Raises UserError."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = suggest(f"config/{path.name}", list(map(str, Path("config").glob("*.toml"))))
        raise UserError(f"no preset {path}: {near}see the folder config") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise UserError(f"cannot read the preset {path}: {e}") from None
    for key, value in values.items():
        if key not in known and not close(key, known):
            raise UserError(f"{path} sets {key}, which this script does not have: it is another "
                            "script's preset")
        values[key] = find(key, known).convert(f"{path}: {key}", str(value))
    return values


def print_help(doc: str, known: dict[str, Option]):
    """The options in two columns, as wide as the terminal."""
    left = 36
    width = max(shutil.get_terminal_size((100, 24)).columns, left + 40)
    print(doc.strip())
    print("\nOptions (--key=value, --key value, or --key alone to switch a True/False one on):")
    for option in known.values():
        default = str(option.default).replace("\n", "\\n")
        head = f"  --{option.name}={default}"
        # Not where it takes all values of a type.
        choices = f" [{type_name(option.kind)}]" if get_origin(option.kind) else ""
        if len(head) >= left:
            print(head)
            head = ""
        print(textwrap.fill(option.help + choices, width, initial_indent=f"{head:<{left}} ",
                            subsequent_indent=" " * (left + 1)))
