"""How many models of transformers and timm precond reaches: each type small, random, run for real.

    python docs/families_all.py results.jsonl > docs/families_all.md    # an hour on one core

Every line of results.jsonl is a model that is done. The command goes on where it was stopped; a
line that is removed is run anew. A model is "reached" by the first way that docs/families.py
calls "all n": the interface of transformers, the context over SDPA, wrap.
"""
import inspect
import itertools
import json
import multiprocessing
import os
import re
import resource
import sys
import time
from collections import defaultdict
from functools import partial
from importlib.metadata import version
from pathlib import Path

import families
import torch
from huggingface_hub.errors import StrictDataclassError
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from precond_dropin.check import is_attention

LIMIT, MEMORY = 90, 12 * 2**30  # seconds and bytes for one model
ERRORS = (  # of odd configurations, and of inputs that do not fit
    AssertionError, AttributeError, ImportError, IndexError, KeyError, NameError, OSError,
    RuntimeError, StrictDataclassError, TypeError, ValueError, ZeroDivisionError)
# Names of numbers in a configuration.
WIDTHS = re.compile(r"hidden|embed|embd|dim|d_model|d_kv|d_ff|d_head|inner|intermediate|ffn|width|"
                    r"rank|channels|filters|planes|head_size|feature_size|project")
DEPTHS = r"layers?$|^depths?$|num_blocks|_depth$"
INDEXES = r"(?<!^out_)(index|indexe|indice)s$"
SPECIAL = re.compile(r"token_(id|index)$|^(bos|eos|pad)$")
KEPT = (r"^num_(?!hidden|layer|enc|dec|block)|max_|position|vocab|patch|image|window|"
        r"kernel|_id$|stride|out_indices|feature_layer")
SMALL_WORDS = ("test_", "atto", "femto", "pico", "nano", "xxtiny", "xxs", "xx_small", "xtiny",
               "tiny", "xs", "x_small", "small", "_s", "_t", "mini", "lite", "base")
VOCAB, TOKENS, SMALL_IMAGE = 512, 16, 256
SIZES = ((16, 2), (8, 2), (8, 8))  # to try: what widths are divided by, and layers
TOGETHER = (  # inputs that some models need beside their main one
    "input_ids pixel_values", "input_ids bbox", "input_ids bbox pixel_values",
    "input_ids pixel_values decoder_input_ids", "input_ids input_features",
    "input_ids input_values", "input_features input_features_mask", "hidden_states grid_thw",
    "pixel_values grid_thw", "query_embeds encoder_hidden_states",
    "input_ids pixel_values pixel_attention_mask spatial_shapes",
    "pixel_values pixel_attention_mask spatial_shapes")


class Attentions(TorchDispatchMode):
    """How often something was computed that check takes for attention."""
    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += is_attention(func, args)
        return func(*args, **kwargs or {})


def small(name: str, value, factor: int, layers: int):
    """An attribute of a configuration, smaller. Widths keep their ratios, so that they fit."""
    if name == "layer_types":
        return value and value[:layers]
    if isinstance(value, list | tuple):
        return type(value)(small(name, v, factor, layers) for v in value)
    if type(value) is not int:
        return value
    if SPECIAL.search(name):
        half = VOCAB // 2  # above it, where no word of the inputs is
        return value if value < half else half + sum(name.encode()) % half
    most = {  # by the first pattern that fits
        r"^(?!.*type).*vocab": VOCAB,
        r"^(image|img|input)_size$": SMALL_IMAGE,
        r"^(num|n|num_local|n_routed|moe_num)_experts$": 8,
        r"^(n|topk)_group$": 1,
        r"^(num_experts_per_tok|moe_topk)$": 2,
        INDEXES: layers - 1,
        r"^num_kv_shared_layers$": 0,
        KEPT: value,
        DEPTHS: layers,
    }
    for pattern, limit in most.items():
        if re.search(pattern, name):
            return min(value, limit)
    if WIDTHS.search(name) and value >= 16 and value % factor == 0:
        return value // factor
    return value


