"""Which folder a command means: that of a run, or that of an archive within it."""

import re
from pathlib import Path

from phased_cpt.errors import InputError, PhasedCptError
from phased_cpt.ledger.record import read_record
from phased_cpt.plan import Plan
from phased_cpt.run_dir import RunDir, new_run_folder, run_folders


def choose_run_dir(plan: Plan, *, new: bool = False) -> RunDir:
    """run.dir, else the newest unfinished run of this name, else the newest finished one, else a new folder."""
    run = plan.config.run
    if run.dir is not None:
        chosen = RunDir(Path(run.dir))
        if chosen.root.exists() and not chosen.root.is_dir():
            raise InputError(f"{run.dir}: this is a file, and a run needs a folder; name another")
        if new and chosen.ledger.exists():
            raise InputError(f"--new: {run.dir} (run.dir) holds a run already; name another, or take run.dir out")
        return chosen
    folders = [] if new else [RunDir(path) for path in run_folders(Path(run.output_dir), run.name)]
    if not folders:
        return RunDir(new_run_folder(Path(run.output_dir), run.name))
    if not _is_finished(folders[0]):
        return folders[0]
    return next((folder for folder in folders[1:] if _can_go_on(folder)), folders[0])


def newest_run(output_dir: Path) -> RunDir:
    """The newest run of any name, by the time in its folder's name."""
    paths = output_dir.iterdir() if output_dir.is_dir() else []
    runs = [path for path in paths if re.search(r"-\d{8}_\d{6}$", path.name) and path.is_dir()]
    if not runs:
        raise InputError(f"no run in {output_dir}/ yet; name one with --run-dir")
    return RunDir(max(runs, key=lambda path: path.name[-15:]))


def next_archive(run_dir: RunDir) -> int:
    """The number of the next archive of a run."""
    archives = run_dir.archives.iterdir() if run_dir.archives.is_dir() else []
    return max((int(path.name) for path in archives if path.name.isdecimal()), default=0) + 1


def _is_finished(run_dir: RunDir) -> bool:
    record = read_record(run_dir)
    return record is not None and record.is_finished


def _can_go_on(run_dir: RunDir) -> bool:
    try:
        return not _is_finished(run_dir)
    except PhasedCptError:
        return False  # an old folder that is damaged does not stand in the way of the newest
