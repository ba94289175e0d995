"""Muon (Jordan et al. 2024): momentum, orthogonalised, for the matrices of a model's blocks.

Everything else moves by AdamW: embeddings, heads, convolutions, vectors, learned powers and scales.
"""
import torch
import torch.nn as nn

from engine.orthogonal import orthogonalise
from engine.parallel import divided, like, whole


def block_matrices(model: nn.Module) -> dict[nn.Parameter, int]:
    """The weights of the linear layers inside a model's blocks, each with its number of parts.

    Blocks are the members of its ModuleLists, but for lists of plain layers, which are heads. A
    layer with `parts` holds as many matrices, one below the other; others hold one.
    """
    found = {}
    for blocks in model.modules():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                layers = [] if isinstance(block, nn.Linear) else block.modules()
                found |= {layer.weight: getattr(layer, "parts", 1) for layer in layers
                          if isinstance(layer, nn.Linear)}
    return found


def muon(model: nn.Module, config) -> torch.optim.Optimizer:
    """Its first group are the blocks' matrices; the other two are AdamW's, decayed and not."""
    parts = block_matrices(model)
    matrices = [p for p in parts if p.requires_grad]
    rest = [p for p in model.parameters() if p.requires_grad and p not in parts]
    groups = [{"params": matrices, "lr": config.matrix_learning_rate},
              {"params": [p for p in rest if p.dim() >= 2]},
              {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0}]
    # Two digits are enough for an update. Squares of gradients leave float16's range.
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    return Muon(groups, parts, momentum=config.momentum, interval=config.matrix_interval,
                dtype=dtype, lr=config.learning_rate, weight_decay=config.weight_decay,
                betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=config.fused)


class Muon(torch.optim.Optimizer):
    """The matrices of the first group move by orthogonalised momentum, the other groups by AdamW.

    An update of a matrix (m, n) is 0.2 sqrt(max(m, n)) times an orthogonal one, which is as large
    as AdamW's usually are (Liu et al. 2025, arXiv 2502.16982). `parts` says of how many matrices
    (m, n) a parameter (parts m, n) consists: q, k and v of all heads lie in one, and those of each
    head have their own update, which costs less than half and trains as well (BENCHMARKS.md).
    `dtype` is that of these products. torch.optim.Muon is not used: it goes matrix by matrix, in
    bfloat16 on every processor.

    A mean over twenty gradients turns slowly, and orthogonalising is what a step costs. So a matrix
    may move at every `interval`-th step only, then as far as in that many steps. Those of one shape
    take turns: all at once, such large steps train worse (BENCHMARKS.md).
    """

    def __init__(self, groups: list[dict], parts: dict[nn.Parameter, int], *, momentum: float,
                 interval: int, dtype: torch.dtype, lr: float, weight_decay: float, **adamw):
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})
        self.parts = parts
        self.momentum = momentum
        self.interval = interval
        self.dtype = dtype
        self.adamw = torch.optim.AdamW(self.param_groups[1:], lr=lr, **adamw)
        self.share()

    def share(self):
        """AdamW's groups and state are parts of this optimizer's."""
        self.adamw.param_groups = self.param_groups[1:]
        self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict):
        super().load_state_dict(state_dict)
        self.share()

    @torch.no_grad()
    def step(self):
        self.adamw.step()
        group = self.param_groups[0]
        shapes = {}
        for p in group["params"]:
            if p.grad is not None:
                self.remember(p)
                shapes.setdefault((p.shape, self.parts[p]), []).append(p)
        # Matrices of one shape go through one sequence of products. Several processes share them
        # and give each other the updates. A sharded model's are gathered before, cut afterwards.
        for ((rows, columns), parts), matrices in shapes.items():
            matrices = [p for i, p in enumerate(matrices)
                        if int(self.state[p]["step"] + i) % self.interval == 0]
            if not matrices:
                continue
            directions = [whole(self.direction(p)).to(self.dtype) for p in matrices]
            stack = torch.stack(directions)  # (n, rows, columns)
            stack = stack.view(-1, rows // parts, columns)  # (n parts, m, columns)
            updates = divided(orthogonalise, stack).view(-1, rows, columns)
            size = 0.2 * max(rows // parts, columns) ** 0.5
            rate = self.interval * group["lr"]
            for p, update in zip(matrices, updates):
                p.mul_(1 - rate * group["weight_decay"])
                p.add_(like(update, p), alpha=-rate * size)

    def remember(self, p: nn.Parameter):
        """Take the gradient into the mean over past ones, and count it."""
        state = self.state[p]
        if "mean" not in state:
            state["mean"] = torch.zeros_like(p)
        state["mean"].lerp_(p.grad, 1 - self.momentum)
        state["step"] = state.get("step", torch.tensor(0)) + 1

    def direction(self, p: nn.Parameter) -> torch.Tensor:
        """The gradient with Nesterov's momentum."""
        return p.grad.lerp(self.state[p]["mean"], self.momentum)
