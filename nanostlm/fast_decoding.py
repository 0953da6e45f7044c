"""
Faster decoding: functions that modify a model in place, for inference only.

    column_major(model)            # the same values, faster for a single text on a CPU
    step = compile_step(model)     # compiled steps of one token, for `generate.stream`
    quantize(model)                # int8 weights, on a CPU
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import GPT
from nanostlm.variants import replace_linear


def column_major(model: GPT) -> None:
    """
    Store the matrices of a model on a CPU in column-major order, which makes the product with a single row
    faster. The values stay the same.
    """
    for p in model.parameters():
        if p.ndim == 2 and p.device.type == "cpu":
            p.data = p.data.t().contiguous().t()


class RowLinear(nn.Linear):
    """
    A linear layer for compiled steps on a CPU. For a single row, the compiler's own loop is faster than the
    library's matrix product, and it multiplies 16-bit weights by float32 activations.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() or x.numel() > x.shape[-1]:
            return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)
        y = (x.unsqueeze(-2) * self.weight.to(x.dtype)).sum(dim=-1)
        return y if self.bias is None else y + self.bias


def to_float32(x: Tensor) -> Tensor:
    """Convert 16-bit floats to float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def compile_step(model: GPT, **options) -> Callable:
    """
    Compile the forward pass of a single token, to be given to `stream`, `generate`, `write` or `stories` as
    `step`. On a CPU the activations become float32 and the linear layers RowLinear. Afterwards, only the
    values of the weights may change. `options` are those of torch.compile.
    """
    if next(model.parameters()).device.type == "cpu":
        replace_linear(model, RowLinear)
        kept = {p for layer in model.modules() if isinstance(layer, RowLinear) for p in layer.parameters()}
        for p in model.parameters():
            p.data = p.data if p in kept else to_float32(p.data)
        # a tied embedding keeps the dtype of the head, so its output is converted
        model.embedder.register_forward_hook(lambda module, args, output: to_float32(output))
        if not options:  # launching a small model's kernels from Python would take longer than running them
            skip_guards = torch.compiler.skip_guard_on_all_nn_modules_unsafe
            options = {"options": {"cpp_wrapper": True, "guard_filter_fn": skip_guards}}
    # isolate_recompiles: without guards, the code compiled for another model must not be reused
    return torch.compile(model.forward, dynamic=False, fullgraph=True, isolate_recompiles=True, **options)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 quantization of weight (N, K), row by row -> int8 weight (N, K), bfloat16 scale (N,)."""
    weight = weight.detach().float()
    scale = (weight.abs().amax(1).clamp(min=1e-20) / 127).bfloat16()
    return (weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8), scale


class Int8Linear(nn.Module):
    """A linear layer with int8 weights and a bfloat16 scale for each row."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = quantize_rows(linear.weight)
        self.register_buffer("scale", scale)
        self.register_buffer("weight", weight)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if len(rows) > 16:  # the int8 kernel is fast for few rows; for prompts, float matmul is faster
            return F.linear(x, self.weight.to(x.dtype) * self.scale[:, None], self.bias)
        y = torch.ops.aten._weight_int8pack_mm(rows.bfloat16(), self.weight, self.scale)
        y = y.view(*x.shape[:-1], -1).to(x.dtype)
        return y if self.bias is None else y + self.bias


def quantize(model: GPT) -> None:
    """
    Replace the linear layers, the head included, by Int8Linear: a CPU then reads a quarter of the bytes per
    token. Layers with a dimension that is not a multiple of 16, such as LoRA's, stay as they are: the kernel
    would read past their end.
    """

    def replacement(linear: nn.Linear) -> nn.Module:
        return linear if any(n % 16 for n in linear.weight.shape) else Int8Linear(linear)

    replace_linear(model, replacement)
