"""The parts of a network from elsewhere: what each may be, in which order they run, and the model they make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from xprnn.arrays.namespace import Array, InputError, Params
from xprnn.io.archive import to_like
from xprnn.layers.elementwise import ActivationLayer, Softmax
from xprnn.layers.embedding import Embedding
from xprnn.layers.linear import Linear
from xprnn.layers.sequential import Sequential

__all__ = [
    "LazyArray",
    "NamedLayer",
    "assemble",
    "infer_order",
    "raise_all",
]

MAX_ORDERED_LAYERS = 7  # parts whose order is looked for; with more, there are too many orders to try


class LazyArray(NamedTuple):
    """One array of a source: its shape and dtype first, its numbers when they are asked for."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Any]  # -> a NumPy array


class NamedLayer(NamedTuple):
    """A named part: the layers it may be (shapes alone cannot always tell) and its arrays, under the layers' names."""

    name: str  # "" for a source that is one part
    candidates: tuple[Any, ...]
    arrays: dict[str, LazyArray]


def raise_all(where: str, problems: Sequence[str]) -> None:
    """Raise InputError if there are problems, with all of them.

    >>> raise_all("from_torch", ["a", "b"])
    Traceback (most recent call last):
    xprnn.arrays.namespace.InputError: from_torch: a; b
    """
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise InputError(f"{where}: {'; '.join(problems[:20])}{more}")


def _in_features(layer: Any, given: int | None) -> int | None:
    """Features that a layer takes; 0 for an Embedding, which takes integers and must stand first."""
    if isinstance(layer, Embedding):
        return 0
    if isinstance(layer, (ActivationLayer, Softmax)):
        return given
    return int(layer.in_features if isinstance(layer, Linear) else layer.input_size)


def _out_features(layer: Any, given: int | None) -> int | None:
    if isinstance(layer, Embedding):
        return layer.embedding_dim
    if isinstance(layer, (ActivationLayer, Softmax)):
        return given
    return int(layer.out_features if isinstance(layer, Linear) else layer.output_size)


def _matching_candidates(part: NamedLayer, width: int | None) -> Iterator[tuple[Any, int | None]]:
    """What the part can be behind so many features, None for the beginning, and the features it gives out."""
    for layer in part.candidates:
        if width is None or _in_features(layer, width) == width:
            yield layer, _out_features(layer, width)


def _chains_in_order(parts: Sequence[NamedLayer], width: int | None) -> Iterator[list[tuple[NamedLayer, Any]]]:
    """Every way to run the parts in the order given, each on what the one before gives out."""
    if not parts:
        yield []
        return
    for layer, out in _matching_candidates(parts[0], width):
        for rest in _chains_in_order(parts[1:], out):
            yield [(parts[0], layer), *rest]


def _chains_in_any_order(parts: Sequence[NamedLayer], width: int | None) -> Iterator[list[tuple[NamedLayer, Any]]]:
    """The same in every order."""
    if not parts:
        yield []
        return
    for k, part in enumerate(parts):
        for layer, out in _matching_candidates(part, width):
            for rest in _chains_in_any_order([*parts[:k], *parts[k + 1 :]], out):
                yield [(part, layer), *rest]


def _format_layers(parts: Sequence[NamedLayer]) -> str:
    def one(layer: Any) -> str:
        if isinstance(layer, (ActivationLayer, Softmax)):
            return type(layer).__name__
        return f"{type(layer).__name__} {_in_features(layer, None) or 'integers'} -> {_out_features(layer, None)}"

    return ", ".join(f"{part.name} ({' or '.join(one(layer) for layer in part.candidates)})" for part in parts)


def infer_order(
    where: str, layers: Sequence[NamedLayer], order: Sequence[str] | None, ignore_source_order: bool
) -> list[tuple[NamedLayer, Any]]:
    """The parts in the order in which they run, and the one layer that each is.

    The order of the source is taken if the widths agree with it; else, and where a file has sorted its names, the only
    order that they do agree with.

    Args:
        where: for errors.
        parts: in the source's order.
        order: their names as the caller says they run, or None.
        sorted_: whether the source's order says nothing.

    Raises:
        InputError: no order fits, or several do; says what each part takes and gives.
    """
    if order is not None:
        named = {part.name: part for part in layers}
        if list(named) == [""]:
            raise InputError(f"{where}: there is one layer, and so no order to give: leave order out")
        if sorted(order) != sorted(named):
            raise InputError(f"{where}: order must name {', '.join(named)}, found {', '.join(map(str, order))}")
        layers, ignore_source_order = [named[name] for name in order], False
    found = [] if ignore_source_order and len(layers) > 1 else _first_two(_chains_in_order(layers, None))
    if not found and order is None and len(layers) <= MAX_ORDERED_LAYERS and all(part.arrays for part in layers):
        found = _first_two(_chains_in_any_order(layers, None))
    if len(found) == 1:
        return found[0]
    reason = "more than one order or reading of the parts fits" if found else "no order of the parts fits their widths"
    hint = "" if order else "; say order=[names as they run], or give the module"
    raise InputError(f"{where}: {reason}: {_format_layers(layers)}{hint}")


def _first_two(chains: Iterator[list[tuple[NamedLayer, Any]]]) -> list[list[tuple[NamedLayer, Any]]]:
    """The first two."""
    return [chain for chain, _ in zip(chains, range(2), strict=False)]


def assemble(where: str, layers: Sequence[tuple[NamedLayer, Any]], like: Array | None) -> tuple[Any, Params]:
    """The model and its parameters: the layer itself if it is alone and has no name, else a Sequential."""
    dtypes = {entry.dtype for part, _ in layers for entry in part.arrays.values()}
    if like is None and len(dtypes) > 1:
        raise InputError(
            f"{where}: its arrays are {' and '.join(sorted(dtypes))}: say like=array, whose dtype all take"
        )

    def taken(entry: LazyArray) -> Array:
        return entry.read() if like is None else to_like(where, entry.read(), like)

    if len(layers) == 1 and not layers[0][0].name:
        ((part, layer),) = layers
        return layer, {name: taken(part.arrays[name]) for name in layer.shapes()}
    model = Sequential(**{part.name: layer for part, layer in layers})
    return model, {f"{part.name}.{key}": taken(part.arrays[key]) for part, layer in layers for key in layer.shapes()}
