"""A few rows of a matrix product, all sums in registers: the one loop in which most of the time goes.

Imported only when a kernel is about to run, because it imports numba.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

UNROLL = 4  # steps of the inner loop written out, so that the addresses' arithmetic is shared
MIN_ACCUMULATORS = 8  # at least so many sums run side by side: each addition takes several cycles
INT64, INT32 = ir.IntType(64), ir.IntType(32)


def _int64(n: int) -> Any:
    return ir.Constant(INT64, n)


class _TileEmitter:
    """Writes the instructions of one tile: `rows` rows, `wide` vectors of `lanes` columns."""

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
        """The vector that begins there."""
        return self.builder.bitcast(self.builder.gep(pointer, [index]), self.vector_type.as_pointer())

    def row_vector_pointer(self, pointer: Any, stride: Any, r: int, c: int) -> Any:
        """Vector c of row r of a matrix."""
        index = self.builder.add(self.builder.mul(_int64(r), stride), _int64(c * self.lanes))
        return self.vector_pointer(pointer, index)

    def broadcast(self, value: Any) -> Any:
        """The number in all lanes."""
        nothing = ir.Constant(self.vector_type, ir.Undefined)
        one = self.builder.insert_element(nothing, value, ir.Constant(INT32, 0))
        return self.builder.shuffle_vector(
            one, nothing, ir.Constant(ir.VectorType(INT32, self.lanes), [0] * self.lanes)
        )

    def accumulate(self, k: Any, count: int) -> None:
        """Add the products of `count` steps from k on."""
        b = self.builder
        panel = b.gep(self.panel, [b.mul(k, _int64(self.vectors * self.lanes))])
        for u in range(count):
            steps = [_int64((u * self.vectors + c) * self.lanes) for c in range(self.vectors)]
            right = [b.load(self.vector_pointer(panel, step), align=self.itemsize) for step in steps]
            for r in range(self.rows):
                first = b.add(k, _int64(u))
                if self.packed:
                    index = b.add(b.mul(first, _int64(self.rows)), _int64(r))
                else:
                    index = b.add(b.mul(_int64(r), self.lhs_stride), first)
                one = self.broadcast(b.load(b.gep(self.lhs, [index])))
                for c in range(self.vectors):
                    place = self.accumulators[r, c, u % self.num_chains]
                    term = b.fmul(one, right[c], flags=("contract",))
                    b.store(b.fadd(b.load(place), term, flags=("contract",)), place)
        if count > 1:
            self.prefetch(k)

    def prefetch(self, k: Any) -> None:
        """Ask for a few pieces of what comes after this panel or, `packed`, of the rows that the next tile adds to."""
        b = self.builder
        if self.packed:
            row = b.urem(b.udiv(k, _int64(UNROLL)), _int64(self.rows))
            offset = b.mul(row, self.out_stride)
        else:
            offset = b.mul(k, _int64(self.vectors * self.lanes))
        byte = ir.IntType(8).as_pointer()
        signature = ir.FunctionType(ir.VoidType(), [byte, INT32, INT32, INT32])
        fetch = cgutils.get_or_insert_function(b.module, signature, "llvm.prefetch.p0i8")
        for piece in range(self.vectors):
            where = b.gep(self.prefetch_pointer, [b.add(offset, _int64(piece * 64 // self.itemsize))])
            how = [ir.Constant(INT32, n) for n in (0, 2, 1)]  # to be read, into the second-level cache, data
            b.call(fetch, [b.bitcast(where, byte), *how])

    def emit(self) -> None:
        """All of it."""
        b, zero = self.builder, ir.Constant(self.vector_type, [0.0] * self.lanes)
        self.accumulators = {
            (r, c, i): cgutils.alloca_once(b, self.vector_type)
            for r, c in self.tile_indices
            for i in range(self.num_chains)
        }
        for (r, c, i), place in self.accumulators.items():
            given = self.row_vector_pointer(self.initial, self.initial_stride, r, c)
            b.store(zero if i else b.load(given, align=self.itemsize), place)
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
    """The function called `name`, written by `emit(builder, arguments)` when it is first asked for.

    numba would compile a function of its own in a fifth of a second, and inline it in every place that calls it.
    """
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), kinds), name)
    if function.is_declaration:
        function.linkage = "linkonce_odr"
        function.attributes.add("noinline")
        inside = ir.IRBuilder(function.append_basic_block())
        emit(inside, function.args)
        inside.ret_void()
    return function


def _tile_function(context: Any, builder: Any, kinds: Any, kind: Any, shape: tuple[int, int, int], packed: bool) -> Any:
    """A function: out = start + left panel, (left, stride, panel, inner, out, stride, start, stride, ahead).

    `panel` is (inner, wide * lanes); `left` is (rows, inner) with a stride between rows or, `packed`, (inner, rows)
    without one. `ahead` is memory that will be read soon, as far as the panel reaches.
    """
    name = "xprnn_tile_" + "_".join(map(str, (kind, *shape, packed)))
    return _get_or_emit_function(
        builder, name, kinds, lambda b, args: _TileEmitter(context, b, args, kind, shape, packed).emit()
    )


def packed_tile(rows: int, vectors: int, lanes: int) -> Any:
    """tile(left, panel, inner, out, out_stride, start, start_stride): `rows` rows, packed, against one panel."""

    def packed(
        typing: Any, left: Any, panel: Any, inner: Any, out: Any, out_stride: Any, start: Any, start_stride: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            given, *rest = args
            ahead = builder.gep(rest[2], [builder.mul(_int64(rows), rest[3])])
            whole = (given, _int64(0), *rest, ahead)
            kinds = [a.type for a in whole]
            builder.call(
                _tile_function(context, builder, kinds, left.dtype, (rows, vectors, lanes), packed=True), whole
            )
            return context.get_dummy_value()

        return types.void(left, left, types.int64, left, types.int64, left, types.int64), generate

    return intrinsic(packed)


def copy_vector(lanes: int) -> Any:
    """move(source, target): `lanes` numbers that lie side by side."""

    def copy(typing: Any, source: Any, target: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kind = ir.VectorType(context.get_value_type(source.dtype), lanes).as_pointer()
            given, to = (builder.bitcast(pointer, kind) for pointer in args)
            item = source.dtype.bitwidth // 8
            builder.store(builder.load(given, align=item), to, align=item)
            return context.get_dummy_value()

        return types.void(source, source), generate

    return intrinsic(copy)


def row_strip(rows: int, vectors: int, lanes: int) -> Any:
    """strip(left, stride, panel, inner, out, stride, start, stride, n): n rows, `rows` at once, against one panel."""

    def many(
        typing: Any,
        left: Any,
        stride: Any,
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

            def emit(b: Any, given: Any) -> None:
                _emit_row_strip(context, b, given, left.dtype, rows, vectors, lanes)

            name = "xprnn_strip_" + "_".join(map(str, (left.dtype, rows, vectors, lanes)))
            builder.call(_get_or_emit_function(builder, name, kinds, emit), args)
            return context.get_dummy_value()

        integer = types.int64
        return types.void(left, integer, left, integer, left, integer, left, integer, integer), generate

    return intrinsic(many)


def _emit_row_strip(context: Any, b: Any, args: Any, kind: Any, rows: int, wide: int, lanes: int) -> None:
    """The loops of a strip."""
    left, stride, panel, inner, out, out_stride, start, start_stride, n = args
    kinds = [a.type for a in (*args[:8], panel)]
    after, done = b.gep(panel, [b.mul(inner, _int64(wide * lanes))]), _int64(0)
    for size in dict.fromkeys((rows, 4, 2, 1)):
        whole = b.sub(n, b.srem(n, _int64(size)))
        function = _tile_function(context, b, kinds, kind, (size, wide, lanes), packed=False)
        with cgutils.for_range_slice(b, done, whole, _int64(size)) as (r, _):
            # UNROLL tiles together ask for the whole of the next panel.
            piece = b.urem(b.udiv(b.mul(r, _int64(wide)), _int64(size)), _int64(wide * UNROLL))
            near = b.gep(after, [b.mul(piece, _int64(lanes))])
            at = [
                b.gep(pointer, [b.mul(r, step)])
                for pointer, step in ((left, stride), (out, out_stride), (start, start_stride))
            ]
            b.call(function, [at[0], stride, panel, inner, at[1], out_stride, at[2], start_stride, near])
        done = whole
