"""model.GPT with weights from elsewhere: published, in a Hugging Face folder like GPT-2's, a run's.

    gpt = load("gpt2")                                   # downloads two files once
    gpt = from_checkpoint(checkpoint.read("out/best.pt"), "out/best.pt")
    shapes, precond, state = read("out/exported", block_size=256)

Radford et al. 2019. Weights are read from safetensors alone: a pickle can run code when it is
opened. Hugging Face stores GPT-2's linear layers as Conv1D, y = x W + b with W of shape (in, out),
the transpose of nn.Linear's. Needs requirements-extra.txt.
"""
import json
from dataclasses import asdict
from pathlib import Path

import torch

from engine import options
from engine.options import UserError
from engine.run import OWN
from model import GPT, ModelConfig

HUB = {name: f"openai-community/{name}"
       for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
VOCABULARY = 50257  # GPT-2's tokens
# (tokenizer, a token in its tokenizer.json, the token's number)
WORDS = ("gpt2", "\u0120the", 262), ("bytes", "a", 97)
LARGEST = 2**24  # of any size: far beyond all models
SIZES = {"block_size": "n_positions", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd",
         "vocab_size": "vocab_size"}
# Parts of parameters' names, ours and theirs. Their linear layers begin with c_.
NAMES = {"blocks.": "h.", "attn.qkv": "attn.c_attn", "attn.proj": "attn.c_proj",
         "mlp.fc": "mlp.c_fc", "mlp.proj": "mlp.c_proj"}
# What model.GPT computes: config key -> (its default in transformers, the values that mean it).
# reorder_and_upcast_attn is free: it changes the order of the same operations. gelu_pytorch_tanh
# is gelu_new's formula.
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
    """(shapes, precond, state_dict) of `source`: a name in HUB, or a local Hugging Face folder.

    shapes: block_size, n_layer, n_head, n_embd, bias (always True) and vocab_size. precond: the
    options under which export.py's model was trained, empty for a plain one. state_dict:
    model.GPT's keys, fp32, on the CPU. block_size keeps that many of the learned positions.
    Whatever cannot be read or is another architecture is a UserError.
    """
    folder = download(source) if source in HUB else Path(source)
    if not folder.is_dir():
        near = options.suggest(source, (*OWN, *HUB))
        raise UserError(f"{source} is neither a folder nor one of {', '.join(HUB)}: {near}name a "
                        "Hugging Face GPT-2 folder")
    path = folder / "config.json"
    config = read_json(path)
    shapes = read_shapes(config, path)
    precond = read_preconditioner(config, path)
    state = convert(read_tensors(folder), shapes, folder)
    if block_size is not None:
        rows = shapes["block_size"]
        if not 1 <= block_size <= rows:
            raise UserError(f"block_size={block_size}: {source} has learned positions for 1 to "
                            f"{rows} tokens, choose among them")
        shapes["block_size"] = block_size
        state["wpe.weight"] = state["wpe.weight"][:block_size].clone()
    return shapes, precond, state


def exported_options(source: str) -> dict:
    """The precond options of export.py's model in the folder `source`; empty for a plain one."""
    path = Path(source) / "config.json"
    return {} if source in HUB else read_preconditioner(read_json(path), path)


def load(source: str) -> GPT:
    """The model of `source`, see `read`, in evaluation mode, on the CPU. Raises UserError."""
    shapes, precond, weights = read(source)
    vocab_size = shapes.pop("vocab_size")
    return assemble(options.build(ModelConfig, shapes | precond), vocab_size, weights, source)


def from_checkpoint(saved: dict, source: str | Path) -> GPT:
    """The model of train.py's checkpoint `saved`, which `source` names, in evaluation mode, on the
    CPU. Raises UserError."""
    config = read_config(saved, source)
    return assemble(config, saved["task"]["vocab_size"], saved["model"], source)


def read_config(saved: dict, source: str | Path) -> ModelConfig:
    """The model's part of a checkpoint's configuration. Raises UserError."""
    has = {*saved, *saved["task"]}
    if lacking := sorted({"config", "model", "step", "vocab_size"} - has):
        raise UserError(f"{source} cannot be used: it lacks {', '.join(lacking)}")
    names = options.options(ModelConfig)
    values = {name: value for name, value in saved["config"].items() if name in names}
    return options.build(ModelConfig, values)


def assemble(config: ModelConfig, vocab_size: int, weights: dict, source: str | Path) -> GPT:
    """model.GPT with these weights. Raises UserError.

    Whatever a configuration asks for, it is compared with the weights before it takes memory.
    """
    layers = count_layers(weights)
    if config.n_layer > layers:
        raise UserError(f"{source} asks for n_layer={config.n_layer} and has weights for {layers}: "
                        "it is damaged")
    try:
        with torch.device("meta"):
            model = GPT(config, vocab_size)
        model.load_state_dict(weights, assign=True)
        model.float().eval()
        finite = all(p.isfinite().all() for p in model.parameters())
    except (AttributeError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[-1].strip()[:120]
        raise UserError(f"the weights of {source} are not its configuration's ({reason}): it is "
                        "damaged") from None
    if not finite:
        raise UserError(f"{source} has weights that are not finite numbers: use another model")
    return model


def count_layers(weights: dict) -> int:
    return sum(str(name).endswith(".ln_1.weight") for name in weights)


def read_tokenizer(source: str, vocab_size: int) -> dict | None:
    """The state of the tokenizer with which `source` was trained, where it can be told.

    data/tokenizers.py has three, and export.py writes them. Raises UserError for another one.
    """
    path = Path(source) / "tokenizer.json"
    if source in HUB or not path.exists():
        return {"name": "gpt2"} if vocab_size == VOCABULARY else None
    try:
        model = read_json(path)["model"]
        vocab = model["vocab"]
        chars = "".join(sorted(vocab, key=vocab.get))
        if model["type"] == "WordLevel" and vocab == {c: i for i, c in enumerate(chars)}:
            return {"name": "char", "chars": chars}
        for name, word, number in WORDS:
            if vocab.get(word) == number:
                return {"name": name}
    except (AttributeError, KeyError, TypeError):
        pass
    raise UserError(f"{path} is none of the tokenizers char, bytes and gpt2: use another model")


def check_tokenizer(tokenizer, vocab_size: int):
    """Raises UserError where a model of so many tokens cannot be given all of the tokenizer's."""
    if tokenizer.vocab_size > vocab_size:
        raise UserError(f"the model knows {vocab_size:,} tokens, its tokenizer has "
                        f"{tokenizer.vocab_size:,}: they do not belong together")


def start(run) -> dict[str, torch.Tensor]:
    """The weights of the GPT-2 that a run's init_from names; gives run.config its shape.

    A given block_size cuts its positions. The preconditioner that an export names is kept unless
    the options say otherwise. Raises UserError.
    """
    config = run.config
    given = run.given
    shapes, precond, weights = read(config.init_from, given.get("block_size"))
    vocab_size = shapes.pop("vocab_size")
    shapes |= {"attention": "softmax", "n_inner": 0, "rotary": False, "qk_norm": False}
    for key, value in shapes.items():
        allowed = (0, 4 * shapes["n_embd"]) if key == "n_inner" else (value,)
        if given.get(key, value) not in allowed:
            raise UserError(f"{key}={given[key]}, but {config.init_from} has {key}={value}: leave "
                            "the option out")
    kept = {key: value for key, value in precond.items() if key not in given}
    values = asdict(config) | shapes | kept
    if config.tokenizer == "auto" and vocab_size == VOCABULARY:
        values["tokenizer"] = "gpt2"
    run.config = options.build(type(config), values)
    return weights


def check_vocabulary(source: str, weights: dict, meta: dict):
    """Raises UserError where prepared text, whose meta.json this is, has other tokens than those
    that `source` was trained on."""
    rows = len(weights["wte.weight"])
    tokenizer = meta["tokenizer"]
    if rows != meta["vocab_size"]:
        raise UserError(f"{source} has a vocabulary of {rows:,}, the text one of "
                        f"{meta['vocab_size']:,} ({tokenizer['name']}): choose --tokenizer as it "
                        "was trained, and for characters a text with the same ones")
    known = read_tokenizer(source, rows)
    if known and known != tokenizer:
        raise UserError(f"{source} was trained on other characters or tokens than the text's: "
                        "train on a text with the same ones, or export a model with "
                        "--tokenizer=gpt2 or bytes")


def hugging_face_name(key: str) -> str:
    """blocks.0.attn.qkv.weight -> h.0.attn.c_attn.weight"""
    for ours, theirs in NAMES.items():
        key = key.replace(ours, theirs)
    return key


def download(name: str) -> Path:
    """Fetch a published GPT-2 into huggingface_hub's cache and return its folder."""
    huggingface_hub = options.need("huggingface_hub", f"downloading {name} needs the package")
    repository = HUB[name]
    files = "config.json", "model.safetensors"
    cached = [huggingface_hub.try_to_load_from_cache(repository, file) for file in files]
    if all(isinstance(path, str) for path in cached):
        return Path(cached[0]).parent
    try:
        # Asked once: without a network hf_hub_download would try for half a minute.
        url = huggingface_hub.hf_hub_url(repository, files[1])
        huggingface_hub.get_hf_file_metadata(url, timeout=10)
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=files))
    except (OSError, huggingface_hub.errors.HTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"cannot download {repository} from the Hugging Face hub ({reason}): "
                        "check the network and the disk, or download it elsewhere and give the "
                        f"folder instead of {name}") from None


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}")
        return value
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; a Hugging Face GPT-2 folder has "
                        "one, and export.py makes such a folder of a run") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): download or export the folder "
                        "again") from None


