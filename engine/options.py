"""Options: a dataclass's defaults <- a TOML preset <- --key=value on the command line. `--help` is made from the dataclass.

A field is declared `name: Annotated[type, "meaning", mark?] = default`; type is int, float, bool, str, Literal[...] or a union of these.
Options marked "fixed" decide what a run is: they cannot change when it is resumed. "fixed in training" ones can change in an evaluation.
"""
import dataclasses
import difflib
import os
import sys
import tomllib
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


class UserError(Exception):
    """Something the user can mend: `run` prints its message as one line and exits with code 2."""


class DataError(UserError):
    """Data that cannot be used: one line that says what is wrong, where, and what to do."""


def run(main):
    """Call main(); a UserError ends the program with one line and exit code 2 (rank 0 prints it)."""
    try:
        main()
    except UserError as e:
        if os.environ.get("RANK", "0") == "0":
            print(f"{Path(sys.argv[0]).name}: error: {e}", file=sys.stderr)
        if "RANK" in os.environ:  # freeing a DDP model waits, with the GIL, for gloo's threads, which after an error may want the GIL
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(2)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)


def parse(cls: type, argv: list[str], doc: str) -> tuple[Any, dict[str, Any]]:
    """-> (an instance of the dataclass `cls`, {option: value} of those typed on the command line); see `read`."""
    preset, typed = read(cls, argv, doc)
    return build(cls, preset | typed), typed


