"""
Recipes and command lines: from `python train.py config/tiny.py --max_iters=200` to a configuration.

A recipe is a Python file of assignments of literals, and of + - * / // ** on literals and on names assigned
above. It is parsed, never executed. Every field of a configuration dataclass, and of a dataclass nested in
it, is a setting: in a recipe, and on the command line as `--key=value` or `--key value`.

All scripts share `Parser`, which reports a mistake in one line. It is argparse because that starts fast.
"""

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import io
import operator
import os
import re
import stat
import sys
import textwrap
import tokenize
import typing
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

TYPES = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
}
MAX_LENGTH, MAX_TOKENS = 1_000_000, 200  # characters of a recipe; names and signs of an assignment

# ----------------------------------------------------------------------------------------------------------
# Settings: the fields of a configuration dataclass


class Setting(NamedTuple):
    """A field of a configuration dataclass, or of a dataclass nested in it."""

    name: str
    type: type
    default: Any
    help: str  # the field's trailing comment, or ""
    group: str  # the title of its group in --help, from the last comment line `# -- title` above it
    nested: str  # the name of the outer field that holds the nested dataclass, or ""


@functools.cache
def settings_of(cls: type) -> dict[str, Setting]:
    """Return all settings of a dataclass by name, in the order of its fields."""
    table, comments, types = {}, comments_of(cls), typing.get_type_hints(cls)
    for field in fields(cls):
        kind = types[field.name]
        if is_dataclass(kind):
            group = f"the {field.name.removesuffix('_config')}"
            found = [
                s._replace(group=s.group or group, nested=field.name) for s in settings_of(kind).values()
            ]
        elif kind in TYPES and field.default is not MISSING:
            help, group = comments.get(field.name, ("", ""))
            found = [Setting(field.name, kind, field.default, help, group, "")]
        else:
            raise ValueError(f"{cls.__name__}.{field.name} must be int, float, bool or str, with a default")
        for s in found:
            if s.name in table:
                raise ValueError(f"{cls.__name__} has two settings {s.name!r}; rename one of the two fields")
            table[s.name] = s
    return table


def comments_of(cls: type) -> dict[str, tuple[str, str]]:
    """Return the trailing comment and the group title of each field, as written in the class's source."""
    found = {}
    for base in filter(is_dataclass, reversed(cls.__mro__)):
        try:
            source = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):  # defined interactively
            continue
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}
        titles = {0: ""} | {i: text[3:] for i, text in comments.items() if text.startswith("-- ")}
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                lines = range(node.lineno, node.end_lineno + 1)  # the formatter may have wrapped the field
                help = " ".join(comments[i] for i in lines if i in comments)
                found[node.target.id] = help, titles[max(i for i in titles if i < node.lineno)]
    return found


def build(cls: type, values: Mapping[str, Any]) -> Any:
    """Construct the dataclass, and those nested in it, from a flat mapping of settings."""
    table, parts = settings_of(cls), {"": {}}
    inner = {name: kind for name, kind in typing.get_type_hints(cls).items() if is_dataclass(kind)}
    parts |= {name: {} for name in inner}
    for name, value in values.items():
        check_name(name, table, cls.__name__)
        parts[table[name].nested][name] = value
    return cls(**parts[""], **{name: kind(**parts[name]) for name, kind in inner.items()})


def update(config: Any, **values: Any) -> Any:
    """A copy of a dataclass with new values for those of its fields that are named; others are ignored."""
    return replace(config, **{f.name: values[f.name] for f in fields(config) if f.name in values})


def with_parts(cls: type, **parts: type) -> type:
    """The configuration class `cls` with these classes of nested fields, and so with other settings."""
    known = typing.get_type_hints(cls)
    new = [
        (name, part, dataclasses.field(default_factory=part))
        for name, part in parts.items()
        if known.get(name) is not part
    ]
    return make_dataclass(cls.__name__, new, bases=(cls,), frozen=True) if new else cls


def closest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" with the most similar known name, or "" if none is similar."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_name(name: str, table: dict[str, Setting], where: str) -> None:
    if name not in table:
        raise ValueError(f"{where}: there is no setting {name!r:.60}{closest(name[:60], table)}")


