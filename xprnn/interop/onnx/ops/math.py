"""Arithmetic operators of ONNX: elementwise functions, matrix products, reductions, softmax.

Each operator is a function run(context, node, *inputs).

Source: the ONNX operators (onnx.ai/onnx/operators).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

from xprnn.arrays.namespace import Array, InputError
from xprnn.cells.activations import activation
from xprnn.cells.activations_from_input import erf
from xprnn.interop.onnx.node import Context, Node, Op

__all__ = ["MATH_OPS"]


def _unary(f: Callable[[Any, Array], Array]) -> Op:
    return Op(lambda context, node, x: f(context.xp, x))


def _binary(f: Callable[[Any, Array, Array], Array]) -> Op:
    return Op(lambda context, node, a, b: f(context.xp, a, b))


def _variadic(f: Callable[[Any, Array, Array], Array]) -> Op:
    return Op(lambda context, node, *xs: reduce(lambda a, b: f(context.xp, a, b), xs))


def _activation(name: str, alpha: float | None = None, beta: float | None = None) -> Op:
    """An operator that computes `xprnn.activation(name)`; alpha and beta are the default constants of the operator."""
    constants = {"alpha": alpha, "beta": beta}

    def build(node: Node) -> Any:
        return activation(name, **{k: node.attrs.get(k, v) for k, v in constants.items() if v is not None})

    def unsupported_reason(node: Node) -> str:
        try:
            build(node)
        except InputError as error:
            return str(error)
        return ""

    attrs = tuple(k for k, v in constants.items() if v is not None)
    return Op(
        lambda context, node, x: build(node).build(context.xp)[0](x), attrs, unsupported_reason=unsupported_reason
    )


def _gelu(context: Context, node: Node, x: Array) -> Array:
    name = "gelutanh" if node.attrs.get("approximate", "none") == "tanh" else "gelu"
    return activation(name).build(context.xp)[0](x)


def _selu(context: Context, node: Node, x: Array) -> Array:
    """Selu. The default constants are the float32 numbers of the ONNX standard."""
    alpha = node.attrs.get("alpha", 1.67326319217681884765625)
    gamma = node.attrs.get("gamma", 1.05070102214813232421875)
    return gamma * context.xp.where(x > 0, x, alpha * context.xp.expm1(context.xp.minimum(x, 0 * x)))


def _divide(xp: Any, a: Array, b: Array) -> Array:
    """a / b; integers are rounded towards zero, as in C."""
    if xp.isdtype(a.dtype, "real floating"):
        return a / b
    return xp.sign(a) * xp.sign(b) * (xp.abs(a) // xp.abs(b))


def _mod(context: Context, node: Node, a: Array, b: Array) -> Array:
    if not node.attrs.get("fmod", 0):
        return context.xp.remainder(a, b)
    return (
        a - b * context.xp.trunc(a / b)
        if context.xp.isdtype(a.dtype, "real floating")
        else a - b * _divide(context.xp, a, b)
    )


def _mean(context: Context, node: Node, *xs: Array) -> Array:
    return reduce(lambda a, b: a + b, xs) / len(xs)


def _clip(context: Context, node: Node, x: Array, low: Any = None, high: Any = None) -> Array:
    """Clip. The bounds are attributes before opset 11, inputs from opset 11 on."""
    low, high = node.attrs.get("min", low), node.attrs.get("max", high)
    x = x if low is None else context.xp.maximum(x, low)
    return x if high is None else context.xp.minimum(x, high)


def _where(context: Context, node: Node, condition: Array, a: Array, b: Array) -> Array:
    return context.xp.where(condition, a, b)


def _pow(context: Context, node: Node, a: Array, b: Array) -> Array:
    return context.xp.pow(a, context.xp.astype(b, a.dtype))


def _matmul(context: Context, node: Node, a: Array, b: Array) -> Array:
    if b.ndim != 2 or a.ndim < 3:
        return context.xp.matmul(a, b)
    lead = tuple(a.shape[:-1])  # one large matrix product is faster than a batch of small ones
    out = context.xp.matmul(context.xp.reshape(a, (math.prod(lead), a.shape[-1])), b)
    return context.xp.reshape(out, (*lead, b.shape[1]))


def _gemm(context: Context, node: Node, a: Array, b: Array, c: Array | None = None) -> Array:
    """alpha * A @ B + beta * C; A and B may be transposed."""
    xp, get = context.xp, node.attrs.get
    a = xp.permute_dims(a, (1, 0)) if get("transA", 0) else a
    b = xp.permute_dims(b, (1, 0)) if get("transB", 0) else b
    out = xp.matmul(a, b)
    alpha, beta = get("alpha", 1.0), get("beta", 1.0)
    out = out if alpha == 1 else out * alpha
    if c is None or beta == 0:
        return out
    return out + (c if beta == 1 else c * beta)


def _reduction(f: Callable[[Any, Array, tuple[int, ...], bool], Array]) -> Op:
    """A reduction f(xp, x, axes, keepdims).

    The axes are an attribute in older opsets and an input in newer ones. Without axes, all are reduced, or none if
    noop_with_empty_axes is set.
    """

    def run(context: Context, node: Node, x: Array, axes: Any = None) -> Array:
        listed = node.attrs.get("axes") if axes is None else axes.reshape(-1).tolist()
        if not listed and node.attrs.get("noop_with_empty_axes", 0):
            return x
        reduced = tuple(int(a) for a in listed) if listed else tuple(range(x.ndim))
        return f(context.xp, x, reduced, bool(node.attrs.get("keepdims", 1)))

    return Op(run, ("axes", "keepdims", "noop_with_empty_axes"), host_inputs=(1,))


def _sum(xp: Any, x: Array, axes: tuple[int, ...], keepdims: bool) -> Array:
    return xp.sum(x, axis=axes, keepdims=keepdims, dtype=x.dtype)


def _argmax(context: Context, node: Node, x: Array) -> Array:
    get = node.attrs.get
    return context.xp.argmax(x, axis=get("axis", 0), keepdims=bool(get("keepdims", 1)))


def _cumsum(context: Context, node: Node, x: Array, axis: Any) -> Array:
    xp, k = context.xp, int(axis) % x.ndim
    x = xp.flip(x, axis=k) if node.attrs.get("reverse", 0) else x
    out = xp.cumulative_sum(x, axis=k, dtype=x.dtype, include_initial=False)
    if node.attrs.get("exclusive", 0):
        cut = [slice(None)] * x.ndim
        cut[k] = slice(0, x.shape[k] - 1)
        first = [slice(None)] * x.ndim
        first[k] = slice(0, 1)
        out = xp.concat((xp.zeros_like(x[tuple(first)]), out[tuple(cut)]), axis=k)
    return xp.flip(out, axis=k) if node.attrs.get("reverse", 0) else out


def _softmax(log: bool) -> Op:
    """Softmax or LogSoftmax. Before opset 13, all axes from `axis` on are treated as one axis."""

    def run(context: Context, node: Node, x: Array) -> Array:
        xp, shape = context.xp, tuple(x.shape)
        axis = node.attrs.get("axis", -1 if node.opset >= 13 else 1)
        if node.opset < 13:
            axis = axis % x.ndim
            x = xp.reshape(x, (math.prod(shape[:axis]), math.prod(shape[axis:])))
        k = axis if node.opset >= 13 else 1
        shifted = x - xp.max(x, axis=k, keepdims=True)
        total = xp.sum(xp.exp(shifted), axis=k, keepdims=True, dtype=x.dtype)
        out = shifted - xp.log(total) if log else xp.exp(shifted) / total
        return out if node.opset >= 13 else xp.reshape(out, shape)

    return Op(run, ("axis",))


def _require_attribute_value(name: str, supported: int) -> Callable[[Node], str]:
    """A function for Op.unsupported_reason: only one value of an attribute is supported."""

    def unsupported_reason(node: Node) -> str:
        found = node.attrs.get(name, supported)
        return "" if found == supported else f"{name}={found}"

    return unsupported_reason


MATH_OPS: dict[str, Op] = {
    "Abs": _unary(lambda xp, x: xp.abs(x)),
    "Ceil": _unary(lambda xp, x: xp.ceil(x)),
    "Exp": _unary(lambda xp, x: xp.exp(x)),
    "Floor": _unary(lambda xp, x: xp.floor(x)),
    "Log": _unary(lambda xp, x: xp.log(x)),
    "Neg": _unary(lambda xp, x: -x),
    "Not": _unary(lambda xp, x: xp.logical_not(x)),
    "Reciprocal": _unary(lambda xp, x: 1.0 / x),
    "Round": _unary(lambda xp, x: xp.round(x)),
    "Sign": _unary(lambda xp, x: xp.sign(x)),
    "Sqrt": _unary(lambda xp, x: xp.sqrt(x)),
    "Tanh": _activation("tanh"),
    "Sigmoid": _activation("sigmoid"),
    "Relu": _activation("relu"),
    "Softplus": _activation("softplus"),
    "Softsign": _activation("softsign"),
    "Elu": _activation("elu", 1.0),
    "LeakyRelu": _activation("leakyrelu", 0.01),
    "ThresholdedRelu": _activation("thresholdedrelu", 1.0),
    "HardSigmoid": _activation("hardsigmoid", 0.2, 0.5),
    "Celu": _activation("celu", 1.0),
    "Erf": Op(lambda context, node, x: erf(context.xp)(x)),
    "Gelu": Op(_gelu, ("approximate",)),
    "HardSwish": _activation("hardswish"),
    "Mish": _activation("mish"),
    "Selu": Op(_selu, ("alpha", "gamma")),
    "Add": _binary(lambda xp, a, b: a + b),
    "Sub": _binary(lambda xp, a, b: a - b),
    "Mul": _binary(lambda xp, a, b: a * b),
    "Div": _binary(_divide),
    "Mod": Op(_mod, ("fmod",)),
    "Pow": Op(_pow),
    "And": _binary(lambda xp, a, b: xp.logical_and(a, b)),
    "Or": _binary(lambda xp, a, b: xp.logical_or(a, b)),
    "Xor": _binary(lambda xp, a, b: xp.logical_xor(a, b)),
    "Equal": _binary(lambda xp, a, b: a == b),
    "Less": _binary(lambda xp, a, b: a < b),
    "LessOrEqual": _binary(lambda xp, a, b: a <= b),
    "Greater": _binary(lambda xp, a, b: a > b),
    "GreaterOrEqual": _binary(lambda xp, a, b: a >= b),
    "Max": _variadic(lambda xp, a, b: xp.maximum(a, b)),
    "Min": _variadic(lambda xp, a, b: xp.minimum(a, b)),
    "Sum": _variadic(lambda xp, a, b: a + b),
    "Mean": Op(_mean),
    "Clip": Op(_clip, ("min", "max")),
    "Where": Op(_where),
    "MatMul": Op(_matmul),
    "Gemm": Op(_gemm, ("alpha", "beta", "transA", "transB")),
    "ReduceSum": _reduction(_sum),
    "ReduceMean": _reduction(lambda xp, x, axes, keepdims: xp.mean(x, axis=axes, keepdims=keepdims)),
    "ReduceMax": _reduction(lambda xp, x, axes, keepdims: xp.max(x, axis=axes, keepdims=keepdims)),
    "ReduceMin": _reduction(lambda xp, x, axes, keepdims: xp.min(x, axis=axes, keepdims=keepdims)),
    "ReduceProd": _reduction(lambda xp, x, axes, keepdims: xp.prod(x, axis=axes, keepdims=keepdims, dtype=x.dtype)),
    "ArgMax": Op(
        _argmax,
        ("axis", "keepdims", "select_last_index"),
        unsupported_reason=_require_attribute_value("select_last_index", 0),
    ),
    "CumSum": Op(_cumsum, ("exclusive", "reverse"), host_inputs=(1,)),
    "Softmax": _softmax(log=False),
    "LogSoftmax": _softmax(log=True),
}
