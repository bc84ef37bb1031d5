"""The verb that looks before anything is started: preflight."""

import contextlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from phased_cpt.cli.options import (
    AsJson,
    ConfigFile,
    HostFile,
    LauncherName,
    MasterAddress,
    MasterPort,
    NodeRank,
    Nodes,
    NumGpus,
    Overrides,
    RunFolder,
    app,
    launch_settings,
    tell,
    tell_aside,
    the_plan,
    typed_again,
)
from phased_cpt.config.allowed import nearest
from phased_cpt.errors import InputError, PreflightFailed
from phased_cpt.tables import checks_table, fit_table, plan_table, prepared_table

if TYPE_CHECKING:
    from phased_cpt.preflight import Finding, Scene


@app.command()
def preflight(
    config: ConfigFile = None,
    set_: Overrides = None,
    run_dir: RunFolder = None,
    redo_from: Annotated[
        str | None, typer.Option(metavar="PHASE", help="As of a run that trains from this phase on again.")
    ] = None,
    launcher: LauncherName = None,
    num_gpus: NumGpus = None,
    nnodes: Nodes = None,
    node_rank: NodeRank = None,
    master_addr: MasterAddress = None,
    master_port: MasterPort = None,
    hostfile: HostFile = None,
    as_json: AsJson = False,
) -> None:
    """Look for whatever could fail, and say what to do about it; nothing is trained."""
    # numpy and tokenizers take a third of a second, which the verbs without data do not wait for.
    from phased_cpt import doors
    from phased_cpt.preflight import Scene, looked
    from phased_cpt.progress import Bar

    machines = launch_settings(
        launcher=launcher, num_gpus=num_gpus, nnodes=nnodes, master_addr=master_addr, master_port=master_port,
        hostfile=hostfile,
    )  # fmt: skip
    planned = the_plan(config, [*(set_ or []), *machines], run_dir)
    if doors.is_other_node(planned, node_rank):
        raise typer.Exit(doors.attended_jobs(planned, node_rank or 0, tell_aside, rehearses=True))
    if redo_from is not None and redo_from not in (names := [phase.name for phase in planned.phases]):
        raise InputError(f"--redo-from: no phase is called {redo_from!r}{nearest(redo_from, names)}")
    words = typed_again("preflight", config, set_ or [])
    node = node_rank or (0 if planned.config.launch.nnodes > 1 else None)
    doors.require_sense(planned, node)
    with contextlib.ExitStack() as nodes:  # who has come leaves with what is found here
        jobs = doors.launched_jobs(planned, node, words, tell_aside, rehearses=True)
        scene = Scene(planned, Bar(), lambda: nodes.enter_context(jobs), redo_from)
        _tell_all(scene, looked(scene), as_json)


def _tell_all(scene: "Scene", findings: "list[Finding]", as_json: bool) -> None:
    from phased_cpt.preflight import answer

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
