"""The libraries and programs that xprnn is compared with, and their implementations of a row of the grid."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness.problem import FORWARD, FORWARD_BACKWARD, GATE_COUNTS, Call, Implementation, Problem

__all__ = [
    "PEERS",
    "Peer",
    "eligible_names",
    "jax_cell",
    "make_implementation",
    "missing_reason",
    "torch_article",
    "torch_layer",
]

RARE_CELLS = frozenset({"gru-before", "lstm-proj"})
NOT_ELMAN = frozenset(GATE_COUNTS) - {"elman"}


class Peer(NamedTuple):
    """A column of a table.

    title: its heading.
    modules: modules that must be importable.
    requirements: arguments of `pip install`, one tuple for each environment to build.
    build_requirements: what pip must install first, if the package cannot be built in isolation.
    unsupported_cells: keys of GATE_COUNTS that it has no layer or operator for.
    is_framework: True if it counts in "best peer".
    counterpart: the implementation of xprnn that computes the same: "layer", or "article_api" with the output layer.
    """

    title: str
    modules: tuple[str, ...] = ()
    requirements: tuple[tuple[str, ...], ...] = ()
    build_requirements: tuple[str, ...] = ()
    unsupported_cells: frozenset[str] = frozenset()
    is_framework: bool = False
    counterpart: str = "layer"


PEERS = {  # in the order of the tables' columns
    "layer": Peer("layer"),
    "article_api": Peer("article API", unsupported_cells=NOT_ELMAN),
    "article_loop": Peer("article loop", unsupported_cells=NOT_ELMAN, counterpart="article_api"),
    "article_loop_float64": Peer("article loop, float64 zeros", unsupported_cells=NOT_ELMAN, counterpart="article_api"),
    "loop": Peer("compiled loop", ("numba",), unsupported_cells=RARE_CELLS),
    "xprnn": Peer("xprnn", ("xprnn",)),
    "article": Peer("the article's code"),
    "torch": Peer(
        "torch",
        ("torch",),
        requirements=(("torch==2.13.0", "numpy"),),
        unsupported_cells=frozenset({"gru-before"}),
        is_framework=True,
    ),
    "torch_head": Peer(
        "torch with output layer", ("torch",), unsupported_cells=NOT_ELMAN, is_framework=True, counterpart="article_api"
    ),
    "torch_article": Peer(
        "torch with output layer, article's arrays",
        ("torch",),
        unsupported_cells=NOT_ELMAN,
        is_framework=True,
        counterpart="article_api",
    ),
    "jax": Peer("JAX jit", ("jax",), unsupported_cells=RARE_CELLS, is_framework=True),
    "onnxruntime": Peer(
        "ONNX Runtime",
        ("onnxruntime", "onnx"),
        requirements=(("onnxruntime",),),
        unsupported_cells=frozenset({"lstm-proj"}),
        is_framework=True,
    ),
    "openvino": Peer(
        "OpenVINO",
        ("openvino", "onnx"),
        requirements=(("openvino",),),
        unsupported_cells=frozenset({"lstm-proj"}),
        is_framework=True,
    ),
    "tract": Peer("tract", ("tract", "onnx"), requirements=(("tract",),), unsupported_cells=RARE_CELLS),
    "keras": Peer("Keras", ("keras",), requirements=(("keras==3.15.1", "jax"),)),
    # Chainer's setup.py needs pkg_resources. Chainer itself needs an older NumPy than xprnn: the table shows both.
    "chainer": Peer(
        "Chainer",
        ("chainer",),
        requirements=(("chainer==7.8.1", "numpy>=2"), ("chainer==7.8.1", "numpy==1.23.5")),
        build_requirements=("setuptools<81", "wheel"),
    ),
    "thinc": Peer("Thinc", ("thinc",), requirements=(("thinc==9.1.1",),)),
}


def missing_reason(name: str, device: str = "cpu") -> str:
    """Return why a peer cannot run here, or "". Its modules are imported: some installations import only in part."""
    try:
        for module in PEERS[name].modules:
            importlib.import_module(module)
    except Exception as error:  # a broken installation may raise anything
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if name == "torch" and device != "cpu":
        import torch

        return "" if torch.cuda.is_available() else "this torch has no CUDA device"
    return ""


def eligible_names(cell: str, shape: tuple[int, ...], candidates: list[str]) -> list[str]:
    """Return the candidates that can run a row. The compiled loop is written for N = 1."""
    names = [name for name in candidates if cell not in PEERS[name].unsupported_cells]
    return [name for name in names if name != "loop" or shape[2] == 1]


def make_implementation(
    name: str,
    cell: str,
    shape: tuple[int, int, int, int],
    order: str = "C",
    threads: int = 1,
    device: str = "cpu",
) -> Implementation:
    """Build the implementation of a row by its name in PEERS.

    Args:
        name: a key of PEERS that the grid knows.
        cell: a key of GATE_COUNTS.
        shape: (D, H, N, T).
        order: memory order of the article's arrays.
        threads: number of threads of libraries that take it as an argument.
        device: of torch.
    """
    from benchmarks.harness import onnx_peers, xprnn_contenders

    makers: dict[str, Callable[[Problem], Implementation]] = {
        "layer": xprnn_contenders.core_layer,
        "article_api": xprnn_contenders.article_api,
        "article_loop": xprnn_contenders.article_loop,
        "article_loop_float64": lambda problem: xprnn_contenders.article_loop(problem, zeros_dtype=np.float64),
        "loop": _numba_loop,
        "torch": lambda problem: torch_layer(problem, threads, device),
        "torch_head": lambda problem: torch_article(problem, threads, article_layout=False),
        "torch_article": lambda problem: torch_article(problem, threads, article_layout=True),
        "jax": _jax,
        "onnxruntime": lambda problem: onnx_peers.onnxruntime_layer(problem, threads),
        "openvino": lambda problem: onnx_peers.openvino_layer(problem, threads),
    }
    return makers[name](Problem(cell, shape, order))


def _numba_loop(problem: Problem) -> Implementation:
    from benchmarks.harness.numba_loop import numba_loop

    return numba_loop(problem)


def _cuda_event_seconds(call: Call) -> float:
    """Time one call on the GPU by torch's events."""
    import torch

    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) * 1e-3