def small_config(config, *size):
    """A configuration of the same class, made anew: what it derives is derived again."""
    import transformers
    if config.model_type == "timm_backbone":  # needs torchvision
        config = transformers.ResNetConfig(out_indices=config.out_indices, layer_type="basic")
    plain = type(config)()
    given = {}
    for name, field in type(config).__dataclass_fields__.items():
        value = vars(config).get(name)  # an attribute that differs by layer would raise
        if isinstance(value, transformers.PreTrainedConfig):
            given[name] = small_config(value, *size)
            continue
        if value == vars(plain).get(name):
            value = field.default  # None, where the class would fill it in
        if isinstance(value, int | list | tuple):
            smaller = small(name, value, *size)
            if smaller != field.default:
                given[name] = smaller
    made = type(config)(**given)
    if "mrope_section" in getattr(made, "ignore_keys_at_rope_validation", ()):  # half a head
        head = getattr(made, "head_dim", None) or made.hidden_size // made.num_attention_heads
        half = int(head * made.rope_parameters.get("partial_rotary_factor", 1)) // 2
        third = half // 3
        made.rope_parameters["mrope_section"] = [half - 2 * third, third, third]
    return made


def inputs_of(model, config) -> list[dict]:
    """Sets of inputs to try, the fewest first."""
    parts = [config, *vars(config).values()]  # what it says itself, then of its encoders

    def find(*names):
        """The first number of such a name, or the first one in a list of them."""
        for part, name in itertools.product(parts, names):
            value = getattr(part, name, None)
            if isinstance(value, list | tuple) and value:
                value = value[0]
            if type(value) is int:
                return value

    noise = families.noise
    size = find("image_size", "img_size", "input_size", "pretrain_image_size") or 64
    channels = find("num_channels", "in_channels", "in_chans") or 3
    mels = find("num_mel_bins", "feature_size", "input_feat_per_channel", "n_mels") or 80
    frames = find("num_frames", "frames_per_clip") or 2
    sound = 2 * (find("max_source_positions") or 32)
    length = find("max_length") or 64
    patch = find("patch_size") or 16
    patches = channels * (find("temporal_patch_size") or 1) * patch**2  # a patch as a row
    ids = families.text(2, TOKENS, vocabulary=VOCAB // 2)
    image = noise(2, channels, size, size)
    video = image[:, None].expand(-1, frames, -1, -1, -1)
    series = noise(2, find("context_length") or 64, channels)
    supply = dict(
        input_ids=[ids],
        decoder_input_ids=[ids[:, :7]],
        bbox=[torch.zeros(2, TOKENS, 4, dtype=torch.long)],
        pixel_values=[image, video, noise(16, patches), noise(2, 16, patches), series],
        hidden_states=[noise(16, patches)],
        grid_thw=[torch.tensor([[1, 4, 4]])],
        pixel_attention_mask=[torch.ones(2, 16, dtype=torch.long)],
        spatial_shapes=[torch.full((2, 2), 4)],
        input_features_mask=[torch.ones(2, sound, dtype=torch.long)],
        query_embeds=[noise(2, 8, find("hidden_size") or 64)],
        encoder_hidden_states=[noise(2, 8, find("encoder_hidden_size") or 64)],
        pixel_values_videos=[video],
        input_values=[noise(2, 4000), noise(2, 1, 4000), noise(2, length, mels)],
        input_features=[noise(2, mels, sound), noise(2, 64, mels)],
        past_values=[series])
    takes = inspect.signature(model.forward).parameters.keys()
    has = [name for name in supply if name in takes]
    if not has:
        return []
    main = model.main_input_name if model.main_input_name in has else has[0]
    begin = main, f"{main} decoder_input_ids", f"input_ids {main}"
    # Each name and each set once.
    sets = [tuple(dict.fromkeys(names.split())) for names in (*begin, *TOGETHER, *has)]
    possible = [names for names in dict.fromkeys(sets) if takes >= set(names)]
    return [dict(zip(names, values)) for names in possible
            for values in itertools.product(*map(supply.get, names))]


def transformers_type(kind: str) -> dict:
    """Make it small, run it, and try the ways."""
    import transformers
    transformers.logging.set_verbosity_error()
    why, runs = "no inputs are known", False
    for size in SIZES:
        config = partial(small_type, kind, *size)
        try:
            model, *_ = families.make_small((config, {}), families.WRAP, None)
            sets = inputs_of(model, model.config)
        except ERRORS as error:
            why = said(error)
            continue
        for inputs in sets:
            try:
                with torch.no_grad(), Attentions() as attentions:
                    model(**inputs)
            except ERRORS as error:
                why = said(error) if inputs is sets[0] else why
                continue
            runs = True
            if attentions.seen:
                return ways(families.WAYS, families.make_small, (config, inputs), inputs)
    return dict(result="no attention" if runs else "not run", why=why)


def small_type(kind: str, *size):
    import transformers
    return small_config(transformers.CONFIG_MAPPING[kind](), *size)


def timm_model(model: str) -> dict:
    make = partial(families.make_timm, depth=2)
    try:
        made, args, _ = make(model, families.WRAP, None)
    except (AssertionError, TypeError, ValueError):  # not every model has it so
        make = families.make_timm
        made, args, _ = make(model, families.WRAP, None)
    with torch.no_grad(), Attentions() as attentions:
        made(*args)
    if not attentions.seen:
        return dict(result="no attention")
    return ways(families.WAYS[1:], make, model, ())


def smallness(model: str) -> tuple:
    """Of one of timm's models, by the words of its name: a key to sort by."""
    import timm
    word = next((i for i, word in enumerate(SMALL_WORDS) if word in model), len(SMALL_WORDS))
    return word, timm.get_pretrained_cfg(model).input_size[-1], len(model), model


def said(error: Exception) -> str:
    text = re.sub(r"'/\S*/site-packages/", "'", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:150]}"


