"""Printed pointwise functions: readable names, and user-defined names that the printed code uses itself."""

from __future__ import annotations

import ast
import keyword

import numpy as np
import pytest
from support.backends import Backend
from support.layer_cases import random_cotangents, random_inputs

import xprnn
from xprnn.cells import Pointwise
from xprnn.kernels.config import reference_only
from xprnn.kernels.jit.pointwise import MAX_STATES, pointwise_sources
from xprnn.kernels.tracing.graph import UntraceableError

XP = Backend.NUMPY
DEFAULT_NAMES = ("in", "out"), ("h", "c"), ("rate", "peep")
# cell, names of its gates, and names that its printed step must contain
STANDARD_CELLS = {
    "elman": (xprnn.cells.elman(), "a", {"sum_a", "new_h"}),
    "lstm": (xprnn.cells.lstm(), "ifgo", {"i", "f", "g", "o", "c", "new_c", "new_h"}),
    "gru": (xprnn.cells.gru(), "rzn", {"r", "z", "x_n", "h_n", "new_h"}),
}


def named_cell(gates, states, vectors, pregates=0):
    """Return a cell of two gates, states and vectors with these names; its values depend on all of them."""

    def build(xp):
        def step(x, h, state, p):
            a, b = (x[0] if pregates else xp.tanh(x[0] + h[0])), xp.tanh(x[1] + h[-1] + p[1] * state[1])
            c = 0.5 * state[1] + a * b
            return (b * xp.tanh(c) + p[0] * a, c), (a, b, xp.tanh(c))

        def backward(dstate, saved, state, p):
            (a, b, t), (dh, dc) = saved, dstate
            dc = dc + dh * b * (1.0 - t * t)
            da, db = dh * p[0] + dc * b, (dh * t + dc * a) * (1.0 - b * b)
            da = da if pregates else da * (1.0 - a * a)
            return (da, db), (db,) if pregates else (da, db), (None, 0.5 * dc + db * p[1]), (dh * a, db * state[1])

        def pregate(x, h, state, p):
            a = xp.tanh(x[0] + h[0])
            return (a,), a * state[0]

        def pregate_backward(dvalues, dq, values, state, p):
            (a,) = values
            return ((dvalues[0] + dq * state[0]) * (1.0 - a * a),), (dq * a, None), (None, None)

        return Pointwise(step, backward, pregate, pregate_backward) if pregates else (step, backward)

    return xprnn.Cell("named", 2, build, tuple(states), tuple(vectors), pregates, gate_names=tuple(gates))


def sources(cell):
    """Return the texts of the printed functions of a cell."""
    printed = pointwise_sources(cell, 64)
    return [t for t in (*printed[:2], printed.pregate_rows, printed.pregate_backward_rows) if t]


def unit_loop(text):
    """Return the statements that a printed function runs for one unit, and all other nodes of its module."""
    module = ast.parse(text)
    loop = next(n for n in ast.walk(module) if isinstance(n, ast.For) and n.target.id == "j")
    inside = {id(n) for statement in loop.body for n in ast.walk(statement)}
    return loop.body, [n for n in ast.walk(module) if id(n) not in inside]


def names_in(nodes):
    """Return the names that these nodes read, write, import or declare as arguments."""
    found = {n.id for n in nodes if isinstance(n, ast.Name)} | {n.arg for n in nodes if isinstance(n, ast.arg)}
    aliases = [a for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names]
    return found | {a.asname or a.name for a in aliases} | {n.name for n in nodes if isinstance(n, ast.FunctionDef)}


def assigned_names(body):
    """Return the names to which the statements assign, in order."""
    return [s.targets[0].id for s in body if isinstance(s, ast.Assign)]


def check_names(text):
    """Assert that the values of a unit have names of their own, and that every name is defined before it is read."""
    body, rest = unit_loop(text)
    assigned, outside = assigned_names(body), names_in(rest)
    assert len(set(assigned)) == len(assigned)
    assert not outside & set(assigned)
    known = outside | {"abs", "np", "math"}
    for statement in body:
        reads = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
        assert reads <= known, f"{ast.unparse(statement)} reads {reads - known}"
        known |= {n.id for n in ast.walk(statement) if isinstance(n, ast.Name)}


