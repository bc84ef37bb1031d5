"""What `merge` and `run --merge-only` do alike."""

from pathlib import Path
from typing import TYPE_CHECKING

from phased_cpt.cli.options import run_of, tell, tell_aside, the_plan
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
    from phased_cpt.blend import merge_published

    _require_of_the_merge(overrides, "")
    chosen = run_of(config, [], run_dir)
    here = [f"model.name={base}", "model.from_config=null"] if base else []
    plan = the_plan(None, [*overrides, *here], chosen.root)
    return merge_published(plan, chosen, phase, out, base is not None, tell_aside)


def merged_folders(
    base: str | None, adapters: list[Path], out: Path | None, overrides: list[str], others: object
) -> "Merged":
    from phased_cpt.merging import merge_folders

    if others:
        raise InputError("--adapter names an adapter of its own; leave -c, --run-dir and --phase out")
    if base is None or out is None:
        raise InputError("--adapter needs the base that it is for, and where to: --base MODEL --adapter DIR --out DIR")
    _require_of_the_merge(overrides, "model.trust_remote_code")
    folders = [each.expanduser() for each in adapters]
    return merge_folders(base, folders, out.expanduser(), overrides, tell_aside)


def _require_of_the_merge(overrides: list[str], also: str) -> None:
    """How a run was trained is known, and not a matter of what is typed now."""
    for each in overrides:
        key = each.partition("=")[0].strip()
        if not key.startswith("merge.") and key != also:
            raise InputError(f"--set {key}: a merge takes merge.dtype, merge.base, merge.max_shard_size; leave it out")


def tell_merged(made: "Merged", as_json: bool) -> None:
    if as_json:
        tell({"folder": str(made.folder), "merged_now": made.now, **made.facts})
    else:
        tell(f"{'merged' if made.now else 'nothing to do: merged already'}: {made.folder}\n")
