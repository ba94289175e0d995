"""Which way of precond reaches which family of models: small random instances, run for real.

    python docs/families.py > docs/families.md      # with transformers, and timm where it is

For every family and way it asks for three things: with power 0 the model's own output to the bit,
finite gradients with C, and `precond.check` without a warning.
"""
import enum
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import precond

WIDTH, HEADS, VOCAB = 32, 4, 50
SMALL = dict(hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS,
             intermediate_size=WIDTH)
TEXT = dict(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, pad_token_id=0)
PYRAMID = dict(image_size=32, num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[16, 32],
               strides=[4, 2], num_attention_heads=[2, 4], mlp_ratios=[2, 2])
WINDOWS = dict(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 4],
               window_size=4)
SEQ2SEQ = dict(d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_attention_heads=HEADS,
               decoder_attention_heads=HEADS, encoder_ffn_dim=WIDTH, decoder_ffn_dim=WIDTH,
               decoder_start_token_id=0)
BACKBONE = dict(embedding_size=8, hidden_sizes=[8, 16, 32], depths=[1, 1, 1], layer_type="basic",
                out_features=["stage1", "stage2", "stage3"])
TIMM = """vit_tiny_patch16_224 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256
    xcit_nano_12_p16_224 cait_xxs24_224 davit_tiny levit_128s visformer_tiny coat_lite_tiny
    nest_tiny_jx mvitv2_tiny tnt_s_patch16_224 convit_tiny crossvit_tiny_240 edgenext_xx_small
    gcvit_xxtiny volo_d1_224 efficientvit_m0""".split()
WAYS = ("transformers' interface", "precondition_sdpa", "wrap")


def text(*shape):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def image(size=32):
    return noise(2, 3, size, size)


