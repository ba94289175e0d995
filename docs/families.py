"""Which way of precond reaches which family of models: small random instances, run for real.

    python docs/families.py > docs/families.md      # with transformers, and timm where it is

For every family and way it asks for three things: with power 0 the model's own output to the bit,
finite gradients with C, and `precond.check` without a warning.
"""
import copy
import enum
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import warnings
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import precond

WAYS = INTERFACE, SDPA, WRAP = "transformers' interface", "precondition_sdpa", "wrap"


def text(*shape, vocabulary=50):
    return torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(1))


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def image(size):
    return noise(2, 3, size, size)


# Settings that several families share. Where a family has names of its own for hidden_size and the
# other two, its configuration knows these too.
WIDTH, HEADS = 32, 4
LAYERS = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS)
SMALL = dict(intermediate_size=WIDTH, **LAYERS)
TOKENS = dict(vocab_size=50, bos_token_id=0, eos_token_id=0, pad_token_id=0)
GPT = LAYERS | TOKENS
BERT = SMALL | TOKENS
VIT = dict(image_size=32, patch_size=8, **SMALL)
PYRAMID = dict(image_size=32, num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[16, 32],
               strides=[4, 2], num_attention_heads=[2, 4], mlp_ratios=[2, 2])
REDUCED = dict(sr_ratios=[2, 1], patch_sizes=[7, 3], **PYRAMID)
WINDOWS = dict(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4],
               window_size=4)
DETR = dict(d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_attention_heads=HEADS,
            decoder_attention_heads=HEADS, encoder_ffn_dim=WIDTH, decoder_ffn_dim=WIDTH)
SEQ2SEQ = dict(decoder_start_token_id=0, **DETR, **TOKENS)
BACKBONE = dict(embedding_size=8, hidden_sizes=[8, 16, 32], depths=[1, 1, 1], layer_type="basic",
                out_features=["stage1", "stage2", "stage3"])
