"""The door to ONNX: from_onnx and to_onnx. What is behind it is imported when it is first opened."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from xprnn.arrays.namespace import Array, InputError, Params, from_numpy, resolve_namespace
from xprnn.io.archive import as_path, write_atomically

__all__ = ["from_onnx", "to_onnx"]


def from_onnx(source: Any, like: Array | None = None) -> tuple[Any, Params]:
    """Load an ONNX model: what torch, Keras and xprnn export, and any graph of RNN, LSTM, GRU and plumbing.

    Where the graph is [look-up ->] recurrent layers [-> matrix products], however its exporter wrote it, the result is
    a layer or Sequential with all its verbs: it streams and trains. Any other graph becomes a `Graph`, which runs
    (`y = model(params, x)`, or a dict of outputs) on every array library, and whose `reason` says why it is no more.

    Args:
        source: a path, or an onnx.ModelProto.
        like: the parameters become arrays of its library, dtype and device; None: NumPy, in the file's dtype.

    Returns:
        model, params.

    Raises:
        InputError: a damaged or lying file; operators or attributes that are not supported, all at once, with the
            names of their nodes; no onnx package (the extra `onnx`).

    >>> import numpy as np, xprnn
    >>> layer = xprnn.LSTM(3, 4)
    >>> params = layer.init(np.random.default_rng(0), like=np.zeros(0, np.float32))
    >>> model, back = from_onnx(to_onnx(layer, params))
    >>> model == layer, bool(np.all(back["weight_hh_l0"] == params["weight_hh_l0"]))
    (True, True)

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
    block = compile_graph("from_onnx", proto)
    told = declared_model_from_metadata({p.key: p.value for p in proto.metadata_props}, len(proto.graph.initializer))
    try:
        model, params = match_layers(block, told)
    except NotALayerGraphError as reason:
        params = block.params
        shapes = {name: np.broadcast_to(np.float32(0), a.shape) for name, a in params.items()}
        model = GraphModel(replace(block, params=shapes), str(reason))
    if told is not None and model != told and (found := verify_round_trip(proto, told)) is not None:
        model, params = found
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

    Its inputs are `x`, (T,N,D) or (N,T,D) as the model has it, integers (T,N) where an Embedding comes first, and, with
    values of their own so that they may be left out, `lengths` (N,) int32 and the states `initial_h` (L*directions,N,H)
    and `initial_c`; its outputs are `y`, `final_h` and `final_c`, which go back in as the next chunk's initial states.
    T and N are free. Several recurrent parts have "part.initial_h" each, layers with hidden sizes of their own
    "initial_h_l0". `from_onnx` gives the same model back, with the same bits in float parameters of `dtype`; of a model
    with code of your own in it, a `Graph`.

    RNN, LSTM and GRU are the operators of these names. What these do not say (a projected LSTM, a cell or an activation
    of your own) is a Scan over elementary operators, which the cell's own lines write. Steps that Masking skips are
    moved to the end of their rows before an operator and back behind it.

    Args:
        model: a layer, or a Sequential with a recurrent layer in it, of any parts here, in other Sequentials too; but
            not Merge(mode="pair"), which has two outputs, and no part of your own class.
        params: its parameters, of any array library.
        path: the file, whose name ends in `.onnx`: here and for many other programs the ending says what a file holds.
            Replaced in one step; None: nothing is written.
        lengths: whether the model has the input `lengths`.
        optional: whether lengths and states may be left out. ONNX Runtime then warns, when it loads the model, that
            inputs with a value of their own are no constants: that is what they are for.
        dtype: "float32", which ONNX Runtime runs; "float64", for which it has no recurrent operators (1.32).

    Returns:
        the onnx.ModelProto.

    Raises:
        InputError: parameters that are not the model's, or what ONNX cannot express, all reasons at once; another
            ending, or a place that cannot be written; no onnx package (the extra `onnx`).

    >>> import numpy as np, xprnn
    >>> layer = xprnn.GRU(3, 4)
    >>> proto = to_onnx(layer, layer.init(np.random.default_rng(0), like=np.zeros(0, np.float32)))
    >>> [i.name for i in proto.graph.input], [o.name for o in proto.graph.output]
    (['x', 'lengths', 'initial_h'], ['y', 'final_h'])

    Source: the ONNX operators RNN, LSTM, GRU and Scan, opset 17 (onnx.ai/onnx/operators).
    """
    from xprnn.interop.onnx.writer.export import build_model_proto

    place = None if path is None else as_path("to_onnx", path)
    if place is not None and place.name and place.suffix != ".onnx":
        raise InputError(f"to_onnx {place}: expected a name ending in .onnx, found {place.suffix or 'no ending'}")
    proto = build_model_proto(model, params, lengths=lengths, optional=optional, dtype=dtype)
    if place is not None:
        write_atomically(place, proto.SerializeToString())
    return proto
