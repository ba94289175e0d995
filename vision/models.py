"""The vision models: ViT, YOLOS and EoMT of Hugging Face transformers, made from their configurations, with preconditioned attention.

    classify    ViT (Dosovitskiy et al. 2021), ViTForImageClassification
    detect      YOLOS (Fang et al. 2021), a ViT with detection tokens and DETR's loss (Carion et al. 2020), YolosForObjectDetection
    segment     EoMT (Kerssies et al. 2025), a ViT whose last blocks have queries and masked attention, EomtForUniversalSegmentation

All three reach the preconditioner through precond.register_transformers, off (power 0) or on, so kappa is recorded in both cases.
"""
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

import precond
from data import coco
from engine.options import (FIXED, FIXED_IN_TRAINING, DATA, UserError, at_least, divides,
                            in_range)
from engine.precond_config import PrecondConfig

TASKS = ("classify", "detect", "segment")


def at_most_n_layer(name, value, config):
    if config.task == "segment" and value > config.n_layer:
        return f"{name}={value} must not exceed n_layer={config.n_layer}"


@dataclass
class VisionConfig(PrecondConfig):
    """What fixes a model but its classes."""
    task: Annotated[Literal[TASKS], "classify: ViT; detect: YOLOS, boxes; segment: EoMT, instance "
                                    "masks", DATA] = "detect"
    image_size: Annotated[int, "side of an image in pixels; others are resized to it", FIXED,
                          at_least(1)] = 64
    patch_size: Annotated[int, "side of a patch, which is one token", FIXED, at_least(1),
                          divides("image_size")] = 8
    n_layer: Annotated[int, "number of blocks", FIXED, at_least(1)] = 4
    n_head: Annotated[int, "attention heads per block", FIXED, at_least(1),
                      divides("n_embd")] = 4
    n_embd: Annotated[int, "width of the model", FIXED, at_least(1)] = 64
    dropout: Annotated[float, "dropout probability", in_range(0, 1)] = 0.0
    queries: Annotated[int, "detect, segment: most objects found in an image", FIXED,
                       at_least(1)] = 8
    query_blocks: Annotated[int, "segment: the last blocks, which have the queries", FIXED,
                            at_least(1), at_most_n_layer] = 1
    upscale_blocks: Annotated[int, "segment: each doubles the masks' resolution, from one value a "
                                   "patch", FIXED, at_least(0)] = 1
    mask_points: Annotated[int, "segment: points of each mask that the loss looks at",
                           at_least(1)] = 256
    precond_power: Annotated[float, "1: the paper's; 0: plain attention; 0.5: half-way",
                             FIXED_IN_TRAINING] = 1.0


