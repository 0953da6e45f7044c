"""
What a file must hold: a schema, checked where the file is read.

A schema is a kind (words, test), [schema of the elements] or {key: schema}, where "?" marks keys that may be
missing or null, and "*" stands for all keys without a schema of their own.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def whole(low: int) -> tuple:
    return f"a whole number from {low} on", lambda x: type(x) is int and low <= x < 2**63


WHOLE, COUNT = whole(0), whole(1)
NUMBER = "a number", lambda x: type(x) is float or type(x) is int and abs(x) < 2**63
FINITE = "a finite number", lambda x: NUMBER[1](x) and abs(x) < 1e300
FLAG = "true or false", lambda x: type(x) is bool
TEXT = "text", lambda x: type(x) is str and not re.search("[\0\ud800-\udfff]", x)
NAME = "a plain name", lambda x: type(x) is str and re.fullmatch(r"\w[\w.-]*", x)
NONE = "absent", lambda x: False
NESTED = {list: ("a list", lambda x: type(x) is list), dict: ("an object", lambda x: isinstance(x, dict))}
TYPES = {int: whole(-1), float: NUMBER, bool: FLAG, str: TEXT}  # of settings


def check(value, schema: tuple | list | dict, key: str = "") -> None:
    """ValueError, which names the key, unless `value` fits the schema."""
    words, test = NESTED.get(type(schema), schema)
    if not test(value):
        raise ValueError(f"{key or 'the content'} must be {words}, not {value!r:.60}")
    if isinstance(schema, list):
        schema, value = {"*": schema[0]} if schema else {}, dict(enumerate(value))
    marks = {name.removesuffix("?"): name for name in schema if name != "*"} if type(schema) is dict else {}
    for name in [*marks, *(value if "*" in schema else ())]:
        if value.get(name) is not None:
            check(value[name], schema[marks.get(name, "*")], f"{key}.{name}".lstrip("."))
        elif not marks.get(name, "").endswith("?"):
            raise ValueError(f"{key}.{name} is missing".lstrip("."))


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Inside, a ValueError names the file, and any failure but one of the machine becomes one."""
    try:
        yield
    except (OSError, MemoryError):
        raise
    except Exception as error:
        name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        message = " ".join(str(error).splitlines())  # a key in it may have line breaks
        raise ValueError(f"{path}: {name}{message}") from error


def read_json(path: Path, schema: dict) -> dict:
    """The content of a JSON file, checked. ValueError names the file and the key."""
    with naming(path):
        if not path.is_file():
            raise ValueError("there is no such file")
        data = json.loads(path.read_text(encoding="utf-8"))
        check(data, schema)
    return data
