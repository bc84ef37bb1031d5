"""The verbs, one screen each; nothing is decided here."""

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import RenderableType
from rich.text import Text
from typer.main import get_command

from phased_cpt import __version__
from phased_cpt.argv import normalise
from phased_cpt.config import Loaded, from_record, load
from phased_cpt.config.allowed import nearest, schema
from phased_cpt.config.schema import Run
from phased_cpt.config.secrets import scrubbed
from phased_cpt.config.shipped import shipped_folder, shipped_names
from phased_cpt.errors import InputError, PhasedCptError
from phased_cpt.ledger import choose_run_dir, holder_of, newest_run, next_archive, read_record, reconcile
from phased_cpt.plan import Plan, Wanted, make_plan
from phased_cpt.resolved import resolved_yaml
from phased_cpt.run_dir import RunDir, disk_failed
from phased_cpt.stopping import heard
from phased_cpt.tables import (
    config_facts,
    outcome_line,
    plan_facts,
    plan_table,
    prepared_facts,
    prepared_table,
    shown,
    smoke_line,
    status_facts,
    status_table,
    summary_facts,
    summary_table,
    trained_tokenizer,
)

if TYPE_CHECKING:
    from phased_cpt.data.prepared import PreparedRun
    from phased_cpt.doors import Door

_HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=_HELP_OPTIONS,
    help="Teach a language model in stages: one YAML lists the phases, each starts from what the one before published.",
    epilog="Begin with: phased-cpt plan -c demo",
)
config_app = typer.Typer(
    no_args_is_help=True,
    context_settings=_HELP_OPTIONS,
    help="The configuration: its schema, and what it resolves to.",
)
app.add_typer(config_app, name="config")
tokenizer_app = typer.Typer(
    no_args_is_help=True, context_settings=_HELP_OPTIONS, help="A tokenizer of one's own, for a model from scratch."
)
app.add_typer(tokenizer_app, name="tokenizer")

ConfigFile = Annotated[
    Path | None, typer.Option("-c", "--config", help="YAML or JSON file, or the name of a shipped one.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value; repeatable.")
]
RunFolder = Annotated[
    Path | None, typer.Option("--run-dir", help="Run folder, instead of the one that the name finds.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the facts as JSON, and nothing else, on stdout.")]


@app.command()
def plan(config: ConfigFile = None, set_: Overrides = None, run_dir: RunFolder = None, as_json: AsJson = False) -> None:
    """Show what a run would do: every phase, and where each value came from."""
    planned = _plan(config, set_, run_dir)
    _print(plan_facts(planned) if as_json else plan_table(planned))


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
    launcher: Annotated[
        str | None, typer.Option(metavar="NAME", help="local, deepspeed, torchrun or inline (launch.launcher).")
    ] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="Try it: two steps of every phase, in a folder that is then removed.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and the run folder, and write nothing.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run the curriculum, or go on with it (the default verb)."""
    chosen_launcher = [f"launch.launcher={launcher}"] if launcher else []
    if phase and (from_ or until):
        raise InputError("--phase stands for --from and --until; give it alone, or those two")
    if dry_run:
        if os.environ.get("RANK", "0") == "0":
            planned = _on_ranks(_plan(config, [*(set_ or []), *chosen_launcher], run_dir))
            _print_dry_run(planned, new, redo_from, as_json)
        return
    with contextlib.ExitStack() as leaving:
        ranks = _ranks(context, leaving) if _is_rank() else None
        planned = _plan(config, [*(set_ or []), *chosen_launcher], run_dir)
        if planned.config.launch.launcher == "inline" and ranks is None:
            ranks = _ranks(context, leaving)
        wanted = Wanted(redo_from, from_ or phase, until or phase, resume, steps_today, minutes, smoke)
        _run(planned, ranks, wanted, new, as_json)


def _ranks(context: typer.Context, leaving: contextlib.ExitStack) -> "Door":
    """This process as a rank. Those behind the first do as it says, and leave with it."""
    ranks = context.obj()
    if ranks.number > 0:
        raise typer.Exit(ranks.follow())
    door: Door = leaving.enter_context(ranks)
    return door


