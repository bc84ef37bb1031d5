"""The verb that tells a run to a person: report."""

from pathlib import Path
from typing import Annotated

import typer

from phased_cpt.cli.curriculum import run_that_is_there
from phased_cpt.cli.options import ConfigFile, Overrides, RunFolder, app, tell
from phased_cpt.errors import InputError


@app.command()
def report(
    config: ConfigFile = None,
    set_: Overrides = None,
    run_dir: RunFolder = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write it there, and not to report.html in the run folder.")
    ] = None,
) -> None:
    """Write a run as one page to look at: what each phase taught, and what it made the model forget."""
    from phased_cpt.report import write_report  # a twentieth of a second, with jinja

    chosen = run_that_is_there(config, set_, run_dir)
    if not chosen.ledger.exists() and not chosen.phase_folders():
        raise InputError(f"{chosen.root}: no run has begun here; name another folder with --run-dir")
    if out is not None and out.expanduser().is_dir():
        raise InputError(f"--out {out}: this is a folder; name the file, {out / 'report.html'} perhaps")
    tell(f"{write_report(chosen, out and out.expanduser())}\n")
