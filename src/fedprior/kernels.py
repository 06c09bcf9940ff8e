r"""Layers that PyTorch computes in a slow order on a CPU, in another order: the same values to rounding.

**GRU** (nn.GRU of one layer). With c the gate's input x_t W_i^T + b_i, and g = h_{t-1} W_h^T + b_h,

    r = sigmoid(c_r + g_r),  z = sigmoid(c_z + g_z),  n = tanh(c_n + r g_n),  h_t = n + z (h_{t-1} - n)

the gradient of g is that of h_t times what is known when the forward pass is done, and of h_t alone:

    dg_t = dh_t * [ a g_n r (1 - r),  (h_{t-1} - n) z (1 - z),  a r ],    a = (1 - z)(1 - n^2)
    dh_{t-1} = (what reads h_{t-1}) + z dh_t + dg_t W_h,                  dc_t = [dg_r, dg_z, a dh_t]

so that a step back takes three operations, and the weights' gradients one matrix product each over all steps.

**1 x 1 convolutions with a stride** (the shortcuts of residual networks) read every s-th pixel: those are taken first.

**Convolutions** of few values are matrix products. An image lies in memory as (row, channel, column, example). Its
strips S (row, j, channel, column, example) hold what column j of a filter sees; the patches P_r (size, columns *
examples) that a row r of the result sees are then consecutive rows of S, and need no copy of their own:

    Y_r = W P_r + b,    dW = sum_r dY_r P_r^T,    dS = what W^T dY_r has for each of its rows, added up

and dx adds up dS over j. Examples are last, so that a row of the whole batch is copied and added up in one run; beside
norms, where only images of one channel are done so, each example has patches and a product of its own.
**Max-pooling** of what they give is PyTorch's of a volume whose channels are last: examples take their part. **Flat**
values stay in that order.

A `forward` of the user's own may ask what these layers give for a view, x.view(len(x), -1), which there is in PyTorch's
order of memory alone: it gets a copy in that order (`Views`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

_NORMS = (nn.GroupNorm, nn.modules.batchnorm._NormBase)
_BLOCK = 16  # PyTorch computes convolutions in blocks of so many channels and filters, whether they are there or not
# values in the patches of a batch above which PyTorch is faster, and where its blocks are half empty
_MOST, _MOST_OF_FEW = 750_000, 8_000_000


class Views(TorchFunctionMode):
    """While it is entered, `view` and `view_as` copy what has no such view in its order of memory.

    Attributes:
        asked: for any view, since it was made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.asked = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run; a view that there is in no order of memory is refused in PyTorch's words."""
        if func is Tensor.view or func is Tensor.view_as:
            self.asked = True
            try:
                return func(*args, **(kwargs or {}))
            except RuntimeError:
                if args[0].is_contiguous():
                    raise
            args = (args[0].contiguous(), *args[1:])
        return func(*args, **(kwargs or {}))


def faster(model: nn.Module) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """The layers of a model that have a faster `forward`, and that.

    Norms want channels before pixels, and examples first: with them, convolutions of many channels stay. Where a
    convolution's blocks are full, PyTorch is as fast, and all stay.
    """
    found: list[tuple[nn.Module, Callable[..., Any]]] = []
    norms = any(isinstance(m, _NORMS) for m in model.modules())
    products = not norms and not any(_filled(m) == 1 for m in model.modules() if type(m) is nn.Conv2d)
    for m in model.modules():
        if type(m) is nn.GRU and m.num_layers == 1 and m.bias and not m.bidirectional:
            found.append((m, partial(_gru, m)))
        elif type(m) is nn.MaxPool2d and not m.return_indices and products:
            found.append((m, partial(_pooled, m)))
        elif type(m) is nn.Flatten and (m.start_dim, m.end_dim) == (1, -1) and products:
            found.append((m, partial(_flat, m)))
        elif type(m) is not nn.Conv2d or m.padding_mode != "zeros" or isinstance(m.padding, str):
            continue
        elif m.kernel_size == (1, 1):
            if m.stride != (1, 1) and m.padding == (0, 0):
                found.append((m, partial(_pixels, m)))
        elif m.dilation == (1, 1) and m.groups == 1 and (products or (norms and m.in_channels == 1)):
            found.append((m, partial(_products if products else _grey, m)))
    return found


