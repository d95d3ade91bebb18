"""What a JSON or YAML file holds, as the types that a dataclass declares."""

from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin, get_type_hints


class Condition(NamedTuple):
    """What a number must satisfy besides its type."""

    holds: Callable[[float], bool]
    wording: str


NAMES = {
    bool: "true or false",
    dict: "keys and values",
    float: "a number",
    int: "a whole number",
    list: "a list",
    str: "text",
}


def read_section(values: Any, section: type, key: str) -> Any:
    """A dataclass from a mapping; ``key`` is its dotted name, empty for the whole file.

    Raises:
        ValueError: One line that begins with the key at fault.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{key or 'the file'}: expected keys and values, got {values!r}")
    prefix = f"{key}." if key else ""
    types = get_type_hints(section, include_extras=True)
    for name in values:
        if name not in types:
            raise ValueError(f"{prefix}{name}: unknown key; known are {', '.join(types)}")
    for f in fields(section):
        if f.name not in values and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{prefix}{f.name}: missing")
    return section(
        **{name: read_value(values[name], types[name], prefix + name) for name in values}
    )


def read_value(value: Any, kind: Any, key: str) -> Any:
    """``value`` as ``kind``.

    Args:
        kind: A plain type, a list of one, a union, a literal, a number with a
            :class:`Condition`, or a dataclass of these.
        key: What to call it.

    Raises:
        ValueError: One line that begins with ``key``.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        return read_section(value, kind, key)
    if origin is UnionType:
        if value is None and NoneType in arguments:
            return None
        fitting = [a for a in arguments if isinstance(value, get_origin(a) or a)]
        return read_value(value, (fitting or arguments)[0], key)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{key}: expected one of {', '.join(arguments)}, got {value!r}")
        return value
    if origin is Annotated:
        number, condition = read_value(value, arguments[0], key), arguments[1]
        if not condition.holds(number):
            raise ValueError(f"{key}: expected a number {condition.wording}, got {value!r}")
        return number

    kind = origin or kind
    is_bool = isinstance(value, bool)
    if kind is float and isinstance(value, int | str) and not is_bool:
        try:
            return float(value)  # YAML reads 3e-4, without a point, as text.
        except ValueError:
            pass
    if not isinstance(value, kind) or (is_bool and kind is not bool):
        raise ValueError(f"{key}: expected {NAMES[kind]}, got {value!r}")
    if kind is list:
        return [read_value(item, arguments[0], f"{key}[{n}]") for n, item in enumerate(value)]
    return value
