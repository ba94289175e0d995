"""What is answered before a run begins: help, mistyped options, nanoGPT's names."""
import subprocess
import sys

import pytest

import train
from conftest import ROOT, error, shell
from engine import nanogpt_names


def test_a_mistyped_option_is_answered_without_pytorch():
    done = shell("-X", "importtime", "train.py", "--lerning_rate=1", check=False, timeout=120)
    assert done.returncode == 2
    assert "train.py: error: unknown option --lerning_rate: did you mean" in done.stderr
    assert " torch" not in done.stderr


@pytest.mark.slow
def test_help_is_answered_without_the_compiler():
    """It takes as long to load as the rest of PyTorch."""
    done = shell("-X", "importtime", "sample.py", "--help", timeout=120)
    assert "--max_new_tokens" in done.stdout
    assert " torch.nn\n" in done.stderr and " torch._dynamo\n" not in done.stderr


@pytest.mark.slow
def test_help_into_head():
    piped = f"{sys.executable} train.py --help | head -2"
    done = subprocess.run(piped, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "" and len(done.stdout.splitlines()) == 2


@pytest.mark.parametrize("words, answer", [
    (["--lr=1e-3"], "--learning_rate"),
    (["--decay_lr=False"], "--lr_schedule=constant"),
    (["--always_save_checkpoint"], "every evaluation saves"),
    (["--backend=nccl"], "nccl on GPUs"),
    (["--vocab_size=50304"], "vocabulary decides"),
    (["--dataset=shakespeare_char"], "--dataset=tinyshakespeare"),
    (["config/train_gpt2.py"], "config/gpt2_124m.toml"),
    (["config/train_shakespeare_char.py", "--device=cpu"], "config/shakespeare_char_gpu.toml"),
])
def test_nanogpts_names_get_the_right_answer(words, answer, call):
    assert answer in error(call(train, *words))


def test_a_guess_that_is_not_close_is_not_made(call):
    assert "did you mean" not in error(call(train, "--zebra=1"))


def test_the_document_shows_the_table_of_nanogpts_names():
    text = (ROOT / "docs" / "from_nanogpt.md").read_text(encoding="utf-8").replace("`", "")
    rows = dict(line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| "))
    assert rows.pop("nanoGPT") == "here"
    assert rows == nanogpt_names.NAMES
