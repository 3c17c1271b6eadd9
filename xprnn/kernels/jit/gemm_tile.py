"""Micro-kernel of the matrix products: a tile of the output, accumulated in registers.

This module imports numba. Import it only when a kernel is about to run.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

UNROLL = 4  # iterations of the inner loop that are unrolled, to share address arithmetic
MIN_ACCUMULATORS = 8  # independent sums that hide the latency of an addition, several cycles
INT64, INT32 = ir.IntType(64), ir.IntType(32)


def _int64(n: int) -> Any:
    return ir.Constant(INT64, n)


class _TileEmitter:
    """Emits the LLVM instructions of one tile of shape (rows, vectors, lanes)."""

    def __init__(self, context: Any, builder: Any, args: Any, kind: Any, shape: tuple[int, int, int], packed: bool):
        self.builder, self.packed = builder, packed
        self.rows, self.vectors, self.lanes = shape
        self.scalar_type, self.itemsize = context.get_value_type(kind), kind.bitwidth // 8
        self.vector_type = ir.VectorType(self.scalar_type, self.lanes)
        self.lhs, self.lhs_stride, self.panel, self.inner, self.out, self.out_stride = args[:6]
        self.initial, self.initial_stride, self.prefetch_pointer = args[6:9]
        self.tile_indices = [(r, c) for r in range(self.rows) for c in range(self.vectors)]
        self.num_chains = max(1, min(UNROLL, MIN_ACCUMULATORS // len(self.tile_indices)))

    def vector_pointer(self, pointer: Any, index: Any) -> Any:
        """Return the pointer to the vector that starts at pointer[index]."""
        return self.builder.bitcast(self.builder.gep(pointer, [index]), self.vector_type.as_pointer())

    def row_vector_pointer(self, pointer: Any, stride: Any, r: int, c: int) -> Any:
        """Return the pointer to vector c of row r of a matrix."""
        index = self.builder.add(self.builder.mul(_int64(r), stride), _int64(c * self.lanes))
        return self.vector_pointer(pointer, index)

    def broadcast(self, value: Any) -> Any:
        """Return the vector that has the scalar in every lane."""
        undefined = ir.Constant(self.vector_type, ir.Undefined)
        one_lane = self.builder.insert_element(undefined, value, ir.Constant(INT32, 0))
        return self.builder.shuffle_vector(
            one_lane, undefined, ir.Constant(ir.VectorType(INT32, self.lanes), [0] * self.lanes)
        )

    def accumulate(self, k: Any, count: int) -> None:
        """Emit the products of `count` consecutive inner indices from k on, added to the accumulators."""
        b = self.builder
        panel = b.gep(self.panel, [b.mul(k, _int64(self.vectors * self.lanes))])
        for u in range(count):
            offsets = [_int64((u * self.vectors + c) * self.lanes) for c in range(self.vectors)]
            rhs = [b.load(self.vector_pointer(panel, offset), align=self.itemsize) for offset in offsets]
            for r in range(self.rows):
                inner_index = b.add(k, _int64(u))
                if self.packed:
                    index = b.add(b.mul(inner_index, _int64(self.rows)), _int64(r))
                else:
                    index = b.add(b.mul(_int64(r), self.lhs_stride), inner_index)
                lhs = self.broadcast(b.load(b.gep(self.lhs, [index])))
                for c in range(self.vectors):
                    accumulator = self.accumulators[r, c, u % self.num_chains]
                    term = b.fmul(lhs, rhs[c], flags=("contract",))
                    b.store(b.fadd(b.load(accumulator), term, flags=("contract",)), accumulator)
        if count > 1:
            self.prefetch(k)

    def prefetch(self, k: Any) -> None:
        """Emit prefetches of a few cache lines: of the next panel, or if `packed` of the next tile's initial rows."""
        b = self.builder
        if self.packed:
            row = b.urem(b.udiv(k, _int64(UNROLL)), _int64(self.rows))
            offset = b.mul(row, self.out_stride)
        else:
            offset = b.mul(k, _int64(self.vectors * self.lanes))
        byte = ir.IntType(8).as_pointer()
        signature = ir.FunctionType(ir.VoidType(), [byte, INT32, INT32, INT32])
        llvm_prefetch = cgutils.get_or_insert_function(b.module, signature, "llvm.prefetch.p0i8")
        for line in range(self.vectors):
            pointer = b.gep(self.prefetch_pointer, [b.add(offset, _int64(line * 64 // self.itemsize))])
            options = [ir.Constant(INT32, n) for n in (0, 2, 1)]  # for reading, into the L2 cache, data
            b.call(llvm_prefetch, [b.bitcast(pointer, byte), *options])

    def emit(self) -> None:
        """Emit the tile: load the initial values, accumulate, store the sums."""
        b, zero = self.builder, ir.Constant(self.vector_type, [0.0] * self.lanes)
        self.accumulators = {
            (r, c, i): cgutils.alloca_once(b, self.vector_type)
            for r, c in self.tile_indices
            for i in range(self.num_chains)
        }
        for (r, c, i), accumulator in self.accumulators.items():
            initial = self.row_vector_pointer(self.initial, self.initial_stride, r, c)
            b.store(zero if i else b.load(initial, align=self.itemsize), accumulator)
        main = b.sdiv(self.inner, _int64(UNROLL))
        with cgutils.for_range(b, main) as loop:
            self.accumulate(b.mul(loop.index, _int64(UNROLL)), UNROLL)
        with cgutils.for_range_slice(b, b.mul(main, _int64(UNROLL)), self.inner, _int64(1)) as (k, _):
            self.accumulate(k, 1)
        for r, c in self.tile_indices:
            total = b.load(self.accumulators[r, c, 0])
            for i in range(1, self.num_chains):
                total = b.fadd(total, b.load(self.accumulators[r, c, i]))
            b.store(total, self.row_vector_pointer(self.out, self.out_stride, r, c), align=self.itemsize)


def _get_or_emit_function(builder: Any, name: str, kinds: Any, emit: Any) -> Any:
    """Return the LLVM function called `name`; the first call emits its body with `emit(builder, arguments)`.

    A numba function instead would take 0.2 s to compile and would be inlined into every caller.
    """
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), kinds), name)
    if function.is_declaration:
        function.linkage = "linkonce_odr"
        function.attributes.add("noinline")
        body = ir.IRBuilder(function.append_basic_block())
        emit(body, function.args)
        body.ret_void()
    return function


def _tile_function(context: Any, builder: Any, kinds: Any, kind: Any, shape: tuple[int, int, int], packed: bool) -> Any:
    """Return the LLVM function of a tile, out = start + lhs panel.

    Its arguments are (lhs, lhs_stride, panel, inner, out, out_stride, start, start_stride, prefetch_pointer). `panel`
    is (inner, vectors * lanes). `lhs` is (rows, inner), or if `packed` (inner, rows) without gaps. `prefetch_pointer`
    is memory of the size of the panel that will be read next.
    """
    name = "xprnn_tile_" + "_".join(map(str, (kind, *shape, packed)))
    return _get_or_emit_function(
        builder, name, kinds, lambda b, args: _TileEmitter(context, b, args, kind, shape, packed).emit()
    )


def packed_tile(rows: int, vectors: int, lanes: int) -> Any:
    """Make the intrinsic tile(lhs, panel, inner, out, out_stride, start, start_stride) for a packed lhs."""

    def packed(
        typing: Any, lhs: Any, panel: Any, inner: Any, out: Any, out_stride: Any, start: Any, start_stride: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            lhs_pointer, *rest = args
            next_rows = builder.gep(rest[2], [builder.mul(_int64(rows), rest[3])])
            arguments = (lhs_pointer, _int64(0), *rest, next_rows)
            kinds = [a.type for a in arguments]
            shape = rows, vectors, lanes
            builder.call(_tile_function(context, builder, kinds, lhs.dtype, shape, packed=True), arguments)
            return context.get_dummy_value()

        return types.void(lhs, lhs, types.int64, lhs, types.int64, lhs, types.int64), generate

    return intrinsic(packed)


def copy_vector(lanes: int) -> Any:
    """Make the intrinsic copy(source, target) that copies `lanes` contiguous elements."""

    def copy(typing: Any, source: Any, target: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.VectorType(context.get_value_type(source.dtype), lanes).as_pointer()
            source_vector, target_vector = (builder.bitcast(pointer, kind) for pointer in args)
            item = source.dtype.bitwidth // 8
            builder.store(builder.load(source_vector, align=item), target_vector, align=item)
            return context.get_dummy_value()

        return types.void(source, source), generate

    return intrinsic(copy)


def row_strip(rows: int, vectors: int, lanes: int) -> Any:
    """Make the intrinsic strip(lhs, lhs_stride, panel, inner, out, out_stride, start, start_stride, n).

    It multiplies n rows by one panel, in tiles of `rows` rows and, for the remainder, of 4, 2 and 1 rows.
    """

    def strip(
        typing: Any,
        lhs: Any,
        lhs_stride: Any,
        panel: Any,
        inner: Any,
        out: Any,
        out_stride: Any,
        start: Any,
        start_stride: Any,
        n: Any,
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kinds = [a.type for a in args]

            def emit(b: Any, arguments: Any) -> None:
                _emit_row_strip(context, b, arguments, lhs.dtype, rows, vectors, lanes)

            name = "xprnn_strip_" + "_".join(map(str, (lhs.dtype, rows, vectors, lanes)))
            builder.call(_get_or_emit_function(builder, name, kinds, emit), args)
            return context.get_dummy_value()

        integer = types.int64
        return types.void(lhs, integer, lhs, integer, lhs, integer, lhs, integer, integer), generate

    return intrinsic(strip)


def _emit_row_strip(context: Any, b: Any, args: Any, kind: Any, rows: int, vectors: int, lanes: int) -> None:
    """Emit the loops over the tiles of a strip."""
    lhs, lhs_stride, panel, inner, out, out_stride, start, start_stride, n = args
    kinds = [a.type for a in (*args[:8], panel)]
    next_panel, first = b.gep(panel, [b.mul(inner, _int64(vectors * lanes))]), _int64(0)
    for size in dict.fromkeys((rows, 4, 2, 1)):
        end = b.sub(n, b.srem(n, _int64(size)))
        function = _tile_function(context, b, kinds, kind, (size, vectors, lanes), packed=False)
        with cgutils.for_range_slice(b, first, end, _int64(size)) as (r, _):
            # Each tile prefetches every UNROLL-th line of the next panel; UNROLL tiles cover all of it.
            line = b.urem(b.udiv(b.mul(r, _int64(vectors)), _int64(size)), _int64(vectors * UNROLL))
            prefetch_pointer = b.gep(next_panel, [b.mul(line, _int64(lanes))])
            r_lhs, r_out, r_start = [
                b.gep(pointer, [b.mul(r, stride)])
                for pointer, stride in ((lhs, lhs_stride), (out, out_stride), (start, start_stride))
            ]
            b.call(
                function,
                [r_lhs, lhs_stride, panel, inner, r_out, out_stride, r_start, start_stride, prefetch_pointer],
            )
        first = end
