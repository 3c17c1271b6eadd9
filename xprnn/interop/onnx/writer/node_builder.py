"""A graph as it is written: nodes in their order, constants by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

__all__ = ["NodeBuilder"]


class NodeBuilder:
    """What has been written so far.

    Args:
        onnx: the package.
        dtype: that of all floats.
    """

    def __init__(self, onnx: Any, dtype: str) -> None:
        self.onnx, self.dtype = onnx, np.dtype(dtype)
        self.elem_type = int(onnx.helper.np_dtype_to_tensor_dtype(self.dtype))
        self.nodes, self.initializers, self.name_counter = list[Any](), dict[str, Any](), 0

    def add_node(self, op: str, inputs: list[str], output: str | list[str], name: str = "", **attrs: Any) -> str:
        """Add a node; the name of its first output."""
        outs = [output] if isinstance(output, str) else output
        self.nodes.append(self.onnx.helper.make_node(op, inputs, outs, name=name or f"{op}_{outs[0]}", **attrs))
        return outs[0]

    def emit_multi_output(self, count: int, op: str, *inputs: str, **attrs: Any) -> list[str]:
        """Add a node with so many outputs, under names of its own."""
        self.name_counter += 1
        outs = [f"{op.lower()}{self.name_counter}{f'.{k}' if k else ''}" for k in range(count)]
        self.add_node(op, list(inputs), outs, **attrs)
        return outs

    def emit(self, op: str, *inputs: str, **attrs: Any) -> str:
        """Add a node under a name of its own; the name of its output."""
        return self.emit_multi_output(1, op, *inputs, **attrs)[0]

    @contextmanager
    def subgraph_scope(self) -> Iterator[list[Any]]:
        """Nodes go into a list of their own: a body."""
        outer, self.nodes = self.nodes, []
        try:
            yield self.nodes
        finally:
            self.nodes = outer

    def make_subgraph(
        self, name: str, nodes: list[Any], inputs: list[str], outputs: list[str], elem_types: list[int]
    ) -> Any:
        """A graph inside a node, whose values have any shape; its outputs are floats."""
        make = self.onnx.helper
        given = [make.make_tensor_value_info(n, k, None) for n, k in zip(inputs, elem_types, strict=True)]
        return make.make_graph(
            nodes, name, given, [make.make_tensor_value_info(n, self.elem_type, None) for n in outputs]
        )

    def add_initializer(self, name: str, array: Any) -> str:
        """Add a constant; its name."""
        if name not in self.initializers:
            self.initializers[name] = self.onnx.numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def int64_vector(self, *values: int) -> str:
        """Add integers, as axes and shapes are; their name."""
        return self.add_initializer("int_" + "_".join(map(str, values)), np.asarray(values, np.int64))

    def int64_scalar(self, value: int) -> str:
        """Add an integer without axes; its name."""
        return self.add_initializer(f"integer_{value}", np.asarray(value, np.int64))

    def float_scalar(self, value: float) -> str:
        """Add a float without axes; its name."""
        return self.add_initializer(f"float_{float(value)!r}", np.asarray(value, self.dtype))

    def zero_tensor(self) -> Any:
        """A 0 of the model's dtype, as an attribute."""
        return self.onnx.numpy_helper.from_array(np.zeros(1, self.dtype))
