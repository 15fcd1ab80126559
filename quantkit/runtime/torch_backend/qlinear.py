"""Operators that compute with codes: integer products and convolutions, and onnxruntime's quantized operators.

Sums of products are exact. onnxruntime's kernels multiply by combined scales, as here; those that work on single
numbers dequantize and quantize again, and may differ from it by one step where a number lies half way between two.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812

from quantkit.runtime.torch_backend._affine import Grid, dequantized, grid_of
from quantkit.runtime.torch_backend._types import Node, Op, Run, Table, direct
from quantkit.runtime.torch_backend._whole import padded, rows, whole_convolution, whole_product, window_pads
from quantkit.runtime.torch_backend.activations import coerced
from quantkit.runtime.torch_backend.quantization import dynamic_quantize

Zero = torch.Tensor | None


def _output_grid(node: Node, zero_point: int, like: int = 0) -> Grid:
    """The type of the output's zero point, of the output, or of the input that it must share the type with."""
    kinds = (*node.input_types[zero_point : zero_point + 1], node.output_types[0], node.input_types[like])
    return grid_of(node, *kinds)


def matmul_integer(a: torch.Tensor, b: torch.Tensor, a_zero: Zero = None, b_zero: Zero = None) -> torch.Tensor:
    return whole_product(a, b, a_zero, b_zero)


def qlinear_matmul(node: Node) -> Run:
    grid = _output_grid(node, 7)

    def run(
        a: torch.Tensor,
        a_scale: torch.Tensor,
        a_zero: torch.Tensor,
        b: torch.Tensor,
        b_scale: torch.Tensor,
        b_zero: torch.Tensor,
        y_scale: torch.Tensor,
        y_zero: torch.Tensor,
    ) -> torch.Tensor:
        total = whole_product(a, b, a_zero, b_zero)
        steps = _scales(a_scale, b_scale) / _last(y_scale)
        return grid.codes(total.to(steps.dtype) * steps, _last(y_zero))

    return run


def _last(values: torch.Tensor) -> torch.Tensor:
    """Of one output row [M] -> [M, 1]; a scalar stays."""
    laid = rows(values)
    assert laid is not None
    return laid.reshape(()) if laid.numel() == 1 else laid


def _scales(a_scale: torch.Tensor, b_scale: torch.Tensor) -> torch.Tensor:
    """Scale of a product: rows of a by columns of b; half precision does not hold it."""
    left = _last(a_scale)
    right = b_scale.reshape(()) if b_scale.numel() == 1 else b_scale
    if left.dtype in (torch.float16, torch.bfloat16):
        left, right = left.to(torch.float32), right.to(torch.float32)
    return left * right