def read_preconditioner(config: dict, path: Path) -> dict:
    """ModelConfig's precond options from what export.py writes."""
    saved = config.get("preconditioned_attention")
    if saved is None:
        return {}
    try:
        return {"precond": True, "precond_grad": bool(saved["grad"]),
                "precond_eps": float(saved["eps"]), "precond_power": float(saved["power"])}
    except (KeyError, OverflowError, TypeError, ValueError):
        raise UserError(f"{path}: preconditioned_attention={str(saved)[:80]} needs grad, eps and "
                        "power: export the folder again") from None


def read_shapes(config: dict, path: Path) -> dict:
    """ModelConfig's sizes and vocab_size from a config.json of model.GPT's architecture."""
    for key, (default, allowed) in ARCHITECTURE.items():
        if config.get(key, default) not in allowed:
            raise UserError(f"{path}: {key}={config.get(key)!r}, but model.py computes "
                            f"{key}={allowed[0]!r}: use another model")
    shapes = {}
    for ours, theirs in SIZES.items():
        size = config.get(theirs)
        if type(size) is not int or not 1 <= size <= LARGEST:
            raise UserError(f"{path}: {theirs}={repr(size)[:40]} must be a positive integer, "
                            f"at most {LARGEST:,}")
        shapes[ours] = size
    n_embd = shapes["n_embd"]
    if config.get("n_inner") not in (None, 4 * n_embd):
        raise UserError(f"{path}: n_inner={config['n_inner']}, but model.py computes "
                        f"n_inner=4 * n_embd={4 * n_embd}: use another model")
    if n_embd % shapes["n_head"]:
        raise UserError(f"{path}: n_head={shapes['n_head']} does not divide n_embd={n_embd}")
    return shapes | {"bias": True}


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of model.safetensors, or of the files that model.safetensors.index.json lists."""
    safetensors = options.need("safetensors", f"reading {folder} needs the package")
    from safetensors.torch import load_file

    names = ["model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if index.exists() and not (folder / names[0]).exists():
        names = list_shards(index)
    tensors = {}
    for name in names:
        path = folder / name
        try:
            tensors |= load_file(path)
        except FileNotFoundError:
            pickled = ""
            if any(folder.glob("pytorch_model.bin*")):
                pickled = (". Its pytorch_model.bin is a pickle, which can run code and is not "
                           "read: save the model with transformers' save_pretrained")
            raise UserError(f"{path} is missing: name a whole Hugging Face GPT-2 folder"
                            + pickled) from None
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"cannot read {path} ({error}): it is damaged or incomplete, download "
                            "it again") from None
    return tensors


def list_shards(index: Path) -> list[str]:
    """The files of an index; none of another folder. Raises UserError."""
    names = read_json(index).get("weight_map")
    names = set(map(str, names.values())) if isinstance(names, dict) else ()
    if not names or any(name != Path(name).name for name in names):
        raise UserError(f"{index} has no weight_map from tensors to files of its own folder: "
                        "download the folder again")
    return sorted(names)


def convert(tensors: dict[str, torch.Tensor], shapes: dict, folder: Path
            ) -> dict[str, torch.Tensor]:
    """Their names and layout -> those of model.GPT, checked against it tensor by tensor."""
    tensors = {key.removeprefix("transformer."): tensor for key, tensor in tensors.items()}
    sizes = dict(shapes)
    vocab_size = sizes.pop("vocab_size")
    sizes["n_layer"] = min(sizes["n_layer"], count_layers(tensors) + 1)  # make no more than needed
    with torch.device("meta"):
        gpt = GPT(ModelConfig(**sizes), vocab_size)
    state = {}
    for key, expected in gpt.state_dict().items():
        name = hugging_face_name(key)
        if name not in tensors:
            raise UserError(f"{folder} has no tensor {name}: it is incomplete or not a GPT-2")
        tensor = tensors.pop(name)
        shape = expected.shape
        if ".c_" in name:
            shape = shape[::-1]
        if tensor.shape != shape or not tensor.is_floating_point():
            raise UserError(f"{folder}: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, "
                            f"but config.json asks for floats of shape {tuple(shape)}: "
                            "the two do not belong together")
        # A bias is the same either way.
        state[key] = (tensor.t() if ".c_" in name else tensor).float().contiguous()
    head = tensors.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head.float(), state["wte.weight"]):
        raise UserError(f"{folder}: lm_head.weight is not wte.weight, and model.py ties its head "
                        "to the embedding: use another model")
    # Causal masks that old versions of transformers saved as buffers.
    extra = sorted(key for key in tensors if not key.endswith((".attn.bias", ".attn.masked_bias")))
    if extra:
        raise UserError(f"{folder} has {len(extra)} tensors that GPT-2 does not have, {extra[0]} "
                        "first: use a GPT-2 language model")
    return state
