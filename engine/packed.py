"""A model's weights in a form that is read fast for one token at a time: sample.py's speed.

Sampling works without it, slower. The numbers are in BENCHMARKS.md; `python bench.py` measures
them anew.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

FEW_ROWS = 8  # tokens at one time up to which the packed kernel is the faster one


def for_sampling(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model, changed in place: its weights in `dtype` on `device`, or packed on a CPU."""
    # PyTorch has the kernel on x86, not on ARM.
    packs = torch.backends.quantized.engine in ("x86", "fbgemm")
    if device.type == "cpu" and dtype != torch.float32 and packs:
        return pack(model, dtype)
    return model.to(device, dtype)


def pack(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace linear layers and head by `Packed` ones; all else, the cache too, stays float32."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Packed(child.weight, child.bias, dtype))
    model.head = Packed(model.wte.weight, None, dtype)
    return model


class Packed(nn.Module):
    """F.linear of float32 rows with half-precision weights, for inference.

    One token's product with a matrix does one multiplication for each weight that it reads, so its
    time is that of reading. F.linear reads a row-major float32 matrix at 28 to 61% of the speed at
    which its bytes can be summed, and a bfloat16 one at 18 to 39%: halving the bytes gains little.
    FBGEMM's kernel takes float32 rows and float16 weights, which it stores in its own order. It
    reads at 46% (384 x 384) to 100% (768 x 50,257): 2.5 to 4.7 times as fast as F.linear in
    float32 and 2.2 to 3.2 times as in bfloat16. With eight rows it is 2.3 to 3.9 and 1.1 to 1.6.

    Float16 keeps three bits more of a weight than bfloat16 does, down to 6e-5. Below, its error is
    3e-8 at most; weights beyond 65,504 are clipped. Keys and values stay float32: attention of a
    single query takes 2 to 5 times as long in bfloat16.

    With more rows, a prompt's, arithmetic counts and not reading. There the product is F.linear's
    in `dtype`, rounded to it as by autocast.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype):
        super().__init__()
        weight = weight.detach()
        bias = None if bias is None else bias.detach()
        single = None if bias is None else bias.float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), single)
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() <= FEW_ROWS * x.size(-1):
            return torch.ops.quantized.linear_dynamic_fp16.default(x, self.packed)
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)
