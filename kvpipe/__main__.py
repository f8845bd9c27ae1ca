"""``python -m kvpipe [VERB] [Hydra overrides]``."""

import sys


def main() -> None:
    """Entry of the ``kvpipe`` command; ends the process with the exit code of the verb."""
    # Imports take most of a second, in which Ctrl-C may come.
    try:
        from kvpipe.system import streams

        streams.prepare()
        try:
            from kvpipe.cli import app

            code = app.main(sys.argv)
        finally:
            streams.end()
    except KeyboardInterrupt:
        print("kvpipe: interrupted by Ctrl-C", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
