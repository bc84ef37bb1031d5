"""The verbs of a run: plan, run, status."""

import contextlib
import functools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phased_cpt.cli.merging import merged_run, tell_merged
from phased_cpt.cli.options import (
    AsJson,
    ConfigFile,
    Control,
    DryRun,
    HostFile,
    LauncherName,
    MasterAddress,
    MasterPort,
    MergeOnly,
    NodeRank,
    Nodes,
    NumGpus,
    Overrides,
    RunFolder,
    Smoke,
    app,
    is_rank,
    launch_settings,
    run_of,
    tell,
    tell_aside,
    the_plan,
    typed_again,
)
from phased_cpt.config import Loaded
from phased_cpt.errors import InputError
from phased_cpt.ledger import amended, choose_run_dir, holder_of, next_archive, read_record, reconcile
from phased_cpt.plan import Plan, Wanted, make_plan
from phased_cpt.run_dir import RunDir
from phased_cpt.stopping import heard
from phased_cpt.tables import (
    forgetting_table,
    memory_table,
    outcome_line,
    plan_facts,
    plan_table,
    prepared_table,
    read_forgetting,
    smoke_line,
    status_facts,
    status_table,
    summary_facts,
    summary_table,
)

if TYPE_CHECKING:
    from phased_cpt.data.prepared import PreparedRun
    from phased_cpt.doors import Door


