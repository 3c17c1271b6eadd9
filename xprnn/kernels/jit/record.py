"""The argument record of a scan: one structure for every cell, read by the drivers and by the pointwise functions.

A call of the compiled scan fills one record (bind.py). The drivers (forward.py, backward.py) run the time loop. At each
step they set the step's pointers and call the pointwise functions of the cell (pointwise.py) by address. All fields are
64-bit integers: sizes, strides in elements, flags and addresses.

Letters are those of the docstrings of xprnn: T steps, N rows of the batch, D inputs, H units, G gates. R is the number
of rows of this call, which a thread may run as a part of the batch. P is the width of h: H, or that of a projected h.
W = G*H. "padded" widths are rounded up to whole vectors.

The two gate groups. A product with weight_hh runs for each group of gates. The first group has `first_width` columns.
If the cell uses only the sum x + h of a group's gates, its recurrent product is added to `gate_sums`. Otherwise the
product and its bias go to `recurrent`. The pregates of a cell (see xprnn.Cell) are its first group. The second group of
such a cell multiplies the gated state that the pregates compute, instead of h.

Buffers. "step" pointers change at every step and point to row 0 of the step.

    output
      y (T,R,P)                 h after each step, 0 in inactive rows; strides y_step, y_row; 0 if states[0] serves
    caller's arrays (read only)
      x (T,R,D), ids (T,R)      input: x_step, x_row, x_unit strides (x_row = x_step if R = 1); ids instead if D = 0
      weight_ih, weight_hh, weight_hr, bias_ih, bias_hh     any strides
      active, reset (T,N)       uint8 masks, 0 if absent
      reset_state[k] (R,.)      states that a reset restores
      injected[k] (T,R,.)       cotangent of state k after each step; strides injected_step, injected_row, injected_unit
    tape: written by forward, read by backward
      states[k] (T+1,N,.)       state k before the first and after every step (in time order: after step t at t+1, or
                                at t if reverse); 2 slots if states_full[k] is 0
      (`saved_step` is N, or 0 if no tape is recorded: then the arrays below hold one step)
      gates (T,N,W)             the first saved values of the cell, one block of H columns each
      extra[k] (T,N,H)          the other saved values
      gated_state (T,N,H)       the h of the second product, if the cell has pregates
      unprojected (T,N,H)       h before its projection, if there is one
      reset_before[k] (T,N,.)   state k before each step after resets, if there are resets
    workspace of one call
      packed_ih, packed_hh, packed_hr   weights packed for the products (products.py)
      x_block (J,R,D)           copy of a block of x whose rows are not contiguous
      gate_sums (J,R,padded)    x W' + biases of a block; the recurrent products of summed groups are added
      recurrent (R,recurrent_width)     recurrent products of the groups that are not summed
      bias_sums, bias_recurrent rows of biases, the starts of the products
      vectors[k] (H,)           the cell's vectors, contiguous
      edge                      scratch memory of the products, then zeros
    workspace of backward
      dgates_x (J,R,x_stride)   cotangent of x W'; for integer x (T,N,W), returned to the caller
      dgates_h                  cotangent of h U', the same array if the two are equal
      dstate_in[k], dstate_out[k]  running cotangents of the states (R,.), exchanged at every step; state 0 is padded
      dgated (R,h_padded)       cotangent of gated_state
      dh_block (J,R,P), dunprojected (R,.)  cotangents of a projected h, and of h before the projection
      packed_lhs, packed_rhs    factors of the weight gradients of a block
      injected_block[k] (J,R,.) copy of a block of injected[k] whose units are not adjacent
    gradients: written by backward
      dx (T,N,D), dweight_ih, dweight_hh, dweight_hr, dbias_ih, dbias_hh, dvectors[k] (N,H), dreset[k] (N,.)

No two of these arrays overlap, except that states[k] holds both the states before and after a step, and that dgates_h
may be dgates_x.

This module imports numba. Import it only when a kernel is about to run.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core.imputils import lower_getattr_generic, lower_setattr_generic
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import intrinsic, models, register_model

from xprnn.kernels.jit.pointwise import MAX_EXTRA, MAX_STATES, MAX_VECTORS

__all__ = ["SCAN_RECORD", "get", "put", "scan_record"]

_SCALAR_FIELDS = """
    item shift T N R D H P W padded_width row_offset first_width first_padded recurrent_width h_padded
    gates_count first_gates num_states num_vectors num_extra separate_first separate_second
    has_pregates has_projection has_direct_path
    dx_is_dh saves_gates fused reverse record_tape block_steps lanes whole_units last_units
    input_strategy recurrent_strategy gemm forward_driver backward_driver
    forward_rows pregate_rows backward_rows pregate_backward_rows
    x x_step x_row x_unit copy_x ids ids_step ids_row num_classes copy_table
    weight_ih weight_ih_row weight_ih_column weight_hh weight_hh_row weight_hh_column
    weight_hr weight_hr_row weight_hr_column bias_ih bias_ih_stride bias_hh bias_hh_stride active reset
    y y_step y_row gates gated_state unprojected saved_step
    packed_ih packed_hh packed_hr packed_ih_stride packed_hh_stride x_block gate_sums recurrent
    bias_sums bias_recurrent edge zeros
    x_stride first_packed dgates_x dgates_h dgated dh_block dunprojected packed_lhs packed_rhs capacity
    dx add_to_dx dweight_ih dweight_hh dweight_hr dbias_ih dbias_hh dbias_hr
    step_sums step_gates step_gated step_unprojected step_dgates_x step_dgates_h
    sums_stride gates_stride units_stride