def _filled(layer: nn.Conv2d) -> float:
    """How much of PyTorch's blocks a convolution fills."""
    sizes = layer.in_channels, layer.out_channels
    return math.prod(sizes) / max(1, math.prod(-(-size // _BLOCK) * _BLOCK for size in sizes))


def _pixels(layer: nn.Conv2d, x: Tensor) -> Tensor:
    if not x.is_cpu:
        return nn.Conv2d.forward(layer, x)
    taken: Any = _Pixels.apply(x, *layer.stride)
    return F.conv2d(taken, layer.weight, layer.bias, groups=layer.groups)


class _Pixels(torch.autograd.Function):
    """Every s-th pixel; PyTorch's slice, row by row and column by column, goes back by two copies of the whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: int, right: int) -> Tensor:
        ctx.size, ctx.down, ctx.right = x.shape, down, right
        return x[..., ::down, ::right].contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Of the image."""
        dx = grads[0].new_zeros(ctx.size)
        dx[..., :: ctx.down, :: ctx.right] = grads[0]
        return dx, None, None


def _last(x: Tensor) -> bool:
    """Are examples last in memory, as `_Products` gives them?"""
    return x.is_cpu and x.dim() == 4 and not x.is_contiguous() and x.permute(2, 1, 3, 0).is_contiguous()


def _pooled(layer: nn.MaxPool2d, x: Tensor) -> Any:
    """Where examples are last in memory, they take the channels' part, and channels that of rows in a volume."""
    if not _last(x):
        return nn.MaxPool2d.forward(layer, x)
    sizes = layer.kernel_size, layer.stride, layer.padding, layer.dilation
    pairs = [(s, s) if isinstance(s, int) else tuple(s) for s in sizes]
    volume = [(down, same, right) for (down, right), same in zip(pairs, (1, 1, 0, 1), strict=True)]
    pool: Any = F.max_pool3d
    y = pool(x.permute(2, 1, 3, 0)[None].permute(0, 4, 1, 2, 3), *volume, layer.ceil_mode)
    return y.permute(0, 2, 3, 4, 1).squeeze(0).permute(3, 1, 0, 2)


def _flat(layer: nn.Flatten, x: Tensor) -> Tensor:
    """Where examples are last in memory, they stay there; but of fewer than 16, gradients take ten times as long."""
    if not _last(x) or len(x) < 16:
        return nn.Flatten.forward(layer, x)
    return x.permute(1, 2, 3, 0).reshape(-1, len(x)).t()


def _fits(layer: nn.Conv2d, x: Tensor) -> bool:
    """Is x a batch of images on a CPU that the layer can read? The rest is PyTorch's, to do or to refuse."""
    sizes = zip(x.shape[-2:], layer.padding, layer.kernel_size, strict=True)
    images = x.is_cpu and x.dim() == 4 and len(x) > 0 and x.shape[1] == layer.in_channels
    return images and all(n + 2 * int(p) >= k for n, p, k in sizes)


def _products(layer: nn.Conv2d, x: Tensor) -> Any:
    sizes = zip(x.shape[-2:], layer.padding, layer.kernel_size, layer.stride, strict=True)
    places = [(n + 2 * int(p) - k) // s + 1 for n, p, k, s in sizes]
    values = len(x) * layer.weight[0].numel() * math.prod(places)
    most = _MOST if _filled(layer) > 0.5 else _MOST_OF_FEW
    if not _fits(layer, x) or values > most:
        return nn.Conv2d.forward(layer, x)
    return _Products.apply(x, layer.weight, layer.bias, layer.stride, layer.padding, places)


def _grey(layer: nn.Conv2d, x: Tensor) -> Any:
    if not _fits(layer, x) or x.requires_grad:
        return nn.Conv2d.forward(layer, x)
    return _Grey.apply(x, layer.weight, layer.bias, layer.stride, layer.padding)


def _padded(x: Tensor, padding: Any) -> Tensor:
    """With a margin around its last two dimensions."""
    return F.pad(x, [p for p in reversed(padding) for _ in range(2)]) if any(padding) else x


class _Grey(torch.autograd.Function):
    """A convolution of constants of one channel by patches, (n, 1, ...) -> (n, filters, ...), with examples first."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, stride: Any, padding: Any) -> Tensor:
        windows = _padded(x[:, 0], padding).unfold(1, w.shape[2], stride[0]).unfold(2, w.shape[3], stride[1])
        patches = windows.permute(0, 3, 4, 1, 2).reshape(len(x), w[0].numel(), -1)
        ctx.save_for_backward(patches)
        ctx.size = w.shape
        y = w.flatten(1) @ patches if b is None else torch.add(w.flatten(1) @ patches, b[:, None])
        return y.reshape(len(x), len(w), *windows.shape[1:3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Of the filters and their biases."""
        [patches] = ctx.saved_tensors
        dw = torch.bmm(grads[0].flatten(2), patches.transpose(1, 2)).sum(0).view(ctx.size)
        return None, dw, grads[0].sum((0, 2, 3)) if ctx.needs_input_grad[2] else None, None, None


class _Products(torch.autograd.Function):
    """A convolution by strips, (n, channels, ...) -> (n, filters, ...), with examples last in memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, stride: Any, padding: Any, places: Any) -> Tensor:
        padded = _padded(x, padding).permute(2, 1, 3, 0).contiguous()
        strips = padded.unfold(2, w.shape[3], stride[1]).permute(0, 4, 1, 2, 3).contiguous()
        row, size, length = strips[0, :, :, 0, 0].numel(), w[0].numel(), strips[0, 0, 0].numel()
        seen = strips.as_strided((places[0], size, length), (stride[0] * row * length, length, 1))
        weights = w.permute(0, 2, 3, 1).reshape(len(w), -1)
        ctx.save_for_backward(seen, weights)
        ctx.stride, ctx.padding, ctx.size, ctx.padded, ctx.strips = stride, padding, w.shape, padded.shape, strips.shape
        every = weights.expand(places[0], -1, -1)
        y = torch.bmm(every, seen) if b is None else torch.baddbmm(b[:, None], every, seen)
        return y.reshape(places[0], len(w), places[1], -1).permute(3, 1, 0, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Of the image, of the filters and their biases."""
        (seen, weights), (filters, channels, rows, columns) = ctx.saved_tensors, ctx.size
        dy = grads[0].permute(2, 1, 3, 0).reshape(len(seen), filters, -1)
        dw = torch.bmm(dy, seen.transpose(1, 2)).sum(0).view(filters, rows, columns, channels).permute(0, 3, 1, 2)
        dx = _spread(ctx, weights, dy) if ctx.needs_input_grad[0] else None
        return dx, dw, dy.sum((0, 2)) if ctx.needs_input_grad[2] else None, None, None, None


def _spread(ctx: Any, weights: Tensor, dy: Tensor) -> Tensor:
    """The gradient of x."""
    (high, filters, length), (_, channels, rows, columns) = dy.shape, ctx.size
    (height, *_, wide, _), (down, right), (top, left) = ctx.strips, ctx.stride, ctx.padding
    of_strips, dx = dy.new_zeros(height, columns * channels, length), dy.new_zeros(ctx.padded)
    by_row = weights.view(filters, rows, -1).expand(high, -1, -1, -1).transpose(1, 3)
    for i in range(rows):
        of_strips[i : i + down * (high - 1) + 1 : down].baddbmm_(by_row[:, :, i], dy)
    of_strips = of_strips.view(ctx.strips)
    for j in range(columns):
        dx[:, :, j : j + right * (wide - 1) + 1 : right].add_(of_strips[:, j])
    return dx[top : height - top, :, left : dx.shape[2] - left].permute(3, 1, 0, 2)


def _gru(layer: nn.GRU, x: Any, h: Tensor | None = None) -> Any:
    """What nn.GRU.forward gives; what trains no batch of sequences from zero is left to it."""
    if h is not None or not isinstance(x, Tensor) or x.dim() != 3 or not x.is_cpu or not torch.is_grad_enabled():
        return nn.GRU.forward(layer, x, h)
    steps = x.transpose(0, 1) if layer.batch_first else x
    weights: list[Any] = [getattr(layer, name) for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")]
    states: Any = _GRU.apply(steps, *weights)
    return (states.transpose(0, 1) if layer.batch_first else states), states[-1:]


class _GRU(torch.autograd.Function):
    """(steps, batch, inputs) -> the states h_1, h_2, ...: (steps, batch, width)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w_i: Tensor, w_h: Tensor, b_i: Tensor, b_h: Tensor) -> Tensor:
        steps, batch, width = *x.shape[:2], w_h.shape[1]
        gates = torch.addmm(b_i, x.flatten(0, 1), w_i.t()).reshape(steps, batch, 3 * width)
        g, states = torch.empty_like(gates), gates.new_zeros(steps + 1, batch, width)
        for c_t, g_t, h, out in zip(gates, g, states[:-1], states[1:], strict=True):
            torch.addmm(b_h, h, w_h.t(), out=g_t)
            rz, n = c_t[:, : 2 * width], c_t[:, 2 * width :]
            rz.add_(g_t[:, : 2 * width]).sigmoid_()
            n.addcmul_(rz[:, :width], g_t[:, 2 * width :]).tanh_()
            torch.lerp(n, h, rz[:, width:], out=out)
        ctx.save_for_backward(x, gates, g[:, :, 2 * width :], states, w_i, w_h)
        return states[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Of x, and of weights and biases."""
        x, gates, g_n, states, w_i, w_h = ctx.saved_tensors
        r, z, n = gates.chunk(3, -1)
        a = (1 - z) * (1 - n.square())
        slope = torch.stack([a * g_n * r * (1 - r), (states[:-1] - n) * z * (1 - z), a * r], 2)
        dg, dh = torch.empty_like(slope), grads[0].contiguous().clone()
        for t in range(len(dh) - 1, -1, -1):
            torch.mul(dh[t].unsqueeze(1), slope[t], out=dg[t])
            if t:
                dh[t - 1].addcmul_(z[t], dh[t]).addmm_(dg[t].flatten(1), w_h)
        flat = dg.flatten(2).flatten(0, 1)
        of_w_h, of_b_h = flat.t() @ states[:-1].flatten(0, 1), flat.sum(0)
        dg[:, :, 2] = a * dh
        of_x = (flat @ w_i).view(x.shape) if ctx.needs_input_grad[0] else None
        return of_x, flat.t() @ x.flatten(0, 1), of_w_h, flat.sum(0), of_b_h