def _is_rank() -> bool:
    """Whether a launcher has started this process beside others."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def _on_ranks(planned: Plan) -> Plan:
    """The plan for the processes that would train it, whatever launch.num_gpus says."""
    alone = 1 if planned.config.launch.launcher == "inline" else None
    ranks = int(os.environ["WORLD_SIZE"]) if _is_rank() else alone
    return make_plan(Loaded(planned.config, planned.places), ranks)


def _run(planned: Plan, ranks: "Door | None", wanted: Wanted, new: bool, as_json: bool) -> None:
    with heard():  # a stop while the rest is imported, too
        _conducted(planned, ranks, wanted, new, as_json)


def _conducted(planned: Plan, ranks: "Door | None", wanted: Wanted, new: bool, as_json: bool) -> None:
    # numpy and tokenizers take a third of a second, which the verbs without data do not wait for.
    from phased_cpt.conductor import conduct, smoke_run_dir
    from phased_cpt.doors import LaunchedJobs
    from phased_cpt.progress import Bar

    chosen = smoke_run_dir(planned) if wanted.smoke else choose_run_dir(planned, new=new)
    door = ranks or LaunchedJobs.of(planned)

    def look(prepared: "PreparedRun", counted: Plan) -> None:
        if not as_json:
            _print(plan_table(counted))
            _print(prepared_table(prepared))

    try:
        outcome = conduct(planned, chosen, door, wanted, Bar(), look)
    except BaseException:
        if wanted.smoke and chosen.root.exists():
            sys.stderr.write(f"what the smoke run has left is in {chosen.root}\n")
        raise
    facts = outcome.run_dir, outcome.plan, outcome.trained
    if as_json:
        run = status_facts(chosen, read_record(chosen), None) | {"published": summary_facts(*facts)}
        _print({"plan": plan_facts(outcome.plan), "run": run})
    else:
        _print(summary_table(*facts, places=not wanted.smoke))
        _print(smoke_line(outcome.trained) if wanted.smoke else outcome_line(*facts, outcome.finished))
    if wanted.smoke:
        shutil.rmtree(chosen.root)


def _print_dry_run(planned: Plan, new: bool, redo_from: str | None, as_json: bool) -> None:
    chosen = choose_run_dir(planned, new=new)
    record = read_record(chosen)
    if record is None and redo_from:
        raise InputError("--redo-from: no run has begun yet that could be redone; leave it out")
    would_be = record and reconcile(record, planned, redo_from, next_archive(chosen))
    facts = chosen, would_be, holder_of(chosen)
    if as_json:
        _print({"plan": plan_facts(planned), "run": status_facts(*facts)})
    else:
        _print(plan_table(planned))
        _print(status_table(*facts))


@app.command("prepare")
def prepare_verb(
    config: ConfigFile = None,
    set_: Overrides = None,
    run_dir: RunFolder = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that tokenise; every core if absent.")] = None,
    emit_jsonl: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the rows of every phase and split as JSONL, too.")
    ] = None,
    emit_bin: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the documents of every phase and split as .bin, too.")
    ] = None,
    inspect: Annotated[
        str | None,
        typer.Option(
            metavar="PHASE:N", help="Show block N (the first is 0) of a phase as text; PHASE:eval:N: held out."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make the data of every phase: tokens, the split, blocks; nothing is made twice."""
    from phased_cpt.data import emit, inspection

    plan = _plan(config, set_, run_dir)
    written = {
        "--emit-jsonl": emit_jsonl and emit.new_folder("--emit-jsonl", emit_jsonl.expanduser()),
        "--emit-bin": emit_bin and emit.new_folder("--emit-bin", emit_bin.expanduser()),
    }
    prepared = _prepared(plan, workers)
    for option, write in {"--emit-jsonl": emit.rows, "--emit-bin": emit.documents}.items():
        if folder := written[option]:
            write(prepared, folder)
            sys.stderr.write(f"{option}: the files of every phase and split are in {folder}\n")
    if inspect:
        shown_block = inspection.block_facts if as_json else inspection.shown_block
        _print(shown_block(prepared, inspect))
    else:
        _print(prepared_facts(prepared) if as_json else prepared_table(prepared))


@app.command()
def status(
    config: ConfigFile = None, set_: Overrides = None, run_dir: RunFolder = None, as_json: AsJson = False
) -> None:
    """Show how far a run has come; of the newest run, if none is named."""
    # What is typed is read and checked, also where --run-dir alone decides.
    planned = _plan(config, set_, run_dir) if config or set_ else None
    if run_dir is not None:
        chosen = RunDir(run_dir.expanduser())
    else:
        chosen = choose_run_dir(planned) if planned else newest_run(Path(Run().output_dir))
    if not chosen.root.is_dir():
        if planned and not run_dir:
            raise InputError(f"no run of {config} has begun yet; `phased-cpt run` with the same options begins one")
        raise InputError(f"{chosen.root}: no such run folder; name another, or its configuration with -c")
    facts = chosen, read_record(chosen), holder_of(chosen)
    _print(status_facts(*facts) if as_json else status_table(*facts))


