"""The verb that looks before anything is started: preflight."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from phased_cpt.cli.options import AsJson, ConfigFile, Overrides, RunFolder, app, tell, the_plan
from phased_cpt.errors import PreflightFailed
from phased_cpt.tables import checks_table, fit_table, plan_table, prepared_table

if TYPE_CHECKING:
    from phased_cpt.preflight import Scene


@app.command()
def preflight(
    config: ConfigFile = None,
    set_: Overrides = None,
    run_dir: RunFolder = None,
    num_gpus: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="For so many processes (launch.num_gpus).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look for whatever could fail, and say what to do about it; nothing is trained."""
    # numpy and tokenizers take a third of a second, which the verbs without data do not wait for.
    from phased_cpt.preflight import Scene, answer, looked
    from phased_cpt.progress import Bar

    ranks = [f"launch.num_gpus={num_gpus}"] if num_gpus else []
    scene = Scene(the_plan(config, [*(set_ or []), *ranks], run_dir), Bar())
    findings = looked(scene)
    facts = answer(findings, scene)
    if as_json:
        tell(facts)
    else:
        tell(checks_table(facts["checks"]))
        _tell_what_would_run(scene, facts["fit"])
    if failed := dict.fromkeys(finding.name for finding in findings if finding.verdict == "fail"):
        raise PreflightFailed(f"this run would fail: {', '.join(failed)}")


def _tell_what_would_run(scene: "Scene", fit: dict[str, Any]) -> None:
    """The picture before a launch: the hardware, the phases, their data, and what they need."""
    if not scene.counted.missing:
        tell(plan_table(scene.counted.given()))
        tell(prepared_table(scene.prepared.given()))
    elif not scene.by_ranks.missing:
        tell(plan_table(scene.by_ranks.given()))
    tell(fit_table(fit))