@app.command()
def plan(
    config: ConfigFile = None,
    set_: Overrides = None,
    run_dir: RunFolder = None,
    fit: Annotated[bool, typer.Option("--fit", help="Show what memory each phase needs, and whether it fits.")] = False,
    gpus: Annotated[int | None, typer.Option(metavar="N", min=1, help="… on so many GPUs in each machine.")] = None,
    gpu_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="… of so much memory each (80GB).")] = None,
    host_memory: Annotated[str | None, typer.Option(metavar="SIZE", help="… on a host of so much (1TB).")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a run would do: every phase, and where each value came from; with --fit, what memory it needs."""
    planned = the_plan(config, set_, run_dir)
    if not (fit or gpus or gpu_memory or host_memory):
        tell(plan_facts(planned) if as_json else plan_table(planned))
        return
    from phased_cpt.fitting import fit_facts  # half a second, with the hub's library

    facts = fit_facts(planned, gpus, gpu_memory, host_memory)
    tell(plan_facts(planned) | {"fit": facts} if as_json else memory_table(facts))


@app.command()
def run(
    context: typer.Context,
    config: ConfigFile = None,
    set_: Overrides = None,
    run_dir: RunFolder = None,
    new: Annotated[bool, typer.Option("--new", help="Start another run, whatever there is.")] = False,
    redo_from: Annotated[str | None, typer.Option(metavar="PHASE", help="Train from this phase on again.")] = None,
    from_: Annotated[str | None, typer.Option("--from", metavar="PHASE", help="Begin at this phase.")] = None,
    until: Annotated[str | None, typer.Option(metavar="PHASE", help="Stop after this phase.")] = None,
    phase: Annotated[str | None, typer.Option(metavar="PHASE", help="Train this phase alone.")] = None,
    steps_today: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Take N optimizer steps at most now, then save and stop.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(metavar="M", min=0.001, max=525_600, help="Save and stop after M minutes.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="STEP", help="Go on from this checkpoint (a step, or a folder), or from none."),
    ] = None,
    launcher: LauncherName = None,
    num_gpus: NumGpus = None,
    nnodes: Nodes = None,
    node_rank: NodeRank = None,
    master_addr: MasterAddress = None,
    master_port: MasterPort = None,
    hostfile: HostFile = None,
    smoke: Smoke = False,
    dry_run: DryRun = False,
    control: Control = False,
    merge_only: MergeOnly = False,
    as_json: AsJson = False,
) -> None:
    """Run the curriculum, or go on with it (the default verb)."""
    if phase and (from_ or until):
        raise InputError("--phase stands for --from and --until; give it alone, or those two")
    if merge_only:
        tell_merged(merged_run(config, set_ or [], run_dir), as_json)
        return
    where = {"nnodes": nnodes, "master_addr": master_addr, "master_port": master_port, "hostfile": hostfile}
    settings = [*(set_ or []), *launch_settings(launcher=launcher, num_gpus=num_gpus, **where)]
    if dry_run:
        if os.environ.get("RANK", "0") == "0":
            _print_dry_run(_on_ranks(the_plan(config, settings, run_dir)), new, redo_from, as_json)
        return
    wanted = Wanted(redo_from, from_ or phase, until or phase, resume, steps_today, minutes, smoke, control)
    with contextlib.ExitStack() as leaving:
        read = functools.partial(the_plan, config, settings, run_dir)
        ranks = _ranks(context, leaving, read) if is_rank() else None
        planned = read()
        if planned.config.launch.launcher == "inline" and ranks is None:
            ranks = _ranks(context, leaving, read)
        door = ranks or leaving.enter_context(_launched_jobs(planned, node_rank, config, set_ or []))
        _run(planned, door, wanted, new, as_json)


@contextlib.contextmanager
def _launched_jobs(planned: Plan, node: int | None, config: Path | None, overrides: list[str]) -> "Iterator[Door]":
    """The first door, on all machines; on the other nodes this is where a call spends its life."""
    from phased_cpt import doors

    if doors.is_other_node(planned, node):
        raise typer.Exit(doors.attended_jobs(planned, node or 0, tell_aside))
    with doors.launched_jobs(planned, node, typed_again("run", config, overrides), tell_aside) as door:
        yield door


def _ranks(context: typer.Context, leaving: contextlib.ExitStack, read: Callable[[], Plan]) -> "Door":
    """This process as a rank. Those behind the first do as it says, and leave with it."""
    ranks = context.obj.ranks()
    if ranks.number > 0:
        raise typer.Exit(ranks.follow(read))
    door: Door = leaving.enter_context(ranks)
    ranks.typed = read()  # behind it: where that fails, the others hear of it
    return door


def _on_ranks(planned: Plan) -> Plan:
    """The plan for the processes that would train it, whatever launch.num_gpus says."""
    launch = planned.config.launch
    alike = launch.num_gpus and launch.num_gpus * launch.nnodes  # on each machine as on this one
    alone = 1 if launch.launcher == "inline" else None if launch.hostfile else alike
    ranks = int(os.environ["WORLD_SIZE"]) if is_rank() else alone
    return make_plan(Loaded(planned.config, planned.places), ranks)


def _run(planned: Plan, door: "Door", wanted: Wanted, new: bool, as_json: bool) -> None:
    with heard():  # a stop while the rest is imported, too
        _conducted(planned, door, wanted, new, as_json)


def _conducted(planned: Plan, door: "Door", wanted: Wanted, new: bool, as_json: bool) -> None:
    # numpy and tokenizers take a third of a second, which the verbs without data do not wait for.
    from phased_cpt.conductor import conduct, smoke_run_dir
    from phased_cpt.progress import Bar

    chosen = smoke_run_dir(planned) if wanted.smoke else choose_run_dir(planned, new=new)

    def look(prepared: "PreparedRun", counted: Plan) -> None:
        if not as_json:
            tell(plan_table(counted))
            tell(prepared_table(prepared))

    try:
        outcome = conduct(planned, chosen, door, wanted, Bar(), look)
    except BaseException:
        if wanted.smoke and chosen.root.exists():
            sys.stderr.write(f"what the smoke run has left is in {chosen.root}\n")
        raise
    facts = outcome.run_dir, outcome.plan, outcome.trained
    if as_json:
        run = status_facts(chosen, read_record(chosen), None)
        run |= {"published": summary_facts(*facts), "forgetting": read_forgetting(chosen)}
        tell({"plan": plan_facts(outcome.plan), "run": run})
    else:
        if forgetting := read_forgetting(chosen):
            tell(forgetting_table(forgetting))
        tell(summary_table(*facts, places=not wanted.smoke))
        tell(smoke_line(outcome.trained) if wanted.smoke else outcome_line(*facts, outcome.finished))
    if wanted.smoke:
        shutil.rmtree(chosen.root)


def _print_dry_run(planned: Plan, new: bool, redo_from: str | None, as_json: bool) -> None:
    chosen = choose_run_dir(planned, new=new)
    record = read_record(chosen)
    if record is None and redo_from:
        raise InputError("--redo-from: no run has begun yet that could be redone; leave it out")
    planned = amended(planned, record, redo_from)
    would_be = record and reconcile(record, planned, redo_from, next_archive(chosen))
    facts = chosen, would_be, holder_of(chosen)
    if as_json:
        tell({"plan": plan_facts(planned), "run": status_facts(*facts)})
    else:
        tell(plan_table(planned))
        tell(status_table(*facts))


@app.command()
def status(
    config: ConfigFile = None,
    set_: Overrides = None,
    run_dir: RunFolder = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show it live, until the run ends; Ctrl-C leaves.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show how far a run has come; of the newest run, if none is named."""
    if watch and as_json:
        raise InputError("--watch goes on and on, and --json prints facts once; leave one of them out")
    chosen = run_that_is_there(config, set_, run_dir)
    if watch:
        from phased_cpt.report.watch import watch as live  # a twentieth of a second, with jinja

        live(chosen)
        return
    facts = chosen, read_record(chosen), holder_of(chosen)
    tell(status_facts(*facts) if as_json else status_table(*facts))


def run_that_is_there(config: Path | None, overrides: list[str] | None, run_dir: Path | None) -> RunDir:
    """The folder that is meant, which must be one."""
    chosen = run_of(config, overrides, run_dir)
    if not chosen.root.is_dir():
        if config and not run_dir:
            raise InputError(f"no run of {config} has begun yet; `phased-cpt run` with the same options begins one")
        raise InputError(f"{chosen.root}: no such run folder; name another, or its configuration with -c")
    return chosen
