"""The scan on CuPy in one launch for the whole sequence, on devices with thread block clusters.

Thread block clusters need compute capability 9.0 or later. persistent.cu documents the kernels and their partition of
the weight. This module selects a configuration and runs the matrix products outside the kernels: one for the input
projection, one for each weight gradient. Only float32 is supported, and only the standard cells: persistent_cells.cu
implements the equations of xprnn.cells a second time.
"""

from collections.abc import Sequence
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from xprnn import cells
from xprnn.arrays.namespace import Array, Namespace, Params, device_of
from xprnn.cells.cell import Cell
from xprnn.kernels.cuda.cluster_config import GATE_COUNTS, ClusterConfig, choose_config
from xprnn.kernels.cuda.device import contiguous, copy, cublas_gemm, empty, zeros
from xprnn.kernels.cuda.fused import input_gradients, project_inputs, recurrent_gradients
from xprnn.kernels.tape import State, StepMask, Tape

__all__ = ["KERNEL_NAMES", "NAME", "find_config", "forward", "kernel_source", "launch", "launch_error"]

NAME = "CUDA persistent"
KERNEL_NAMES = ("xp_forward", "xp_backward")
_SAVED_PER_STEP = 4  # saved values per unit and step of a GRU or LSTM: SAVED in persistent_cells.cu
_MAX_PORTABLE_CLUSTER_SIZE = 8
_NON_PORTABLE_ATTRIBUTE = 14  # CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED


@cache
def kernel_source() -> str:
    """Return the CUDA source of both kernels; it includes no header."""
    return "".join(_read_source(name) for name in ("persistent_device", "persistent_cells", "persistent"))


def _read_source(name: str) -> str:
    return Path(__file__).with_name(f"{name}.cu").read_text(encoding="utf-8")


# --- selection of a configuration


def find_config(
    cell: Cell, params: Params, shape: tuple[int, int], step_mask: StepMask, compute_capability: tuple[int, int]
) -> ClusterConfig | str:
    """Return the configuration for a layer, or the reason why there is none.

    Args:
        cell: the cell.
        params: the parameters of one layer in one direction; their dtype and the shape (G*H, H) of weight_hh are used.
        shape: (T, N).
        step_mask: the active and the reset rows of each step.
        compute_capability: that of the device, for example (9, 0) for Hopper.
    """
    weight = params["weight_hh"]
    name, hidden = _standard_cell_names().get(id(cell)), weight.shape[-1]
    if compute_capability < (9, 0):
        return f"needs compute capability 9.0, the device has {compute_capability[0]}.{compute_capability[1]}"
    if name is None:
        return f"only for the standard Elman, GRU and LSTM cells, this is {cell.name}"
    if "weight_hr" in params:
        return "not for projected states"
    if str(weight.dtype) != "float32":
        return f"only for float32, the parameters are {weight.dtype}"
    if step_mask.reset is not None:
        return "not with reset"
    if 0 in shape or hidden == 0:
        return "nothing to do"
    config = choose_config(name, hidden, shape[1], compute_capability)
    return config if isinstance(config, str) else launch_error(config, int(device_of(weight).id)) or config


@cache
def _standard_cell_names() -> dict[int, str]:
    """Map the id of each standard cell object to its name; xprnn.cells returns the same object on every call."""
    standard = {"tanh": (cells.elman(), cells.elman("tanh")), "relu": (cells.elman("relu"),)}
    standard |= {"gru": (cells.gru(),), "lstm": (cells.lstm(),)}
    return {id(cell): name for name, variants in standard.items() for cell in variants}


# --- forward and backward