def convert(name: str, kind: type, value: Any) -> Any:
    """Convert a value from a recipe or the command line to the setting's type."""
    try:
        if kind is bool and str(value) in ("True", "False", "true", "false"):
            return str(value).lower() == "true"
        if kind is int and not isinstance(value, bool) and float(value) == int(float(value)):
            exact = isinstance(value, int) or isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value)
            return int(value if exact else float(value))  # 1e3 is a whole number, too
        if kind is float and not isinstance(value, bool) and abs(float(value)) <= sys.float_info.max:
            return float(value)
        if kind is str and isinstance(value, str | bool):
            return str(value)
    except (ValueError, TypeError, OverflowError):
        pass
    raise ValueError(f"{name} must be {TYPES[kind]}, not {value!r:.60}")


# ----------------------------------------------------------------------------------------------------------
# Recipes


def read_recipe(path: str | Path, cls: type) -> dict[str, Any]:
    """Return the settings that a recipe assigns, converted to their types. ValueError names file and line."""
    path, table = Path(path), settings_of(cls)
    if not os.path.isfile(path):  # unlike path.is_file(), it is False for names that no file can have
        known = ", ".join(sorted(str(p) for p in (Path(__file__).parent.parent / "config").glob("*.py")))
        raise FileNotFoundError(f"there is no recipe {path}; there are: {known}")
    values: dict[str, Any] = {}

    def evaluate(node: ast.expr) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.Name() if node.id in values:
                return values[node.id]
            case ast.UnaryOp(op=ast.USub()):
                return -evaluate(node.operand)
            case ast.BinOp() if type(node.op) in OPERATORS:
                left, right = evaluate(node.left), evaluate(node.right)
                if not all(
                    isinstance(x, int | float) and abs(x) <= sys.float_info.max for x in (left, right)
                ):
                    raise ValueError("arithmetic needs numbers up to 1.8e308")
                if isinstance(node.op, ast.Pow) and (abs(left) > 1e9 or abs(right) > 100):
                    raise ValueError("the base or the exponent of this power is too large for a setting")
                return OPERATORS[type(node.op)](left, right)
        raise ValueError("a recipe may contain only literals, arithmetic on them, and names assigned above")

    where = f"{path}, line 1"
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:  # -sig: no byte order mark
        text = file.read(MAX_LENGTH + 1)
    try:
        valid = re.match(rf"[^\0\udc80-\udcff]{{,{MAX_LENGTH}}}", text)[0]
        if valid != text:
            where = f"{path}, line {valid.count(chr(10)) + 1}"
            raise ValueError(f"a recipe is UTF-8 of at most {MAX_LENGTH:,} characters, without null bytes")
        tokens = 0  # of this statement: no expression is nested deeper
        with suppress(SyntaxError, tokenize.TokenError):  # ast.parse raises them, too, with a better message
            for kind, _, (line, _), *_ in tokenize.generate_tokens(io.StringIO(text).readline):
                tokens = 0 if kind == tokenize.NEWLINE else tokens + (kind in (tokenize.NAME, tokenize.OP))
                if kind == tokenize.ERRORTOKEN:  # a syntax error; Python 3.11 may go on for a long time
                    break
                if tokens > MAX_TOKENS:
                    where = f"{path}, line {line}"
                    raise ValueError(f"an assignment has at most {MAX_TOKENS} names and signs")
        for statement in ast.parse(text, filename=str(path)).body:
            where = f"{path}, line {statement.lineno}"
            match statement:
                case ast.Expr(value=ast.Constant(value=str())):  # the docstring
                    continue
                case ast.Assign(targets=[ast.Name(id=name)]):
                    check_name(name, table, where)
                    values[name] = convert(name, table[name].type, evaluate(statement.value))
                case _:
                    raise ValueError("a recipe holds only assignments `setting = value`")
    except SyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno or 1}: {error.msg}") from error
    except (ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        message = str(error) or "this is nested too deeply"
        raise ValueError(message if message.startswith(where) else f"{where}: {message}") from error
    return values


# ----------------------------------------------------------------------------------------------------------
# Command lines


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises a one-line ValueError, and suggests the closest option."""

    def __init__(self, **options):
        super().__init__(**{"allow_abbrev": False, "formatter_class": self.formatter} | options)

    @staticmethod
    def formatter(prog: str) -> argparse.HelpFormatter:
        return argparse.HelpFormatter(prog, max_help_position=34, width=110)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        args = sys.argv[1:] if args is None else args
        for word in args[: args.index("--")] if "--" in args else args:
            name, known = word.split("=")[0], self._option_string_actions
            if name.startswith("--") and " " not in name and name not in known:
                self.error(
                    f"there is no option {name!r}{closest(name, known) or '; --help lists all options'}"
                )
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        if match := re.fullmatch(r"argument (--\w+): expected one argument", message):
            action = self._option_string_actions[match[1]]
            help = f": {action.help % vars(action)}" if action.help else ""
            message = f"{match[1]} takes a value, as in {match[1]}=VALUE{help}"
        raise ValueError(message)


def command_line(
    cls: type,
    argv: list[str],
    flags: Mapping[str, str],
    about: str,
    resolved: Mapping[str, str] = {},
) -> tuple[str, dict[str, Any], dict[str, Any], set[str]]:
    """
    Parse `[recipe] [--setting=value ...] [--flag ...]`. Return the recipe's path or "", the settings that the
    recipe assigns, the settings on the command line, and the names of the flags given.

    `flags` maps the name of a flag to its help. `resolved` maps the name of a setting that the program itself
    computes to the reason why it cannot be set: --help leaves it out, and the error is "NAME REASON".
    """
    table = settings_of(cls)
    parser = Parser(description=about, usage=argparse.SUPPRESS)
    parser.add_argument("recipe", nargs="?", help="a file of settings such as config/tiny.py")
    for name, help in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=help)
    groups: dict[str, Any] = {}
    for s in table.values():
        if s.group not in groups:
            groups[s.group] = parser.add_argument_group(s.group or "settings")
        help = f"{s.help} (default: {s.default!r})".lstrip().replace("%", "%%")
        groups[s.group].add_argument(
            f"--{s.name}",
            metavar=s.type.__name__,
            help=argparse.SUPPRESS if s.name in resolved else help,
            default=argparse.SUPPRESS,
        )
    given = vars(parser.parse_args(argv))
    recipe, chosen = given.pop("recipe"), {name for name in flags if given.pop(name)}
    given = {name: convert(name, table[name].type, value) for name, value in given.items()}
    values = {} if recipe is None else read_recipe(recipe, cls)
    for name, reason in resolved.items():
        if name in values | given:
            raise ValueError(f"{name} {reason}")
    return recipe or "", values, given, chosen


def peek(argv: list[str], name: str) -> str:
    """
    The word that the command line, or else its recipe, gives the setting `name`; "" if none does. For a
    setting that decides which others there are: it ignores mistakes, which `command_line` reports.
    """
    pairs = zip(argv, [*argv[1:], ""], strict=True)
    words = [b if a == f"--{name}" else a.split("=")[1] for a, b in pairs if a.split("=")[0] == f"--{name}"]
    for path in argv:
        if not words and not path.startswith("--") and os.path.isfile(path):
            with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
                words = re.findall(rf"^{name} *= *[\"'](\w+)[\"']", file.read(MAX_LENGTH), re.M)
    return words[-1] if words else ""


def check_path(name: str, path: str | Path | None, kinds: str = "file or folder") -> None:
    """ValueError unless a path that the user gives is one of `kinds`, or nothing yet. None: none is given."""
    if path is None:
        return
    try:
        mode = os.stat(path).st_mode
        kind = "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "device"
        wrong = "" if kind in kinds else f"is a {kind}"
    except FileNotFoundError:
        wrong = "" if str(path) else "is empty"
    except (OSError, ValueError) as error:  # inside a file, too long, not readable, with a null character
        wrong = f"is none ({getattr(error, 'strerror', None) or error})"
    if wrong:
        raise ValueError(f"{name} must be a {kinds}, and {str(path)!r:.60} {wrong}")
