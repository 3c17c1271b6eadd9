"""One launch for a whole sequence, for devices whose thread blocks form clusters (compute capability 9.0 and up).

The kernels and the partition they work on are drawn in persistent.cu; here it is decided which of their configurations
runs a case, and what stands around them: one GEMM for the projection before, one for each weight's gradient after.
Only float32, and only the standard cells, for which persistent_cells.cu has the maths of cells.py once more.
"""

from collections.abc import Sequence
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xprnn import cells
from xprnn.arrays.linear import flat
from xprnn.arrays.namespace import Array, Namespace, Params, device_of
from xprnn.cells.cell import Cell
from xprnn.kernels.cuda.cluster_config import CELLS, Config, choose
from xprnn.kernels.cuda.device import contiguous, copy, empty, products, zeros
from xprnn.kernels.cuda.fused import gradients, project
from xprnn.kernels.tape import State, Steps, Tape

__all__ = ["KERNELS", "NAME", "find", "forward", "launch", "refused", "source"]

NAME = "CUDA persistent"
KERNELS = ("xp_forward", "xp_backward")
_SAVED = 4  # of a GRU's or LSTM's step, as persistent_cells.cu has it
_PORTABLE_CLUSTER = 8
_NON_PORTABLE_CLUSTERS = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED


@cache
def source() -> str:
    """The kernels' source, for NVRTC as it is: it includes nothing."""
    return "".join(_text(name) for name in ("persistent_device", "persistent_cells", "persistent"))


def _text(name: str) -> str:
    return Path(__file__).with_name(f"{name}.cu").read_text(encoding="utf-8")


# --- which configuration runs a case


def find(cell: Cell, params: Params, shape: tuple[int, int], steps: Steps, capability: tuple[int, int]) -> Config | str:
    """The configuration for this case, or one sentence that says why there is none.

    Args:
        cell: the cell.
        params: as in the scan; their dtype and the weight's shape (G*H, H) decide.
        shape: (T, N).
        steps: which rows take part when.
        capability: the device's, (9, 0) for a Hopper.
    """
    u = params["weight_hh"]
    name, hidden = _names().get(id(cell)), u.shape[-1]
    if capability < (9, 0):
        return f"needs compute capability 9.0, the device has {capability[0]}.{capability[1]}"
    if name is None:
        return f"only for the standard Elman, GRU and LSTM cells, this is {cell.name}"
    if "weight_hr" in params:
        return "not for projected states"
    if str(u.dtype) != "float32":
        return f"only for float32, the parameters are {u.dtype}"
    if steps.reset is not None:
        return "not with reset"
    if 0 in shape or hidden == 0:
        return "nothing to do"
    config = choose(name, hidden, shape[1], capability)
    return config if isinstance(config, str) else refused(config, int(device_of(u).id)) or config


@cache
def _names() -> dict[int, str]:
    """The standard cells by identity: `cells` makes each of them once."""
    own = {"tanh": (cells.elman(), cells.elman("tanh")), "relu": (cells.elman("relu"),)}
    own |= {"gru": (cells.gru(),), "lstm": (cells.lstm(),)}
    return {id(cell): name for name, made in own.items() for cell in made}


# --- forward and its adjoint


class _Kept(NamedTuple):
    """What backward needs."""

    config: Config
    x: Array
    h: Array  # (T+1, N, H), the initial state before the first step
    c: Array | None
    saved: Array | None  # (T, N, SAVED, H)
    active: Array | None


def forward(
    config: Config,
    cell: Cell,
    params: Params,
    x: Array,
    state: State,
    steps: Steps,
    *,
    home: State,
    xp: Namespace,
    reverse: bool,
    keep: bool,
) -> tuple[Array, State, Tape | None]:
    """See xprnn.kernels.dispatch.forward, which is the specification."""
    with device_of(x):
        (count, n), hidden = x.shape[:2], params["weight_hh"].shape[1]
        kept = _room(config, contiguous(x), state, steps, reverse, keep)
        pointers = _given(config, params, kept.x, xp)
        pointers += kept.active, kept.h, kept.c, kept.saved
        launch(config, KERNELS[0], ceil(n / config.rows), (*pointers, count, n, hidden, int(reverse)))
        memory = [m for m in (kept.h, kept.c) if m is not None]
        after = tuple(m[:-1] if reverse else m[1:] for m in memory)
        final = tuple(copy(m[0 if reverse else -1, ...]) for m in memory)
        # Whoever works in place on what comes out must not reach the tape.
        y = copy(after[0]) if keep and kept.active is None else after[0]
        if kept.active is not None:
            y = xp.where(kept.active[..., None], y, xp.zeros_like(y))
    if not keep:
        return y, final, None

    def states() -> State:
        return tuple(copy(a) for a in after)

    return y, final, Tape(_backward, xp, cell, params, x, state, home, steps, reverse, states, kept, NAME)


def _room(config: Config, x: Array, state: State, steps: Steps, reverse: bool, keep: bool) -> _Kept:
    """What the kernel writes to, with the initial states in their places."""
    (count, n), (_, hidden), dtype = x.shape[:2], state[0].shape, state[0].dtype
    memory = [empty((count + 1, n, hidden), dtype) for _ in state]
    for m, s in zip(memory, state, strict=True):
        m[count if reverse else 0, ...] = s
    h, c = memory if len(memory) > 1 else (*memory, None)
    saved = empty((count, n, _SAVED, hidden), dtype) if keep and CELLS[config.cell] > 1 else None
    return _Kept(config, x, h, c, saved, None if steps.active is None else contiguous(steps.active))


