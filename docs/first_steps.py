"""The first steps of small random models with C: gradient norms, losses, and what eps does.

    python docs/first_steps.py    # needs transformers and scipy; half an hour on one core

ViT and Deformable DETR take one step on data/shapes.py's images, RT-DETR takes 300.
"""
import itertools
import statistics
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import transformers as t

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import precond
from data import shapes
from data.images import Shapes

BATCH, RATE, CLIP = 8, 5e-4, 0.1
WIDTH, HEADS, QUERIES = 64, 4, 20
SHOWN = (1, 2, 5, 10, 30, 100, 300)  # steps
DETR = dict(d_model=WIDTH, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=2 * WIDTH,
            decoder_ffn_dim=2 * WIDTH, encoder_attention_heads=HEADS, num_queries=QUERIES,
            decoder_attention_heads=HEADS, num_labels=len(shapes.CLASSES))
STAGES = dict(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1], layer_type="basic",
              out_features=["stage1", "stage2", "stage3"])
MODELS = {  # class, configuration, steps
    "ViT": (t.ViTForImageClassification, lambda: t.ViTConfig(
        image_size=64, patch_size=8, hidden_size=WIDTH, num_hidden_layers=4, num_labels=6,
        num_attention_heads=HEADS, intermediate_size=4 * WIDTH), 1),
    "Deformable DETR": (t.DeformableDetrForObjectDetection, lambda: t.DeformableDetrConfig(
        backbone_config=t.ResNetConfig(**STAGES), num_feature_levels=3, **DETR), 1),
    "RT-DETR": (t.RTDetrForObjectDetection, lambda: t.RTDetrConfig(
        backbone_config=t.RTDetrResNetConfig(**STAGES), encoder_in_channels=[16, 32, 64],
        encoder_hidden_dim=WIDTH, decoder_in_channels=[WIDTH] * 3, feat_strides=[4, 8, 16],
        num_denoising=QUERIES, freeze_backbone_batch_norms=False, **DETR), 300),
}


def batch(name: str, seed: int, step: int) -> dict:
    indices = range(step * BATCH, (step + 1) * BATCH)
    images, counts, kinds, boxes = Shapes("detect", 64, None, seed).batch(indices)
    pixels = images / 127.5 - 1  # (B, 3, 64, 64)
    if name == "ViT":
        return dict(pixel_values=pixels, labels=kinds[:, 0])
    labels = []
    for n, its_kinds, its_boxes in zip(counts, kinds, boxes):
        labels.append(dict(class_labels=its_kinds[:n], boxes=its_boxes[:n]))
    return dict(pixel_values=pixels, labels=labels)


def train(name: str, seed: int, **options):
    """Yields (gradient norm before clipping, loss) of each step; no options: without C."""
    torch.manual_seed(seed)
    cls, config, steps = MODELS[name]
    model = cls(config()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    with precond.wrap(model, **options) if options else nullcontext():
        for step in range(steps):
            loss = model(**batch(name, seed, step)).loss
            optimizer.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            yield norm.item(), loss.item()
            optimizer.step()


for name, seed in itertools.product(MODELS, (1, 2)):
    with precond.record() as calls:
        next(train(name, seed, power=0.0))
    lengths = torch.cat([a.norm(dim=-1).flatten() for a, _ in calls])
    ordinary = lengths.median().item()
    for arm in ({}, dict(eps=1e-8), dict(eps=ordinary), dict(eps=0.1)):
        norms, losses = zip(*train(name, seed, **arm))
        shown = [f"{norms[step - 1]:.3g}" for step in SHOWN if step <= len(norms)]
        last = statistics.fmean(losses[-50:])
        print(name, seed, arm, "norms", *shown, "last losses", f"{last:.3f}")
