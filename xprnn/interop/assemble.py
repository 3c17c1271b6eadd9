"""Assembly of converted layers: infer their execution order, and build the layer or Sequential and its parameters."""

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

MAX_ORDERED_LAYERS = 7  # 7! = 5040 orders are tried at most; with more layers the order is not searched


class LazyArray(NamedTuple):
    """One array of a source: its shape and dtype are known at once, `read` loads its data."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Any]  # -> a NumPy array


class NamedLayer(NamedTuple):
    """One layer of a source: its name, the xprnn layers it may be, and its arrays under xprnn's parameter names.

    There are several candidates if the shapes fit several layers: an Embedding and a Linear without bias.
    """

    name: str  # "" if the source is a single layer
    candidates: tuple[Any, ...]
    arrays: dict[str, LazyArray]


def raise_all(where: str, problems: Sequence[str]) -> None:
    """Raise one InputError that lists the problems (the first 20 and a count of the rest); return if there are none.

    >>> raise_all("from_torch", ["a", "b"])
    Traceback (most recent call last):
    xprnn.arrays.namespace.InputError: from_torch: a; b
    """
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise InputError(f"{where}: {'; '.join(problems[:20])}{more}")


def _in_features(layer: Any, width: int | None) -> int | None:
    """Input features of a layer; `width` if it accepts any number; 0 for an Embedding, which can only come first."""
    if isinstance(layer, Embedding):
        return 0
    if isinstance(layer, (ActivationLayer, Softmax)):
        return width
    return int(layer.in_features if isinstance(layer, Linear) else layer.input_size)


def _out_features(layer: Any, width: int | None) -> int | None:
    """Output features of a layer that receives `width` input features."""
    if isinstance(layer, Embedding):
        return layer.embedding_dim
    if isinstance(layer, (ActivationLayer, Softmax)):
        return width
    return int(layer.out_features if isinstance(layer, Linear) else layer.output_size)


def _matching_candidates(source: NamedLayer, width: int | None) -> Iterator[tuple[Any, int | None]]:
    """Yield each candidate that accepts `width` input features (None: any number), with its output features."""
    for layer in source.candidates:
        if width is None or _in_features(layer, width) == width:
            yield layer, _out_features(layer, width)


def _chains_in_order(sources: Sequence[NamedLayer], width: int | None) -> Iterator[list[tuple[NamedLayer, Any]]]:
    """Yield each choice of candidates for which the widths of adjacent layers match, in the order of `sources`."""
    if not sources:
        yield []
        return
    for layer, out in _matching_candidates(sources[0], width):
        for rest in _chains_in_order(sources[1:], out):
            yield [(sources[0], layer), *rest]


def _chains_in_any_order(sources: Sequence[NamedLayer], width: int | None) -> Iterator[list[tuple[NamedLayer, Any]]]:
    """Yield each order of the layers and choice of candidates for which the widths of adjacent layers match."""
    if not sources:
        yield []
        return
    for k, source in enumerate(sources):
        for layer, out in _matching_candidates(source, width):
            for rest in _chains_in_any_order([*sources[:k], *sources[k + 1 :]], out):
                yield [(source, layer), *rest]


def _format_layers(sources: Sequence[NamedLayer]) -> str:
    def widths(layer: Any) -> str:
        if isinstance(layer, (ActivationLayer, Softmax)):
            return type(layer).__name__
        return f"{type(layer).__name__} {_in_features(layer, None) or 'integers'} -> {_out_features(layer, None)}"

    return ", ".join(
        f"{source.name} ({' or '.join(widths(layer) for layer in source.candidates)})" for source in sources
    )


def infer_order(
    where: str, layers: Sequence[NamedLayer], order: Sequence[str] | None, ignore_source_order: bool
) -> list[tuple[NamedLayer, Any]]:
    """Put the layers in execution order, and choose one candidate for each.

    An explicit `order` is used as it is. Otherwise the source's order is used if the widths of adjacent layers match.
    If they do not, or if `ignore_source_order`, all orders are tried, and exactly one must match. The orders are tried
    only if there are at most MAX_ORDERED_LAYERS layers, all of them with parameters.

    Args:
        where: prefix of error messages.
        layers: the source's layers, in its order.
        order: the layers' names in execution order, from the caller, or None.
        ignore_source_order: True if the source's order carries no information, as in a file with sorted names.

    Returns:
        Pairs (source layer, chosen candidate) in execution order.

    Raises:
        InputError: no order fits, or several do; the message lists the input and output widths of each layer.
    """
    if order is not None:
        by_name = {source.name: source for source in layers}
        if list(by_name) == [""]:
            raise InputError(f"{where}: the source is a single layer: leave order out")
        if sorted(order) != sorted(by_name):
            raise InputError(f"{where}: order must name {', '.join(by_name)}, found {', '.join(map(str, order))}")
        layers, ignore_source_order = [by_name[name] for name in order], False
    chains = [] if ignore_source_order and len(layers) > 1 else _first_two(_chains_in_order(layers, None))
    if not chains and order is None and len(layers) <= MAX_ORDERED_LAYERS and all(source.arrays for source in layers):
        chains = _first_two(_chains_in_any_order(layers, None))
    if len(chains) == 1:
        return chains[0]
    reason = "more than one order or type of the layers fits" if chains else "no order of the layers fits their widths"
    hint = "" if order else "; pass order=[names in execution order], or pass the module"
    raise InputError(f"{where}: {reason}: {_format_layers(layers)}{hint}")


def _first_two(chains: Iterator[list[tuple[NamedLayer, Any]]]) -> list[list[tuple[NamedLayer, Any]]]:
    """Return at most two chains: two are enough to show that the order is ambiguous."""
    return [chain for chain, _ in zip(chains, range(2), strict=False)]


def assemble(where: str, layers: Sequence[tuple[NamedLayer, Any]], like: Array | None) -> tuple[Any, Params]:
    """Build the model and its parameters.

    Args:
        where: prefix of error messages.
        layers: pairs (source layer, chosen candidate) in execution order, as from `infer_order`.
        like: array library, dtype and device of the parameters; None: NumPy, in the source's dtype.

    Returns:
        model, params. A single layer with the name "" is returned as it is; otherwise the model is a Sequential.

    Raises:
        InputError: the arrays have different dtypes and `like` is None.
    """
    dtypes = {array.dtype for source, _ in layers for array in source.arrays.values()}
    if like is None and len(dtypes) > 1:
        raise InputError(
            f"{where}: its arrays are {' and '.join(sorted(dtypes))}: pass like=array to convert all to one dtype"
        )

    def load(array: LazyArray) -> Array:
        return array.read() if like is None else to_like(where, array.read(), like)

    if len(layers) == 1 and not layers[0][0].name:
        ((source, layer),) = layers
        return layer, {name: load(source.arrays[name]) for name in layer.shapes()}
    model = Sequential(**{source.name: layer for source, layer in layers})
    return model, {
        f"{source.name}.{key}": load(source.arrays[key]) for source, layer in layers for key in layer.shapes()
    }
