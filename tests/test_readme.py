"""The README is true: its commands parse, its files exist, its differences are those in the code."""

import ast
import importlib
import io
import re
import shlex
import tokenize

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(ROOT.glob("*.py"))
COMMANDS = [part.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S)
            for line in block.splitlines() for part in line.split("&&")]


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.match(r"python \w+\.py", c)])
def test_commands_parse(command):
    _, script, *arguments = shlex.split(command)
    importlib.import_module(script.removesuffix(".py")).parse_args(arguments)


def test_the_first_screen_has_the_commands():
    screen = README.split("## What to do about it")[0]
    for command in ("python3 -m venv .venv", "pip install -r requirements.txt", "python bgbias.py --bgaugment",
                    "python masks.py --dataset my_photos", "bash run_all.sh"):
        assert command in screen


def test_ci_runs_the_test_command_of_the_readme():
    line, = [line for line in README.splitlines() if "pytest -q" in line]
    assert line in (ROOT / ".ci/run").read_text().splitlines()
    assert "python3 -m venv" in line and "pip install -q -r requirements.txt" in line  # complete in itself


def test_files_named_exist():
    named = set(re.findall(r"\]\((?!http|ftp|#)([^)]+)\)", README))
    named |= {name for name in re.findall(r"`([\w./]+\.(?:py|sh|txt))`", README) if "/" not in name}
    assert {"bgbias.py", "masks.py", "eval_attention.py"} <= named
    assert [name for name in named if not (ROOT / name).exists() and not name.startswith(("Ebay", "hubconf"))] == []


def test_differences_are_those_tagged_in_the_code():
    tagged = re.findall(r"# DIFF: (.*)", "\n".join(path.read_text() for path in SCRIPTS))
    listed = README.split("## Differences from the authors' code")[1].split("\n## ")[0]
    listed = [line.removeprefix("- ") for line in listed.splitlines() if line.startswith("- ")]
    assert sorted(tagged) == sorted(listed) and len(tagged) >= 5


def test_importing_does_nothing_but_define():
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.Expr, ast.If)
    for path in SCRIPTS:
        for node in ast.parse(path.read_text()).body:
            assert isinstance(node, allowed)
            if isinstance(node, ast.Expr):  # the docstring
                assert isinstance(node.value, ast.Constant)
            if isinstance(node, ast.If):
                assert "__main__" in ast.unparse(node.test)


def code_lines(function):
    """How many lines of code a function has: those where a statement or a part of it stands, its docstring apart."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return len({line for statement in body for node in ast.walk(statement) if hasattr(node, "lineno")
                for line in (node.lineno, node.end_lineno)})


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_code_stays_readable(path):
    """What shortness by golf would hide: long functions and lines, booleans without a name, nested comprehensions."""
    comprehensions = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    text = path.read_text()
    assert max(map(len, text.splitlines())) <= 100
    assert ";" not in [token.string for token in tokenize.generate_tokens(io.StringIO(text).readline)]
    for node in ast.walk(ast.parse(text)):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.FunctionDef):
            assert code_lines(node) <= 60, f"{where}: {node.name} is long"
            defaults = [default for default in node.args.defaults if isinstance(default, ast.Constant)]
            named_by_torch = node.name == "train"  # nn.Module.train(mode=True), overridden
            assert named_by_torch or not any(isinstance(default.value, bool) for default in defaults), where
        if isinstance(node, ast.Call):
            values = [value.value for value in node.args if isinstance(value, ast.Constant)]
            assert not any(isinstance(value, bool) for value in values), f"{where}: a boolean without a name"
        if isinstance(node, comprehensions):
            inside = [child for child in ast.walk(node) if child is not node]
            assert not any(isinstance(child, comprehensions) for child in inside), f"{where}: nested comprehensions"
