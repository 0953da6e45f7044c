"""Recipes and command lines: parsing without execution, one-line errors, suggestions."""

import re
import time
import tomllib
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path

import pytest

import train
from model import GPTConfig
from nanostlm import settings
from train import FLAGS, RESOLVED, TrainConfig

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = sorted(path.stem for path in (ROOT / "config").glob("*.py") if path.stem != "__init__")


@pytest.fixture
def read(tmp_path):
    """read(text) -> the settings of a recipe with that text."""

    def read_text(text: str | bytes) -> dict:
        path = tmp_path / "mine.py"
        path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
        return settings.read_recipe(path, TrainConfig)

    return read_text


def parse(*argv: str):
    return settings.command_line(TrainConfig, list(argv), FLAGS, "about")


# ----------------------------------------------------------------------------------------------------------
# Recipes


def test_recipe_takes_literals_and_arithmetic_on_earlier_names(read):
    text = '''"""A description."""

dataset = "toystories"  # a comment
n_head = 3
n_embd = 64 * n_head
mlp_hidden = (n_embd + 8) * 2 - n_head // 2
max_iters = 1e3
seed = 2**40 + 1
learning_rate = 3
min_lr = learning_rate / 10
weight_decay = -(-0.5)
bias = True
story_windows = False
compile = False
out_dir = ""
'''
    assert read(text) == dict(
        dataset="toystories",
        n_head=3,
        n_embd=192,
        mlp_hidden=399,
        max_iters=1000,
        seed=2**40 + 1,
        learning_rate=3.0,
        min_lr=0.3,
        weight_decay=0.5,
        bias=True,
        story_windows=False,
        compile="False",
        out_dir="",
    )
    types = {name: type(value) for name, value in read(text).items()}
    assert types["max_iters"] is int and types["learning_rate"] is float and types["bias"] is bool
    assert read("") == {} and read("n_layer = 2\nn_layer = 3") == {"n_layer": 3}


@pytest.mark.parametrize("name", ["seed", "max_iters"])
def test_large_integers_are_exact(read, name):
    assert read(f"{name} = {2**60 + 1}")[name] == 2**60 + 1
    assert parse(f"--{name}={2**60 + 1}")[2][name] == 2**60 + 1


