"""``python -m learnsched``: the command line."""

import sys

from learnsched.cli import main

if __name__ == "__main__":
    sys.exit(main())
