"""Entry point of `python -m xprnn`."""

import sys

if __name__ == "__main__":
    try:
        from xprnn.cli.main import main

        code = main()
    except KeyboardInterrupt:  # during the import; later ones are handled by `main`
        code = 130
    sys.exit(code)