def _torch_module(problem: Problem) -> Any:
    """Create torch's recurrent layer with the row's parameters."""
    import torch

    layer_class = {"elman": torch.nn.RNN, "lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[
        problem.cell.removesuffix("-proj")
    ]
    projection = {"proj_size": problem.output_size} if problem.cell == "lstm-proj" else {}
    layer = layer_class(*problem.shape[:2], **projection)
    with torch.no_grad():
        for name, value in problem.params.items():
            getattr(layer, f"{name}_l0").copy_(torch.from_numpy(value))
    return layer


def torch_layer(
    problem: Problem, threads: int | None = None, device: str = "cpu", tf32: bool | None = None
) -> Implementation:
    """Run torch's layer: forward without gradients, and forward + autograd.

    Args:
        problem: the row.
        threads: number of CPU threads; None: torch's default.
        device: "cpu" or "cuda".
        tf32: switch TF32 on or off before each forward pass; None: leave it.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    layer = _torch_module(problem).to(device)
    dy = torch.from_numpy(problem.dy).to(device)
    x, *states = (torch.from_numpy(a).to(device) for a in (problem.x, *(s[None] for s in problem.state)))
    leaves = [a.clone().requires_grad_() for a in (x, *states)]
    weights = [getattr(layer, f"{name}_l0") for name in problem.params]

    def run(x: Any, *states: Any) -> Any:
        if tf32 is not None:  # both: the layer's products run in cuDNN, others in cuBLAS
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
        return layer(x, states if len(states) > 1 else states[0])

    def forward() -> Any:
        with torch.no_grad():
            return run(x, *states)

    def forward_backward() -> Any:
        y, _ = run(*leaves)
        return y, torch.autograd.grad(y, [*leaves, *weights], dy)

    def results() -> dict[str, Any]:
        y, (dx, *grads) = forward_backward()
        names = [f"d{c}0" for c in "hc"[: len(states)]] + [f"d{name}" for name in problem.params]
        arrays = {"y": forward()[0], "y (with a tape)": y.detach(), "dx": dx}
        arrays |= {k: v[0] if k in ("dh0", "dc0") else v for k, v in zip(names, grads, strict=True)}
        return {k: v.cpu().numpy() for k, v in arrays.items()}

    timer = None if device == "cpu" else _cuda_event_seconds
    return Implementation({FORWARD: forward, FORWARD_BACKWARD: forward_backward}, results, timer)


def torch_article(problem: Problem, threads: int, *, article_layout: bool) -> Implementation:
    """Compute what `xprnn.rnn_forward` and `xprnn.rnn_backward` compute, by torch's RNN, Linear and softmax.

    The backward pass starts at the cotangent of the states, as the article's does.

    Args:
        problem: the row, of the Elman cell.
        threads: number of CPU threads.
        article_layout: True: the arrays of `problem.article_arrays`, (features, m, T_x), which torch reads and returns
            as views with reversed axes. False: torch's own layout, (T, N, features).
    """
    import torch

    torch.set_num_threads(threads)
    layer = _torch_module(problem)
    head = torch.nn.Linear(problem.shape[1], problem.shape[0])
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(problem.head[0]))
        head.bias.copy_(torch.from_numpy(problem.head[1][:, 0]))
    arrays = problem.article_arrays()[:3] if article_layout else (problem.x, problem.state[0], problem.dy)
    x, a0, da = map(torch.from_numpy, arrays)
    leaves = [a.clone().requires_grad_() for a in (x, a0)]
    weights = [getattr(layer, f"{name}_l0") for name in problem.params]

    def time_major(a: Any) -> Any:
        return a.permute(*reversed(range(a.ndim))) if article_layout else a

    def run(x: Any, a0: Any) -> Any:
        h, _ = layer(time_major(x), time_major(a0)[None])
        return time_major(h), time_major(torch.softmax(head(h), -1))

    def forward() -> Any:
        with torch.no_grad():
            return run(x, a0)

    def forward_backward() -> Any:
        a, y_pred = run(*leaves)
        return a, y_pred, torch.autograd.grad(a, [*leaves, *weights], da)

    def results() -> dict[str, Any]:
        a, y_pred, (dx, dh0, *grads) = forward_backward()
        transposed = {"y": forward()[0], "y (with a tape)": a, "y_pred": y_pred, "dx": dx, "dh0": dh0}
        tensors = {name: time_major(tensor) for name, tensor in transposed.items()}
        tensors |= {f"d{name}": grad for name, grad in zip(problem.params, grads, strict=True)}
        return {name: tensor.detach().numpy() for name, tensor in tensors.items()}

    return Implementation({FORWARD: forward, FORWARD_BACKWARD: forward_backward}, results)


def jax_cell(cell: str) -> Callable[..., Any]:
    """Return the function (state, projected x, projected h) -> state, with torch's gate order."""
    import jax
    import jax.numpy as jnp

    def elman(state: Any, x: Any, h: Any) -> Any:
        return (jnp.tanh(x + h),)

    def lstm(state: Any, x: Any, h: Any) -> Any:
        i, f, g, o = jnp.split(x + h, 4, axis=-1)
        c = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(c), c

    def gru(state: Any, x: Any, h: Any) -> Any:
        (xr, xz, xn), (hr, hz, hn) = jnp.split(x, 3, axis=-1), jnp.split(h, 3, axis=-1)
        z = jax.nn.sigmoid(xz + hz)
        return ((1 - z) * jnp.tanh(xn + jax.nn.sigmoid(xr + hr) * hn) + z * state[0],)

    return {"elman": elman, "lstm": lstm, "gru": gru}[cell]


