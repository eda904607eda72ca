"""The README is true: its commands parse, its files exist, its differences are those in the code."""

import ast
import re
import shlex

import pytest

import bgbias
from conftest import ROOT

README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(ROOT.glob("*.py"))
COMMANDS = [part.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", README, re.S)
            for line in block.splitlines() for part in line.split("&&")]


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("python bgbias.py")])
def test_commands_parse(command):
    bgbias.parse_args(shlex.split(command)[2:])


def test_the_first_screen_has_the_one_command():
    assert "pip install -r requirements.txt" in COMMANDS and "python bgbias.py --bgaugment" in COMMANDS


def test_ci_runs_the_test_command_of_the_readme():
    tests = [command for command in COMMANDS if "pytest" in command]
    assert len(tests) == 1 and tests[0] in (ROOT / ".ci/run").read_text().splitlines()


def test_files_named_exist():
    named = set(re.findall(r"\]\((?!http|ftp|#)([^)]+)\)", README))
    named |= {name for name in re.findall(r"`([\w./]+\.(?:py|sh|txt))`", README) if "/" not in name}
    assert {"bgbias.py", "requirements.txt"} <= named
    assert [name for name in named if not (ROOT / name).exists() and not name.startswith("Ebay")] == []


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


def test_code_stays_readable():
    for path in SCRIPTS:
        text = path.read_text()
        assert max(map(len, text.splitlines())) <= 100
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 41, f"{path.name}: {node.name}"