INVALID = {
    "import os": "only assignments",
    "from os import path": "only assignments",
    "n_layer = __import__('os').system('touch hacked')": "only literals",
    "n_layer = int('3')": "only literals",
    "dataset = open('/etc/passwd').read()": "only literals",
    "dataset = ''.__class__": "only literals",
    "n_layer = [1][0]": "only literals",
    "n_layer = 1 if True else 2": "only literals",
    "n_layer = (lambda: 3)()": "only literals",
    "dataset = f'{1}'": "only literals",
    "n_layer = n_head": "only literals",
    "n_layer = 1 << 2": "only literals",
    "exec('1')": "only assignments",
    "n_layer: int = 3": "only assignments",
    "n_layer += 3": "only assignments",
    "n_layer, n_head = 1, 2": "only assignments",
    "n_layer = n_head = 2": "only assignments",
    "if True:\n    n_layer = 3": "only assignments",
    "def n_layer(): pass": "only assignments",
    "class n_layer: pass": "only assignments",
    "del n_layer": "only assignments",
    "n_headd = 4": "no setting 'n_headd'; did you mean 'n_head'",
    "learning_rte = 4": "did you mean 'learning_rate'",
    "zzzz = 4": "no setting 'zzzz'",
    "model = 4": "no setting 'model'",
    "resume = True": "no setting 'resume'",
    "n_layer = 2.5": "n_layer must be a whole number, not 2.5",
    "n_layer = 'four'": "n_layer must be a whole number, not 'four'",
    "n_layer = True": "n_layer must be a whole number, not True",
    "n_layer = None": "n_layer must be a whole number",
    "n_layer = (-1) ** 0.5": "n_layer must be a whole number",
    "n_layer = 1e400": "n_layer must be a whole number",
    "learning_rate = 1e400": "learning_rate must be a number",
    "learning_rate = 1e308 * 10": "learning_rate must be a number",
    "learning_rate = -1e308 * 10": "learning_rate must be a number",
    "learning_rate = 1e400 - 1e400": "up to 1.8e308",
    "learning_rate = 1e308 * 10 / 10": "up to 1.8e308",
    "learning_rate = 9e99 ** 9": "power",
    "bias = 1": "bias must be True or False, not 1",
    "bias = 'yes'": "bias must be True or False",
    "dataset = 4": "dataset must be text, not 4",
    "dataset = b'x'": "dataset must be text",
    "learning_rate = 'fast'": "learning_rate must be a number",
    "learning_rate = False": "learning_rate must be a number",
    "learning_rate = 1 / 0": "division by zero",
    "n_layer = 'a' + 1": "arithmetic needs numbers",
    "n_layer = 9**9**9": "power",
    "n_layer = 10**1000": "power",
    "n_layer = (": "never closed",
    "n_layer = 3 4": "invalid syntax",
    "n_layer 3": "invalid syntax",
    "n_layer = 3\x00": "null bytes",
    "n_layer = 3  # \x00": "null bytes",
    "dataset = '\ud83d'": "UTF-8",
    "n_layer = " + "9" * 5000: "4300 digits",
    "n_layer = 0x" + "f" * 5000: "4300 digits",
    "n_layer = 0x" + "f" * 900_000 + " // 7": "up to 1.8e308",
    "n_layer = -" + "9" * 400: "n_layer must be a whole number",
    "n_layer = +3": "only literals",
    "n_layer = ~3": "only literals",
    "n_layer = not 3": "only literals",
    "n_layer = -'3'": "unary -",
    "n_layer = -None": "unary -",
    "n_layer = 3j": "n_layer must be a whole number",
    "n_layer = 3j + 1": "arithmetic needs numbers",
    "n_layer = (2, 3)": "only literals",
    "n_layer = {2}": "only literals",
    "n_layer = (n_head := 2)": "only literals",
    "n_layer = ...": "n_layer must be a whole number",
    "n_layer = yield": "only literals",
    "n_layer = n_layer": "only literals",
    "learning_rate = 1\nlearning_rate = learning_rate ** 101": "power",
    "from os import *": "only assignments",
    "n_layer = *[2],": "only literals",
    "model.n_layer = 2": "only assignments",
    "n_layer[0] = 2": "only assignments",
    "(n_layer := 2)": "only assignments",
    "async def f(): await f()": "only assignments",
    "match 1:\n    case 1: pass": "only assignments",
    "try: pass\nfinally: pass": "only assignments",
    "x" * 900_000 + " = 1": "no setting 'xxxx",
}


@pytest.mark.parametrize("text", INVALID)
def test_invalid_recipe_raises_one_line_with_file_and_line(text, read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(INVALID[text])) as excinfo:
        read("dataset = 'x'\n\n" + text)
    line = str(excinfo.value)
    assert re.search(r"mine.py, line [34]: ", line) and "\n" not in line and len(line) < 400
    assert [p.name for p in tmp_path.iterdir()] == ["mine.py"], "nothing was executed"


def test_line_number_of_a_later_error(read):
    with pytest.raises(ValueError, match="line 4: n_layer must be"):
        read("'''A\nB'''\n\nn_layer = 'x'")
    with pytest.raises(ValueError, match="line 2: "):
        read("n_layer = 2\nn_head = = 3\n")


@pytest.mark.parametrize(
    "text",
    [
        "max_iters = 999999 ** 999999",
        "max_iters = 10**6**10**6",
        "dataset = 'a' * 10**12",
        "max_iters = 2**1000000 * 2**1000000",
        "max_iters = " + "(" * 4 + "10**90" + ")**90" * 4,
        "max_iters = 10**9" + "\nmax_iters = max_iters * max_iters" * 50,
        "max_iters = 10**9" + "\nmax_iters = max_iters ** 90" * 50,
        "max_iters = 0x" + "f" * 600_000 + " // 0x" + "f" * 300_000,
        "max_iters = 1" + " " * 10_000_000,
        "# " + "x" * 10_000_000,
        "max_iters = 1" + " " * 15_000 + "?",
        "max_iters = 1\n" * 1_000_000,
    ],
    ids=lambda text: text[:40],
)
def test_expensive_recipe_is_rejected_quickly(text, read):
    start = time.process_time()
    with pytest.raises(ValueError, match=r"mine.py, line \d+: "):
        read(text)
    assert time.process_time() - start < 2


