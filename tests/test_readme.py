"""The README is true: its commands parse, its files exist, its differences are those in the code. And
the code stays readable."""

import ast
import importlib
import io
import re
import shlex
import subprocess
import tokenize

import pytest

from conftest import ROOT

README = (ROOT / "README.md").read_text()
SCRIPTS = sorted(ROOT.glob("*.py"))


def commands(text):
    """The commands in the bash blocks of a text."""
    return [part.split("#")[0].strip() for block in re.findall(r"```bash\n(.*?)```", text, re.S)
            for line in block.splitlines() for part in line.split("&&")]


# ---- The README ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [c for c in commands(README) if re.match(r"python \w+\.py", c)])
def test_commands_parse(command):
    _, script, *arguments = shlex.split(command)
    importlib.import_module(script.removesuffix(".py")).parse_args(arguments)


@pytest.mark.parametrize("command", [c for c in commands(README) if "bash run_all.sh" in c])
def test_commands_of_run_all_parse(command, tmp_path):
    for script in (*SCRIPTS, ROOT / "run_all.sh"):
        (tmp_path / script.name).symlink_to(script)
    for dataset in ("cars", "birds", "caltech"):  # the README's own folders
        (tmp_path / dataset / "images").mkdir(parents=True)
    run = subprocess.run(f"{command} --dry-run", shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0 and "python bgbias.py" in run.stdout, run.stderr


def test_the_first_screen_has_the_setup_and_the_quick_start():
    """Everything before the second heading."""
    first_screen = "\n## ".join(README.split("\n## ")[:2])
    assert {"python3 -m venv .venv", "pip install -r requirements.txt", "python bgbias.py",
            "python bgbias.py --bgaugment"} <= set(commands(first_screen))


def test_ci_runs_the_test_command_of_the_readme():
    line, = [line for line in README.splitlines() if "pytest -q" in line]
    assert line in (ROOT / ".ci/run").read_text().splitlines()
    assert "python3 -m venv" in line and "pip install -q -r requirements.txt" in line  # complete in itself


def test_named_files_exist():
    named = set(re.findall(r"\]\((?!http|ftp|#)([^)#]+)\)", README))
    named |= set(re.findall(r"`((?:tests/)?\w+\.(?:py|sh|txt))`", README)) - {"hubconf.py"}  # the user's
    assert {"bgbias.py", "masks.py", "eval_attention.py", "run_all.sh"} <= named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_differences_are_those_tagged_in_the_code():
    tagged = re.findall(r"# DIFF: (.*)", "\n".join(path.read_text() for path in SCRIPTS))
    listed = re.search(r"\n## Differences.*?\n(.*?)\n## ", README, re.S).group(1)
    listed = [line.removeprefix("- ") for line in listed.splitlines() if line.startswith("- ")]
    assert sorted(tagged) == sorted(listed) and len(tagged) >= 5


# ---- The code ------------------------------------------------------------------------------------


def code_lines(function):
    """How many lines of code a function has: those where a statement or a part of it stands, without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return len({line for statement in body for node in ast.walk(statement) if hasattr(node, "lineno")
                for line in (node.lineno, node.end_lineno)})


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_code_stays_readable(path):
    """Nothing counts the lines of a file. Long lines, long functions, booleans without a name and nested comprehensions
    are what makes a reader stop."""
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