class _PersistentSavedArrays(NamedTuple):
    """Arrays saved for backward."""

    config: ClusterConfig
    x: Array
    h: Array  # (T+1, N, H): the initial state and the state after each step
    c: Array | None
    gate_values: Array | None  # (T, N, SAVED, H)
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
    """Run the scan as xprnn.kernels.dispatch.forward specifies."""
    with device_of(x):
        (num_steps, n), hidden = x.shape[:2], params["weight_hh"].shape[1]
        saved = _allocate(config, contiguous(x), state, step_mask, reverse, record_tape)
        pointers = _pack_arguments(config, params, saved.x, xp)
        pointers += saved.active, saved.h, saved.c, saved.gate_values
        launch(
            config, KERNEL_NAMES[0], ceil(n / config.rows_per_cluster), (*pointers, num_steps, n, hidden, int(reverse))
        )
        state_arrays = [a for a in (saved.h, saved.c) if a is not None]
        states_after = tuple(a[:-1] if reverse else a[1:] for a in state_arrays)
        final = tuple(copy(a[0 if reverse else -1, ...]) for a in state_arrays)
        # Copy y, so that in-place edits by the caller cannot corrupt the tape.
        y = copy(states_after[0]) if record_tape and saved.active is None else states_after[0]
        if saved.active is not None:
            y = xp.where(saved.active[..., None], y, xp.zeros_like(y))
    if not record_tape:
        return y, final, None

    def states() -> State:
        return tuple(copy(a) for a in states_after)

    return y, final, Tape(_backward, xp, cell, params, x, state, reset_state, step_mask, reverse, states, saved, NAME)


def _allocate(
    config: ClusterConfig, x: Array, state: State, step_mask: StepMask, reverse: bool, record_tape: bool
) -> _PersistentSavedArrays:
    """Allocate the arrays that the kernel writes, and store the initial state in them."""
    (num_steps, n), (_, hidden), dtype = x.shape[:2], state[0].shape, state[0].dtype
    state_arrays = [empty((num_steps + 1, n, hidden), dtype) for _ in state]
    for array, s in zip(state_arrays, state, strict=True):
        array[num_steps if reverse else 0, ...] = s
    h, c = state_arrays if len(state_arrays) > 1 else (*state_arrays, None)
    gate_values = (
        empty((num_steps, n, _SAVED_PER_STEP, hidden), dtype)
        if record_tape and GATE_COUNTS[config.cell_name] > 1
        else None
    )
    return _PersistentSavedArrays(
        config, x, h, c, gate_values, None if step_mask.active is None else contiguous(step_mask.active)
    )


def _pack_arguments(config: ClusterConfig, params: Params, x: Array, xp: Namespace) -> tuple[Array | None, ...]:
    """Return the recurrent weight, the two biases and the projected input, as kernel arguments."""
    weight = contiguous(params["weight_hh"])
    xg = empty((*x.shape[:2], weight.shape[0]), weight.dtype)
    with cublas_gemm(weight.dtype) as gemm:
        project_inputs(gemm, xp, xg, x, params["weight_ih"])
    return weight, *_biases(config, params, weight.shape[1]), xg


def _biases(config: ClusterConfig, params: Params, hidden: int) -> tuple[Array | None, Array | None]:
    """Return the bias added to the input projection, and the GRU's bias inside the reset gate's product."""
    if "bias_ih" not in params:
        return None, None
    bias, b_hh = copy(params["bias_ih"]), params.get("bias_hh")
    b_hh = zeros(bias.shape, bias.dtype) if b_hh is None else contiguous(b_hh)  # the article's RNN has one bias
    cut = 2 * hidden if config.cell_name == "gru" else len(b_hh)
    bias[:cut] += b_hh[:cut]
    return bias, copy(b_hh[cut:]) if config.cell_name == "gru" else None


