"""Reading a pickle as data.

A pickle is a program for a small stack machine, and unpickling it runs whatever
functions the program names. Here the program is interpreted instead: a name
means what a table of ours says, anything that is not in the table is refused,
and no object of Python's own is ever looked up or built by name.

Time and memory are linear in the length of the pickle. Only what the picklers
of protocols 2 to 5 write for numbers, text, containers and the names in the
table is understood.
"""

import pickletools
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any


def read_pickle(data: bytes, names: Mapping[str, Any], resolve: Callable[[Any], Any]) -> Any:
    """The value that a pickle describes.

    Args:
        data: The pickle.
        names: What dotted names stand for (``"collections.OrderedDict"``): a function,
            called with the pickle's arguments, or any other value.
        resolve: Gives the value of a persistent id, which refers to something that is
            stored beside the pickle.

    Raises:
        ValueError: If the pickle names anything else, is corrupt, or uses opcodes that
            data does not need; ``names``' functions and ``resolve`` may raise it too.
    """
    try:
        return _run(data, names, resolve)
    except (IndexError, KeyError):  # Of the stack or the memo.
        raise ValueError("its pickle is corrupt: it uses values that it does not have") from None


def _run(data: bytes, names: Mapping[str, Any], resolve: Callable[[Any], Any]) -> Any:
    stack: list[Any] = []
    outer_stacks: list[list[Any]] = []
    memo: dict[int, Any] = {}

    def pop_to_mark() -> list[Any]:
        nonlocal stack
        items, stack = stack, outer_stacks.pop()
        return items

    for opcode, argument, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                outer_stacks.append(stack)
                stack = []
            case "POP":
                stack.pop()
            case "POP_MARK":
                pop_to_mark()

            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(argument)
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINBYTES" | "SHORT_BINBYTES":
                stack.append(argument)

            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(_last(stack, count))]
            case "TUPLE":
                items = tuple(pop_to_mark())
                stack.append(items)
            case "EMPTY_LIST":
                stack.append([])
            case "APPEND":
                item = stack.pop()
                _container(stack, list).append(item)
            case "APPENDS":
                items = pop_to_mark()
                _container(stack, list).extend(items)
            case "EMPTY_DICT":
                stack.append({})
            case "SETITEM":
                items = _last(stack, 2)
                del stack[-2:]
                _set_items(_container(stack, dict), items)
            case "SETITEMS":
                items = pop_to_mark()
                _set_items(_container(stack, dict), items)

            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])

            case "GLOBAL":
                stack.append(_look_up(names, *argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_look_up(names, module, name))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                if type(function) is not FunctionType or type(arguments) is not tuple:
                    raise ValueError("its pickle is corrupt: it calls what is no function")
                stack.append(function(*arguments))
            case "BUILD":
                # Attributes that a dictionary was given (state_dict()._metadata).
                stack.pop()
                _container(stack, dict)
            case "BINPERSID":
                stack.append(resolve(stack.pop()))

            case "INST":
                _look_up(names, *argument.split(" ", 1))
                raise ValueError("its pickle builds an object (opcode INST), which is not data")
            case _:
                raise ValueError(f"its pickle uses opcode {opcode.name}, which data does not need")
    raise AssertionError("genops ends with STOP or raises")


def _look_up(names: Mapping[str, Any], module: Any, name: Any) -> Any:
    if type(module) is not str or type(name) is not str:
        raise ValueError("its pickle is corrupt: it uses a name that is not text")
    dotted = f"{module}.{name}"
    if dotted not in names:
        raise ValueError(
            f"it wants to run {dotted[:200]!r}, which reading weights never needs: refused, "
            "nothing of it was run; if you trust it, save its state dict alone with torch"
        )
    return names[dotted]


def _last(stack: list[Any], count: int) -> list[Any]:
    if len(stack) < count:
        raise IndexError
    return stack[-count:]


def _container(stack: list[Any], kind: type) -> Any:
    if type(stack[-1]) is not kind:
        raise ValueError(f"its pickle is corrupt: it fills a {kind.__name__} that is none")
    return stack[-1]


def _set_items(target: dict[Any, Any], items: list[Any]) -> None:
    if len(items) % 2:
        raise ValueError("its pickle is corrupt: a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Larger integers can be chosen to have one hash, and nested tuples take long to hash.
        if not (type(key) is str or type(key) is int and key.bit_length() < 61):
            raise ValueError("its pickle has a dictionary with keys that state dicts do not have")
        target[key] = value
