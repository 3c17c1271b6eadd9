"""What `import xprnn` adds to `import numpy`, and whether it imports anything optional.

    python benchmarks/cpu/import_time.py [--rounds N]

Each round is a fresh interpreter that imports NumPy and then xprnn, from files that the system has in memory.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile

from benchmarks.harness.options import argument_parser, write_results

MAX_IMPORT_MS = 50.0  # milliseconds
OPTIONAL_PACKAGES = ("cupy", "h5py", "jax", "llvmlite", "matplotlib", "numba", "onnx", "onnxruntime", "torch")
IMPORT_SCRIPT = """
import sys, time
a = time.perf_counter()
import numpy
b = time.perf_counter()
import xprnn
print((b - a) * 1e3, (time.perf_counter() - b) * 1e3, *(m for m in sys.modules if "." not in m))
"""


def time_imports(pycache_prefix: str) -> tuple[float, float, list[str]]:
    """Milliseconds for NumPy, for xprnn after it, and which optional packages came along."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {
        "PYTHONPYCACHEPREFIX": pycache_prefix
    }
    done = subprocess.run([sys.executable, "-c", IMPORT_SCRIPT], capture_output=True, text=True, check=True, env=env)
    first, second, *loaded = done.stdout.split()
    return float(first), float(second), sorted(set(loaded) & set(OPTIONAL_PACKAGES))


def main() -> int:
    """Measure, print, write."""
    args = argument_parser(__doc__, rounds=21).parse_args()
    with tempfile.TemporaryDirectory() as compiled:
        time_imports(compiled)  # compiles and reads the files, as an installation does
        numpy, own, extra = zip(*(time_imports(compiled) for _ in range(args.rounds)), strict=True)
    low, middle, high = statistics.quantiles(own, n=4)
    goals = [
        {"what": "import xprnn after numpy, milliseconds", "value": middle, "most": MAX_IMPORT_MS},
        {"what": "optional packages that import xprnn loads", "value": len(extra[-1]), "most": 0},
    ]
    run = {"numpy": numpy, "xprnn": own, "optional": extra[-1], "goals": goals}
    text = (
        f"`import xprnn` adds {middle:.0f} ms (quartiles {low:.0f} to {high:.0f}) to `import numpy`, which takes "
        f"{statistics.median(numpy):.0f} ms; optional packages imported: {', '.join(extra[-1]) or 'none'}. "
        f"{args.rounds} fresh processes."
    )
    return write_results(args, [text], run)


if __name__ == "__main__":
    sys.exit(main())
