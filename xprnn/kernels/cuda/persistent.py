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
from xprnn.arrays.linear import flatten_leading
from xprnn.arrays.namespace import Array, Namespace, Params, device_of
from xprnn.cells.cell import Cell
from xprnn.kernels.cuda.cluster_config import GATE_COUNTS, ClusterConfig, choose_config
from xprnn.kernels.cuda.device import contiguous, copy, cublas_gemm, empty, zeros
from xprnn.kernels.cuda.fused import input_gradients, project_inputs
from xprnn.kernels.tape import State, StepMask, Tape

__all__ = ["KERNEL_NAMES", "NAME", "find_config", "forward", "kernel_source", "launch", "launch_error"]

NAME = "CUDA persistent"
KERNEL_NAMES = ("xp_forward", "xp_backward")
_SAVED_PER_STEP = 4  # of a GRU's or LSTM's step, as persistent_cells.cu has it
_MAX_PORTABLE_CLUSTER_SIZE = 8
_NON_PORTABLE_ATTRIBUTE = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED


@cache
def kernel_source() -> str:
    """The kernels' source, for NVRTC as it is: it includes nothing."""
    return "".join(_read_source(name) for name in ("persistent_device", "persistent_cells", "persistent"))


def _read_source(name: str) -> str:
    return Path(__file__).with_name(f"{name}.cu").read_text(encoding="utf-8")


# --- which configuration runs a case


def find_config(
    cell: Cell, params: Params, shape: tuple[int, int], step_mask: StepMask, compute_capability: tuple[int, int]
) -> ClusterConfig | str:
    """The configuration for this case, or one sentence that says why there is none.

    Args:
        cell: the cell.
        params: as in the scan; their dtype and the weight's shape (G*H, H) decide.
        shape: (T, N).
        steps: which rows take part when.
        capability: the device's, (9, 0) for a Hopper.
    """
    u = params["weight_hh"]
    name, hidden = _standard_cell_names().get(id(cell)), u.shape[-1]
    if compute_capability < (9, 0):
        return f"needs compute capability 9.0, the device has {compute_capability[0]}.{compute_capability[1]}"
    if name is None:
        return f"only for the standard Elman, GRU and LSTM cells, this is {cell.name}"
    if "weight_hr" in params:
        return "not for projected states"
    if str(u.dtype) != "float32":
        return f"only for float32, the parameters are {u.dtype}"
    if step_mask.reset is not None:
        return "not with reset"
    if 0 in shape or hidden == 0:
        return "nothing to do"
    config = choose_config(name, hidden, shape[1], compute_capability)
    return config if isinstance(config, str) else launch_error(config, int(device_of(u).id)) or config


@cache
def _standard_cell_names() -> dict[int, str]:
    """The standard cells by identity: `cells` makes each of them once."""
    own = {"tanh": (cells.elman(), cells.elman("tanh")), "relu": (cells.elman("relu"),)}
    own |= {"gru": (cells.gru(),), "lstm": (cells.lstm(),)}
    return {id(cell): name for name, made in own.items() for cell in made}


# --- forward and its adjoint


class _PersistentSavedArrays(NamedTuple):
    """What backward needs."""

    config: ClusterConfig
    x: Array
    h: Array  # (T+1, N, H), the initial state before the first step
    c: Array | None
    saved: Array | None  # (T, N, SAVED, H)
    active: Array | None


def forward(
    config: ClusterConfig,
    cell: Cell,
    params: Params,
    x: Array,
    state: State,
    step_mask: StepMask,
    *,
    reset_state: State,
    xp: Namespace,
    reverse: bool,
    record_tape: bool,
) -> tuple[Array, State, Tape | None]:
    """See xprnn.kernels.dispatch.forward, which is the specification."""
    with device_of(x):
        (count, n), hidden = x.shape[:2], params["weight_hh"].shape[1]
        kept = _allocate(config, contiguous(x), state, step_mask, reverse, record_tape)
        pointers = _pack_arguments(config, params, kept.x, xp)
        pointers += kept.active, kept.h, kept.c, kept.saved
        launch(config, KERNEL_NAMES[0], ceil(n / config.rows_per_cluster), (*pointers, count, n, hidden, int(reverse)))
        memory = [m for m in (kept.h, kept.c) if m is not None]
        after = tuple(m[:-1] if reverse else m[1:] for m in memory)
        final = tuple(copy(m[0 if reverse else -1, ...]) for m in memory)
        # Whoever works in place on what comes out must not reach the tape.
        y = copy(after[0]) if record_tape and kept.active is None else after[0]
        if kept.active is not None:
            y = xp.where(kept.active[..., None], y, xp.zeros_like(y))
    if not record_tape:
        return y, final, None

    def states() -> State:
        return tuple(copy(a) for a in after)

    return y, final, Tape(_backward, xp, cell, params, x, state, reset_state, step_mask, reverse, states, kept, NAME)


def _allocate(
    config: ClusterConfig, x: Array, state: State, steps: StepMask, reverse: bool, keep: bool
) -> _PersistentSavedArrays:
    """What the kernel writes to, with the initial states in their places."""
    (count, n), (_, hidden), dtype = x.shape[:2], state[0].shape, state[0].dtype
    memory = [empty((count + 1, n, hidden), dtype) for _ in state]
    for m, s in zip(memory, state, strict=True):
        m[count if reverse else 0, ...] = s
    h, c = memory if len(memory) > 1 else (*memory, None)
    saved = empty((count, n, _SAVED_PER_STEP, hidden), dtype) if keep and GATE_COUNTS[config.cell_name] > 1 else None
    return _PersistentSavedArrays(config, x, h, c, saved, None if steps.active is None else contiguous(steps.active))