def _jax(problem: Problem) -> Implementation:
    """Run a jitted lax.scan with the input projection hoisted out of it, compiled before the clock starts."""
    import jax

    step = jax_cell(problem.cell)

    def run(p: Any, x: Any, state: Any) -> Any:
        ut = p["weight_hh"].T
        xg = x @ p["weight_ih"].T + p["bias_ih"]

        def body(state: Any, xt: Any) -> Any:
            state = step(state, xt, state[0] @ ut + p["bias_hh"])
            return state, state[0]

        return jax.lax.scan(body, state, xg)[1]

    def value_and_vjp(p: Any, x: Any, state: Any, dy: Any) -> Any:
        y, back = jax.vjp(run, p, x, state)
        return y, back(dy)

    arguments = jax.device_put((problem.params, problem.x, problem.state))
    dy = jax.device_put(problem.dy)
    fast, fast_vjp = jax.jit(run), jax.jit(value_and_vjp)

    def forward() -> Any:
        return jax.block_until_ready(fast(*arguments))

    def forward_backward() -> Any:
        return jax.block_until_ready(fast_vjp(*arguments, dy))

    def results() -> dict[str, Any]:
        y, (dparams, dx, dstates) = forward_backward()
        arrays = {"y": forward(), "y (with a tape)": y, "dx": dx} | {f"d{k}": v for k, v in dparams.items()}
        arrays |= {f"d{c}0": s for c, s in zip("hc", dstates, strict=False)}
        return {k: np.asarray(v) for k, v in arrays.items()}

    return Implementation({FORWARD: forward, FORWARD_BACKWARD: forward_backward}, results)