def ways(names, make, model: str, inputs) -> dict:
    """The first way that reaches all, or what each one says."""
    answers = {}
    for way in names:
        try:
            answers[way] = families.attempt(make, model, way)
        except ERRORS as error:
            answers[way] = f"no: {said(error)}"
        if answers[way].startswith("all"):
            return dict(result=way, n=answers[way][4:], inputs=list(inputs))
    return dict(result="not reached", answers=answers, inputs=list(inputs))


def in_a_child(work, name: str) -> dict:
    """work(name) in a process of its own, which may take too long or die."""
    ours, theirs = multiprocessing.Pipe(duplex=False)

    def answer():
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        try:
            theirs.send(work(name))
        except ERRORS as error:
            theirs.send(dict(result="not run", why=said(error)))

    child = multiprocessing.get_context("fork").Process(target=answer)
    child.start()
    theirs.close()
    try:
        if ours.poll(LIMIT):
            return ours.recv()
        return dict(result="not run", why=f"not done after {LIMIT} s")
    except EOFError:
        return dict(result="not run", why="its process died")
    finally:
        child.kill()
        child.join()


def names_of(library: str) -> list[str]:
    if library == "timm":
        families.without_torchvision()
        import timm
        families_of = {}  # by file and the letters that a name begins with: resnet, botnet
        for module in timm.list_modules():
            for model in timm.list_models(module=module):
                letters = re.match("[a-z]+", model)[0]
                families_of.setdefault((module, letters), []).append(model)
        return sorted(min(models, key=smallness) for models in families_of.values())
    from transformers import PreTrainedModel  # noqa: F401  loaded once, for all children
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
    return sorted(MODEL_MAPPING_NAMES)


def section(library: str, results: dict[str, dict]) -> list[str]:
    by = defaultdict(list)
    for name, result in results.items():
        by[result["result"]].append(name)
    reached = sum(len(by[way]) for way in families.WAYS)
    left, none, not_run = by["not reached"], by["no attention"], by["not run"]
    lines = [f"## {library}", "", f"{len(results)} were tried, {reached + len(left)} "
             f"of them run and have attention; {reached} of these are reached fully.", ""]
    for way in families.WAYS:
        if by[way]:
            lines += [f"By {way} ({len(by[way])}): {', '.join(by[way])}.", ""]
    lines += [f"Not reached ({len(left)}), and what wrap says:", ""]
    for name in left:
        answer = results[name]["answers"][families.WRAP]
        lines.append(f"- {name}: {answer.removeprefix('no: ')}")
    if none:
        lines += ["", f"No softmax attention ({len(none)}): {', '.join(none)}."]
    if not_run:
        lines += ["", f"Not made or not run small ({len(not_run)}):", ""]
        lines += [f"- {name}: {results[name]['why']}" for name in not_run]
    return [*lines, ""]


def main():
    path = Path(sys.argv[1])
    path.touch()
    done = {}
    for line in path.read_text().splitlines():
        result = json.loads(line)
        done[result["library"], result["name"]] = result
    lines = ["# Which types are reached", "",
             f"Written by `docs/families_all.py` with transformers {version('transformers')} and "
             f"timm {version('timm')}: types of transformers",
             "that can be made small and random, and a model of each family of timm. What is not",
             "reached is followed by what `precond.wrap` says.", ""]
    for library, work in ("transformers", transformers_type), ("timm", timm_model):
        results = {}
        for name in names_of(library):
            if (library, name) not in done:
                began = time.time()
                result = in_a_child(work, name)
                print(f"{time.time() - began:.0f} s:", library, name, result, file=sys.stderr)
                done[library, name] = dict(library=library, name=name, **result)
                with path.open("a") as file:
                    file.write(json.dumps(done[library, name]) + "\n")
            results[name] = done[library, name]
        lines += section(library, results)
    print("\n".join(lines).rstrip())


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)
    main()
