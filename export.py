"""Write a train.py checkpoint as a Hugging Face GPT-2 folder.

    python export.py                                   # the best checkpoint of out/ becomes out/hf
    python export.py --out_dir=out-mine --ckpt=latest --to=my-model
    python train.py --init_from=my-model --dataset=my.txt --out_dir=out-more    # and back

The folder holds model.safetensors, config.json and the tokenizer. model.GPT with attention=softmax
is GPT-2's architecture, so transformers computes the same logits. GPT-2 has biases everywhere: a
model trained with bias=False gets biases of 0. A preconditioned model keeps its options in
config.json, under "preconditioned_attention", but for the scale, which goes into the weights. It
names the attention implementation of precond.register_transformers, without which transformers
refuses to load it. Each of the three tokenizers becomes a tokenizer.json that
transformers.AutoTokenizer reads. Needs requirements-extra.txt.
"""
import engine.startup  # noqa: F401  (first: it answers mistakes before PyTorch is loaded)

# isort: split
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch

from data.tokenizers import Tokenizer, load_tokenizer
from engine import checkpoint, options
from engine.options import UserError, need, not_empty
from engine.pretrained import check_tokenizer, from_checkpoint, hugging_face_name, read_config
from model import GPT, ModelConfig
from precond import head_scale

WEIGHTS = "model.safetensors"


@dataclass
class Config(options.Options):
    out_dir: Annotated[str, "folder of the run", not_empty] = "out"
    ckpt: Annotated[Literal["best", "latest"],
                    "best: the lowest validation loss, where it is kept; or the latest"] = "best"
    to: Annotated[str, "folder to write; empty: hf in out_dir"] = ""
    overwrite: Annotated[bool, "replace an export that is there"] = False


def write(saved: dict, folder: Path, overwrite: bool = False) -> dict | None:
    """Export the checkpoint `saved` (checkpoint.read) to `folder`.

    Returns the options for precond.register_transformers, None for a plain model. overwrite
    replaces the files of an earlier export and leaves others alone. Raises UserError for a model
    that is not GPT-2's architecture, a folder that is not empty, and a failed write; DataError
    where gpt2's vocabulary or a package is not at hand.
    """
    config = read_config(saved, "the checkpoint")
    precond = preconditioner(config)
    vocab_size = saved["task"]["vocab_size"]
    tokenizer = load_tokenizer(saved["task"]["tokenizer"])
    check_tokenizer(tokenizer, vocab_size)
    need("tokenizers", "export needs")
    SafetensorError = need("safetensors", "export needs").SafetensorError
    save_file = need("safetensors.torch", "export needs").save_file
    files = describe(config, vocab_size, precond, tokenizer)
    gpt = from_checkpoint(saved, "the checkpoint")
    fold_scales(gpt)
    weights = convert(gpt)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()) and not overwrite:
            raise UserError(f"{folder} is not empty: choose another folder with --to=FOLDER, or "
                            "replace the export in it with --overwrite")
        # All is written before anything of an earlier export is replaced.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".export") as made:
            made = Path(made)
            save_file(weights, made / WEIGHTS, metadata={"format": "pt"})
            for name, content in files.items():
                written = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
                (made / name).write_text(written, encoding="utf-8")
            (folder / "config.json").unlink(missing_ok=True)
            for name in (WEIGHTS, *files):
                (made / name).replace(folder / name)
    except (OSError, SafetensorError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"cannot write to {folder}: {reason}") from None
    return precond


def preconditioner(c: ModelConfig) -> dict | None:
    """The options for precond.register_transformers, None without preconditioning.

    Raises UserError for a model that is not exported.
    """
    if c.attention != "softmax":
        raise UserError(f"the model has attention={c.attention}, which is not GPT-2's: only "
                        "attention=softmax is exported")
    if c.n_inner not in (0, 4 * c.n_embd):
        raise UserError(f"the model has n_inner={c.n_inner}: only n_inner=0, which is 4 n_embd, "
                        "is exported")
    for name in ("rotary", "qk_norm"):
        if getattr(c, name):
            raise UserError(f"the model has {name}=True, which GPT-2 has not: it is not exported")
    if not c.precond or c.precond_power == 0:
        return None
    if c.precond_power == "learned":
        raise UserError("the model has precond_power=learned, one power a head: transformers' "
                        "attention takes one fixed power, so this model is not exported")
    return {"grad": c.precond_grad, "eps": c.precond_eps, "power": c.precond_power}


