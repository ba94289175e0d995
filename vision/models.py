"""ViT, YOLOS and EoMT of Hugging Face transformers, with preconditioned attention.

    classify    ViTForImageClassification: ViT (Dosovitskiy et al. 2021)
    detect      YolosForObjectDetection: YOLOS (Fang et al. 2021), a ViT with detection tokens and
                DETR's loss (Carion et al. 2020)
    segment     EomtForUniversalSegmentation: EoMT (Kerssies et al. 2025), a ViT whose last blocks
                have queries and masked attention

The networks are made from their configurations, with random weights. All three reach the
preconditioner through precond.register_transformers, off (power 0) or on, so that kappa is recorded
in both cases.
"""
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import coco
from engine.options import DATA, FIXED, FIXED_IN_TRAINING, at_least, divides, in_range, need
from engine.precond_config import PrecondConfig, positive
from precond_dropin import register_transformers

TASKS = ("classify", "detect", "segment")


def at_most_n_layer(name, value, config):
    if config.task == "segment" and value > config.n_layer:
        return f"{name}={value} must not exceed n_layer={config.n_layer}"


@dataclass
class VisionConfig(PrecondConfig):
    """A network's task and shape; only the number of classes comes from the data."""
    task: Annotated[Literal[TASKS], "classify: ViT; detect: YOLOS, boxes; segment: EoMT, masks",
                    DATA] = "detect"
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
    query_blocks: Annotated[int, "segment: how many of the last blocks have the queries", FIXED,
                            at_least(1), at_most_n_layer] = 1
    upscale_blocks: Annotated[int, "segment: times that the masks' resolution is doubled, from one "
                                   "value a patch", FIXED, at_least(0)] = 1
    mask_points: Annotated[int, "segment: points of each mask that the loss looks at",
                           at_least(1)] = 256
    precond_power: Annotated[float, "1: the paper's; 0: plain attention; 0.5: half-way",
                             FIXED_IN_TRAINING] = 1.0
    precond_scale: Annotated[float | Literal["sqrt_d"],
                             "1: the paper's; sqrt_d: the root of the head's width, RMSNorm's",
                             FIXED_IN_TRAINING, positive] = 1.0