SAM_VISION = dict(output_channels=WIDTH, mlp_dim=WIDTH, image_size=64, patch_size=16,
                  window_size=2, global_attn_indexes=[1], num_pos_feats=WIDTH // 2, **LAYERS)
SAM_PROMPT = dict(hidden_size=WIDTH, image_size=64, patch_size=16, mask_input_channels=4)
SAM_MASK = dict(hidden_size=WIDTH, mlp_dim=WIDTH, num_hidden_layers=1, num_attention_heads=2,
                iou_head_hidden_dim=WIDTH)

IDS = dict(input_ids=text(2, 16))
ANSWER = dict(decoder_input_ids=text(2, 7))
PIXELS = dict(pixel_values=image(32))
LARGE = dict(pixel_values=image(64))
SOUND = dict(input_features=image(32)[:, 0, :8])
POINTS = dict(input_points=torch.full((2, 1, 1, 2), 3.0))

FAMILIES = {  # of transformers: its name for the type, inputs, settings
    "GPT-2": ("gpt2", IDS, GPT),
    "Llama": ("llama", IDS, BERT | dict(num_key_value_heads=2)),
    "Gemma 2": ("gemma2", IDS, BERT | dict(num_key_value_heads=2, head_dim=8)),
    "BERT": ("bert", IDS, BERT),
    "T5": ("t5", IDS | ANSWER, GPT | dict(d_kv=8, d_ff=WIDTH, num_decoder_layers=2,
                                          decoder_start_token_id=0)),
    "Whisper": ("whisper", SOUND | ANSWER,
                SEQ2SEQ | dict(num_mel_bins=8, max_source_positions=16)),
    "ViT": ("vit", PIXELS, VIT),
    "SigLIP": ("siglip_vision_model", PIXELS, VIT),
    "Swin": ("swin", PIXELS, WINDOWS),
    "SwinV2": ("swinv2", PIXELS, WINDOWS),
    "PVT": ("pvt", PIXELS,
            PYRAMID | dict(sequence_reduction_ratios=[2, 1], patch_sizes=[4, 2])),
    "PVTv2": ("pvt_v2", PIXELS, REDUCED),
    "SegFormer": ("segformer", PIXELS, REDUCED),
    "LeViT": ("levit", LARGE,
              dict(image_size=64, hidden_sizes=[16, 32, 48], num_attention_heads=[2, 4, 6],
                   depths=[1, 1, 1], key_dim=[8, 8, 8])),
    "MobileViT": ("mobilevit", LARGE,
                  dict(image_size=64, hidden_sizes=[16, 24, 32],
                       neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 32])),
    "Nystromformer": ("nystromformer", IDS,
                      BERT | dict(num_landmarks=4, segment_means_seq_len=16)),
    "YOSO": ("yoso", IDS, BERT | dict(use_expectation=True)),
    "Longformer": ("longformer", IDS, BERT | dict(attention_window=[8, 8])),
    "LED": ("led", IDS | ANSWER, SEQ2SEQ | dict(attention_window=8)),
    "BigBird": ("big_bird", IDS, BERT | dict(attention_type="original_full")),
    "DeBERTa": ("deberta-v2", IDS, BERT),
    "Bloom": ("bloom", IDS, GPT),
    "GPT-J": ("gptj", IDS, GPT | dict(rotary_dim=4)),
    "GPT-Neo": ("gpt_neo", IDS, GPT | dict(attention_types=[[["global", "local"], 1]])),
    "Falcon": ("falcon", IDS, GPT),
    "XLNet": ("xlnet", IDS,
              TOKENS | dict(d_model=WIDTH, n_layer=2, n_head=HEADS, d_inner=WIDTH)),
    "SAM": ("sam", LARGE | POINTS,
            dict(vision_config=SAM_VISION, prompt_encoder_config=SAM_PROMPT,
                 mask_decoder_config=SAM_MASK)),
    "Deformable DETR": ("deformable_detr", LARGE,
                        DETR | dict(backbone_config=dict(model_type="resnet", **BACKBONE),
                                    num_queries=5, num_feature_levels=3)),
    "RT-DETR": ("rt_detr", LARGE,
                DETR | dict(backbone_config=dict(model_type="rt_detr_resnet", **BACKBONE),
                            num_queries=5, encoder_hidden_dim=WIDTH,
                            encoder_in_channels=[8, 16, 32], decoder_in_channels=[WIDTH] * 3)),
}
TIMM = """vit_tiny_patch16_224 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256
    xcit_nano_12_p16_224 cait_xxs24_224 davit_tiny levit_128s visformer_tiny coat_lite_tiny
    nest_tiny_jx mvitv2_tiny tnt_s_patch16_224 convit_tiny crossvit_tiny_240 edgenext_xx_small
    gcvit_xxtiny volo_d1_224 efficientvit_m0""".split()


def make_transformers(family: str, way: str, power: float | None):
    """(model in evaluation mode, arguments, inputs); power None: without C."""
    from transformers import AutoConfig, logging
    logging.set_verbosity_error()
    kind, inputs, settings = FAMILIES[family]

    def config():
        return AutoConfig.for_model(kind, **copy.deepcopy(settings))  # it changes nested ones
    return make_small((config, inputs), way, power)


def make_small(made_of: tuple, way: str, power: float | None):
    """made_of: a function that makes a configuration, since a model may change it; and inputs."""
    from transformers import AutoModel
    config, inputs = made_of
    implementation = None  # the model's own choice: SDPA where it has it
    if way == INTERFACE and power is not None:
        implementation = "preconditioned"
        precond.register_transformers(implementation, power=power)
    torch.manual_seed(0)
    model = AutoModel.from_config(config(), attn_implementation=implementation)
    return model.eval(), (), inputs


class Torchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty classes for whatever timm imports of torchvision: its models use none of them."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision" and "timm" in sys.modules:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def exec_module(self, module):
        module.__getattr__ = self.invent

    def invent(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name == "InterpolationMode":
            return enum.Enum(name, "NEAREST BILINEAR BICUBIC BOX HAMMING LANCZOS")
        return type(name, (torch.nn.Module,), {})


def without_torchvision():
    """timm needs torchvision for its data alone: make do where it is not installed."""
    if importlib.util.find_spec("torchvision") is None:
        sys.meta_path.insert(0, Torchvision())


def make_timm(family: str, way: str, power: float | None, **options):
    import timm
    timm.layers.set_fused_attn(way == SDPA, experimental=True)
    torch.manual_seed(0)
    size = timm.get_pretrained_cfg(family).input_size[-1]
    model = timm.create_model(family, num_classes=3, **options)
    return model.eval(), (image(size)[:1],), {}


def preconditioned(way: str, model, power: float):
    """A context in which the model has C by that way."""
    if way == SDPA:
        return precond.precondition_sdpa(power=power)
    if way == WRAP:
        return precond.wrap(model, power=power)
    return nullcontext()


def tensors(output) -> list[torch.Tensor]:
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point()]


def attempt(make, family: str, way: str) -> str:
    """"all n" or "n, but not NAMES" or "no: why"."""
    try:
        model, args, inputs = make(family, way, None)
        with torch.no_grad():
            own = tensors(model(*args, **inputs))
            model, *_ = make(family, way, 0.0)
            with preconditioned(way, model, 0.0):
                plain = tensors(model(*args, **inputs))
        if not all(map(torch.equal, own, plain)):
            return "no: power 0 changes the output"
        model, *_ = make(family, way, 1.0)
        with preconditioned(way, model, 1.0), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            n = precond.check(model, *args, **inputs)
            outputs = tensors(model(*args, **inputs))
            sum(x.square().mean() for x in outputs).backward()
    except (RuntimeError, ValueError, KeyError) as error:
        return f"no: {str(error).splitlines()[0]}"
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    if not all(gradient.isfinite().all() for gradient in gradients):
        return "no: gradients are not finite"
    for warning in caught:
        said = str(warning.message)
        if "attention calls of" in said or "rows are channels" in said:  # by precond.check
            return f"{n}, but {said}"
    return f"all {n}"


def short(result: str) -> str:
    """What a cell of the table says."""
    if result.startswith("all"):
        return result
    if result.startswith("no: "):
        return "no"
    return "channels" if "channels" in result else f"partly: {result.split(',')[0]}"


def table(title: str, make, families, ways) -> list[str]:
    lines = [f"## {title}", "", f"| family | {' | '.join(ways)} |", "|---" * (len(ways) + 1) + "|"]
    left = []
    for family in families:
        results = [attempt(make, family, way) for way in ways]
        print(family, results, file=sys.stderr)
        lines.append(f"| {family} | {' | '.join(map(short, results))} |")
        if not any(result.startswith("all") for result in results):
            reason = results[-1].removeprefix("no: ").split(". ")[0]
            left.append(f"- {family}: {reason}")
    reached = f"{len(families) - len(left)} of {len(families)} are reached fully by some way."
    if left:
        return [*lines, "", f"{reached} The others, by `wrap`:", "", *left, ""]
    return [*lines, "", reached, ""]


def main():
    versions = f"PyTorch {torch.__version__.split('+')[0]}, transformers {version('transformers')}"
    lines = ["# Which way reaches which model", "",
             f"Written by `docs/families.py` from small random instances: {versions}.",
             "\"all n\": with power 0 the output is the model's own to the bit, with C gradients",
             "are finite, and `check` found the n attentions all reached. \"channels\": rows are",
             "channels, so C is another method there.", ""]
    lines += table("Hugging Face transformers", make_transformers, FAMILIES, WAYS)
    if importlib.util.find_spec("timm") is None:
        print("timm is not installed: its table is left out", file=sys.stderr)
    else:
        without_torchvision()
        lines += table(f"timm {version('timm')}", make_timm, TIMM, WAYS[1:])
    print("\n".join(lines).rstrip())


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
