"""The values of options: of what type they are, and what a typed word stands for."""
import difflib
import types
from collections.abc import Collection
from typing import Any, Literal, Union, get_args, get_origin

BOOLEANS = {"true": True, "1": True, "yes": True, "on": True,
            "false": False, "0": False, "no": False, "off": False}


def type_name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(get_args(kind))
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(map(type_name, get_args(kind)))
    return kind.__name__


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an option's type; a whole number is a float too."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return any(fits(value, member) for member in get_args(kind))
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def convert(name: str, text: str, kind: Any) -> Any:
    """The string `text` as a `kind`. Raises ValueError, in which it is called `name`."""
    if get_origin(kind) in (Union, types.UnionType):
        for member in get_args(kind):
            try:
                return convert(name, text, member)
            except ValueError:
                continue
    elif get_origin(kind) is Literal:
        if wrong := not_among(name, text, get_args(kind)):
            raise ValueError(wrong)
        return text
    elif kind is bool:
        if text.lower() in BOOLEANS:
            return BOOLEANS[text.lower()]
    else:
        try:
            return kind(text)
        except ValueError:
            pass
    choose = ": choose True or False" if kind is bool else ""
    raise ValueError(f"{name}={text!r} is not of type {type_name(kind)}{choose}")


def not_among(name: str, value: str, names: Collection[str]) -> str | None:
    """What is wrong where `value` is not one of `names`."""
    if value not in names:
        return f"{name}={value}: {suggest(value, names)}choose {' or '.join(names)}"


def suggest(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}? " if near else ""
