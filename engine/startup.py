"""What a command does before PyTorch is loaded, which takes seconds. Imported first by each one.

A mistyped option is answered at once. Ctrl-C while modules are loaded is one line. Characters that
the terminal cannot show become question marks instead of an error.
"""
import ast
import sys
from pathlib import Path

from engine import options

ROOT = Path(__file__).resolve().parents[1]


def quiet(kind, error, traceback):
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


# Options that are no fields: compare.py reads them by itself, each any number of times.
OF_COMPARE = "vary", "arm", "tune"


def option_names(script: Path) -> set[str]:
    """The fields of every configuration class in a script and in what it could take them from."""
    names = {*OF_COMPARE}
    places = [script, *ROOT.glob("*.py"), *ROOT.glob("engine/*.py"), *ROOT.glob("vision/*.py")]
    for path in places:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
                fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
                names |= {field.target.id for field in fields}
    return names


def check_names(script: Path, argv: list[str]):
    """Raises UserError for an option that no command has."""
    words = [word for word in argv if word.startswith("--") and word != "--help"]
    if words:
        known = dict.fromkeys(option_names(script))
        for word in words:
            options.find(word, known)


if Path(sys.argv[0]).resolve().parent == ROOT:  # one of the commands, not a test
    sys.excepthook = quiet
    for stream in sys.stdout, sys.stderr:
        stream.reconfigure(errors="replace")
    options.run(lambda: check_names(Path(sys.argv[0]), sys.argv[1:]))