def make_network(config: VisionConfig, n_classes: int) -> nn.Module:
    """The transformers model of a task, with random weights. Raises UserError where requirements-extra.txt is not installed."""
    try:
        import scipy  # noqa: F401  (the matching in the losses of YOLOS and EoMT)
        import transformers
    except ImportError as e:
        raise UserError(f"vision models need {e.name}: pip install -r requirements-extra.txt") from None
    power = config.precond_power if config.precond else 0.0
    name = f"preconditioned_{power}_{config.precond_eps}_{config.precond_grad}"
    precond.register_transformers(name, grad=config.precond_grad, eps=config.precond_eps, power=power)
    shape = dict(hidden_size=config.n_embd, num_hidden_layers=config.n_layer, num_attention_heads=config.n_head, num_labels=n_classes,
                 patch_size=config.patch_size, hidden_dropout_prob=config.dropout,
                 initializer_range=config.n_embd**-0.5)  # transformers' 0.02 is for wide models: narrow ones would start flat
    square = [config.image_size, config.image_size]
    if config.task == "classify":
        cls, settings = transformers.ViTForImageClassification, transformers.ViTConfig(
            **shape, image_size=config.image_size, intermediate_size=4 * config.n_embd, attention_probs_dropout_prob=config.dropout)
    elif config.task == "detect":
        cls, settings = transformers.YolosForObjectDetection, transformers.YolosConfig(
            **shape, image_size=square, intermediate_size=4 * config.n_embd, attention_probs_dropout_prob=config.dropout,
            num_detection_tokens=config.queries, use_mid_position_embeddings=False,
            bbox_loss_coefficient=2, giou_loss_coefficient=1)  # DETR's are 5 and 2: a small model then learns where long before what
    else:
        cls, settings = transformers.EomtForUniversalSegmentation, transformers.EomtConfig(
            **shape, image_size=config.image_size, mlp_ratio=4, attention_dropout=config.dropout, num_queries=config.queries,
            num_blocks=config.query_blocks, num_upscale_blocks=config.upscale_blocks, num_register_tokens=0,
            train_num_points=config.mask_points)
    network = cls._from_config(settings, attn_implementation=name)
    with torch.no_grad():
        positions = sincos_2d(config.image_size // config.patch_size, config.n_embd)
        if config.task == "segment":
            network.embeddings.position_embeddings.weight.copy_(positions)
        else:
            embeddings = network.vit.embeddings
            embeddings.position_embeddings[0, 1:1 + len(positions)] = positions
            if config.task == "detect":  # transformers leaves them at 0, meant for loading weights: all would start as one
                embeddings.detection_tokens.normal_()
    return network


def sincos_2d(side: int, width: int) -> torch.Tensor:
    """(side^2, width): sines and cosines of a patch's row and column, at width / 4 frequencies from one period over the image up to half
    the patches. Position embeddings are learned from there: places that are near start alike, which Beyer et al. 2022 found to help."""
    frequency = torch.pi * torch.logspace(0, 1, max(1, width // 4), base=max(2, side / 2)) / side
    angle = torch.arange(side)[:, None] * frequency  # (side, width / 4)
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)
    row, column = wave.repeat_interleave(side, dim=0), wave.repeat(side, 1)
    return F.pad(torch.cat([row, column], dim=1), (0, width))[:, :width]


class Vision(nn.Module):
    """A task's network and loss, over uint8 images (B, 3, S, S)."""

    def __init__(self, config: VisionConfig, n_classes: int):
        super().__init__()
        self.config, self.n_classes = config, n_classes
        self.network = make_network(config, n_classes)

    def forward(self, images, *targets):
        """Images and the other tensors of a batch (data/vision.py) -> (outputs, loss); without targets loss is None.

        outputs: logits (B, n_classes) for classify; else class logits (B, queries, n_classes + 1), the last for "no object", and boxes
        (B, queries, 4) in units of the image or mask logits (B, queries, H, W). Losses are in float32, whatever the autocast.
        """
        x = images.float() / 127.5 - 1
        if self.config.task == "classify":
            logits = self.network(x).logits.float()
            return (logits,), F.cross_entropy(logits, *targets) if targets else None
        if self.config.task == "detect":
            outputs = self.network(x)
            logits, boxes = outputs.logits.float(), outputs.pred_boxes.float()
            return (logits, boxes), self.detection_loss(logits, boxes, *targets) if targets else None
        labels = {}
        if targets:
            counts, classes, masks = targets
            counts = counts.tolist()
            labels = dict(class_labels=[c[:n] for c, n in zip(classes, counts)], mask_labels=[m[:n].float() for m, n in zip(masks, counts)])
        outputs = self.network(x, **labels)
        return (outputs.class_queries_logits.float(), outputs.masks_queries_logits.float()), outputs.loss

    def detection_loss(self, logits, boxes, counts, classes, targets):
        if not (logits.isfinite().all() and boxes.isfinite().all()):  # the matching cannot take them; the loop reports a loss that is nan
            return logits.sum() * torch.nan
        labels = [dict(class_labels=c[:n], boxes=t[:n]) for c, t, n in zip(classes, targets, counts.tolist())]
        with torch.autocast(logits.device.type, enabled=False):
            return self.network.loss_function(logits, labels, logits.device, boxes, self.network.config)[0]

    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> float:
        """Of one training step, for each patch: 6 per weight of the blocks' matrix products, 12 n_embd a layer for each column of the
        attention matrix, over all tokens of an image; without the heads, which are small."""
        c = self.config
        patches = (c.image_size // c.patch_size) ** 2
        extra = {"classify": 1, "detect": 1 + c.queries, "segment": 1 + c.queries * c.query_blocks / c.n_layer}[c.task]
        tokens = patches + extra
        return (6 * 12 * c.n_layer * c.n_embd**2 + 12 * c.n_layer * c.n_embd * tokens) * tokens / patches


def detections(task: str, outputs: tuple[torch.Tensor, ...], records: list[dict]) -> list[dict]:
    """COCO results of a batch: one for each query, in the pixels of `records` (id, width, height of each image).

    The score is the probability of the likeliest class; for masks times the mean probability of the mask's pixels (Cheng et al. 2022).
    """
    scores, classes = outputs[0].softmax(dim=-1)[..., :-1].max(dim=-1)
    results = []
    for i, record in enumerate(records):
        w, h = record["width"], record["height"]
        found = [{"image_id": record["id"], "category_id": c, "score": s} for c, s in zip(classes[i].tolist(), scores[i].tolist())]
        if task == "detect":
            x, y, width, height = outputs[1][i].cpu().double().unbind(dim=-1)
            pixels = torch.stack([(x - width / 2) * w, (y - height / 2) * h, width * w, height * h], dim=-1)
            results += [d | {"bbox": box} for d, box in zip(found, pixels.tolist())]
        else:
            probability = F.interpolate(outputs[1][i:i + 1], size=(h, w), mode="bilinear")[0].sigmoid()
            masks = probability > 0.5
            sizes = masks.sum(dim=(1, 2))
            quality = (probability * masks).sum(dim=(1, 2)) / sizes.clamp(min=1)
            for d, n, q, encoded in zip(found, sizes.tolist(), quality.tolist(), coco.encode(masks.cpu().numpy())):
                if n:
                    results.append(d | {"score": d["score"] * q, "segmentation": encoded})
    return results
