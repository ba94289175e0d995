"""Texts for the tests of data/, and what lies in the folders that are prepared of them."""
from pathlib import Path

import numpy as np

from data.tokens import Tokens

MIXED = "Zwölf  Boxkämpfer\r\n\n\tjagen 3 Eva's 日本語 🎭 quer!  \n" * 40


def write(path: Path, content: str) -> str:
    path.write_bytes(content.encode())
    return str(path)


def everything(folder: Path, split: str) -> list[int]:
    stored = Tokens(folder, split)
    return stored.gather(np.array([0]), len(stored))[0].tolist()