"""
_STATE_FIELDS = """
    states states_full reset_state reset_state_row reset_before injected injected_step injected_row injected_unit
    injected_block dstate_in dstate_out dreset before after after_stride after_flip
    injected_stride step_injected step_injected_row
"""
_LENGTHS = dict.fromkeys(_STATE_FIELDS.split(), MAX_STATES)
_LENGTHS |= dict.fromkeys(("product_weight", "product_columns", "product_start", "product_out"), 2)
_LENGTHS |= {"vectors": MAX_VECTORS, "dvectors": MAX_VECTORS, "extra": MAX_EXTRA, "step_extra": MAX_EXTRA}

_FIELDS = [*_SCALAR_FIELDS.split(), *(f"{name}_{k}" for name, length in _LENGTHS.items() for k in range(length))]
_POSITIONS = {name: position for position, name in enumerate(_FIELDS)}
SCAN_RECORD = np.dtype([(name, np.int64) for name in _FIELDS])


def _index(name: str) -> int:
    """Return the position of name[0] among the fields."""
    return _POSITIONS[f"{name}_0"]


# Positions of the indexed fields, for `get` and `put`.
STATES = _index("states")
STATES_FULL = _index("states_full")
RESET_STATE = _index("reset_state")
RESET_STATE_ROW = _index("reset_state_row")
RESET_BEFORE = _index("reset_before")
INJECTED = _index("injected")
INJECTED_STEP = _index("injected_step")
INJECTED_ROW = _index("injected_row")
INJECTED_UNIT = _index("injected_unit")
INJECTED_BLOCK = _index("injected_block")
DSTATE_IN = _index("dstate_in")
DSTATE_OUT = _index("dstate_out")
DRESET = _index("dreset")
BEFORE = _index("before")
AFTER = _index("after")
AFTER_STRIDE, AFTER_FLIP = _index("after_stride"), _index("after_flip")
INJECTED_STRIDE = _index("injected_stride")
PRODUCT_WEIGHT, PRODUCT_COLUMNS = _index("product_weight"), _index("product_columns")
PRODUCT_START, PRODUCT_OUT = _index("product_start"), _index("product_out")
STEP_INJECTED = _index("step_injected")
STEP_INJECTED_ROW = _index("step_injected_row")
VECTORS = _index("vectors")
DVECTORS = _index("dvectors")
EXTRA = _index("extra")
STEP_EXTRA = _index("step_extra")


class _RecordType(types.Type):  # type: ignore[misc]
    """numba type of a record: a pointer to its fields. numba's own records are slow to compile with 200 fields."""

    def __init__(self) -> None:
        super().__init__(name="ScanRecord")


_RECORD = _RecordType()


@register_model(_RecordType)
class _RecordModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, ir.IntType(64).as_pointer())


@infer_getattr
class _RecordAttribute(AttributeTemplate):  # type: ignore[misc]
    key = _RecordType

    def generic_resolve(self, kind: Any, name: str) -> Any:
        """Return the type of a field."""
        return types.int64 if name in _POSITIONS else None


def _field_pointer(builder: Any, record: Any, position: Any) -> Any:
    return builder.gep(record, [position])


@lower_getattr_generic(_RecordType)  # type: ignore[untyped-decorator]
def _load_field(context: Any, builder: Any, kind: Any, record: Any, name: str) -> Any:
    return builder.load(_field_pointer(builder, record, ir.Constant(ir.IntType(64), _POSITIONS[name])))


@lower_setattr_generic(_RecordType)  # type: ignore[untyped-decorator]
def _store_field(context: Any, builder: Any, signature: Any, args: Any, name: str) -> None:
    record, value = args
    value = context.cast(builder, value, signature.args[1], types.int64)
    builder.store(value, _field_pointer(builder, record, ir.Constant(ir.IntType(64), _POSITIONS[name])))


def _from_address(typing: Any, address: Any) -> Any:
    """Return the record at an address."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(_RECORD))

    return _RECORD(types.int64), generate


def _get(typing: Any, record: Any, name: Any, k: Any) -> Any:
    """Return entry k of an indexed field; `name` is its position, such as BEFORE."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(_field_pointer(builder, args[0], builder.add(args[1], args[2])))

    return types.int64(record, types.int64, types.int64), generate


def _put(typing: Any, record: Any, name: Any, k: Any, value: Any) -> Any:
    """Set entry k of an indexed field."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[3], _field_pointer(builder, args[0], builder.add(args[1], args[2])))
        return context.get_dummy_value()

    return types.void(record, types.int64, types.int64, types.int64), generate


scan_record, get, put = intrinsic(_from_address), intrinsic(_get), intrinsic(_put)