def make_network(config: VisionConfig, n_classes: int) -> nn.Module:
    """The transformers model of a task. UserError where requirements-extra.txt is not installed."""
    need("scipy", "vision models need")  # the matching in the losses of YOLOS and EoMT
    transformers = need("transformers", "vision models need")
    power = config.precond_power if config.precond else 0.0
    scale = config.precond_scale if config.precond else 1.0
    name = f"preconditioned_{power}_{scale}_{config.precond_eps}_{config.precond_grad}"
    register_transformers(name, grad=config.precond_grad, eps=config.precond_eps, power=power,
                          scale=scale)
    shape = dict(
        hidden_size=config.n_embd, num_hidden_layers=config.n_layer, patch_size=config.patch_size,
        num_attention_heads=config.n_head, num_labels=n_classes, hidden_dropout_prob=config.dropout,
        initializer_range=config.n_embd**-0.5)  # transformers' 0.02 is flat for narrow models
    vit = dict(intermediate_size=4 * config.n_embd, attention_probs_dropout_prob=config.dropout)
    if config.task == "classify":
        cls = transformers.ViTForImageClassification
        more = dict(**vit, image_size=config.image_size)
    elif config.task == "detect":
        cls = transformers.YolosForObjectDetection
        # DETR weighs boxes by 5 and 2: a small model then learns where long before what.
        more = dict(
            **vit, image_size=[config.image_size] * 2, use_mid_position_embeddings=False,
            num_detection_tokens=config.queries, bbox_loss_coefficient=2, giou_loss_coefficient=1)
    else:
        cls = transformers.EomtForUniversalSegmentation
        more = dict(
            image_size=config.image_size, mlp_ratio=4, attention_dropout=config.dropout,
            num_queries=config.queries, num_blocks=config.query_blocks, num_register_tokens=0,
            num_upscale_blocks=config.upscale_blocks, train_num_points=config.mask_points)
    network = cls._from_config(cls.config_class(**shape, **more), attn_implementation=name)
    with torch.no_grad():
        positions = sincos_2d(config.image_size // config.patch_size, config.n_embd)
        if config.task == "segment":
            network.embeddings.position_embeddings.weight.copy_(positions)
        else:
            embeddings = network.vit.embeddings
            embeddings.position_embeddings[0, 1:1 + len(positions)] = positions
            if config.task == "detect":
                # transformers leaves them at 0, to load weights into: all would start as one.
                embeddings.detection_tokens.normal_()
    return network


def sincos_2d(side: int, width: int) -> torch.Tensor:
    """(side^2, width): sines and cosines of each patch's row and column.

    They have width / 4 frequencies, from one period over the image up to half the patches. Position
    embeddings are learned from there: places that are near start alike, which Beyer et al. 2022
    found to help.
    """
    frequency = torch.logspace(0, 1, max(1, width // 4), base=max(2, side / 2))
    angle = torch.arange(side)[:, None] * (torch.pi * frequency / side)  # (side, width / 4)
    wave = torch.cat([angle.sin(), angle.cos()], dim=1)
    row, column = wave.repeat_interleave(side, dim=0), wave.repeat(side, 1)
    return F.pad(torch.cat([row, column], dim=1), (0, width))[:, :width]


class Vision(nn.Module):
    """A task's network and loss, over uint8 images (B, 3, S, S)."""

    def __init__(self, config: VisionConfig, n_classes: int):
        super().__init__()
        self.config = config
        self.network = make_network(config, n_classes)

    def forward(self, images, *targets):
        """A batch of data/images.py, images first -> (outputs, loss); without targets loss is None.

        outputs of classify: logits (B, n_classes). Of detect and segment: class logits
        (B, queries, n_classes + 1), the last for "no object"; and boxes (B, queries, 4) in units
        of the image, or mask logits (B, queries, H, W). Losses are in float32, whatever autocast.
        """
        x = images.float() / 127.5 - 1
        if self.config.task == "classify":
            logits = self.network(x).logits.float()
            return (logits,), F.cross_entropy(logits, *targets) if targets else None
        objects = []  # of each image, without what fills it up: (classes, boxes or masks)
        if targets:
            counts, *filled = targets
            objects = [(c[:n], t[:n]) for n, c, t in zip(counts.tolist(), *filled)]
        if self.config.task == "detect":
            found = self.network(x)
            outputs = found.logits.float(), found.pred_boxes.float()
            return outputs, self.detection_loss(*outputs, objects) if targets else None
        labels = {}
        if targets:
            labels = dict(class_labels=[classes for classes, _ in objects],
                          mask_labels=[masks.float() for _, masks in objects])
        found = self.network(x, **labels)
        return (found.class_queries_logits.float(), found.masks_queries_logits.float()), found.loss

    def detection_loss(self, logits, boxes, objects):
        # The matching cannot take them; the loop reports a loss that is nan.
        if not (logits.isfinite().all() and boxes.isfinite().all()):
            return (logits.sum() + boxes.sum()) * torch.nan  # all weights get a gradient
        labels = [dict(class_labels=classes, boxes=its_boxes) for classes, its_boxes in objects]
        network = self.network
        with torch.autocast(logits.device.type, enabled=False):
            return network.loss_function(logits, labels, logits.device, boxes, network.config)[0]

    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self) -> float:
        """FLOPs of a training step for each patch, without the heads, which are small.

        6 for each weight of the blocks' matrix products, and 12 n_embd a layer for each column of
        the attention matrix, over all tokens of an image.
        """
        c = self.config
        patches = (c.image_size // c.patch_size) ** 2
        tokens = patches + 1
        if c.task == "detect":
            tokens += c.queries
        elif c.task == "segment":
            tokens += c.queries * c.query_blocks / c.n_layer
        of_weights = 6 * 12 * c.n_layer * c.n_embd**2
        of_attention = 12 * c.n_layer * c.n_embd * tokens
        return (of_weights + of_attention) * tokens / patches


def corners(boxes: torch.Tensor, width: int, height: int) -> list[list[float]]:
    """Boxes (n, 4), centre and size in units of the image -> [[x, y, width, height]], in pixels."""
    centre, size = boxes.cpu().double().split(2, dim=-1)
    corner = centre - size / 2
    pixels = torch.tensor([width, height])
    return torch.cat([corner * pixels, size * pixels], dim=-1).tolist()


def detections(task: str, outputs: tuple[torch.Tensor, ...], records: list[dict]) -> list[dict]:
    """COCO results of a batch, one for each query, in pixels.

    records: id, width and height of each image. The score is the probability of the likeliest
    class; for masks times the mean probability of the mask's pixels (Cheng et al. 2022).
    """
    scores, classes = outputs[0].softmax(dim=-1)[..., :-1].max(dim=-1)
    results = []
    for record, its_scores, its_classes, shapes in zip(records, scores, classes, outputs[1]):
        width, height = record["width"], record["height"]
        found = [{"image_id": record["id"], "category_id": c, "score": s}
                 for c, s in zip(its_classes.tolist(), its_scores.tolist())]
        if task == "detect":
            for d, box in zip(found, corners(shapes, width, height)):
                results.append(d | {"bbox": box})
            continue
        logits = F.interpolate(shapes[None], size=(height, width), mode="bilinear")[0]
        probability = logits.sigmoid()  # (queries, height, width)
        masks = probability > 0.5
        sizes = masks.sum(dim=(1, 2))
        quality = (probability * masks).sum(dim=(1, 2)) / sizes.clamp(min=1)
        encoded = coco.encode(masks.cpu().numpy())
        for d, n, q, mask in zip(found, sizes.tolist(), quality.tolist(), encoded):
            if n:
                results.append(d | {"score": d["score"] * q, "segmentation": mask})
    return results
