"""How `convert`, `info` and `run` are called: rows for the table of commands."""

from __future__ import annotations

import argparse

__all__ = ["MODEL_COMMANDS"]

_CONVERT_EXAMPLES = """
  python -m xprnn convert model.pt model.npz
  python -m xprnn convert book book.onnx --dtype float32
  python -m xprnn convert keras-model.keras model.safetensors
  python -m xprnn convert model.weights.h5 model.npz --config model.json
  python -m xprnn convert weights.safetensors model.npz --nonlinearity relu --batch-first
Read are .safetensors (xprnn's, or a state_dict of anyone's), .npz, .pt and .pth (a state_dict), .onnx, .keras and .h5;
written are the first four. xprnn's .safetensors hold torch's names and shapes: safetensors.torch.load_file reads them.
"""
_INFO_EXAMPLES = """
  python -m xprnn info book
  python -m xprnn info model.onnx
"""
_RUN_EXAMPLES = """
  python -m xprnn run model.onnx input.npy
  python -m xprnn run model.pt input.npy --stream --output output.npy
INPUT is (T,N,D), or (N,T,D) if the model is batch-first, or (T,D) for one sequence; for an Embedding integers (T,N) or
(T,).
"""


def _add_source_options(parser: argparse.ArgumentParser) -> None:
    about = parser.add_argument_group("what files of weights do not say")
    about.add_argument("--nonlinearity", choices=("tanh", "relu"), help="of an nn.RNN (default: tanh)")
    about.add_argument("--config", metavar="FILE", help="of a .weights.h5: a .json or .keras file that says its layers")
    about.add_argument("--batch-first", action="store_true", default=None, help="x is (N,T,D), not (T,N,D)")
    about.add_argument(
        "--order", nargs="+", metavar="PART", help="names of the parts as they run, if widths leave a doubt"
    )


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="a model file, or the DIR of a run")
    parser.add_argument("target", metavar="OUT", help="the file to write; its ending tells the format")
    parser.add_argument("--dtype", choices=("float32", "float64"), help="of the parameters (default: the source's)")
    _add_source_options(parser)


def _info_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a model file of any format, or the DIR of a run")
    _add_source_options(parser)


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a model file of any format, or the DIR of a run")
    parser.add_argument("input", metavar="INPUT", help="a .npy file")
    parser.add_argument("--output", metavar="OUT", help="a .npy file to write (default: print)")
    parser.add_argument("--stream", action="store_true", help="one step at a time; the output is that of every step")
    _add_source_options(parser)


def _source_options(args: argparse.Namespace) -> dict[str, object]:
    return {name: getattr(args, name) for name in ("nonlinearity", "batch_first", "order", "config")}


def _convert(args: argparse.Namespace) -> int:
    from xprnn.cli.model_commands import convert_command

    return convert_command(args.source, args.target, args.dtype, **_source_options(args))


def _info(args: argparse.Namespace) -> int:
    from xprnn.cli.model_commands import info_command

    return info_command(args.file, **_source_options(args))


def _run(args: argparse.Namespace) -> int:
    from xprnn.cli.model_commands import run_command

    return run_command(args.model, args.input, args.output, args.stream, **_source_options(args))


MODEL_COMMANDS = {
    "convert": ("write a model file in another format", _CONVERT_EXAMPLES, _convert_arguments, _convert),
    "info": ("say what is in a model file", _INFO_EXAMPLES, _info_arguments, _info),
    "run": ("run a model on an array", _RUN_EXAMPLES, _run_arguments, _run),
}
