"""Dataclasses as the plain values that msgpack carries, and back again, checked: what processes and hosts report."""

from __future__ import annotations

import functools
from dataclasses import fields, is_dataclass
from enum import StrEnum
from reprlib import repr as short
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from proto_v3.errors import PeerProtocolError

MAX_INT = 2**60
"""Of either sign. In nanoseconds 36 years; sums of a few stay within 64 bits."""
MAX_TEXT_CHARS = 1 << 16

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """A dataclass as a map of its fields; lists and dataclasses inside it likewise."""
    if is_dataclass(value):
        return {each.name: to_plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, StrEnum) else value


def from_plain(kind: type[T], value: object) -> T:
    """The dataclass that `to_plain` made `value` of.

    All fields must be there, and no others, each of its type. What is of type `Any` is not looked into. Raises
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
    if origin is UnionType:
        return None if value is None and NoneType in inner else _read(inner[0], value, name)
    if origin is list:
        return [_read(inner[0], item, f"{name}.{at}") for at, item in enumerate(_checked(list, value, name))]
    if origin is dict:
        given = _checked(dict, value, name)
        return {_read(inner[0], key, f"key of {name}"): _read(inner[1], given[key], f"{name}.{key}") for key in given}
    if issubclass(kind, StrEnum):
        if value not in set(kind):
            raise _wrong(name, value, " or ".join(kind))
        return kind(value)
    _checked(kind, value, name)
    if kind is int and abs(value) > MAX_INT:
        raise _wrong(name, value, f"from {-MAX_INT} to {MAX_INT}")
    if kind is str and len(value) > MAX_TEXT_CHARS:
        raise _wrong(name, value, f"of at most {MAX_TEXT_CHARS} characters")
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
    return get_type_hints(kind)


def _checked(kind: type, value: Any, name: str) -> Any:
    if type(value) is not kind:
        raise _wrong(name, value, f"a {kind.__name__}")
    return value


def _wrong(name: str, value: object, due: str) -> PeerProtocolError:
    return PeerProtocolError(f"{name} = {short(value)}: must be {due}")