def _given(config: Config, params: Params, x: Array, xp: Namespace) -> tuple[Array | None, ...]:
    """The weight, the biases and the projected input."""
    u = contiguous(params["weight_hh"])
    xg = empty((*x.shape[:2], u.shape[0]), u.dtype)
    with products(u.dtype) as p:
        project(p, xp, xg, x, params["weight_ih"])
    return u, *_biases(config, params, u.shape[1]), xg


def _biases(config: Config, params: Params, hidden: int) -> tuple[Array | None, Array | None]:
    """What is added to the projection, and the GRU's bias that the reset gate multiplies."""
    if "bias_ih" not in params:
        return None, None
    bias, b_hh = copy(params["bias_ih"]), params.get("bias_hh")
    b_hh = zeros(bias.shape, bias.dtype) if b_hh is None else contiguous(b_hh)  # the article has one bias
    cut = 2 * hidden if config.cell == "gru" else len(b_hh)
    bias[:cut] += b_hh[:cut]
    return bias, copy(b_hh[cut:]) if config.cell == "gru" else None


def _backward(
    tape: Tape, dy: Array | None, dstate: Sequence[Array | None], dstates: Sequence[Array | None]
) -> tuple[Array | None, State, Sequence[Array | None], Params]:
    """See xprnn.kernels.dispatch.backward."""
    kept: _Kept = tape.saved
    xp, params, config, u = tape.xp, tape.params, kept.config, contiguous(tape.params["weight_hh"])
    (count, n), hidden, dtype = kept.x.shape[:2], u.shape[1], u.dtype
    with device_of(u), products(dtype) as p:
        given = _together(xp, dy, dstates, kept.active)
        ds = [zeros(i.shape, dtype) if d is None else copy(d) for i, d in zip(tape.initial, dstate, strict=True)]
        dxg = empty((count, n, u.shape[0]), dtype)
        dhg = empty(dxg.shape, dtype) if config.cell == "gru" else dxg
        dcs, dc = (given[1], ds[1]) if len(ds) > 1 else (None, None)
        pointers = (
            u,
            kept.saved,
            kept.h,
            kept.c,
            kept.active,
            given[0],
            dcs,
            ds[0],
            dc,
            dxg,
            None if dhg is dxg else dhg,
        )
        launch(config, KERNELS[1], ceil(n / config.rows), (*pointers, count, n, hidden, int(tape.reverse)))
        dx, grads = gradients(p, tape, kept.x, dxg)
        du = grads["weight_hh"] = empty(u.shape, dtype)
        p.summed(du, flat(xp, dhg), flat(xp, kept.h[1:] if tape.reverse else kept.h[:-1]))
        if "bias_ih" in params:
            grads["bias_ih"] = flat(xp, dxg).sum(axis=0)
            grads["bias_hh"] = copy(grads["bias_ih"]) if dhg is dxg else flat(xp, dhg).sum(axis=0)
    return dx, tuple(ds), [None] * len(ds), {name: grads[name] for name in params}


def _together(
    xp: Namespace, dy: Array | None, dstates: Sequence[Array | None], active: Array | None
) -> list[Array | None]:
    """The adjoint of each state after each step (T, N, H), or None: y's is that of h where a row took part."""
    if dy is not None and active is not None:
        dy = xp.where(active[..., None], dy, xp.zeros_like(dy))
    h, *others = dstates or (None, None)
    h = dy if h is None else h if dy is None else dy + h
    return [None if d is None else contiguous(d) for d in (h, *others)]


# --- the device


@cache
def refused(config: Config, device: int) -> str:
    """Why a device will not run a configuration, or "": both kernels are launched once, with nothing to do."""
    import cupy

    try:
        with cupy.cuda.Device(device):
            for name, pointers in zip(KERNELS, (8, 11), strict=True):
                launch(config, name, 1, (*[None] * pointers, 0, 0, 0, 0))
    except (cupy.cuda.driver.CUDADriverError, cupy.cuda.compiler.CompileException) as error:
        return f"the device refuses clusters of {config.blocks} blocks: {error}"
    return ""


def launch(config: Config, name: str, clusters: int, args: Sequence[Any]) -> None:
    """Run a kernel on the current device and stream.

    Args:
        config: what it is compiled for.
        name: one of KERNELS.
        clusters: how many.
        args: the kernel's arguments: arrays in C order, None for those that are missing, and integers.
    """
    import cupy

    values = tuple(np.uintp(0) if a is None else np.int32(a) if isinstance(a, int) else a for a in args)
    grid, block = (clusters * config.blocks,), (config.threads,)
    run = _kernels(config, int(cupy.cuda.Device().id))[name]
    run(grid, block, values, shared_mem=config.shared_bytes(name == KERNELS[1]))


@cache
def _kernels(config: Config, device: int) -> dict[str, Any]:
    """Both kernels, compiled for the current device, `device`; CuPy keeps the machine code on disk."""
    import cupy

    module = cupy.RawModule(code=source(), options=config.options())
    kernels = {name: module.get_function(name) for name in KERNELS}
    for name, kernel in kernels.items():
        kernel.max_dynamic_shared_size_bytes = config.shared_bytes(name == KERNELS[1])
        if config.blocks > _PORTABLE_CLUSTER:
            cupy.cuda.driver.funcSetAttribute(kernel.kernel.ptr, _NON_PORTABLE_CLUSTERS, 1)
    return kernels
