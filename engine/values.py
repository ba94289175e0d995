"""The values of options: of what type they are, and what a typed word stands for."""
import configparser
import contextlib
import difflib
import types
from collections.abc import Collection
from typing import Any, Literal, Union, get_args, get_origin

BOOLEANS = configparser.ConfigParser.BOOLEAN_STATES  # true, 1, yes, on; false, 0, no, off


def members(kind: Any) -> tuple:
    """The types of a union, or the one type."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def type_name(kind: Any) -> str:
    names = []
    for member in members(kind):
        names += get_args(member) or [member.__name__]
    return " or ".join(names)


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of an option's type; a whole number is a float too."""
    for member in members(kind):
        if value in get_args(member):  # of a Literal
            return True
        if type(value) is member or (type(value) is int and member is float):
            return True
    return False


def convert(name: str, text: str, kind: Any) -> Any:
    """The string `text` as a `kind`. Raises ValueError, in which it is called `name`."""
    for member in members(kind):
        if text in get_args(member):
            return text
        if member is bool and text.lower() in BOOLEANS:
            return BOOLEANS[text.lower()]
        if member in (int, float, str):
            with contextlib.suppress(ValueError):
                return member(text)
    if get_origin(kind) is Literal:
        raise ValueError(not_among(name, text, get_args(kind)))
    choose = ": choose True or False" if kind is bool else ""
    raise ValueError(f"{name}={text!r} is not of type {type_name(kind)}{choose}")


def not_among(name: str, value: str, names: Collection[str]) -> str | None:
    """What is wrong where `value` is not one of `names`."""
    if value not in names:
        return f"{name}={value}: {suggest(value, names)}choose {' or '.join(names)}"


def suggest(word: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]}? " if near else ""
