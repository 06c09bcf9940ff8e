"""Values of a TOML file as annotations want them, and back. TOML has no null: the string "none" stands for it."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import types
from collections import abc
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def arguments(
    function: Callable[..., Any], given: Mapping[str, Any], section: str, without: Iterable[str] = ()
) -> dict[str, Any]:
    """All arguments of `function` by name: those given, checked against its annotations, and its defaults.

    Args:
        function: or a class.
        given: from a file.
        section: of the file.
        without: arguments that are not the user's to give.
    """
    parameters, hints = dict(inspect.signature(function).parameters), get_type_hints(function)
    for name in without:
        del parameters[name]
    for key in given:
        known_name(f"key in [{section}]", key, parameters)
    values = {}
    for name, parameter in parameters.items():
        if name in given:
            values[name] = _value(hints[name], given[name], f"{name} in [{section}]")
        elif parameter.default is not parameter.empty:
            values[name] = parameter.default
    return values


def _value(hint: Any, value: Any, what: str) -> Any:
    """`value` as its annotation wants it."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for option in options:
        if option is types.NoneType and value in ("none", None):
            return None
        if get_origin(option) is Literal and value in get_args(option):
            return value
        if option is float and isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            return float(value)
        if option in (int, str, bool) and type(value) is option and value != "none":
            return value
        if get_origin(option) is tuple and (items := _items(get_args(option), value)) is not None:
            return items
        if get_origin(option) is abc.Mapping and isinstance(value, Mapping):
            return {key: _value(get_args(option)[1], v, f"{key} of {what}") for key, v in value.items()}
    raise ValueError(f"{what} must be {' or '.join(map(_wanted, options))}, got {value!r}")


def _wanted(option: Any) -> str:
    """An annotation, for people."""
    if option is types.NoneType:
        return '"none"'
    if get_origin(option) is abc.Mapping:
        return "a table {name = value, ...}"
    if get_origin(option) is Literal:
        return " or ".join(map(repr, get_args(option)))
    return str(option) if get_origin(option) else getattr(option, "__name__", str(option))


def _items(kinds: tuple[Any, ...], value: Any) -> tuple[Any, ...] | None:
    """A tuple whose items are of these kinds, or None."""
    if not isinstance(value, list | tuple):
        return None
    kinds = (kinds[0],) * len(value) if kinds[-1] is Ellipsis else kinds
    fits = len(kinds) == len(value) and all(type(v) is kind for v, kind in zip(value, kinds, strict=True))
    return tuple(value) if fits else None


def known_name(what: str, name: Any, known: Iterable[str]) -> None:
    """A ValueError with the known names, unless `name` is one of them."""
    known = list(known)
    if name not in known:
        close = difflib.get_close_matches(str(name), known, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ";"
        raise ValueError(f"unknown {what} {name!r}{hint} known: {', '.join(known)}")


def toml(value: Any) -> str:
    """The value as TOML writes it."""
    if value is None:
        return '"none"'
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{json.dumps(k)} = {toml(v)}' for k, v in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