NESTED = {  # expressions to nest: (prefix, repeated part, suffix)
    "minus": ("", "-", "1"),
    "not": ("", "not ", "1"),
    "plus": ("", "1+", "1"),
    "power": ("", "2**", "1"),
    "parentheses": ("", "(", "1"),
    "brackets": ("", "[", "1"),
    "braces": ("", "{", ""),
    "mixed": ("", "([{", "1"),
    "calls": ("", "f(", "1"),
    "attributes": ("x", ".x", ""),
    "lambda": ("", "lambda:", "1"),
    "if": ("", "1 if 1 else ", "1"),
    "and": ("", "1 and ", "1"),
    "less": ("", "1<", "1"),
    "names": ("", "n_layer = ", "1"),
    "lines": ("(", "-\n", "1)"),
    "continued": ("", "-\\\n", "1"),
}


@pytest.mark.parametrize("times", [40, 99, 150, 300, 1000, 2500, 6000, 50_000])
@pytest.mark.parametrize("kind", NESTED)
def test_deeply_nested_expression_raises_one_line(kind, times, read):
    prefix, repeated, suffix = NESTED[kind]
    start = time.process_time()
    text = "dataset = 'x'\nn_layer = " + prefix + repeated * times + suffix
    if kind in ("minus", "plus", "lines", "continued") and times < 198:
        assert abs(read(text)["n_layer"]) in (1, times + 1)
        return
    with pytest.raises(ValueError, match=r"mine.py, line \d+: \S") as excinfo:
        read(text)
    assert "\n" not in str(excinfo.value) and len(str(excinfo.value)) < 300
    assert "line 1:" not in str(excinfo.value) and time.process_time() - start < 2


@pytest.mark.parametrize("times", [100, 3000, 30_000])
@pytest.mark.parametrize("repeated", ["elif 1: n_layer = 2\n", "else:\n if 1:\n  pass\n", "@x\n", "if 1:"])
def test_deeply_nested_statements_raise_one_line(repeated, times, read):
    with pytest.raises(ValueError, match=r"mine.py, line \d+: \S") as excinfo:
        read("if 1: n_layer = 2\n" + repeated * times)
    assert "\n" not in str(excinfo.value)


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbfn_layer = 2\n",
        b"n_layer = 1\r\nn_layer = 2\r\n",
        b"n_layer = 1\rn_layer = 2\r",
        b"n_layer = 2",
        b"n_layer = 2  # " + b"x" * 900_000,
        b"# a comment\n\n" * 20_000 + b"n_layer = 2",
        b"# coding: latin-1\nn_layer = 2  # \xc3\xa9",
        b"n_layer = (\n    1  # one\n    + 1\n)",
        b"n_layer = " + b"+".join([b"2"] * 99) + b" - 196",
        b"\x0cn_layer = 2\n",
        b"n_layer = 2;",
    ],
    ids=lambda data: str(data[:20]),
)
def test_unusual_valid_recipes(data, read):
    assert read(data) == {"n_layer": 2}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp037"])
def test_recipe_that_is_not_utf8_raises(encoding, read):
    with pytest.raises(ValueError, match=r"mine.py, line \d+: a recipe is UTF-8"):
        read("n_layer = 2\nprompt = 'é'\n".encode(encoding))


def test_missing_recipe_lists_the_existing_ones(tmp_path):
    with pytest.raises(FileNotFoundError, match="no recipe .*nope.py; there are: .*tiny.py"):
        settings.read_recipe(tmp_path / "nope.py", TrainConfig)
    for path in (tmp_path, "/dev/zero", "a\0b", "x" * 5000, "", tmp_path / "nope.py" / "x.py"):
        with pytest.raises(FileNotFoundError, match="no recipe"):
            settings.read_recipe(path, TrainConfig)
    (tmp_path / "latin.py").write_bytes(b"dataset = '\xe9'")
    with pytest.raises(ValueError, match="latin.py"):
        settings.read_recipe(tmp_path / "latin.py", TrainConfig)


