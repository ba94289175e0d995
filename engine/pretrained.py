"""GPT-2's weights in the form of model.GPT: the four published sizes, or a local Hugging Face folder of the same architecture.

    shapes, _, state = read("gpt2")                      # downloads config.json and model.safetensors once
    shapes, precond, state = read("out/exported", block_size=256)
    vocab_size = shapes.pop("vocab_size")
    gpt = GPT(ModelConfig(**shapes, **precond), vocab_size)
    gpt.load_state_dict(state)

Radford et al. 2019. Weights are read from safetensors alone: a pickle can run code when it is opened. Hugging Face stores GPT-2's
linear layers as Conv1D, y = x W + b with W of shape (in, out), the transpose of nn.Linear's. Needs requirements-extra.txt.
"""
import json
from dataclasses import asdict
from pathlib import Path

import torch

from engine import options
from engine.options import UserError
from model import GPT, ModelConfig

HUB = {name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
VOCABULARY = 50257  # GPT-2's tokens
SHAPES = {"n_positions": "block_size", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd", "vocab_size": "vocab_size"}
MODULES = {"ln_1": "ln_1", "attn.c_attn": "attn.qkv", "attn.c_proj": "attn.proj",
           "ln_2": "ln_2", "mlp.c_fc": "mlp.fc", "mlp.c_proj": "mlp.proj"}
# What model.GPT computes: config key -> (its default in transformers, the values that mean this architecture).
# reorder_and_upcast_attn is free: it changes the order of the same operations. gelu_pytorch_tanh is gelu_new's formula.
ARCHITECTURE = {
    "model_type": (None, ("gpt2",)),
    "activation_function": ("gelu_new", ("gelu_new", "gelu_pytorch_tanh")),
    "layer_norm_epsilon": (1e-5, (1e-5,)),
    "scale_attn_weights": (True, (True,)),
    "scale_attn_by_inverse_layer_idx": (False, (False,)),
    "add_cross_attention": (False, (False,)),
    "tie_word_embeddings": (True, (True,)),
}


def read(source: str, block_size: int | None = None) -> tuple[dict, dict, dict[str, torch.Tensor]]:
    """(shapes, precond, state_dict) of `source`: a name in HUB, or a local folder with config.json and safetensors.

    shapes: block_size, n_layer, n_head, n_embd, bias (always True) and vocab_size. precond: the options under which export.py's model was
    trained, empty for a plain one. state_dict: model.GPT's keys, fp32, on the CPU.
    block_size keeps that many of the learned positions. Whatever cannot be read or is another architecture is a UserError.
    """
    folder = _download(source) if source in HUB else Path(source)
    if not folder.is_dir():
        raise UserError(f"{source} is neither a folder nor one of {', '.join(HUB)}: name a Hugging Face GPT-2 folder")
    config = _read_json(folder / "config.json")
    shapes, precond = _shapes(config, folder / "config.json"), _preconditioner(config, folder / "config.json")
    rows = shapes["block_size"]
    state = _convert(_read_tensors(folder), shapes, folder)
    if block_size is not None:
        if not 1 <= block_size <= rows:
            raise UserError(f"block_size={block_size}: {source} has learned positions for 1 to {rows} tokens, choose among them")
        shapes["block_size"], state["wpe.weight"] = block_size, state["wpe.weight"][:block_size].clone()
    return shapes, precond, state


def start(run) -> dict[str, torch.Tensor]:
    """The weights of the GPT-2 that a run's init_from names; gives run.config its shape.

    A given block_size cuts its positions. The preconditioner that an export names is kept unless
    the options say otherwise. Raises UserError.
    """
    config, given = run.config, run.given
    shapes, precond, weights = read(config.init_from, given.get("block_size"))
    vocab_size = shapes.pop("vocab_size")
    shapes |= {"attention": "softmax", "n_inner": 0}
    for key, value in shapes.items():
        same = given.get(key, value) == value
        if key == "n_inner":
            same = given.get(key, 0) in (0, 4 * shapes["n_embd"])
        if not same:
            raise UserError(f"{key}={given[key]}, but {config.init_from} has {key}={value}: leave "
                            "the option out")
    kept = {key: value for key, value in precond.items() if key not in given}
    values = asdict(config) | shapes | kept
    if config.tokenizer == "auto" and vocab_size == VOCABULARY:
        values["tokenizer"] = "gpt2"
    run.config = options.build(type(config), values)
    return weights


def check_vocabulary(source: str, weights: dict[str, torch.Tensor], meta: dict):
    """Raises UserError where the tokens of prepared text, whose meta.json this is, are not those that `source` was trained on: another
    number of them, or other characters than those in the tokenizer.json of export.py."""
    rows, tokenizer = len(weights["wte.weight"]), meta["tokenizer"]
    if rows != meta["vocab_size"]:
        raise UserError(f"{source} has a vocabulary of {rows:,}, the text one of {meta['vocab_size']:,} ({tokenizer['name']}): choose "
                        "--tokenizer as it was trained, and for characters a text with the same ones")
    path = Path(source) / "tokenizer.json"
    if tokenizer["name"] == "char" and path.exists():
        known = _read_json(path).get("model", {}).get("vocab", {})
        if known != {c: i for i, c in enumerate(tokenizer["chars"])}:
            raise UserError(f"{source} was trained on other characters than the text's: train on a text with the same ones, or export a "
                            "model with --tokenizer=gpt2 or bytes")


def _download(name: str) -> Path:
    """Fetch a published GPT-2 into huggingface_hub's cache and return its folder."""
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(f"downloading {name} needs huggingface_hub: pip install -r requirements-extra.txt") from None
    try:
        huggingface_hub.hf_hub_download(HUB[name], "model.safetensors")
        return Path(huggingface_hub.hf_hub_download(HUB[name], "config.json")).parent
    except OSError as error:  # every failure of the hub or of the disk is one, a missing network too
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"cannot download {HUB[name]} from the Hugging Face hub: {reason} "
                        f"Check the network, or download it elsewhere and give the folder instead of {name}") from None


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; a Hugging Face GPT-2 folder has one") from None
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): download or export the folder again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not an object: download or export the folder again")
    return value


