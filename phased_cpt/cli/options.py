"""What the verbs share: the app, options that all of them take, how a plan is found and facts are printed."""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from phased_cpt.config import Loaded, from_record, load
from phased_cpt.config.allowed import nearest
from phased_cpt.config.schema import Run
from phased_cpt.config.shipped import shipped_folder, shipped_names
from phased_cpt.errors import InputError
from phased_cpt.ledger import choose_run_dir, newest_run, read_record
from phased_cpt.plan import Plan, make_plan
from phased_cpt.run_dir import RunDir
from phased_cpt.tables import shown

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
dataset_app = typer.Typer(no_args_is_help=True, context_settings=_HELP_OPTIONS, help="Data files: mixing them.")
app.add_typer(dataset_app, name="dataset")

ConfigFile = Annotated[
    Path | None, typer.Option("-c", "--config", help="YAML or JSON file, or the name of a shipped one.")
]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a value; repeatable.")
]
RunFolder = Annotated[
    Path | None, typer.Option("--run-dir", help="Run folder, instead of the one that the name finds.")
]
Smoke = Annotated[
    bool, typer.Option("--smoke", help="Try it: two steps of every phase, in a folder that is then removed.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the plan and the run folder, and write nothing.")]
Control = Annotated[
    bool, typer.Option("--control", help="Train the equal-token control of each phase, too: what it really forgot.")
]
MergeOnly = Annotated[
    bool, typer.Option("--merge-only", help="Train nothing: merge what the last phase has published.")
]
NumGpus = Annotated[
    int | None, typer.Option("--num-gpus", metavar="N", min=1, help="Processes on each machine (launch.num_gpus).")
]
Nodes = Annotated[int | None, typer.Option("--nnodes", metavar="N", min=1, help="Machines (launch.nnodes).")]
NodeRank = Annotated[
    int | None, typer.Option("--node-rank", metavar="K", min=0, help="Which of them this is; node 0 conducts.")
]
MasterAddress = Annotated[
    str | None, typer.Option("--master-addr", metavar="HOST", help="Node 0, as the others reach it.")
]
MasterPort = Annotated[
    int | None, typer.Option("--master-port", metavar="PORT", min=1, max=65535, help="Where the nodes meet.")
]
HostFile = Annotated[
    Path | None, typer.Option("--hostfile", metavar="FILE", help="The machines, called by ssh (launch.hostfile).")
]
LauncherName = Annotated[
    str | None, typer.Option("--launcher", metavar="NAME", help="local, deepspeed, torchrun or inline.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the facts as JSON, and nothing else, on stdout.")]


def the_plan(config: Path | None, overrides: list[str] | None, run_dir: Path | None) -> Plan:
    return make_plan(loaded(config, overrides or [], run_dir))


def loaded(config: Path | None, overrides: list[str], run_dir: Path | None) -> Loaded:
    """A file, or what a run folder has kept of its last attempt; and --run-dir is run.dir."""
    if config is not None:
        read = load(found(config), overrides)
        return read.in_folder(str(run_dir.expanduser())) if run_dir else read
    if run_dir is None:
        raise InputError("no configuration is named: add `-c FILE`, or `-c demo` to look at a shipped one")
    run_dir = run_dir.expanduser()
    record = read_record(RunDir(run_dir))
    if record is None:
        raise InputError(f"{run_dir}: no run has begun here; add its configuration with -c")
    return from_record(record.config, str(RunDir(run_dir).ledger), overrides).in_folder(str(run_dir))


def found(config: Path) -> Path:
    """A file, or a shipped configuration by its name."""
    config, shipped = config.expanduser(), shipped_names("configs")
    if config.exists():
        return config
    if str(config) in shipped:
        return shipped_folder("configs") / f"{config}.yaml"
    near = [str(path) for path in config.parent.glob("*") if path.suffix in (".yaml", ".yml", ".json")]
    hint = nearest(config, near) or nearest(config.stem, shipped)
    raise InputError(f"{config}: no such file (looked from {Path.cwd()}){hint}")


def launch_settings(**given: object) -> list[str]:
    """The options of a launch, as --set would say them."""
    return [f"launch.{key}={value}" for key, value in given.items() if value is not None]


def typed_again(verb: str, config: Path | None, overrides: list[str]) -> list[str]:
    """The words by which another node is called to the same, wherever its call begins."""
    path = config.expanduser() if config else None
    named = ["-c", str(path.resolve() if path.exists() else config)] if path else []
    return [verb, *named, *(word for each in overrides for word in ("--set", each))]


def tell(what: dict[str, Any] | str | RenderableType) -> None:
    if sys.stdout is None:  # `>&-`
        return
    if isinstance(what, dict):
        what = json.dumps(what, indent=2, ensure_ascii=False) + "\n"
    try:
        sys.stdout.write(what if isinstance(what, str) else shown(what))
        sys.stdout.flush()
    except BrokenPipeError:  # `phased-cpt plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def the_run(
    config: Path | None,
    overrides: list[str] | None,
    run_dir: Path | None,
    base: str | None,
    adapter: Path | None,
    model: Path | None,
) -> Path | None:
    """The folder of the run that is meant: named, found by its configuration, or the newest; None where none is."""
    if model is not None and (run_dir or config or adapter or base):
        raise InputError("--model names a whole model; leave --run-dir, -c, --base and --adapter out")
    if model is not None or adapter is not None:
        return None
    found = run_of(config, overrides, run_dir)
    if not found.ledger.exists():
        raise InputError(f"{found.root}: no run has begun here; name another folder with --run-dir")
    return found.root


def run_of(config: Path | None, overrides: list[str] | None, run_dir: Path | None) -> RunDir:
    """The folder that a command means, whether or not it is there."""
    # What is typed is read and checked, also where --run-dir alone decides.
    plan = the_plan(config, overrides, run_dir) if config or overrides else None
    if run_dir is not None:
        return RunDir(run_dir.expanduser())
    return choose_run_dir(plan) if plan else newest_run(Path(Run().output_dir))


def tell_aside(said: str) -> None:
    """A line beside the answer, on stderr."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{said}\n")


def is_rank() -> bool:
    """Whether a launcher has started this process beside others."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