def qlinear_conv(node: Node) -> Run:
    grid, convolve = _output_grid(node, 7), whole_convolution(node)

    def run(
        x: torch.Tensor,
        x_scale: torch.Tensor,
        x_zero: torch.Tensor,
        w: torch.Tensor,
        w_scale: torch.Tensor,
        w_zero: torch.Tensor,
        y_scale: torch.Tensor,
        y_zero: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        total = convolve(x, w, x_zero, w_zero)
        along = [1, -1, *[1] * (w.ndim - 2)]
        if bias is not None:
            total = total + bias.reshape(along)
        steps = x_scale.reshape(()) * w_scale.reshape(along if w_scale.numel() > 1 else ()) / y_scale.reshape(())
        return grid.codes(total.to(steps.dtype) * steps, y_zero.reshape(()))

    return run


def qlinear_conv_either_layout(node: Node) -> Run:
    """With `channels_last` the data, not the weight, has its channels behind."""
    run = qlinear_conv(node)
    if not node.get("channels_last", 0):
        return run
    return lambda x, *others: run(x.movedim(-1, 1), *others).movedim(1, -1)


def qgemm(node: Node) -> Run:
    """alpha * (a' @ b' + bias), the int32 bias in units of a step; without y_scale the result stays float."""
    alpha = float(node.get("alpha", 1.0))
    flip_a, flip_b = bool(node.get("transA", 0)), bool(node.get("transB", 0))
    grid = _output_grid(node, 8) if len(node.input_types) > 8 else None

    def run(
        a: torch.Tensor,
        a_scale: torch.Tensor,
        a_zero: Zero,
        b: torch.Tensor,
        b_scale: torch.Tensor,
        b_zero: Zero,
        bias: torch.Tensor | None = None,
        y_scale: torch.Tensor | None = None,
        y_zero: Zero = None,
    ) -> torch.Tensor:
        total = whole_product(a.T if flip_a else a, b.T if flip_b else b, a_zero, b_zero)
        if bias is not None:
            total = total + bias
        steps = _scales(a_scale, b_scale) * alpha
        if y_scale is None or grid is None:
            return total.to(steps.dtype) * steps
        steps = steps / y_scale.reshape(())
        return grid.codes(total.to(steps.dtype) * steps, y_zero)

    return run


def matmul_integer_to_float(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: torch.Tensor,
    b_scale: torch.Tensor,
    a_zero: Zero = None,
    b_zero: Zero = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    total = whole_product(a, b, a_zero, b_zero).to(a_scale.dtype)
    product = total * (a_scale * b_scale)
    return product if bias is None else product + bias


def dynamic_quantize_matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    b_zero: Zero = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    codes, scale, zero = dynamic_quantize(a)
    return matmul_integer_to_float(codes, b, scale, b_scale, zero, b_zero, bias)


def _binary(function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Op:
    """a, scale, zero, b, scale, zero, scale, zero -> codes of the result."""

    def convert(node: Node) -> Run:
        grid = _output_grid(node, 7)

        def run(
            a: torch.Tensor,
            a_scale: torch.Tensor,
            a_zero: Zero,
            b: torch.Tensor,
            b_scale: torch.Tensor,
            b_zero: Zero,
            c_scale: torch.Tensor,
            c_zero: Zero = None,
        ) -> torch.Tensor:
            result = function(dequantized(a, a_scale, a_zero), dequantized(b, b_scale, b_zero))
            return grid.codes(result / c_scale, c_zero)

        return run

    return Op(convert)


def _unary(make: Callable[[Node], Callable[[torch.Tensor], torch.Tensor]]) -> Op:
    """x, scale, zero, scale, zero -> codes of the result."""

    def convert(node: Node) -> Run:
        grid, function = _output_grid(node, 4), make(node)

        def run(
            x: torch.Tensor, x_scale: torch.Tensor, x_zero: Zero, y_scale: torch.Tensor, y_zero: Zero = None
        ) -> torch.Tensor:
            return grid.codes(function(dequantized(x, x_scale, x_zero)) / y_scale, y_zero)

        return run

    return Op(convert)


def _leaky_relu(node: Node) -> Run:
    alpha = float(node.get("alpha", 0.01))
    return lambda x: F.leaky_relu(x, alpha)


def _softmax(node: Node) -> Run:
    axis = int(node.get("axis", -1))
    if int(node.get("opset", 13)) < 13:
        return coerced(torch.softmax).convert(node)
    return lambda x: torch.softmax(x, axis)


def _global_average(node: Node) -> Run:
    last = bool(node.get("channels_last", 0))

    def run(x: torch.Tensor) -> torch.Tensor:
        axes = range(1, x.ndim - 1) if last else range(2, x.ndim)
        return x.mean(tuple(axes), keepdim=True)

    return run


def _average(node: Node) -> Run:
    """Sums of windows by the number of elements they hold."""
    kernel = [int(size) for size in node.attributes["kernel_shape"]]
    rank = len(kernel)
    last, include = bool(node.get("channels_last", 0)), bool(node.get("count_include_pad", 0))
    strides = [int(step) for step in node.get("strides", [1] * rank)]
    pools = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
    if rank not in pools:
        raise node.refuse(f"{rank} spatial axes")
    if node.get("ceil_mode", 0):
        raise node.refuse("ceil_mode")

    def run(x: torch.Tensor) -> torch.Tensor:
        data = x.movedim(-1, 1) if last else x
        pads = window_pads(node, data.shape[2:], kernel, [1] * rank)
        pooled = pools[rank](padded(data, pads), kernel, strides)
        if not include and any((*pads[0], *pads[1])):
            pooled = pooled / pools[rank](padded(torch.ones_like(data[:1, :1]), pads), kernel, strides)
        return pooled.movedim(1, -1) if last else pooled

    return run


def qlinear_concat(node: Node) -> Run:
    """scale, zero, then tensor, scale, zero of every part."""
    axis, grid = int(node.attributes["axis"]), _output_grid(node, 1, 2)

    def run(y_scale: torch.Tensor, y_zero: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
        floats = [dequantized(*parts[place : place + 3]) for place in range(0, len(parts), 3)]
        return grid.codes(torch.cat(floats, axis) / y_scale, y_zero)

    return run


TABLE: Table = {
    ("ConvInteger", 10): Op(whole_convolution),
    ("MatMulInteger", 10): direct(matmul_integer),
    ("QLinearConv", 10): Op(qlinear_conv),
    ("QLinearMatMul", 10): Op(qlinear_matmul),
}
MICROSOFT: Table = {
    ("DynamicQuantizeMatMul", 1): direct(dynamic_quantize_matmul),
    ("MatMulIntegerToFloat", 1): direct(matmul_integer_to_float),
    ("QGemm", 1): Op(qgemm),
    ("QLinearAdd", 1): _binary(torch.add),
    ("QLinearAveragePool", 1): _unary(_average),
    ("QLinearConcat", 1): Op(qlinear_concat),
    ("QLinearConv", 1): Op(qlinear_conv_either_layout),
    ("QLinearGlobalAveragePool", 1): _unary(_global_average),
    ("QLinearLeakyRelu", 1): _unary(_leaky_relu),
    ("QLinearMul", 1): _binary(torch.mul),
    ("QLinearSigmoid", 1): _unary(lambda node: torch.sigmoid),
    ("QLinearSoftmax", 1): _unary(_softmax),
}
