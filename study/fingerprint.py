"""Hashes of what a result depends on: code and data files."""
import ast
import functools
import hashlib
import json
import os
from modulefinder import ModuleFinder
from pathlib import Path

from data.folders import sha256
from engine.options import UserError


def code_hash(script: Path) -> str:
    """Of the script and of every module of this project that it imports, directly or not."""
    # It reads the code without running it, and looks for modules in this folder alone. PyTorch is
    # told apart by its version.
    finder = ModuleFinder([str(script.parent)])
    finder.run_script(str(script))
    seen = {}
    for module in finder.modules.values():
        if module.__path__ or not module.__file__:  # a folder, or built into Python
            continue
        path = Path(module.__file__)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            can_have = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
            if can_have and ast.get_docstring(node) is not None:
                del node.body[0]
        seen[path.relative_to(script.parent).as_posix()] = ast.dump(tree)
    return hash_of(seen)


def hash_of(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@functools.cache
def content(path: str) -> str:
    """A hash of what a file holds, or of a folder's files.

    Of these it is their names, their sizes, and what models and annotations hold.
    """
    if os.path.isfile(path):
        try:
            return sha256(path)
        except OSError as e:
            raise UserError(f"cannot read {path}: {e.strerror}") from None
    files = sorted((p.relative_to(path).as_posix(),
                    content(str(p)) if p.suffix in (".safetensors", ".json") else p.stat().st_size)
                   for p in Path(path).rglob("*") if p.is_file())
    return hash_of(files)