def transformers_families() -> dict:
    """{family: (class, function that makes a configuration, inputs)}"""
    import transformers as t
    t.logging.set_verbosity_error()
    ids = dict(input_ids=text(2, 16))
    both = ids | dict(decoder_input_ids=text(2, 7))
    pixels = dict(pixel_values=image())
    large = dict(pixel_values=image(64))

    def sam():
        return t.SamConfig(
            vision_config=t.SamVisionConfig(
                hidden_size=WIDTH, output_channels=WIDTH, num_hidden_layers=2, mlp_dim=WIDTH,
                num_attention_heads=HEADS, image_size=64, patch_size=16, window_size=2,
                global_attn_indexes=[1], num_pos_feats=WIDTH // 2),
            prompt_encoder_config=t.SamPromptEncoderConfig(
                hidden_size=WIDTH, image_size=64, patch_size=16, mask_input_channels=4),
            mask_decoder_config=t.SamMaskDecoderConfig(
                hidden_size=WIDTH, mlp_dim=WIDTH, num_hidden_layers=1, num_attention_heads=2,
                iou_head_hidden_dim=WIDTH))

    def rt_detr():
        return t.RTDetrConfig(
            backbone_config=t.RTDetrResNetConfig(**BACKBONE), encoder_hidden_dim=WIDTH,
            encoder_in_channels=[8, 16, 32], encoder_layers=1, encoder_ffn_dim=WIDTH,
            encoder_attention_heads=HEADS, d_model=WIDTH, num_queries=5, decoder_layers=1,
            decoder_in_channels=[WIDTH] * 3, decoder_ffn_dim=WIDTH, decoder_attention_heads=HEADS)

    def deformable_detr():
        return t.DeformableDetrConfig(
            backbone_config=t.ResNetConfig(**BACKBONE), num_queries=5, num_feature_levels=3,
            **{k: v for k, v in SEQ2SEQ.items() if "start" not in k})

    return {
        "GPT-2": (t.GPT2Model, lambda: t.GPT2Config(
            n_embd=WIDTH, n_layer=2, n_head=HEADS, **TEXT), ids),
        "Llama": (t.LlamaModel, lambda: t.LlamaConfig(num_key_value_heads=2, **SMALL, **TEXT), ids),
        "Gemma 2": (t.Gemma2Model, lambda: t.Gemma2Config(
            num_key_value_heads=2, head_dim=8, **SMALL, **TEXT), ids),
        "BERT": (t.BertModel, lambda: t.BertConfig(**SMALL, **TEXT), ids),
        "T5": (t.T5Model, lambda: t.T5Config(
            d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=2, num_heads=HEADS,
            decoder_start_token_id=0, **TEXT), both),
        "Whisper": (t.WhisperModel, lambda: t.WhisperConfig(
            num_mel_bins=8, max_source_positions=16, **SEQ2SEQ, **TEXT),
            dict(input_features=image(32)[:, 0, :8], decoder_input_ids=text(2, 7))),
        "ViT": (t.ViTModel, lambda: t.ViTConfig(image_size=32, patch_size=8, **SMALL), pixels),
        "SigLIP": (t.SiglipVisionModel, lambda: t.SiglipVisionConfig(
            image_size=32, patch_size=8, **SMALL), pixels),
        "Swin": (t.SwinModel, lambda: t.SwinConfig(**WINDOWS), pixels),
        "SwinV2": (t.Swinv2Model, lambda: t.Swinv2Config(**WINDOWS), pixels),
        "PVT": (t.PvtModel, lambda: t.PvtConfig(
            sequence_reduction_ratios=[2, 1], patch_sizes=[4, 2], **PYRAMID), pixels),
        "PVTv2": (t.PvtV2Model, lambda: t.PvtV2Config(
            sr_ratios=[2, 1], patch_sizes=[7, 3], **PYRAMID), pixels),
        "SegFormer": (t.SegformerModel, lambda: t.SegformerConfig(
            sr_ratios=[2, 1], patch_sizes=[7, 3], **PYRAMID), pixels),
        "LeViT": (t.LevitModel, lambda: t.LevitConfig(
            image_size=64, hidden_sizes=[16, 32, 48], num_attention_heads=[2, 4, 6],
            depths=[1, 1, 1], key_dim=[8, 8, 8]), large),
        "MobileViT": (t.MobileViTModel, lambda: t.MobileViTConfig(
            image_size=64, hidden_sizes=[16, 24, 32],
            neck_hidden_sizes=[8, 8, 8, 16, 16, 16, 32]), large),
        "Nystromformer": (t.NystromformerModel, lambda: t.NystromformerConfig(
            num_landmarks=4, segment_means_seq_len=16, **SMALL, **TEXT), ids),
        "YOSO": (t.YosoModel, lambda: t.YosoConfig(use_expectation=True, **SMALL, **TEXT), ids),
        "Longformer": (t.LongformerModel, lambda: t.LongformerConfig(
            attention_window=[8, 8], **SMALL, **TEXT), ids),
        "LED": (t.LEDModel, lambda: t.LEDConfig(attention_window=8, **SEQ2SEQ, **TEXT), both),
        "BigBird": (t.BigBirdModel, lambda: t.BigBirdConfig(
            attention_type="original_full", **SMALL, **TEXT), ids),
        "DeBERTa": (t.DebertaV2Model, lambda: t.DebertaV2Config(**SMALL, **TEXT), ids),
        "Bloom": (t.BloomModel, lambda: t.BloomConfig(
            hidden_size=WIDTH, n_layer=2, n_head=HEADS, **TEXT), ids),
        "GPT-J": (t.GPTJModel, lambda: t.GPTJConfig(
            n_embd=WIDTH, n_layer=2, n_head=HEADS, rotary_dim=4, **TEXT), ids),
        "GPT-Neo": (t.GPTNeoModel, lambda: t.GPTNeoConfig(
            hidden_size=WIDTH, num_layers=2, num_heads=HEADS,
            attention_types=[[["global", "local"], 1]], **TEXT), ids),
        "Falcon": (t.FalconModel, lambda: t.FalconConfig(
            hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=HEADS, **TEXT), ids),
        "XLNet": (t.XLNetModel, lambda: t.XLNetConfig(
            d_model=WIDTH, n_layer=2, n_head=HEADS, d_inner=WIDTH, **TEXT), ids),
        "SAM": (t.SamModel, sam, large | dict(input_points=torch.full((2, 1, 1, 2), 3.0))),
        "Deformable DETR": (t.DeformableDetrModel, deformable_detr, large),
        "RT-DETR": (t.RTDetrModel, rt_detr, large),
    }


def make_transformers(family: str, way: str, power: float | None):
    """(model in evaluation mode, arguments, inputs); power None: without C."""
    return make_small(*transformers_families()[family], way, power)


def make_small(cls, config, inputs: dict, way: str, power: float | None):
    implementation = None  # the model's own choice: SDPA where it has it
    if way == WAYS[0] and power is not None:
        implementation = "preconditioned"
        precond.register_transformers(implementation, power=power)
    torch.manual_seed(0)
    return cls._from_config(config(), attn_implementation=implementation).eval(), (), inputs


class Torchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty classes for whatever timm imports of torchvision: its models use none of them."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision" and "timm" in sys.modules:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = self.invent
        return module

    def exec_module(self, module):
        pass

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
    timm.layers.set_fused_attn(way == "precondition_sdpa", experimental=True)
    torch.manual_seed(0)
    size = timm.get_pretrained_cfg(family).input_size[-1]
    return timm.create_model(family, num_classes=3, **options).eval(), (image(size)[:1],), {}


def preconditioned(way: str, model, power: float):
    """A context in which the model has C by that way."""
    if way == WAYS[0]:
        return nullcontext()
    return precond.precondition_sdpa(power=power) if way == WAYS[1] else precond.wrap(
        model, power=power)


def tensors(output) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    return sum(map(tensors, output), []) if isinstance(output, list | tuple) else []


def attempt(make, family: str, way: str) -> str:
    """"all n" or "n, but not NAMES" or "no: why"."""
    try:
        model, args, inputs = make(family, way, None)
        with torch.no_grad():
            own = tensors(model(*args, **inputs))
            model = make(family, way, 0.0)[0]
            with preconditioned(way, model, 0.0):
                plain = tensors(model(*args, **inputs))
        if not all(map(torch.equal, own, plain)):
            return "no: power 0 changes the output"
        model = make(family, way, 1.0)[0]
        with preconditioned(way, model, 1.0), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            n = precond.check(model, *args, **inputs)
            sum(x.square().mean() for x in tensors(model(*args, **inputs))).backward()
    except (RuntimeError, ValueError, KeyError) as error:
        return f"no: {str(error).splitlines()[0]}"
    if not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None):
        return "no: gradients are not finite"
    said = [str(w.message) for w in said if "attention calls of" in str(w.message)
            or "rows are channels" in str(w.message)]
    return f"{n}, but {said[0]}" if said else f"all {n}"