def read(cls: type, argv: list[str], doc: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """-> ({option: value} of the presets, the same of the options typed on the command line), for the dataclass `cls`.

    An argument without dashes is a preset, a TOML file.
    --help prints `doc` and all options and exits. Raises UserError for an unknown option or a bad value.
    """
    fields = options(cls)
    preset, typed = {}, {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            print_help(doc, fields)
            sys.exit(0)
        if not word.startswith("--"):
            if word.endswith(".toml"):
                preset |= read_toml(Path(word), fields)
            else:
                raise UserError(f"unexpected argument {word!r}: give a preset (config/NAME.toml) and --key=value options, a task's name first; "
                                "see --help")
            continue
        key, equals, text = word[2:].partition("=")
        field = find(key, fields)
        if not equals:
            follows = bool(words) and not words[0].startswith("--")
            if field.type is bool and not (follows and words[0].lower() in BOOLEANS):
                text = "True"
            elif follows:
                text = words.pop(0)
            else:
                raise UserError(f"--{key} needs a value of type {type_name(field.type)}, as in --{key}={field.default!r}")
        typed[key] = convert(f"--{key}", text, field.type)
    return preset, typed


def preset_of_task(argv: list[str], tasks: tuple[str, ...], prefix: str) -> list[str]:
    """A task's name in first place stands for its preset config/<prefix>_<task>.toml: the small one, where there is one.

    Raises UserError for an unknown name.
    """
    if not argv or argv[0].startswith("-") or argv[0].endswith(".toml"):
        return argv
    if argv[0] not in tasks:
        near = difflib.get_close_matches(argv[0], tasks, n=1)
        raise UserError(f"unknown task {argv[0]!r}: " + (f"did you mean {near[0]}? " if near else "") + f"choose {', '.join(tasks)}")
    presets = Path(__file__).resolve().parents[1] / "config"
    small = presets / f"{prefix}_{argv[0]}_small.toml"
    return [str(small if small.exists() else presets / f"{prefix}_{argv[0]}.toml"), *argv[1:]]


def resume(cls: type, saved: dict[str, Any], typed: dict[str, Any], preset: dict[str, Any] | None = None,
           evaluate: bool = False) -> Any:
    """The configuration of a resumed run: the saved one; only options in `typed` override it.

    evaluate: it will not be trained on. Raises UserError where a fixed option, typed or of a preset, is not the run's.
    """
    fields = options(cls)
    if unknown := sorted(set(saved) - set(fields)):
        raise UserError(f"the checkpoint has options that this script does not know ({', '.join(unknown)}): another script or version wrote it")
    for key, value in ((preset or {}) | typed).items():
        fixed = fields[key].mark == "fixed" or fields[key].mark == "fixed in training" and not evaluate
        if fixed and saved.get(key, fields[key].default) != value:
            has = f"cannot change on resume: the run has {key}={saved.get(key, fields[key].default)}"
            raise UserError(f"--{key}={value} {has}" if key in typed else
                            f"{key}={value}, which the preset sets, {has}. Leave out the preset, or the name of the task that stands for it")
    return build(cls, saved | typed)


def build(cls: type, values: dict[str, Any]) -> Any:
    """cls(**values), its ValueErrors as UserErrors."""
    try:
        return cls(**values)
    except ValueError as e:
        raise UserError(str(e)) from None


def save(config: Any, path: Path):
    """Write the options as TOML that can be given back as a preset."""
    lines = [f"{key} = {toml_value(value)}" for key, value in dataclasses.asdict(config).items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@dataclasses.dataclass
class Option:
    name: str
    type: Any
    default: Any
    help: str
    mark: str  # "", "fixed" or "fixed in training"


def options(cls: type) -> dict[str, Option]:
    """The dataclass's fields as Options, in the order of declaration."""
    hints = get_type_hints(cls, include_extras=True)
    result = {}
    for field in dataclasses.fields(cls):
        assert get_origin(hints[field.name]) is Annotated, f"{cls.__name__}.{field.name} needs Annotated[type, help]"
        kind, help, *marks = get_args(hints[field.name])
        result[field.name] = Option(field.name, kind, field.default, help, *(marks or [""]))
    return result


def find(key: str, fields: dict[str, Option]) -> Option:
    if key not in fields:
        near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
        raise UserError(f"unknown option --{key}" + (f": did you mean --{near[0]}?" if near else ": see --help"))
    return fields[key]


BOOLEANS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}


def type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(type_name(k) for k in get_args(kind))
    return kind.__name__


def convert(name: str, text: str, kind: Any) -> Any:
    """The string `text` as a `kind`. Raises UserError."""
    if get_origin(kind) in (Union, types.UnionType):
        for member in get_args(kind):
            try:
                return convert(name, text, member)
            except UserError:
                continue
    elif get_origin(kind) is Literal:
        if text in get_args(kind):
            return text
        near = difflib.get_close_matches(text, get_args(kind), n=1)
        raise UserError(f"{name}={text}: " + (f"did you mean {near[0]}? " if near else "") + f"choose {type_name(kind)}")
    elif kind is bool:
        if text.lower() in BOOLEANS:
            return BOOLEANS[text.lower()]
    else:
        try:
            return kind(text)
        except ValueError:
            pass
    raise UserError(f"{name}={text!r} is not of type {type_name(kind)}")


def read_toml(path: Path, fields: dict[str, Option]) -> dict[str, Any]:
    """A flat TOML file's values, checked against the options. Raises UserError."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in Path("config").glob("*.toml")], n=1)
        raise UserError(f"no preset {path}" + (f": did you mean config/{near[0]}?" if near else "")) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as e:
        raise UserError(f"cannot read the preset {path}: {e}") from None
    for key, value in values.items():
        kind = find(key, fields).type
        text = value if isinstance(value, str) else str(value)
        values[key] = convert(f"{path}: {key}", text, kind)
    return values


def toml_value(value: bool | int | float | str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in escaped) + '"'
    return repr(value)


def print_help(doc: str, fields: dict[str, Option]):
    print(doc.strip() + "\n\nOptions (--key=value, --key value, or --key alone to switch a True/False one on):")
    for o in fields.values():
        head = f"--{o.name}={o.default}"
        choices = f" [{type_name(o.type)}]" if get_origin(o.type) is not None else ""
        print(f"  {head:<36} {o.help}{choices}")