@torch.no_grad()
def fold_scales(gpt: GPT):
    """Put the scale s of C = s diag(...) into the projection after it: W (s A') = (s W) A'."""
    for block in gpt.blocks:
        attn = block.attn
        by_head = attn.proj.weight.unflatten(1, (attn.n_head, -1))  # (C, n_head, head_dim)
        scale = head_scale(attn.scale, by_head.size(-1))  # a number or (n_head, 1, 1)
        scale = scale[..., 0] if isinstance(scale, torch.Tensor) else scale
        # A new tensor: the checkpoint's own stays as it is.
        attn.proj.weight = torch.nn.Parameter((by_head * scale).flatten(1))
        del attn.scale  # which may be a parameter
        attn.scale = 1.0


def convert(gpt: GPT) -> dict[str, torch.Tensor]:
    """The weights under transformers' names, linear layers transposed (Conv1D), biases always."""
    out = {}
    for key, tensor in gpt.state_dict().items():
        name = "transformer." + hugging_face_name(key)
        out[name] = (tensor.t() if ".c_" in name else tensor).contiguous()
        if key.endswith(".weight") and key not in ("wte.weight", "wpe.weight"):
            # Overwritten by the model's own bias, which comes next, if it has one.
            out[name.removesuffix("weight") + "bias"] = tensor.new_zeros(len(tensor))
    return out


def describe(c: ModelConfig, vocab_size: int, precond: dict | None, tokenizer: Tokenizer
             ) -> dict[str, dict]:
    """What each JSON file holds, config.json last: without it an interrupted export is no model."""
    ends = {"bos_token_id": tokenizer.eot, "eos_token_id": tokenizer.eot}
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2",
              "vocab_size": vocab_size, "n_positions": c.block_size, "n_layer": c.n_layer,
              "n_head": c.n_head, "n_embd": c.n_embd, "n_inner": None,
              "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
              "tie_word_embeddings": True, "dtype": "float32", "attn_pdrop": c.dropout,
              "embd_pdrop": c.dropout, "resid_pdrop": c.dropout, **ends}
    if precond:
        config |= {"attn_implementation": "preconditioned", "preconditioned_attention": precond}
    tokenization = {"tokenizer_class": "PreTrainedTokenizerFast",
                    "model_max_length": c.block_size, "clean_up_tokenization_spaces": False}
    if tokenizer.eot is not None:
        tokenization["eos_token"] = "<|endoftext|>"
    return {"tokenizer.json": json.loads(to_hugging_face(tokenizer).to_str()),
            "tokenizer_config.json": tokenization,
            "generation_config.json": ends | {"pad_token_id": tokenizer.eot},
            "config.json": config}


def to_hugging_face(tokenizer: Tokenizer):
    """The same tokenizer as a tokenizers.Tokenizer.

    A character outside the vocabulary is an error there too, as in data/tokenizers.py.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    if tokenizer.name == "char":
        result = Tokenizer(models.WordLevel(tokenizer.ids))
        result.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        result.decoder = decoders.Fuse()
        return result
    # In a tokenizer.json a printable letter stands for each byte: itself, or one from U+0100 on.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = iter(letter for letter in alphabet if letter > "\xff")
    letters = [chr(b) if chr(b) in alphabet else next(others) for b in range(256)]

    def spell(token: bytes) -> str:
        return "".join(letters[b] for b in token)

    ranks = {token: i for i, token in enumerate(tokenizer.table) if i != tokenizer.eot}
    vocabulary = {spell(token): i for token, i in ranks.items()}
    merges = [tuple(map(spell, split(token, ranks))) for token in ranks if len(token) > 1]
    result = Tokenizer(models.BPE(vocabulary, merges))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    if tokenizer.eot is not None:
        eot = AddedToken("<|endoftext|>", special=True, normalized=False)
        result.add_special_tokens([eot])
    return result


def split(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    """The two tokens whose merge makes `token`.

    They are what its bytes become by the merges that rank before it.
    """
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
    imports = "import transformers"
    implementation = ""
    if precond:
        arguments = ", ".join(f"{name}={value}" for name, value in precond.items())
        imports = f"import precond, transformers; precond.register_transformers({arguments})"
        implementation = ', attn_implementation="preconditioned"'
    print(f"""wrote step {saved['step']} of {run} to {folder}. Load it with
  {imports}
  model = transformers.AutoModelForCausalLM.from_pretrained({str(folder)!r}{implementation})""")


if __name__ == "__main__":
    options.run(main)