# ----------------------------------------------------------------------------------------------------------
# The recipes in config/


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_matches_its_comments(name):
    """It validates, and its comments state parameters, share of embeddings and tokens per batch correctly."""
    path = ROOT / "config" / f"{name}.py"
    text, values = path.read_text(encoding="utf-8"), settings.read_recipe(path, TrainConfig)
    tokenizer = values["tokenizer"] if "tokenizer" in values else TrainConfig.tokenizer
    vocab_size = 50_257 if tokenizer == "gpt2" else int(tokenizer.removeprefix("bpe"))
    c = settings.build(TrainConfig, values | {"vocab_size": vocab_size})
    c.validate()
    assert (
        c.warmup_iters < c.max_iters and c.eval_interval <= c.max_iters and c.max_iters % c.eval_interval == 0
    )
    sizes = c.model.estimate()
    if c.init_from:
        return  # the size depends on the other model
    docstring = text.split('"""')[1]
    size = re.search(r"([\d.]+)M parameters", docstring)
    assert size, "the recipe states its size"
    digits = len(size[1].partition(".")[2])
    assert float(size[1]) == round(sizes["parameters"] / 1e6, digits), (
        f"it has {sizes['parameters']:,} parameters"
    )
    if share := re.search(r"(\d+)% of them embeddings", docstring):
        assert int(share[1]) == round(100 * sizes["embedding_parameters"] / sizes["parameters"])
    if wanted := re.fullmatch(r"stories(\d+)m", name):
        assert sizes["parameters"] / 1e6 == pytest.approx(int(wanted[1]), rel=0.1), "the size in its name"
    if name == "slm":
        assert 50e6 <= sizes["parameters"] <= 60e6 and c.tokenizer == "gpt2" and c.model.norm == "layernorm"
    if name == "tiny":
        assert 1e6 <= sizes["parameters"] <= 4e6
    tokens = c.batch_size * c.gradient_accumulation_steps * c.model.block_size
    batch = re.search(r"(?:(\d+) x )?(\d+) rows x (\d+) tokens = ([\d,]+) tokens a step", text)
    assert batch, "a comment states the batch"
    assert int(batch[4].replace(",", "")) == tokens == int(batch[1] or 1) * int(batch[2]) * int(batch[3])
    if total := re.search(r"max_iters = [\d_]+  # ([\d.]+)([MB]) tokens", text):
        actual = c.max_iters * tokens / {"M": 1e6, "B": 1e9}[total[2]]
        assert float(total[1]) == round(actual, len(total[1].partition(".")[2]))


def test_expected_recipes_exist():
    assert {"tiny", "llama", "slm", "stories10m", "stories50m", "stories100m"} <= set(SHIPPED)
    llama = settings.build(TrainConfig, settings.read_recipe(ROOT / "config" / "llama.py", TrainConfig)).model
    expected = dict(
        norm="rmsnorm",
        norm_eps=1e-5,
        position="rope",
        rope_theta=10000.0,
        mlp="swiglu",
        bias=False,
        qk_norm=False,
        embed_norm=False,
        share="none",
        window=0,
        softcap=0.0,
    )
    assert {key: getattr(llama, key) for key in expected} == expected


# ----------------------------------------------------------------------------------------------------------
# The command line


def test_every_setting_has_help_group_and_type():
    table = settings.settings_of(TrainConfig)
    names = [f.name for config in (TrainConfig, GPTConfig) for f in fields(config) if f.name != "model"]
    assert sorted(table) == sorted(names), "no duplicate names"
    for s in table.values():
        assert len(s.help) > 5 and s.group, s.name
        assert s.type in (int, float, str, bool) and type(s.default) is s.type, s.name
    groups = list(dict.fromkeys(s.group for s in table.values()))
    assert groups[0] == "everyday" and groups[-1] == "the model"


@dataclass(frozen=True)
class Inner:
    width: int = 4
    name: str = "a # b"  # a comment after a default with a #


@dataclass(frozen=True)
class Outer:
    """Text such as `width: int = 3  # no` in a docstring is not a field."""

    plain: int = 1
    # -- a group
    a: int = 1  # with a comment
    # a comment of its own
    b: float = 2.0
    wrapped: str = (
        "a default that is longer than a line, "  # wrapped by
        "and is therefore wrapped"  # the formatter
    )
    longer: float = (  # first
        3.0 * 4.0
    )  # last

    # -- another: group
    choice: "bool" = False  # 50% of it
    inner: Inner = field(default_factory=Inner)

    def method(self):
        c: int = 3  # not a field
        return c


