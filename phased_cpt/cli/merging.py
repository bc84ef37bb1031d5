"""What `merge` and `run --merge-only` do alike."""

from pathlib import Path
from typing import TYPE_CHECKING

from phased_cpt.cli.options import run_of, tell, the_plan
from phased_cpt.errors import InputError

if TYPE_CHECKING:
    from phased_cpt.merging import Merged


def merged_run(
    config: Path | None,
    overrides: list[str],
    run_dir: Path | None,
    phase: str | None = None,
    base: str | None = None,
    out: Path | None = None,
) -> "Merged":
    """Of a run: of the folder that is named, or that the configuration finds, or the newest."""
    from phased_cpt.merging import merge_published

    chosen = run_of(config, [], run_dir)
    here = [f"model.name={base}", "model.from_config=null"] if base else []
    plan = the_plan(None, [*overrides, *here], chosen.root)
    return merge_published(plan, chosen, phase, out)


def merged_folders(
    base: str | None, adapters: list[Path], out: Path | None, overrides: list[str], others: object
) -> "Merged":
    from phased_cpt.merging import merge_folders

    if others:
        raise InputError("--adapter names an adapter of its own; leave -c, --run-dir and --phase out")
    if base is None or out is None:
        raise InputError("--adapter needs the base that it is for, and where to: --base MODEL --adapter DIR --out DIR")
    return merge_folders(base, [each.expanduser() for each in adapters], out.expanduser(), overrides)


def tell_merged(made: "Merged", as_json: bool) -> None:
    if as_json:
        tell({"folder": str(made.folder), "merged_now": made.now, **made.facts})
    else:
        tell(f"{'merged' if made.now else 'nothing to do: merged already'}: {made.folder}\n")
