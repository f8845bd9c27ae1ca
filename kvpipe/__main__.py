"""``python -m kvpipe [VERB] [Hydra overrides]``."""

import sys


def main() -> None:
    """Entry of the ``kvpipe`` command; ends the process with the exit code of what it did."""
    from kvpipe import cli

    sys.exit(cli.main(sys.argv))


if __name__ == "__main__":
    main()
