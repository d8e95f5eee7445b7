"""``python -m learnsched``: the command line."""

from learnsched.cli import main

if __name__ == "__main__":
    main()
