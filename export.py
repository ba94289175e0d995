"""Write a train.py checkpoint as a Hugging Face GPT-2 folder: model.safetensors, config.json and the tokenizer.

    python export.py                                        # the best checkpoint of out/ becomes out/hf
    python export.py --out_dir=out-mine --ckpt=latest --to=my-model
    python train.py --init_from=my-model                    # and back: go on training from the folder

model.GPT with attention=softmax is GPT-2's architecture, so transformers computes the same logits. GPT-2 has biases everywhere: a model
trained with bias=False gets biases of 0. A preconditioned model keeps its options in config.json, under "preconditioned_attention",
and names the attention implementation of precond.register_transformers, without which transformers refuses to load it. The tokenizer,
whichever of the three it is, becomes a tokenizer.json that transformers.AutoTokenizer reads. Needs requirements-extra.txt.
"""
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from engine import checkpoint
from engine import options
from engine.options import UserError
from data import text, tokens
from model import GPT
from engine.pretrained import MODULES

FILES = ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json")


@dataclass
class Config(options.Options):
    out_dir: Annotated[str, "folder of the run"] = "out"
    ckpt: Annotated[Literal["best", "latest"], "best by validation loss, where there is one, or the latest"] = "best"
    to: Annotated[str, "folder to write; empty: hf in out_dir"] = ""
    overwrite: Annotated[bool, "replace an export that is there"] = False


def write(saved: dict, folder: Path, overwrite: bool = False) -> dict | None:
    """Export the checkpoint `saved` (checkpoint.read) to `folder`; -> options for precond.register_transformers, None for a plain model.

    overwrite replaces the files of an earlier export and leaves others alone. Raises UserError for a model that is not GPT-2's
    architecture, a folder that is not empty, and a failed write; DataError where gpt2's vocabulary is not at hand.
    """
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise UserError("export needs safetensors and tokenizers: pip install -r requirements-extra.txt") from None
    precond = preconditioner(saved["config"])
    tokenizer = text.load_tokenizer(saved["task"]["tokenizer"])
    weights, files = convert(GPT.from_checkpoint(saved)), describe(saved, precond, tokenizer.eot)
    files |= {"tokenizer.json": json.loads(to_hugging_face(tokenizer).to_str()), "tokenizer_config.json": {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": saved["config"]["block_size"],
        "clean_up_tokenization_spaces": False, **({} if tokenizer.eot is None else {"eos_token": "<|endoftext|>"})}}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not overwrite:
            raise UserError(f"{folder} is not empty: choose another folder with --to=FOLDER, or replace the export in it with --overwrite")
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        for name in FILES[1:]:  # config.json last: without it an interrupted export is no model
            (folder / name).write_text(json.dumps(files[name], indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as e:
        raise UserError(f"cannot write to {folder}: {e.strerror or e}") from None
    return precond


def preconditioner(config: dict) -> dict | None:
    """grad, eps and power of a run's configuration, None without preconditioning. Raises UserError for a model that is not exported."""
    if config["attention"] != "softmax":
        raise UserError(f"the model has attention={config['attention']}, which is not GPT-2's: only attention=softmax is exported")
    if config["n_inner"] not in (0, 4 * config["n_embd"]):
        raise UserError(f"the model has n_inner={config['n_inner']}: only n_inner=0, which is 4 n_embd, is exported")
    if not config["precond"] or config["precond_power"] == 0:
        return None
    if config["precond_power"] == "learned":
        raise UserError("the model has precond_power=learned, one power a head: transformers' attention interface takes one fixed power, "
                        "so this model is not exported")
    return {"grad": config["precond_grad"], "eps": config["precond_eps"], "power": config["precond_power"]}


def convert(gpt: GPT) -> dict[str, torch.Tensor]:
    """The weights under transformers' names, linear layers transposed (Conv1D), absent biases as zeros."""
    state = gpt.state_dict()
    linear = {name for name in MODULES.values() if not name.startswith("ln_")}
    modules = {f"blocks.{i}.{ours}": f"h.{i}.{theirs}" for i in range(gpt.config.n_layer) for theirs, ours in MODULES.items()}
    out = {f"transformer.{name}.weight": state[f"{name}.weight"] for name in ("wte", "wpe")}
    for ours, theirs in (modules | {"ln_f": "ln_f"}).items():
        weight = state[f"{ours}.weight"]
        bias = state.get(f"{ours}.bias", weight.new_zeros(weight.size(0)))
        weight = weight.t() if ours.split(".", 2)[-1] in linear else weight
        out |= {f"transformer.{theirs}.weight": weight.contiguous(), f"transformer.{theirs}.bias": bias}
    return out


def describe(saved: dict, precond: dict | None, eot: int | None) -> dict[str, dict]:
    """config.json and generation_config.json."""
    c = saved["config"]
    ends = {"bos_token_id": eot, "eos_token_id": eot}
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": saved["task"]["vocab_size"],
              "n_positions": c["block_size"], "n_layer": c["n_layer"], "n_head": c["n_head"], "n_embd": c["n_embd"], "n_inner": None,
              "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "dtype": "float32",
              "attn_pdrop": c["dropout"], "embd_pdrop": c["dropout"], "resid_pdrop": c["dropout"], **ends}
    if precond:
        config |= {"attn_implementation": "preconditioned", "preconditioned_attention": precond}
    return {"config.json": config, "generation_config.json": {**ends, "pad_token_id": eot}}


def to_hugging_face(tokenizer: tokens.Tokenizer):
    """The same tokenizer as a tokenizers.Tokenizer. As in data/tokens.py, a character outside the vocabulary is an error there too."""
    try:
        from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    except ImportError:
        raise UserError("export needs the tokenizers package: pip install -r requirements-extra.txt") from None
    if tokenizer.name == "char":
        result = Tokenizer(models.WordLevel(tokenizer.ids))
        result.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        result.decoder = decoders.Fuse()
        return result
    letters = byte_letters()
    ranks = {token: i for i, token in enumerate(tokenizer.table) if i != tokenizer.eot}
    vocabulary = {"".join(letters[b] for b in token): i for token, i in ranks.items()}
    pairs = [["".join(letters[b] for b in part) for part in split(token, ranks)] for token in ranks if len(token) > 1]
    result = Tokenizer(models.BPE(vocabulary, [tuple(pair) for pair in pairs]))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    if tokenizer.eot is not None:
        result.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    return result


def byte_letters() -> list[str]:
    """The printable letter that stands for each byte in a byte-level tokenizer.json: itself, or for the others U+0100 and following."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) if b in printable else chr(0x100 + others.index(b)) for b in range(256)]


def split(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens whose merge makes `token`: byte-pair encoding of its bytes with the merges that rank before it."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        merged = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:])]
        i = merged.index(min(merged))
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts


def main():
    config, _ = options.parse(Config, sys.argv[1:], __doc__)
    run = Path(config.out_dir)
    saved = checkpoint.read_language_model(run, best=config.ckpt == "best")
    folder = Path(config.to or run / "hf")
    precond = write(saved, folder, config.overwrite)
    print(f"wrote step {saved['step']} of {run} to {folder}. Load it with")
    if precond:
        arguments = ", ".join(f"{name}={value}" for name, value in precond.items())
        print(f"  import precond, transformers; precond.register_transformers({arguments})")
    else:
        print("  import transformers")
    print(f'  model = transformers.AutoModelForCausalLM.from_pretrained("{folder}"'
          + (', attn_implementation="preconditioned")' if precond else ")"))


if __name__ == "__main__":
    options.run(main)
