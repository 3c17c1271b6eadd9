"""A builder of ONNX graphs: nodes in order, initializers by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

__all__ = ["NodeBuilder"]


class NodeBuilder:
    """The nodes and initializers of a graph under construction.

    Args:
        onnx: the onnx package.
        dtype: the dtype of all floats.
    """

    def __init__(self, onnx: Any, dtype: str) -> None:
        self.onnx, self.dtype = onnx, np.dtype(dtype)
        self.elem_type = int(onnx.helper.np_dtype_to_tensor_dtype(self.dtype))
        self.nodes, self.initializers, self.name_counter = list[Any](), dict[str, Any](), 0

    def add_node(self, op: str, inputs: list[str], output: str | list[str], name: str = "", **attrs: Any) -> str:
        """Append a node with named outputs; return the name of the first output."""
        outputs = [output] if isinstance(output, str) else output
        self.nodes.append(self.onnx.helper.make_node(op, inputs, outputs, name=name or f"{op}_{outputs[0]}", **attrs))
        return outputs[0]

    def emit_multi_output(self, count: int, op: str, *inputs: str, **attrs: Any) -> list[str]:
        """Append a node with `count` outputs; return their generated names."""
        self.name_counter += 1
        outputs = [f"{op.lower()}{self.name_counter}{f'.{k}' if k else ''}" for k in range(count)]
        self.add_node(op, list(inputs), outputs, **attrs)
        return outputs

    def emit(self, op: str, *inputs: str, **attrs: Any) -> str:
        """Append a node with one output; return its generated name."""
        return self.emit_multi_output(1, op, *inputs, **attrs)[0]

    @contextmanager
    def subgraph_scope(self) -> Iterator[list[Any]]:
        """Collect the nodes that are added within the context in a separate list, for a subgraph."""
        outer, self.nodes = self.nodes, []
        try:
            yield self.nodes
        finally:
            self.nodes = outer

    def make_subgraph(
        self, name: str, nodes: list[Any], inputs: list[str], outputs: list[str], elem_types: list[int]
    ) -> Any:
        """Make a GraphProto for an attribute; inputs and outputs have any shape, the outputs are floats."""
        make = self.onnx.helper
        input_infos = [make.make_tensor_value_info(n, k, None) for n, k in zip(inputs, elem_types, strict=True)]
        output_infos = [make.make_tensor_value_info(n, self.elem_type, None) for n in outputs]
        return make.make_graph(nodes, name, input_infos, output_infos)

    def add_initializer(self, name: str, array: Any) -> str:
        """Add an initializer unless there is one of that name; return the name."""
        if name not in self.initializers:
            self.initializers[name] = self.onnx.numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def int64_vector(self, *values: int) -> str:
        """Add a 1-d int64 initializer, for axes and shapes; return its name."""
        return self.add_initializer("int_" + "_".join(map(str, values)), np.asarray(values, np.int64))

    def int64_scalar(self, value: int) -> str:
        """Add a 0-d int64 initializer; return its name."""
        return self.add_initializer(f"integer_{value}", np.asarray(value, np.int64))

    def float_scalar(self, value: float) -> str:
        """Add a 0-d float initializer; return its name."""
        return self.add_initializer(f"float_{float(value)!r}", np.asarray(value, self.dtype))

    def zero_tensor(self) -> Any:
        """A TensorProto of one zero, for an attribute."""
        return self.onnx.numpy_helper.from_array(np.zeros(1, self.dtype))
