"""The verbs, one screen each; nothing is decided here."""

import contextlib
import io
import os
import sys
from typing import Annotated, Any, NoReturn

import typer
from rich.text import Text
from typer.main import get_command

from phased_cpt import __version__
from phased_cpt.argv import normalise
from phased_cpt.cli import curriculum, data, dataset, machine, mixing, models, reporting  # noqa: F401 - in the order in which the help shows their verbs
from phased_cpt.cli.options import app, is_rank, tell
from phased_cpt.config.secrets import scrubbed
from phased_cpt.errors import PhasedCptError
from phased_cpt.run_dir import disk_failed
from phased_cpt.tables import shown

__all__ = ["app", "main"]


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        tell(f"phased-cpt {__version__}\n")
        raise typer.Exit()


def main(arguments: list[str] | None = None, rooms: Any = None) -> NoReturn:
    """Run a verb; a failure that a user can mend is one message on stderr and its own exit code.

    `rooms` are those that load torch; __main__ brings them in.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name of odd bytes is shown, not an error of its own
    try:
        typed = sys.argv[1:] if arguments is None else arguments
        words = normalise(typed, get_command(app))
        if is_rank() and os.environ["RANK"] != "0" and words[:1] != ["run"]:
            sys.exit(0)  # one of them tells it
        app(words, prog_name="phased-cpt", obj=rooms)
    except PhasedCptError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:  # no permission, no space, a name too long: the system's words, and where
        _fail(str(disk_failed(error, None)), 1)
    sys.exit(0)


def _fail(message: str, exit_code: int) -> NoReturn:
    text = scrubbed(message)
    with contextlib.suppress(OSError):  # of `… | tee log`, a Ctrl-C ends the tee, too
        sys.stderr.write(shown(Text(text, style="red"), stderr=True) if sys.stderr.isatty() else f"{text}\n")
        sys.stderr.flush()
    sys.exit(exit_code)
