"""A few rows of a matrix product, all sums in registers: the one loop in which most of the time goes.

Imported only when a kernel is about to run, because it imports numba.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

UNROLL = 4  # steps of the inner loop written out, so that the addresses' arithmetic is shared
CHAINS = 8  # at least so many sums run side by side: each addition takes several cycles
LONG, INT = ir.IntType(64), ir.IntType(32)


def _long(n: int) -> Any:
    return ir.Constant(LONG, n)


class _Tile:
    """Writes the instructions of one tile: `rows` rows, `wide` vectors of `lanes` columns."""

    def __init__(self, context: Any, builder: Any, args: Any, kind: Any, shape: tuple[int, int, int], packed: bool):
        self.builder, self.packed = builder, packed
        self.rows, self.wide, self.lanes = shape
        self.real, self.item = context.get_value_type(kind), kind.bitwidth // 8
        self.vector = ir.VectorType(self.real, self.lanes)
        self.left, self.stride, self.panel, self.inner, self.out, self.out_stride = args[:6]
        self.start, self.start_stride, self.ahead = args[6:9]
        self.places = [(r, c) for r in range(self.rows) for c in range(self.wide)]
        self.chains = max(1, min(UNROLL, CHAINS // len(self.places)))

    def at(self, pointer: Any, index: Any) -> Any:
        """The vector that begins there."""
        return self.builder.bitcast(self.builder.gep(pointer, [index]), self.vector.as_pointer())

    def row(self, pointer: Any, stride: Any, r: int, c: int) -> Any:
        """Vector c of row r of a matrix."""
        index = self.builder.add(self.builder.mul(_long(r), stride), _long(c * self.lanes))
        return self.at(pointer, index)

    def spread(self, value: Any) -> Any:
        """The number in all lanes."""
        nothing = ir.Constant(self.vector, ir.Undefined)
        one = self.builder.insert_element(nothing, value, ir.Constant(INT, 0))
        return self.builder.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(INT, self.lanes), [0] * self.lanes))

    def some(self, k: Any, count: int) -> None:
        """Add the products of `count` steps from k on."""
        b = self.builder
        panel = b.gep(self.panel, [b.mul(k, _long(self.wide * self.lanes))])
        for u in range(count):
            steps = [_long((u * self.wide + c) * self.lanes) for c in range(self.wide)]
            right = [b.load(self.at(panel, step), align=self.item) for step in steps]
            for r in range(self.rows):
                first = b.add(k, _long(u))
                if self.packed:
                    index = b.add(b.mul(first, _long(self.rows)), _long(r))
                else:
                    index = b.add(b.mul(_long(r), self.stride), first)
                one = self.spread(b.load(b.gep(self.left, [index])))
                for c in range(self.wide):
                    place = self.sums[r, c, u % self.chains]
                    term = b.fmul(one, right[c], flags=("contract",))
                    b.store(b.fadd(b.load(place), term, flags=("contract",)), place)
        if count > 1:
            self.fetch(k)

    def fetch(self, k: Any) -> None:
        """Ask for a few pieces of what comes after this panel or, `packed`, of the rows that the next tile adds to."""
        b = self.builder
        if self.packed:
            row = b.urem(b.udiv(k, _long(UNROLL)), _long(self.rows))
            offset = b.mul(row, self.out_stride)
        else:
            offset = b.mul(k, _long(self.wide * self.lanes))
        byte = ir.IntType(8).as_pointer()
        signature = ir.FunctionType(ir.VoidType(), [byte, INT, INT, INT])
        fetch = cgutils.get_or_insert_function(b.module, signature, "llvm.prefetch.p0i8")
        for piece in range(self.wide):
            where = b.gep(self.ahead, [b.add(offset, _long(piece * 64 // self.item))])
            how = [ir.Constant(INT, n) for n in (0, 2, 1)]  # to be read, into the second-level cache, data
            b.call(fetch, [b.bitcast(where, byte), *how])

    def emit(self) -> None:
        """All of it."""
        b, zero = self.builder, ir.Constant(self.vector, [0.0] * self.lanes)
        self.sums = {(r, c, i): cgutils.alloca_once(b, self.vector) for r, c in self.places for i in range(self.chains)}
        for (r, c, i), place in self.sums.items():
            given = self.row(self.start, self.start_stride, r, c)
            b.store(zero if i else b.load(given, align=self.item), place)
        main = b.sdiv(self.inner, _long(UNROLL))
        with cgutils.for_range(b, main) as loop:
            self.some(b.mul(loop.index, _long(UNROLL)), UNROLL)
        with cgutils.for_range_slice(b, b.mul(main, _long(UNROLL)), self.inner, _long(1)) as (k, _):
            self.some(k, 1)
        for r, c in self.places:
            total = b.load(self.sums[r, c, 0])
            for i in range(1, self.chains):
                total = b.fadd(total, b.load(self.sums[r, c, i]))
            b.store(total, self.row(self.out, self.out_stride, r, c), align=self.item)


def _function(builder: Any, name: str, kinds: Any, emit: Any) -> Any:
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


def _tile(context: Any, builder: Any, kinds: Any, kind: Any, shape: tuple[int, int, int], packed: bool) -> Any:
    """A function: out = start + left panel, (left, stride, panel, inner, out, stride, start, stride, ahead).

    `panel` is (inner, wide * lanes); `left` is (rows, inner) with a stride between rows or, `packed`, (inner, rows)
    without one. `ahead` is memory that will be read soon, as far as the panel reaches.
    """
    name = "xprnn_tile_" + "_".join(map(str, (kind, *shape, packed)))
    return _function(builder, name, kinds, lambda b, args: _Tile(context, b, args, kind, shape, packed).emit())


def tile(rows: int, wide: int, lanes: int) -> Any:
    """tile(left, panel, inner, out, out_stride, start, start_stride): `rows` rows, packed, against one panel."""

    def packed(
        typing: Any, left: Any, panel: Any, inner: Any, out: Any, out_stride: Any, start: Any, start_stride: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            given, *rest = args
            ahead = builder.gep(rest[2], [builder.mul(_long(rows), rest[3])])
            whole = (given, _long(0), *rest, ahead)
            kinds = [a.type for a in whole]
            builder.call(_tile(context, builder, kinds, left.dtype, (rows, wide, lanes), packed=True), whole)
            return context.get_dummy_value()

        return types.void(left, left, types.int64, left, types.int64, left, types.int64), generate

    return intrinsic(packed)


def move(lanes: int) -> Any:
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


def strip(rows: int, wide: int, lanes: int) -> Any:
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
                _rows(context, b, given, left.dtype, rows, wide, lanes)

            name = "xprnn_strip_" + "_".join(map(str, (left.dtype, rows, wide, lanes)))
            builder.call(_function(builder, name, kinds, emit), args)
            return context.get_dummy_value()

        integer = types.int64
        return types.void(left, integer, left, integer, left, integer, left, integer, integer), generate

    return intrinsic(many)


def _rows(context: Any, b: Any, args: Any, kind: Any, rows: int, wide: int, lanes: int) -> None:
    """The loops of a strip."""
    left, stride, panel, inner, out, out_stride, start, start_stride, n = args
    kinds = [a.type for a in (*args[:8], panel)]
    after, done = b.gep(panel, [b.mul(inner, _long(wide * lanes))]), _long(0)
    for size in dict.fromkeys((rows, 4, 2, 1)):
        whole = b.sub(n, b.srem(n, _long(size)))
        function = _tile(context, b, kinds, kind, (size, wide, lanes), packed=False)
        with cgutils.for_range_slice(b, done, whole, _long(size)) as (r, _):
            # UNROLL tiles together ask for the whole of the next panel.
            piece = b.urem(b.udiv(b.mul(r, _long(wide)), _long(size)), _long(wide * UNROLL))
            near = b.gep(after, [b.mul(piece, _long(lanes))])
            at = [
                b.gep(pointer, [b.mul(r, step)])
                for pointer, step in ((left, stride), (out, out_stride), (start, start_stride))
            ]
            b.call(function, [at[0], stride, panel, inner, at[1], out_stride, at[2], start_stride, near])
        done = whole
