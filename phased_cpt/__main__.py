"""The way in: of the command, of `python -m phased_cpt`, and of what `deepspeed --module phased_cpt` starts."""

import sys
from typing import NoReturn

STOPPED = 130  # what shells say of a program that Ctrl-C has ended


def main() -> NoReturn:
    """Run a verb. It is imported in here, because a Ctrl-C may come in that fifth of a second, too."""
    try:
        from phased_cpt.cli import main as run

        run()
    except KeyboardInterrupt:
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