def _backward(
    tape: Tape, dy: Array | None, dstate: Sequence[Array | None], dstates: Sequence[Array | None]
) -> tuple[Array | None, State, Sequence[Array | None], Params]:
    """Run backward as xprnn.kernels.dispatch.backward specifies."""
    saved: _PersistentSavedArrays = tape.saved
    xp, params, config, weight = tape.xp, tape.params, saved.config, contiguous(tape.params["weight_hh"])
    (num_steps, n), hidden, dtype = saved.x.shape[:2], weight.shape[1], weight.dtype
    with device_of(weight), cublas_gemm(dtype) as gemm:
        dstates_after = _add_output_cotangent(xp, dy, dstates, saved.active)
        dstate_out = [
            zeros(i.shape, dtype) if d is None else copy(d) for i, d in zip(tape.initial_state, dstate, strict=True)
        ]
        dxg = empty((num_steps, n, weight.shape[0]), dtype)
        dhg = empty(dxg.shape, dtype) if config.cell_name == "gru" else dxg
        dcs, dc = (dstates_after[1], dstate_out[1]) if len(dstate_out) > 1 else (None, None)
        pointers = (
            weight,
            saved.gate_values,
            saved.h,
            saved.c,
            saved.active,
            dstates_after[0],
            dcs,
            dstate_out[0],
            dc,
            dxg,
            None if dhg is dxg else dhg,
        )
        launch(
            config,
            KERNEL_NAMES[1],
            ceil(n / config.rows_per_cluster),
            (*pointers, num_steps, n, hidden, int(tape.reverse)),
        )
        dx, grads = input_gradients(gemm, tape, saved.x, dxg)
        grads |= recurrent_gradients(gemm, tape, saved.h[1:] if tape.reverse else saved.h[:-1], dxg, dhg)
    return dx, tuple(dstate_out), [None] * len(dstate_out), {name: grads[name] for name in params}


def _add_output_cotangent(
    xp: Namespace, dy: Array | None, dstates: Sequence[Array | None], active: Array | None
) -> list[Array | None]:
    """Return the cotangent (T, N, H) of each state after each step, or None; dy counts for h in active rows."""
    if dy is not None and active is not None:
        dy = xp.where(active[..., None], dy, xp.zeros_like(dy))
    h, *others = dstates or (None, None)
    h = dy if h is None else h if dy is None else dy + h
    return [None if d is None else contiguous(d) for d in (h, *others)]


# --- compilation and launch


@cache
def launch_error(config: ClusterConfig, device: int) -> str:
    """Launch both kernels once on an empty batch; return the reason if the device refuses, else ""."""
    import cupy

    try:
        with cupy.cuda.Device(device):
            for name, pointers in zip(KERNEL_NAMES, (8, 11), strict=True):
                launch(config, name, 1, (*[None] * pointers, 0, 0, 0, 0))
    except (cupy.cuda.driver.CUDADriverError, cupy.cuda.compiler.CompileException) as error:
        return f"the device refuses clusters of {config.cluster_size} blocks: {error}"
    return ""


def launch(config: ClusterConfig, kernel_name: str, num_clusters: int, args: Sequence[Any]) -> None:
    """Launch a kernel on the current device and stream.

    Args:
        config: the configuration to compile the kernel for.
        kernel_name: one of KERNEL_NAMES.
        num_clusters: the number of thread block clusters.
        args: the kernel's arguments: C-contiguous arrays, None for absent arrays, and integers.
    """
    import cupy

    values = tuple(np.uintp(0) if a is None else np.int32(a) if isinstance(a, int) else a for a in args)
    grid, block = (num_clusters * config.cluster_size,), (config.threads_per_block,)
    kernel = _compiled_kernels(config, int(cupy.cuda.Device().id))[kernel_name]
    kernel(grid, block, values, shared_mem=config.shared_mem_bytes(kernel_name == KERNEL_NAMES[1]))


@cache
def _compiled_kernels(config: ClusterConfig, device: int) -> dict[str, Any]:
    """Compile both kernels for `device`, which must be current; CuPy caches the machine code on disk."""
    import cupy

    module = cupy.RawModule(code=kernel_source(), options=config.compiler_options())
    kernels = {name: module.get_function(name) for name in KERNEL_NAMES}
    for name, kernel in kernels.items():
        kernel.max_dynamic_shared_size_bytes = config.shared_mem_bytes(name == KERNEL_NAMES[1])
        if config.cluster_size > _MAX_PORTABLE_CLUSTER_SIZE:
            cupy.cuda.driver.funcSetAttribute(kernel.kernel.ptr, _NON_PORTABLE_ATTRIBUTE, 1)
    return kernels