@pytest.mark.parametrize("name", STANDARD_CELLS)
def test_printed_functions_name_the_gates_of_the_equations(name):
    cell, gates, values = STANDARD_CELLS[name]
    assert "".join(cell.gate_name(k) for k in range(cell.gates)) == gates
    printed = pointwise_sources(cell, 64)
    assert values <= set(assigned_names(unit_loop(printed.forward_rows)[0]))
    assert {f"dx_{gate}" for gate in gates} <= set(assigned_names(unit_loop(printed.backward_rows)[0]))


def words_of_the_printed_code():
    """Return every name that the printed functions of a cell with plain names use, keywords, and odd strings."""
    texts = [t for pregates in (0, 1) for t in sources(named_cell(("a", "b"), ("h", "c"), ("u", "v"), pregates))]
    words = set().union(*(names_in(list(ast.walk(ast.parse(t)))) for t in texts))
    odd = [
        "",
        " ",
        "a b",
        "1x",
        "_",
        "__",
        "é",
        "sum",
        "weight_",
        "weight_H",
        "a\nb",
        "'",
        '"""',
        "t",
        "t0",
        "t1",
        "t10",
    ]
    return sorted({*words, *keyword.kwlist, *keyword.softkwlist, *odd, "saved0", "new_h", "dx_a", "after_stride_5"})


@pytest.mark.parametrize("pregates", [0, 1])
def test_any_name_of_a_gate_state_or_vector_is_printed_safely(pregates):
    for word in words_of_the_printed_code():
        for gates, states, vectors in (
            ((word, "b"), ("h", word), ("u", word)),
            (("a", word), (word, "c"), (word, "v")),
        ):
            for text in sources(named_cell(gates, states, vectors, pregates)):
                check_names(text)


NAMES = {
    "keywords": (("if", "lambda"), ("h", "class"), ("weight_in", "weight_is")),
    "reserved": (("H", "args"), ("h", "row"), ("weight_sums_p", "weight_BEFORE0")),
    "temporaries": (("t0", "t3"), ("h", "t1"), ("weight_t2", "weight_range")),
    "equal": (("x", "x"), ("h", "c"), ("weight_h", "weight_c")),
    "no identifiers": (("input gate", "1st"), ("h", "é"), ("weight_a-b", "weight_.")),
}


@pytest.mark.needs("numba")
@pytest.mark.parametrize("pregates", [0, 1])
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_cell_with_unusual_names_compiles_and_equals_reference_scan(rng, names, pregates):
    layer = xprnn.Recurrent(3, 5, cell=named_cell(*names, pregates))
    p = random_inputs(rng, layer, T=4, N=3)
    dy = rng.standard_normal((4, 3, 5))

    def run():
        y, final, tape = layer.forward(p.params, p.x, p.state)
        return (y, final, *layer.backward(tape, dy, random_cotangents(np.random.default_rng(1), final))), tape

    got, tape = run()
    assert tape.explain().endswith("compiled by numba")
    with reference_only():
        want, _ = run()
    XP.assert_close(got, want, condition=200)


def many_states_cell(count):
    """A cell whose states are h' = tanh(x + h) and count - 1 sums, each of itself and h'."""

    def build(xp):
        def step(x, h, state, p):
            y = xp.tanh(x[0] + h[0])
            return (y, *(s + y for s in state[1:])), (y,)

        def backward(dstate, saved, state, p):
            total = dstate[0]
            for d in dstate[1:]:
                total = total + d
            da = total * (1.0 - saved[0] * saved[0])
            return (da,), (da,), (None, *dstate[1:]), ()

        return step, backward

    return xprnn.Cell("sums", 1, build, states=("h", *(f"s{k}" for k in range(1, count))))


def test_cell_with_more_states_than_the_record_holds_names_the_limit():
    assert pointwise_sources(many_states_cell(MAX_STATES), 64).num_extra == 0
    with pytest.raises(UntraceableError, match=f"a cell with {MAX_STATES + 1} states, of at most {MAX_STATES}"):
        pointwise_sources(many_states_cell(MAX_STATES + 1), 64)


@pytest.mark.needs("numba")
@pytest.mark.parametrize("count", [MAX_STATES, MAX_STATES + 1])
def test_cells_with_many_states_equal_the_reference_scan(rng, count):
    layer = xprnn.Recurrent(3, 5, cell=many_states_cell(count))
    p = random_inputs(rng, layer, T=4, N=2)
    y, final, tape = layer.forward(p.params, p.x, p.state)
    assert ("compiled" in tape.explain()) == (count <= MAX_STATES)
    with reference_only():
        XP.assert_close((y, final), layer(p.params, p.x, p.state))
