r"""Layers that PyTorch computes in a slow order on a CPU, in another order: the same values to rounding.

**GRU** (nn.GRU of one layer). With c the gate's input x_t W_i^T + b_i, and g = h_{t-1} W_h^T + b_h,

    r = sigmoid(c_r + g_r),  z = sigmoid(c_z + g_z),  n = tanh(c_n + r g_n),  h_t = n + z (h_{t-1} - n)

the gradient of g is that of h_t times what is known when the forward pass is done, and of h_t alone:

    dg_t = dh_t * [ a g_n r (1 - r),  (h_{t-1} - n) z (1 - z),  a r ],    a = (1 - z)(1 - n^2)
    dh_{t-1} = (what reads h_{t-1}) + z dh_t + dg_t W_h,                  dc_t = [dg_r, dg_z, a dh_t]

so that a step back takes three operations, and the weights' gradients one matrix product each over all steps.

**1 x 1 convolutions with a stride** (the shortcuts of residual networks) read every s-th pixel: those are taken first.

**Convolutions of one channel** (grey images), x no parameter: the filters' gradient is a matrix product of the output's
and of the patches P that a filter saw, dW = sum_i dY_i P_i^T, with dY_i (filters, places) and P_i (size, places).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def faster(model: nn.Module) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """The layers of a model that have a faster `forward`, and that."""
    found: list[tuple[nn.Module, Callable[..., Any]]] = []
    for m in model.modules():
        if type(m) is nn.GRU and m.num_layers == 1 and m.bias and not m.bidirectional:
            found.append((m, partial(_gru, m)))
        elif type(m) is not nn.Conv2d or m.padding_mode != "zeros" or isinstance(m.padding, str):
            continue
        elif m.kernel_size == (1, 1) and m.stride != (1, 1) and m.padding == (0, 0):
            found.append((m, partial(_pixels, m)))
        elif m.in_channels == 1 and m.dilation == (1, 1):
            found.append((m, partial(_grey, m)))
    return found


def _pixels(layer: nn.Conv2d, x: Tensor) -> Tensor:
    if not x.is_cpu:
        return nn.Conv2d.forward(layer, x)
    down, right = layer.stride
    return F.conv2d(x[..., ::down, ::right], layer.weight, layer.bias, groups=layer.groups)


def _grey(layer: nn.Conv2d, x: Tensor) -> Any:
    if not x.is_cpu or x.dim() != 4 or x.requires_grad:
        return nn.Conv2d.forward(layer, x)
    return _Grey.apply(x, layer.weight, layer.bias, layer.stride, layer.padding)


class _Grey(torch.autograd.Function):
    """PyTorch's convolution of a constant, with filters whose gradient is a matrix product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, stride: Any, padding: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.stride, ctx.padding, ctx.size = stride, padding, w.shape
        return F.conv2d(x, w, b, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Of the filters and their biases."""
        [x], [dy] = ctx.saved_tensors, grads
        (down, right), (rows, columns) = ctx.stride, ctx.size[2:]
        padded = F.pad(x, [p for p in reversed(ctx.padding) for _ in range(2)])
        patches = padded.unfold(2, rows, down).unfold(3, columns, right).permute(0, 1, 4, 5, 2, 3)
        dw = torch.bmm(dy.flatten(2), patches.flatten(1, 3).flatten(2).transpose(1, 2)).sum(0).view(ctx.size)
        return None, dw, dy.sum((0, 2, 3)) if ctx.needs_input_grad[2] else None, None, None


def _gru(layer: nn.GRU, x: Any, h: Tensor | None = None) -> Any:
    """What nn.GRU.forward gives; other uses than of a batch of sequences from zero are left to it."""
    if h is not None or not isinstance(x, Tensor) or x.dim() != 3 or not x.is_cpu:
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
        gates = torch.addmm(b_i, x.flatten(0, 1), w_i.t()).view(steps, batch, 3 * width)
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
