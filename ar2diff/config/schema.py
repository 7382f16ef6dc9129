"""The fields of a recipe by their dotted names, as `ar2diff config schema` prints them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel


def field_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Dotted names of all fields of a section and of the sections in it."""
    for name, _ in _fields(model, prefix):
        yield name


def describe_fields(model: type[BaseModel]) -> Iterator[tuple[str, str, Any, str]]:
    """(dotted name, type, default, description) of every field."""
    for name, field in _fields(model, ""):
        yield name, _type_name(field.annotation), field.default, field.description or ""


def keys_of(model: type[BaseModel], parents: list[str]) -> list[str]:
    """Names of the fields of the section at a path, which may lead through items of a list."""
    for name in parents:
        if not name.isdecimal():
            model = next(
                kind for kind in _kinds(model.model_fields[name].annotation) if _is_section(kind)
            )
    return list(model.model_fields)


def _fields(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        kinds = [kind for kind in _kinds(field.annotation) if kind is not type(None)]
        if len(kinds) == 1 and _is_section(kinds[0]):  # a section, which may be null; not a list
            yield from _fields(kinds[0], f"{prefix}{name}.")
        else:
            yield prefix + name, field


def _type_name(kind: Any) -> str:
    """A type as people write it: `int`, `str or null`, `full | block_causal`, `list of int`."""
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    names = [_type_name(k) for k in get_args(kind) if k not in (type(None), Ellipsis)]
    if get_origin(kind) is tuple:
        return f"list of {names[0]}"
    if get_origin(kind) is dict:
        return "mapping"
    if names:
        return " or ".join([*names, *(["null"] if type(None) in get_args(kind) else [])])
    return kind.__name__


def _kinds(annotation: Any) -> list[Any]:
    return list(get_args(annotation)) or [annotation]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)