@config_app.command("show")
def config_show(
    config: ConfigFile = None, set_: Overrides = None, run_dir: RunFolder = None, as_json: AsJson = False
) -> None:
    """Print every value that holds, and where it came from, as a YAML that can be run."""
    planned = _plan(config, set_, run_dir)
    _print(config_facts(planned) if as_json else resolved_yaml(planned))


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of a configuration, for editors."""
    _print(schema())


@tokenizer_app.command("train")
def tokenizer_train(
    sources: Annotated[
        list[str], typer.Argument(metavar="SOURCES...", help="Files, folders or globs, as a phase names them.")
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the tokenizer; it must hold none yet.")],
    vocabulary: Annotated[int, typer.Option(help="Entries: 260 or more; 4096 for a small model.")],
    text_field: Annotated[str, typer.Option(metavar="FIELD", help="Field of the text, as data.text_field.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Train a byte-level BPE on texts: any text comes back as it was, and prepare and transformers read it."""
    from phased_cpt.data.train_tokenizer import train_tokenizer
    from phased_cpt.progress import Bar

    facts = train_tokenizer(sources, output.expanduser(), vocabulary, text_field=text_field, tell=Bar().tell)
    _print(facts if as_json else trained_tokenizer(facts))


def _plan(config: Path | None, overrides: list[str] | None, run_dir: Path | None) -> Plan:
    return make_plan(_load(config, overrides or [], run_dir))


def _prepared(plan: Plan, workers: int | None = None) -> "PreparedRun":
    # numpy and tokenizers take a third of a second, which the verbs without data do not wait for.
    from phased_cpt.data.prepare import prepare
    from phased_cpt.progress import Bar

    return prepare(plan, Bar(), workers)


def _load(config: Path | None, overrides: list[str], run_dir: Path | None) -> Loaded:
    """A file, or what a run folder has kept of its last attempt; and --run-dir is run.dir."""
    if config is not None:
        loaded = load(_find(config), overrides)
        return loaded.in_folder(str(run_dir.expanduser())) if run_dir else loaded
    if run_dir is None:
        raise InputError("no configuration is named: add `-c FILE`, or `-c demo` to look at a shipped one")
    run_dir = run_dir.expanduser()
    record = read_record(RunDir(run_dir))
    if record is None:
        raise InputError(f"{run_dir}: no run has begun here; add its configuration with -c")
    return from_record(record.config, str(RunDir(run_dir).ledger), overrides).in_folder(str(run_dir))


def _find(config: Path) -> Path:
    """A file, or a shipped configuration by its name."""
    config, shipped = config.expanduser(), shipped_names("configs")
    if config.exists():
        return config
    if str(config) in shipped:
        return shipped_folder("configs") / f"{config}.yaml"
    near = [str(path) for path in config.parent.glob("*") if path.suffix in (".yaml", ".yml", ".json")]
    hint = nearest(config, near) or nearest(config.stem, shipped)
    raise InputError(f"{config}: no such file (looked from {Path.cwd()}){hint}")


def _print(what: dict[str, Any] | str | RenderableType) -> None:
    if isinstance(what, dict):
        what = json.dumps(what, indent=2, ensure_ascii=False) + "\n"
    try:
        sys.stdout.write(what if isinstance(what, str) else shown(what))
        sys.stdout.flush()
    except BrokenPipeError:  # `phased-cpt plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# The way in ----------------------------------------------------------------------------------------------------------


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        _print(f"phased-cpt {__version__}\n")
        raise typer.Exit()


def main(arguments: list[str] | None = None, in_ranks: Callable[[], Any] | None = None) -> NoReturn:
    """Run a verb; a failure that a user can mend is one message on stderr and its own exit code.

    `in_ranks` makes this process a rank that trains, which loads torch; __main__ has it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name of odd bytes is shown, not an error of its own
    try:
        typed = sys.argv[1:] if arguments is None else arguments
        words = normalise(typed, get_command(app))
        if _is_rank() and os.environ["RANK"] != "0" and words[:1] != ["run"]:
            sys.exit(0)  # one of them tells it
        app(words, prog_name="phased-cpt", obj=in_ranks)
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
