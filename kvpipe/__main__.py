"""``python -m kvpipe [VERB] [Hydra overrides]``."""

import sys


def main() -> None:
    """Entry of the ``kvpipe`` command; ends the process with the exit code of what it did."""
    from kvpipe.cli import app

    sys.exit(app.main(sys.argv))


if __name__ == "__main__":
    main()
