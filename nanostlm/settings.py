"""
Recipes and the command line: from `python train.py config/tiny.py --max_iters=200` to a configuration.

A recipe is a Python file of assignments (literals, + - * / // ** on them and on names set above) that is
parsed, never executed. Every field of the configuration dataclass can stand in it and on the command line, as
--key=value or --key value; fields of a nested dataclass are named like the others. An unknown key is an error
that names the nearest real one. argparse rather than a larger library: it starts at once, and one line says
what is wrong.
"""

import argparse
import ast
import difflib
import functools
import inspect
import operator
import re
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
             ast.FloorDiv: operator.floordiv, ast.Pow: operator.pow}  # fmt: skip


class Setting(NamedTuple):
    """One field of a configuration dataclass, or of one nested in it."""

    name: str
    type: type
    default: Any
    help: str  # the comment behind the field
    group: str  # the comment line above its paragraph
    nested: str  # the field that holds its dataclass; "" for the outermost


@functools.cache  # finding a class' source takes a tenth of a second
def settings(cls: type, nested: str = "") -> dict[str, Setting]:
    """Every setting of a dataclass by name; comments become its help, `# -- title` lines its groups."""
    found, group, comments = {}, "the model" if nested else "", {}
    for line in inspect.getsource(cls).splitlines():
        if title := re.match(r"    # -- (.*)", line):
            group = title[1]
        elif field := re.match(r"    (\w+): .*?  # (.*)", line):
            comments[field[1]] = (field[2], group)
    for field in fields(cls):
        if is_dataclass(field.type):
            found |= settings(field.type, field.name)
        else:
            default = field.default if field.default is not MISSING else None
            found[field.name] = Setting(field.name, field.type, default, *comments[field.name], nested)
    return found


def build(cls: type, values: dict[str, Any]) -> Any:
    """Make the dataclass from flat values."""
    table = settings(cls)
    inner = {f.name: f.type(**{k: v for k, v in values.items() if table[k].nested == f.name})
             for f in fields(cls) if is_dataclass(f.type)}  # fmt: skip
    return cls(**{k: v for k, v in values.items() if not table[k].nested}, **inner)


def convert(name: str, kind: type, value: Any) -> Any:
    """A recipe's or the command line's value as the field's type, or a ValueError that names the field."""
    try:
        if kind is bool and str(value) in ("True", "False", "true", "false"):
            return str(value).lower() == "true"
        if kind is int and not isinstance(value, bool) and float(value) == int(float(value)):
            exact = isinstance(value, int) or isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value)
            return int(value if exact else float(value))  # 1e3 is a whole number, too
        if kind is float and not isinstance(value, bool):
            return float(value)
        if kind is str and isinstance(value, str | bool):
            return str(value)
    except (ValueError, TypeError, OverflowError):
        pass
    wanted = {int: "a whole number", float: "a number", bool: "True or False", str: "text"}[kind]
    raise ValueError(f"{name} takes {wanted}, not {value!r:.60}")


def check_key(name: str, table: dict, where: str) -> None:
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{where}: there is no setting {name!r}{hint}")


def read(path: str | Path, cls: type) -> dict[str, Any]:
    """The settings that a recipe makes, converted to their types. ValueError says where it is wrong."""
    path, table = Path(path), settings(cls)
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in (Path(__file__).parent.parent / "config").glob("*.py")))
        raise FileNotFoundError(f"there is no recipe {path}; there are: {known}")
    values: dict[str, Any] = {}

    def value_of(node: ast.expr) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.Name() if node.id in values:
                return values[node.id]
            case ast.UnaryOp(op=ast.USub()):
                return -value_of(node.operand)
            case ast.BinOp() if type(node.op) in OPERATORS:
                left, right = value_of(node.left), value_of(node.right)
                if not (isinstance(left, int | float) and isinstance(right, int | float)):
                    raise ValueError("arithmetic is for numbers")
                if isinstance(node.op, ast.Pow) and (abs(left) > 1e9 or abs(right) > 100):
                    raise ValueError("a power of numbers that large is no setting")
                return OPERATORS[type(node.op)](left, right)
        raise ValueError("a recipe holds only literals, arithmetic on them, and names set above")

    where = str(path)
    try:
        for statement in ast.parse(path.read_text(encoding="utf-8"), filename=where).body:
            where = f"{path}, line {statement.lineno}"
            match statement:
                case ast.Expr(value=ast.Constant(value=str())):  # the recipe's own description
                    continue
                case ast.Assign(targets=[ast.Name(id=name)]):
                    check_key(name, table, where)
                    values[name] = convert(name, table[name].type, value_of(statement.value))
                case _:
                    raise ValueError("a recipe holds only assignments `setting = value`")
    except SyntaxError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}") from error
    except (ValueError, TypeError, ArithmeticError) as error:
        message = str(error)
        raise ValueError(message if message.startswith(where) else f"{where}: {message}") from error
    return values


def command_line(
    cls: type, argv: list[str], flags: dict[str, str], about: str
) -> tuple[str, dict[str, Any], dict[str, Any], set[str]]:
    """
    argv -> (the recipe's path or "", its values, the command line's values, the bare flags given). `flags`:
    name -> help. ValueError with one clear line for what cannot be taken; `--help` prints all, in groups, and
    ends.
    """
    table = settings(cls)

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise ValueError(message)

    parser = Parser(description=about, allow_abbrev=False, usage=argparse.SUPPRESS,
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, 34, 34, 110))  # fmt: skip
    parser.add_argument("recipe", nargs="?", default="", help="a file of settings such as config/tiny.py")
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    groups: dict[str, Any] = {}
    for s in table.values():
        if s.group not in groups:
            groups[s.group] = parser.add_argument_group(s.group)
        text = f"{s.help} (default: {s.default!r})".replace("%", "%%")
        groups[s.group].add_argument(
            f"--{s.name}", metavar=s.type.__name__, help=text, default=argparse.SUPPRESS
        )
    for word in argv:
        if word.startswith("--") and word not in ("--help", "--"):
            check_key(word[2:].split("=")[0], flags | table, "command line")
    given = vars(parser.parse_args(argv))
    recipe, chosen = given.pop("recipe"), {name for name in flags if given.pop(name)}
    given = {name: convert(name, table[name].type, value) for name, value in given.items()}
    return recipe, read(recipe, cls) if recipe else {}, given, chosen