@dataclass(frozen=True)
class Derived(Outer):
    depth: int = 3  # of the derived class


def test_comments_are_the_optional_help():
    table = settings.settings_of(Derived)
    assert {s.name: (s.help, s.group, s.nested) for s in table.values()} == {
        "plain": ("", "", ""),
        "a": ("with a comment", "a group", ""),
        "b": ("", "a group", ""),
        "wrapped": ("wrapped by the formatter", "a group", ""),
        "longer": ("first last", "a group", ""),
        "choice": ("50% of it", "another: group", ""),
        "width": ("", "the inner", "inner"),
        "name": ("a comment after a default with a #", "the inner", "inner"),
        "depth": ("of the derived class", "", ""),
    }
    assert table["choice"].type is bool and table["longer"].default == 12.0


def test_class_without_source_has_no_help():
    cls = make_dataclass("Interactive", [("a", int, field(default=1)), ("b", str, field(default="x"))])
    assert [s.help for s in settings.settings_of(cls).values()] == ["", ""]


def test_build_frozen_dataclasses():
    assert settings.build(Outer, dict(a=5, width=6)) == Outer(a=5, inner=Inner(width=6))
    assert settings.build(Outer, {}) == Outer()
    with pytest.raises(ValueError, match="Outer: there is no setting 'widht'; did you mean 'width'"):
        settings.build(Outer, dict(widht=6))


def test_invalid_fields_raise():
    twice = make_dataclass("Twice", [("width", int, field(default=1)), ("inner", Inner, field(default=None))])
    with pytest.raises(ValueError, match="Twice has two settings 'width'; rename"):
        settings.settings_of(twice)
    for wrong in [("sizes", list[int], field(default=None)), ("size", int)]:
        with pytest.raises(
            ValueError, match=rf"Wrong.{wrong[0]} must be int, float, bool or str, with a default"
        ):
            settings.settings_of(make_dataclass("Wrong", [wrong]))


def test_computed_settings_cannot_be_set(tmp_path, capsys):
    resolved = {"width": "comes from the name; choose one with --name"}
    recipe = tmp_path / "mine.py"
    recipe.write_text("width = 5")
    for argv in (["--width=5"], [str(recipe)]):
        with pytest.raises(ValueError, match="^width comes from the name; choose one with --name$"):
            settings.command_line(Outer, argv, {}, "about", resolved)
    assert settings.command_line(Outer, ["--name=x"], {}, "about", resolved)[2] == {"name": "x"}
    with pytest.raises(SystemExit):
        settings.command_line(Outer, ["--help"], {}, "about", resolved)
    output = capsys.readouterr().out
    assert "--width" not in output and re.search(r"--choice bool +50% of it \(default: False\)", output)
    assert re.search(r"--plain int +\(default: 1\)", output)


def test_command_line_values():
    recipe, file, given, flags = parse(
        "--n_layer=3",
        "--n_head",
        "2",
        "--learning_rate=3",
        "--min_lr",
        "1e-4",
        "--max_iters=1e3",
        "--bias=True",
        "--cross_stories",
        "False",
        "--prompt",
        "Once upon a time",
        "--prompt=",
        "--compile=False",
        "--resume",
        "--seed=1_000",
        "--dropout=.5",
    )
    assert (recipe, file, flags) == ("", {}, {"resume"})
    assert given == dict(
        n_layer=3,
        n_head=2,
        learning_rate=3.0,
        min_lr=1e-4,
        max_iters=1000,
        bias=True,
        cross_stories=False,
        prompt="",
        compile="False",
        seed=1000,
        dropout=0.5,
    )
    for argv in (["--compile=False"], ["--compile", "False"]):
        assert parse(*argv)[2] == {"compile": "False"}
    for flag in FLAGS:
        assert parse(f"--{flag}")[3] == {flag}


