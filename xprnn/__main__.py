"""`python -m xprnn`."""

import sys

if __name__ == "__main__":
    try:
        from xprnn.cli.main import main

        code = main()
    except KeyboardInterrupt:  # before a command has begun; from then on `main` answers for it
        code = 130
    sys.exit(code)
