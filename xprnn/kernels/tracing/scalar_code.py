"""Prints a trace as scalar statements: the body of a compiled loop over rows and units."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from xprnn.kernels.tracing.graph import UntraceableError, Value

__all__ = ["OP_TEMPLATES", "ScalarCode", "literal"]

# As in NumPy, maximum and minimum return NaN if either argument is NaN, and sign(nan) is nan.
OP_TEMPLATES = {
    "abs": "abs({0})",
    "add": "{0} + {1}",
    "cos": "F(math.cos({0}))",
    "cosh": "F(math.cosh({0}))",
    "divide": "{0} / {1}",
    "equal": "{0} == {1}",
    "exp": "F(exp64({0}))",
    "expm1": "F(math.expm1({0}))",
    "greater": "{0} > {1}",
    "greater_equal": "{0} >= {1}",
    "less": "{0} < {1}",
    "less_equal": "{0} <= {1}",
    "log": "F(math.log({0}))",
    "log1p": "F(math.log1p({0}))",
    "maximum": "{0} if {0} > {1} or {0} != {0} else {1}",
    "minimum": "{0} if {0} < {1} or {0} != {0} else {1}",
    "multiply": "{0} * {1}",
    "negative": "-{0}",
    "not_equal": "{0} != {1}",
    "positive": "{0}",
    "pow": "F({0} ** {1})",
    "sign": "F(1.0) if {0} > F(0.0) else (F(-1.0) if {0} < F(0.0) else {0})",
    "sin": "F(math.sin({0}))",
    "sinh": "F(math.sinh({0}))",
    "sqrt": "F(math.sqrt({0}))",
    "square": "{0} * {0}",
    "subtract": "{0} - {1}",
    "tanh": "tanh({0})",
    "where": "{1} if {0} else {2}",
}


def literal(number: float) -> str:
    """Print a constant in the dtype of the arrays, so that it does not promote float32 arithmetic to float64."""
    number = float(number)
    return f"F({number!r})" if number - number == 0 else f"F(np.float64({str(number)!r}))"


class ScalarCode:
    """Collects the Python statements that compute values for one unit of one row, each value once.

    A subclass prints another language by overriding the templates.

    Args:
        read: returns the expression that loads the input of a name.
        names: preferred names of values; the others are t0, t1, ...
    """

    op_templates = OP_TEMPLATES
    assignment_template = "{0} = {1}"
    cast_template = "F({0})"
    format_constant = staticmethod(literal)

    def __init__(self, read: Callable[[str], str], names: Mapping[Value, str] | None = None) -> None:
        self.lines: list[str] = []
        self._read, self._preferred, self._names = read, names or {}, dict[Value, str]()
        self._uses, self._taken = dict[str, int](), set(self._preferred.values())

    def emit(self, value: Any) -> str:
        """Print the statements that compute a value; return the variable that holds it, or a constant."""
        if not isinstance(value, Value):
            return self.format_constant(value)
        if value not in self._names:
            text = self._read(value.name) if value.op == "input" else self._format_op(value)
            self._names[value] = self._new_name(value)
            self.lines.append(self.assignment_template.format(self._names[value], text))
        return self._names[value]

    def _new_name(self, value: Value) -> str:
        """Return the preferred name of a value, numbered if it is in use, else t0, t1, ..."""
        base = self._preferred.get(value, "t")
        count = self._uses.get(base, -1) + 1
        name = base if count == 0 and value in self._preferred else f"{base}{count}"
        while name in self._taken and name != base:
            count += 1
            name = f"{base}{count}"
        self._uses[base] = count
        self._taken.add(name)
        return name

    def emit_all(self, values: Iterable[Any]) -> list[str]:
        """Apply `emit` to each value."""
        return [self.emit(v) for v in values]

    def _format_op(self, value: Value) -> str:
        if value.op not in self.op_templates:
            raise UntraceableError(f"the function {value.op!r} in compiled code")
        args = self.emit_all(value.args)
        if value.op == "where" and not getattr(value.args[0], "is_boolean", False):
            raise UntraceableError("where on a number")
        if value.op != "where":
            # A comparison used as a number is 0 or 1.
            args = [
                self.cast_template.format(a) if isinstance(v, Value) and v.is_boolean else a
                for a, v in zip(args, value.args, strict=True)
            ]
        return self.op_templates[value.op].format(*args)
