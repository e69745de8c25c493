# SPDX-License-Identifier: GPL-2.0-or-later
"""Dataclasses as the plain values that msgpack carries, and back again, checked: what processes and hosts send.

A `str` is a text for people: it is cleaned where it comes in (proto_v3.text). One that is data is `Annotated` with its
bounds, and stays as it is.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from reprlib import repr as short
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from proto_v3.errors import PeerProtocolError
from proto_v3.text import clean

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Within:
    """Bounds of a field, for `Annotated`: of an int's value, or of the length of a str or of bytes."""

    low: int
    high: int


MAX_INT = 2**60
ANY_INT = Within(-MAX_INT, MAX_INT)
"""In nanoseconds 36 years; sums of a few stay within 64 bits."""
MAX_TEXT_CHARS = 2000
"""Of a text that is shown."""


def to_plain(value: Any) -> Any:
    """A dataclass as a map of its fields; lists and dataclasses inside it likewise."""
    if is_dataclass(value):
        return {each.name: to_plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, StrEnum) else value


def from_plain(kind: type[T], value: object) -> T:
    """The dataclass that `to_plain` made `value` of.

    All fields must be there, and no others, each of its type and within its bounds: those that the field is annotated
    with, or ANY_INT. A text is cleaned, and cut to MAX_TEXT_CHARS. Values of type `Any` are not checked. Raises
    PeerProtocolError with the field, its value, and what it must be.
    """
    read: T = _read(kind, value, kind.__name__)
    return read


def _read(kind: Any, value: Any, name: str) -> Any:
    if kind is Any:
        return value
    if isinstance(kind, type) and is_dataclass(kind):
        return _read_fields(kind, value, name)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _bounded(inner[0], inner[1], value, name)
    if origin is UnionType:
        return None if value is None and NoneType in inner else _read(inner[0], value, name)
    if origin is list:
        return [_read(inner[0], item, f"{name}.{at}") for at, item in enumerate(_checked(list, value, name))]
    if origin is dict:
        given = _checked(dict, value, name)
        return {_read(inner[0], key, f"key of {name}"): _read(inner[1], given[key], f"{name}.{key}") for key in given}
    if issubclass(kind, StrEnum):
        if value not in list(kind):
            raise _wrong(name, value, " or ".join(kind))
        return kind(value)
    if kind is int:
        return _bounded(int, ANY_INT, value, name)
    checked = _checked(kind, value, name)
    return clean(checked, MAX_TEXT_CHARS) if kind is str else checked


def _bounded(kind: type, within: Within, value: Any, name: str) -> Any:
    size = _checked(kind, value, name) if kind is int else len(_checked(kind, value, name))
    if not within.low <= size <= within.high:
        raise _wrong(name, value, f"{'' if kind is int else 'of a length '}from {within.low} to {within.high}")
    return value


def _read_fields(kind: type, value: Any, name: str) -> Any:
    due, given = _types(kind), _checked(dict, value, name)
    for key in due:
        if key not in given:
            raise PeerProtocolError(f"{name}.{key} is missing")
    for key in given:
        if key not in due:
            raise PeerProtocolError(f"{name} has an unknown field {short(key)}")
    return kind(**{key: _read(inner, given[key], f"{name}.{key}") for key, inner in due.items()})


@functools.cache
def _types(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {each.name: hints[each.name] for each in fields(kind)}


def _checked(kind: type, value: Any, name: str) -> Any:
    if type(value) is not kind:
        raise _wrong(name, value, f"of type {kind.__name__}")
    return value


def _wrong(name: str, value: object, due: str) -> PeerProtocolError:
    return PeerProtocolError(f"{name} = {short(value)}: must be {due}")