def _preconditioner(config: dict, path: Path) -> dict:
    """ModelConfig's precond options from what export.py writes."""
    options = config.get("preconditioned_attention")
    if options is None:
        return {}
    try:
        return {"precond": True, "precond_grad": bool(options["grad"]), "precond_eps": float(options["eps"]),
                "precond_power": float(options["power"])}
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: preconditioned_attention={options!r} needs grad, eps and power: export the folder again") from None


def _shapes(config: dict, path: Path) -> dict:
    """ModelConfig's sizes and vocab_size from a config.json that describes the architecture of model.GPT."""
    for key, (default, allowed) in ARCHITECTURE.items():
        if config.get(key, default) not in allowed:
            raise UserError(f"{path}: {key}={config.get(key)!r}, but model.py computes {key}={allowed[0]!r}: use another model")
    for key in SHAPES:
        if type(config.get(key)) is not int or config[key] < 1:
            raise UserError(f"{path}: {key}={config.get(key)!r} must be a positive integer")
    if config.get("n_inner") not in (None, 4 * config["n_embd"]):
        raise UserError(f"{path}: n_inner={config['n_inner']}, but model.py computes "
                        f"n_inner=4 * n_embd={4 * config['n_embd']}: use another model")
    if config["n_embd"] % config["n_head"]:
        raise UserError(f"{path}: n_head={config['n_head']} does not divide n_embd={config['n_embd']}")
    return {ours: config[theirs] for theirs, ours in SHAPES.items()} | {"bias": True}


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the folder's safetensors: model.safetensors, or the shards that model.safetensors.index.json lists."""
    try:
        import safetensors
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"reading {folder} needs safetensors: pip install -r requirements-extra.txt") from None
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        names = ["model.safetensors"]
    elif index.exists():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(n, str) and n == Path(n).name for n in weight_map.values()):
            raise UserError(f"{index} has no weight_map from tensors to files of its own folder: download the folder again")
        names = sorted(set(weight_map.values()))
    elif (folder / "pytorch_model.bin").exists() or (folder / "pytorch_model.bin.index.json").exists():
        raise UserError(f"{folder} holds pytorch_model.bin alone, a pickle, which can run code and is not read: "
                        "save the model with transformers' save_pretrained, which writes model.safetensors")
    else:
        raise UserError(f"{folder} has no model.safetensors: name a Hugging Face GPT-2 folder")
    tensors = {}
    for name in names:
        try:
            tensors |= load_file(folder / name)
        except FileNotFoundError:
            raise UserError(f"{folder / name} is missing though {index.name} lists it: download the folder again") from None
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"cannot read {folder / name} ({error}): it is damaged or incomplete, download it again") from None
    return tensors


def _convert(tensors: dict[str, torch.Tensor], shapes: dict, folder: Path) -> dict[str, torch.Tensor]:
    """Hugging Face's names and layout -> those of model.GPT, checked against it tensor by tensor."""
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    theirs = {f"{name}.{kind}": f"{name}.{kind}" for name in ("wte", "wpe", "ln_f") for kind in ("weight", "bias")}
    for i in range(shapes["n_layer"]):
        for old, new in MODULES.items():
            theirs |= {f"blocks.{i}.{new}.{kind}": f"h.{i}.{old}.{kind}" for kind in ("weight", "bias")}
    with torch.device("meta"):
        gpt = GPT(ModelConfig(**{k: v for k, v in shapes.items() if k != "vocab_size"}), shapes["vocab_size"])
    state = {}
    for key, expected in gpt.state_dict().items():
        tensor = tensors.pop(theirs[key], None)
        if tensor is None:
            raise UserError(f"{folder} has no tensor {theirs[key]}: it is incomplete or not a GPT-2")
        conv1d = ".c_" in theirs[key]
        shape = tuple(expected.shape)[::-1] if conv1d else tuple(expected.shape)
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise UserError(f"{folder}: {theirs[key]} is {tensor.dtype} of shape {tuple(tensor.shape)}, but config.json asks for floats of "
                            f"shape {shape}: the two do not belong together")
        state[key] = (tensor.t() if conv1d else tensor).float().contiguous()
    head = tensors.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head.float(), state["wte.weight"]):
        raise UserError(f"{folder}: lm_head.weight is not wte.weight, and model.py ties its head to the embedding: use another model")
    # Causal masks that old versions of transformers saved as buffers.
    extra = sorted(key for key in tensors if not key.endswith((".attn.bias", ".attn.masked_bias")))
    if extra:
        raise UserError(f"{folder} has {len(extra)} tensors that GPT-2 does not have, {extra[0]} first: use a GPT-2 language model")
    return state
