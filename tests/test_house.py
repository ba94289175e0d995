"""The house: which room may import which, and how its files are written."""
import ast
import io
import tokenize
from pathlib import Path

import pytest

from conftest import ROOT

ROOMS = {  # room: the rooms that it may import from, besides itself
    "precond": (),
    "precond_dropin": ("precond",),
    "attention": (),
    "engine": ("precond",),
    "data": ("engine.options",),
    "vision": ("precond_dropin", "engine", "data"),
    "model": ("precond", "attention", "engine"),
    "task": ("precond", "attention", "engine", "model", "data", "vision"),
    "study": ("precond", "engine", "task", "data"),
    "command": ("precond", "engine", "model", "data", "task", "study", "vision"),
}
TASKS = ("train", "train_lra", "train_vision")
STEP = ("train.py", "model.py", "attention.py", "precond.py", "engine/trainer.py",
        "engine/optim.py")  # the path of one training step


def sources() -> list[Path]:
    folders = (ROOT, *(ROOT / name for name in ("precond_dropin", "engine", "study", "vision",
                                         "data")))
    return sorted(path for folder in folders for path in folder.glob("*.py"))


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(name: str) -> str:
    first = name.split(".")[0]
    if first in TASKS:
        return "task"
    return first if first in ROOMS else "command"


def imports(path: Path) -> set[str]:
    """The project's modules that a file imports, anywhere in it."""
    known = {module(p) for p in sources()}
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= full if full & known else {node.module}
    return found & known


GRAPH = {module(path): imports(path) for path in sources()}


@pytest.mark.parametrize("name", GRAPH)
def test_arrows_go_one_way(name):
    mine = room(name)
    for other in GRAPH[name]:
        theirs = room(other)
        allowed = theirs == mine or theirs in ROOMS[mine] or other in ROOMS[mine]
        # GPT-2's published weights are poured into model.GPT.
        assert allowed or (name, other) == ("engine.pretrained", "model"), f"{name} -> {other}"


def test_imports_make_no_circle():
    done, under_way = set(), []

    def visit(name):
        assert name not in under_way, " -> ".join([*under_way[under_way.index(name):], name])
        if name not in done:
            under_way.append(name)
            for other in GRAPH[name]:
                visit(other)
            done.add(under_way.pop())
    for name in GRAPH:
        visit(name)


def test_the_top_level_is_what_can_be_typed_and_the_ideas():
    assert len(list(ROOT.glob("*.py"))) <= 12


@pytest.mark.parametrize("path", sources(), ids=module)
def test_a_file_has_one_subject_and_lines_that_fit(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 370
    assert [line for line in lines if len(line) > 100] == []


def test_the_path_of_one_step_reads_in_an_evening():
    lines = code = comments = 0
    for name in STEP:
        text = (ROOT / name).read_text(encoding="utf-8")
        lines += len(text.splitlines())
        with_code = set()
        strings = docstrings(ast.parse(text))
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            comments += token.type == tokenize.COMMENT
            layout = token.type in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE,
                                    tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
            if not layout and token.start[0] not in strings:
                with_code |= set(range(token.start[0], token.end[0] + 1))
        code += len(with_code)
    assert lines <= 1100 and comments >= 0.12 * code, (lines, comments, code)


def docstrings(tree: ast.Module) -> set[int]:
    """The lines of all docstrings."""
    found = set()
    for node in ast.walk(tree):
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            found |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return found
