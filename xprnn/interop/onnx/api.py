"""from_onnx and to_onnx. The modules that they need, and the onnx package, are imported at the first call."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from xprnn.arrays.namespace import Array, InputError, Params, from_numpy, resolve_namespace
from xprnn.io.archive import as_path, write_atomically

__all__ = ["from_onnx", "to_onnx"]


def from_onnx(source: Any, like: Array | None = None) -> tuple[Any, Params]:
    """Load an ONNX model, for example one that torch, Keras or xprnn exported.

    A graph of an optional look-up, then RNN, LSTM or GRU layers, then optionally the last step, linear layers,
    activations or softmax becomes a layer or a Sequential, which streams and trains. The helper operators that an
    exporter inserts do not matter. Any other graph of supported operators becomes a
    `xprnn.interop.onnx.graph_model.GraphModel`, which runs on every array library. Its attribute `reason` says why it
    is not a model of xprnn.

    Every model is called in the same manner: `y, state = model(params, x)`. For a GraphModel with several inputs they
    are passed by position, by name, or as one dict. A GraphModel returns

    - y: the output, an array; a dict of output name -> array if the graph has several outputs that are not states.
    - state: the outputs of the graph that are final states of recurrent operators. An array; a tuple (h, c) if the
      graph outputs both states of an LSTM; a dict of output name -> array if the states come from several operators
      that are not one stack; None if the graph outputs no final state.

    Args:
        source: a path, or an onnx.ModelProto.
        like: an array that sets the array library, dtype and device of the parameters; None: NumPy, in the file's
            dtype.

    Returns:
        (model, params).

    Raises:
        InputError: the file is damaged or contradicts itself; operators or attributes are not supported (one error
            names all of them, with their nodes); the onnx package is missing (the extra `onnx`).

    >>> import numpy as np, xprnn
    >>> layer = xprnn.LSTM(3, 4)
    >>> params = layer.init(np.random.default_rng(0), like=np.zeros(0, np.float32))
    >>> model, loaded = from_onnx(to_onnx(layer, params))
    >>> model == layer, bool(np.all(loaded["weight_hh_l0"] == params["weight_hh_l0"]))
    (True, True)
    >>> y, (h, c) = model(loaded, np.zeros((5, 2, 3), np.float32))
    >>> y.shape, h.shape, c.shape
    ((5, 2, 4), (1, 2, 4), (1, 2, 4))

    Source: the ONNX operators, opsets 7 to 28 (onnx.ai/onnx/operators).
    """
    from xprnn.interop.onnx.graph_model import GraphModel
    from xprnn.interop.onnx.model_file import read_model
    from xprnn.interop.onnx.program import compile_graph
    from xprnn.interop.onnx.reader.pattern import declared_model_from_metadata, match_layers
    from xprnn.interop.onnx.reader.symbolic_axes import NotALayerGraphError
    from xprnn.interop.onnx.writer.round_trip import verify_round_trip

    if like is not None:
        resolve_namespace("from_onnx", {"like": like})
    proto = read_model(source)
    graph = compile_graph("from_onnx", proto)
    metadata = {p.key: p.value for p in proto.metadata_props}
    declared_model = declared_model_from_metadata(metadata, len(proto.graph.initializer))
    try:
        model, params = match_layers(graph, declared_model)
    except NotALayerGraphError as reason:
        params = graph.params
        shapes = {name: np.broadcast_to(np.float32(0), a.shape) for name, a in params.items()}
        model = GraphModel(replace(graph, params=shapes), str(reason))
    if declared_model is not None and model != declared_model:
        verified = verify_round_trip(proto, declared_model)
        model, params = (model, params) if verified is None else verified
    if like is None:
        return model, params
    return model, {name: from_numpy(a, like) for name, a in params.items()}


def to_onnx(
    model: Any,
    params: Params,
    path: str | Path | None = None,
    *,
    lengths: bool = True,
    optional: bool = True,
    dtype: str = "float32",
) -> Any:
    """Write a layer or Sequential as an ONNX model.

    Inputs of the ONNX model:

    - `x`: (T,N,D), or (N,T,D) for a batch-first model; int64 (T,N) or (N,T) if the model starts with an Embedding.
    - `lengths`: (N,) int32.
    - `initial_h`, and `initial_c` for an LSTM: (L*directions,N,H).

    Outputs: `y`, `final_h`, and `final_c` for an LSTM. The final states of one chunk can be passed as the initial
    states of the next. T and N are free. `lengths` and the states have default values, so that they can be left out.
    If a model has several recurrent layers, their states are named "part.initial_h"; if the layers of a stack have
    different hidden sizes, "initial_h_l0".

    `from_onnx` reads the file back as the same model, and as parameters with the same bits if they are of `dtype`. A
    model with user-defined code is read back as a GraphModel.

    The operators RNN, LSTM and GRU are written where they suffice. A projected LSTM, a user-defined cell or a
    user-defined activation is written as a Scan over elementary operators; the functions of the cell are run once with
    symbolic values to write it. Before an operator, steps that Masking skips are moved behind the valid steps of their
    row; after it, the outputs are moved back.

    Args:
        model: a layer, or a Sequential that contains a recurrent layer. Two layers are not supported:
            MergeDirections(mode="pair"), which has two outputs, and layers of a user-defined class.
        params: the parameters, of any array library.
        path: the file to write; its name must end in `.onnx`. It is replaced atomically. None: no file is written.
        lengths: True if the ONNX model has the input `lengths`.
        optional: True if `lengths` and the states have default values. When ONNX Runtime loads such a model, it warns
            that the inputs with default values are not constants.
        dtype: "float32", or "float64", for which ONNX Runtime 1.32 has no recurrent operators.

    Returns:
        The onnx.ModelProto.

    Raises:
        InputError: the parameters do not fit the model; ONNX cannot express the model (one error lists all reasons);
            the path has another ending or cannot be written; the onnx package is missing (the extra `onnx`).

    >>> import numpy as np, xprnn
    >>> layer = xprnn.GRU(3, 4)
    >>> proto = to_onnx(layer, layer.init(np.random.default_rng(0), like=np.zeros(0, np.float32)))
    >>> [i.name for i in proto.graph.input], [o.name for o in proto.graph.output]
    (['x', 'lengths', 'initial_h'], ['y', 'final_h'])

    Source: the ONNX operators RNN, LSTM, GRU and Scan, opset 17 (onnx.ai/onnx/operators).
    """
    from xprnn.interop.onnx.writer.export import build_model_proto

    file = None if path is None else as_path("to_onnx", path)
    if file is not None and file.name and file.suffix != ".onnx":
        raise InputError(f"to_onnx {file}: expected a name ending in .onnx, found {file.suffix or 'no ending'}")
    proto = build_model_proto(model, params, lengths=lengths, optional=optional, dtype=dtype)
    if file is not None:
        write_atomically(file, proto.SerializeToString())
    return proto
