"""What users of nanoGPT type, and what does the same here: docs/from_nanogpt.md in code."""
import sys
from pathlib import Path

NAMES = {
    "--always_save_checkpoint":
        "leave it out: every evaluation saves ckpt.pt, and best.pt keeps the best model",
    "--backend": "leave it out: nccl on GPUs, gloo on CPUs",
    "--decay_lr=False": "--lr_schedule=constant",
    "--decay_lr": "--lr_schedule=cosine",
    "--lr": "--learning_rate",
    "--vocab_size": "leave it out: the data's vocabulary decides",
    "--dataset=shakespeare_char": "--dataset=tinyshakespeare",
    "config/train_shakespeare_char.py":
        "config/shakespeare_char_gpu.toml --dataset=tinyshakespeare",
    "config/train_gpt2.py": "config/gpt2_124m.toml",
    "config/eval_gpt2.py": "--init_from=gpt2 --dataset=openwebtext --eval_only",
    "config/eval_gpt2_medium.py": "--init_from=gpt2-medium --dataset=openwebtext --eval_only",
    "config/eval_gpt2_large.py": "--init_from=gpt2-large --dataset=openwebtext --eval_only",
    "config/eval_gpt2_xl.py": "--init_from=gpt2-xl --dataset=openwebtext --eval_only",
    "config/finetune_shakespeare.py":
        "config/shakespeare_gpt2.toml --init_from=gpt2-xl --dataset=tinyshakespeare",
    "data/shakespeare_char/prepare.py": "data/text.py tinyshakespeare; train.py does it by itself",
    "data/shakespeare/prepare.py":
        "data/text.py tinyshakespeare --tokenizer=gpt2; train.py does it by itself",
    "data/openwebtext/prepare.py": "data/text.py openwebtext; train.py does it by itself",
    "sample.py --compile": "leave it out",
    "bench.py --real_data": "leave it out: bench.py times steps on random tokens",
    "configurator.py": "a preset is a TOML file; engine/options.py reads it",
}


def answer(word: str) -> str | None:
    """What to type for a word of nanoGPT's command line, --option=value or a file's name."""
    name = word.partition("=")[0]
    script = Path(sys.argv[0]).name
    here = NAMES.get(word) or NAMES.get(name) or NAMES.get(f"{script} {name}")
    return here and f"{word} is nanoGPT's. Here: {here}"