def _pack_arguments(config: ClusterConfig, params: Params, x: Array, xp: Namespace) -> tuple[Array | None, ...]:
    """The weight, the biases and the projected input."""
    u = contiguous(params["weight_hh"])
    xg = empty((*x.shape[:2], u.shape[0]), u.dtype)
    with cublas_gemm(u.dtype) as p:
        project_inputs(p, xp, xg, x, params["weight_ih"])
    return u, *_biases(config, params, u.shape[1]), xg


def _biases(config: ClusterConfig, params: Params, hidden: int) -> tuple[Array | None, Array | None]:
    """What is added to the projection, and the GRU's bias that the reset gate multiplies."""
    if "bias_ih" not in params:
        return None, None
    bias, b_hh = copy(params["bias_ih"]), params.get("bias_hh")
    b_hh = zeros(bias.shape, bias.dtype) if b_hh is None else contiguous(b_hh)  # the article has one bias
    cut = 2 * hidden if config.cell_name == "gru" else len(b_hh)
    bias[:cut] += b_hh[:cut]
    return bias, copy(b_hh[cut:]) if config.cell_name == "gru" else None


def _backward(
    tape: Tape, dy: Array | None, dstate: Sequence[Array | None], dstates: Sequence[Array | None]
) -> tuple[Array | None, State, Sequence[Array | None], Params]:
    """See xprnn.kernels.dispatch.backward."""
    kept: _PersistentSavedArrays = tape.saved
    xp, params, config, u = tape.xp, tape.params, kept.config, contiguous(tape.params["weight_hh"])
    (count, n), hidden, dtype = kept.x.shape[:2], u.shape[1], u.dtype
    with device_of(u), cublas_gemm(dtype) as p:
        given = _add_output_cotangent(xp, dy, dstates, kept.active)
        ds = [zeros(i.shape, dtype) if d is None else copy(d) for i, d in zip(tape.initial_state, dstate, strict=True)]
        dxg = empty((count, n, u.shape[0]), dtype)
        dhg = empty(dxg.shape, dtype) if config.cell_name == "gru" else dxg
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
        launch(
            config, KERNEL_NAMES[1], ceil(n / config.rows_per_cluster), (*pointers, count, n, hidden, int(tape.reverse))
        )
        dx, grads = input_gradients(p, tape, kept.x, dxg)
        du = grads["weight_hh"] = empty(u.shape, dtype)
        p.matmul_lhs_transposed(
            du, flatten_leading(xp, dhg), flatten_leading(xp, kept.h[1:] if tape.reverse else kept.h[:-1])
        )
        if "bias_ih" in params:
            grads["bias_ih"] = flatten_leading(xp, dxg).sum(axis=0)
            grads["bias_hh"] = copy(grads["bias_ih"]) if dhg is dxg else flatten_leading(xp, dhg).sum(axis=0)
    return dx, tuple(ds), [None] * len(ds), {name: grads[name] for name in params}


def _add_output_cotangent(
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
def launch_error(config: ClusterConfig, device: int) -> str:
    """Why a device will not run a configuration, or "": both kernels are launched once, with nothing to do."""
    import cupy

    try:
        with cupy.cuda.Device(device):
            for name, pointers in zip(KERNEL_NAMES, (8, 11), strict=True):
                launch(config, name, 1, (*[None] * pointers, 0, 0, 0, 0))
    except (cupy.cuda.driver.CUDADriverError, cupy.cuda.compiler.CompileException) as error:
        return f"the device refuses clusters of {config.cluster_size} blocks: {error}"
    return ""


def launch(config: ClusterConfig, kernel_name: str, num_clusters: int, args: Sequence[Any]) -> None:
    """Run a kernel on the current device and stream.

    Args:
        config: what it is compiled for.
        name: one of KERNELS.
        clusters: how many.
        args: the kernel's arguments: arrays in C order, None for those that are missing, and integers.
    """
    import cupy

    values = tuple(np.uintp(0) if a is None else np.int32(a) if isinstance(a, int) else a for a in args)
    grid, block = (num_clusters * config.cluster_size,), (config.threads_per_block,)
    run = _compiled_kernels(config, int(cupy.cuda.Device().id))[kernel_name]
    run(grid, block, values, shared_mem=config.shared_mem_bytes(kernel_name == KERNEL_NAMES[1]))


@cache
def _compiled_kernels(config: ClusterConfig, device: int) -> dict[str, Any]:
    """Both kernels, compiled for the current device, `device`; CuPy keeps the machine code on disk."""
    import cupy

    module = cupy.RawModule(code=kernel_source(), options=config.compiler_options())
    kernels = {name: module.get_function(name) for name in KERNEL_NAMES}
    for name, kernel in kernels.items():
        kernel.max_dynamic_shared_size_bytes = config.shared_mem_bytes(name == KERNEL_NAMES[1])
        if config.cluster_size > _MAX_PORTABLE_CLUSTER_SIZE:
            cupy.cuda.driver.funcSetAttribute(kernel.kernel.ptr, _NON_PORTABLE_ATTRIBUTE, 1)
    return kernels