def test_command_line_overrides_the_recipe(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("n_layer = 3\nn_head = 4")
    for argv in ([str(path), "--n_layer=5"], ["--n_layer=5", str(path)]):
        recipe, file, given, _ = parse(*argv)
        assert (recipe, file, given) == (str(path), {"n_layer": 3, "n_head": 4}, {"n_layer": 5})


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--n_headd=4"], "no option '--n_headd'; did you mean '--n_head'"),
        (["--resum"], "did you mean '--resume'"),
        (["--batchsize", "4"], "did you mean '--batch_size'"),
        (["--promt=Once upon a time"], "did you mean '--prompt'"),
        (["--qqqq=1"], "no option '--qqqq'; --help lists all options"),
        (["--model=1"], "no option '--model'"),
        (["--n_layer=two"], "n_layer must be a whole number, not 'two'"),
        (["--n_layer="], "n_layer must be a whole number"),
        (["--n_layer"], "takes a value"),
        (["--n_layer=2.5"], "n_layer must be a whole number"),
        (["--n_layer=inf"], "n_layer must be a whole number"),
        (["--bias=perhaps"], "bias must be True or False"),
        (["--bias"], "takes a value"),
        (["--learning_rate=quick"], "learning_rate must be a number"),
        (["--resume=True"], "resume"),
        (["one.py", "two.py"], "two.py"),
        (["-n", "4"], "-n"),
    ],
)
def test_command_line_errors(argv, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as excinfo:
        parse(*argv)
    assert "\n" not in str(excinfo.value)


def test_help_lists_all_settings_by_group(capsys):
    assert train.main(["--help"]) == 0
    text = capsys.readouterr().out
    joined = " ".join(text.split())
    for s in settings.settings_of(TrainConfig).values():
        shown = f"--{s.name} " in text and " ".join(s.help.split()) in joined
        assert shown == (s.name not in RESOLVED), s.name
        assert not shown or f"(default: {s.default!r})" in joined
    for flag in FLAGS:
        assert f"--{flag}" in text
    titles = ["everyday", "data", "optimizer", "run", "the model"]
    positions = [text.index(f"\n{title}:") for title in titles]
    assert positions == sorted(positions)
    assert max(map(len, text.splitlines())) <= 110


# ----------------------------------------------------------------------------------------------------------
# Scripts


def parser() -> settings.Parser:
    parser = settings.Parser(prog="some.py")
    parser.add_argument("dest", nargs="?")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--top_k", type=int, default=0)
    parser.add_argument("--to", choices=["hf", "llama2c"])
    return parser


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--promt", "x"], "there is no option '--promt'; did you mean '--prompt'?"),
        (["--promt=some words"], "there is no option '--promt'; did you mean '--prompt'?"),
        (["--top-k=3"], "there is no option '--top-k'; did you mean '--top_k'?"),
        (["--pro", "x"], "there is no option '--pro'"),  # no abbreviations
        (["--zzz"], "there is no option '--zzz'; --help lists all options"),
        (["--top_k=many"], "argument --top_k: invalid int value: 'many'"),
        (["--top_k"], "--top_k takes a value, as in --top_k=VALUE"),
        (["--to", "x"], "argument --to: invalid choice: 'x' (choose from "),
        (["a", "b"], "unrecognized arguments: b"),
        (["-x"], "unrecognized arguments: -x"),
    ],
)
def test_parser_errors_are_one_line(argv, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)) as excinfo:
        parser().parse_args(argv)
    assert "\n" not in str(excinfo.value)


def test_parser_accepts_values_that_start_with_dashes():
    assert parser().parse_args(["--prompt=--zzz"]).prompt == "--zzz"
    assert parser().parse_args(["--prompt", "-- he said"]).prompt == "-- he said"
    assert parser().parse_args(["--", "--zzz"]).dest == "--zzz"
    with pytest.raises(SystemExit) as excinfo:
        parser().parse_args(["--help"])
    assert excinfo.value.code == 0


def test_closest():
    assert settings.closest("n_headd", {"n_head", "n_layer"}) == "; did you mean 'n_head'?"
    assert settings.closest("zzz", ["n_head"]) == settings.closest("zzz", []) == ""


# ----------------------------------------------------------------------------------------------------------
# Dependencies


def test_pyproject_and_requirements_pin_the_same_packages():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for name, pins in [
        ("requirements.txt", project["project"]["dependencies"]),
        ("requirements-dev.txt", ["-r requirements.txt", *project["dependency-groups"]["dev"]]),
        ("requirements-eval.txt", ["-r requirements.txt", *project["dependency-groups"]["eval"]]),
    ]:
        assert (ROOT / name).read_text(encoding="utf-8").splitlines() == pins