def short(result: str) -> str:
    """What a cell of the table says."""
    if result.startswith("no: "):
        return "no"
    return result if result.startswith("all") else (
        "channels" if "channels" in result else "partly: " + result.split(",")[0])


def table(title: str, make, families, ways) -> list[str]:
    lines = [f"## {title}", "", "| family | " + " | ".join(ways) + " |",
             "|---" * (len(ways) + 1) + "|"]
    left = []
    for family in families:
        results = [attempt(make, family, way) for way in ways]
        print(family, results, file=sys.stderr)
        lines.append(f"| {family} | " + " | ".join(map(short, results)) + " |")
        if not any(result.startswith("all") for result in results):
            reason = results[-1].removeprefix("no: ").split(". ")[0]
            left.append(f"- {family}: {reason}")
    reached = len(families) - len(left)
    return [*lines, "", f"{reached} of {len(families)} are reached fully by some way."
            + (" The others, by `wrap`:" if left else ""), "", *left, *([""] if left else [])]


def main():
    import transformers
    versions = f"PyTorch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}"
    lines = ["# Which way reaches which model", "",
             f"Written by `docs/families.py` from small random instances: {versions}.",
             "\"all n\": with power 0 the output is the model's own to the bit, with C gradients",
             "are finite, and `check` found the n attentions all reached. \"channels\": rows are",
             "channels, so C is another method there.", ""]
    lines += table("Hugging Face transformers", make_transformers, transformers_families(), WAYS)
    if importlib.util.find_spec("timm") is None:
        print("timm is not installed: its table is left out", file=sys.stderr)
    else:
        without_torchvision()
        import timm
        lines += table(f"timm {timm.__version__}", make_timm, TIMM, WAYS[1:])
    print("\n".join(lines).rstrip())


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
