"""The verbs, one screen each; nothing is decided here."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import RenderableType
from typer.core import TyperGroup
from typer.main import get_command

from phased_cpt import __version__
from phased_cpt.config import Loaded, load
from phased_cpt.config.allowed import nearest, schema
from phased_cpt.config.schema import Run
from phased_cpt.config.shipped import shipped_folder, shipped_names
from phased_cpt.errors import InputError, PhasedCptError
from phased_cpt.ledger import choose_run_dir, holder_of, newest_run, read_record, reconcile
from phased_cpt.plan import Plan, make_plan
from phased_cpt.resolved import resolved_yaml
from phased_cpt.run_dir import RunDir
from phased_cpt.tables import config_facts, console, plan_facts, plan_table, status_facts, status_table

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich", help=__doc__)
config_app = typer.Typer(no_args_is_help=True, help="The configuration: its schema, and what it resolves to.")
app.add_typer(config_app, name="config")

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
    config: ConfigFile = None,
    set_: Overrides = None,
    run_dir: RunFolder = None,
    new: Annotated[bool, typer.Option("--new", help="Start another run, whatever there is.")] = False,
    redo_from: Annotated[str | None, typer.Option(metavar="PHASE", help="Train from this phase on again.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, show, and write nothing.")] = False,
) -> None:
    """Run the curriculum, or go on with it (the default verb)."""
    planned = _plan(config, set_, run_dir)
    chosen = choose_run_dir(planned, new=new)
    record = read_record(chosen)
    if record is None and redo_from:
        raise InputError(f"--redo-from: no run has begun in {chosen.root}; leave it out")
    _print(plan_table(planned))
    _print(status_table(chosen, record and reconcile(record, planned, redo_from), holder_of(chosen)))
    if not dry_run:
        raise PhasedCptError(
            "this version plans and checks, it does not train yet: nothing was written (--dry-run shows no such line)"
        )


@app.command()
def status(
    config: ConfigFile = None, set_: Overrides = None, run_dir: RunFolder = None, as_json: AsJson = False
) -> None:
    """Show how far a run has come; of the newest run, if none is named."""
    if run_dir is not None:
        chosen = RunDir(run_dir)
    elif config is not None:
        chosen = choose_run_dir(_plan(config, set_, None))
    else:
        chosen = newest_run(Path(Run().output_dir))
    if not chosen.root.is_dir():
        raise InputError(f"{chosen.root}: no such run folder; name one with --run-dir, or its configuration with -c")
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


def _plan(config: Path | None, overrides: list[str] | None, run_dir: Path | None) -> Plan:
    return make_plan(_load(config, overrides or [], run_dir))


def _load(config: Path | None, overrides: list[str], run_dir: Path | None) -> Loaded:
    if config is None and run_dir is None:
        raise InputError("no configuration is named: add `-c FILE`, such as `-c configs/demo.yaml`")
    if run_dir is not None:
        overrides = [*overrides, f"run.dir={json.dumps(str(run_dir))}"]
    return load(_find(config) if config else RunDir(run_dir or Path()).config_resolved, overrides)


def _find(config: Path) -> Path:
    """A file, or a shipped configuration by its name."""
    shipped = shipped_names("configs")
    if config.exists() or str(config) not in shipped:
        if not config.exists():
            near = [str(path) for path in config.parent.glob("*") if path.suffix in (".yaml", ".yml", ".json")]
            raise InputError(f"{config}: no such file (looked from {Path.cwd()}){nearest(config, [*near, *shipped])}")
        return config
    return shipped_folder("configs") / f"{config}.yaml"


def _print(what: dict[str, Any] | str | RenderableType) -> None:
    if isinstance(what, dict):
        sys.stdout.write(json.dumps(what, indent=2, ensure_ascii=False) + "\n")
    elif isinstance(what, str):
        sys.stdout.write(what)
    else:
        console().print(what)


# The command line ----------------------------------------------------------------------------------------------------


def normalise(arguments: list[str]) -> list[str]:
    """The arguments as typer wants them: verb first, `run` if there is none, the launcher's --local_rank taken out.

    --local_rank=3 -c a.yaml plan --json   →   plan -c a.yaml --json
    """
    verbs = get_command(app)
    assert isinstance(verbs, TyperGroup)
    before, rest = _options_before_the_verb(arguments, _options_with_a_value(verbs))
    if rest and rest[0] in verbs.commands:
        # `config` has verbs of its own, so what stood before goes behind the last of them.
        words = 2 if rest[0] == "config" and rest[1:] and not rest[1].startswith("-") else 1
        return [*rest[:words], *before, *rest[words:]]
    if rest:
        raise InputError(f"no verb {rest[0]!r}{nearest(rest[0], verbs.commands)} (verbs: {', '.join(verbs.commands)})")
    of_the_app = {option for parameter in verbs.params for option in parameter.opts} | {"--help"}
    return before if not before or before[0] in of_the_app else ["run", *before]


def _options_before_the_verb(arguments: list[str], with_value: set[str]) -> tuple[list[str], list[str]]:
    before: list[str] = []
    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        taken = rest[: 2 if rest[0] in with_value else 1]
        rest = rest[len(taken) :]
        before += [] if taken[0].replace("_", "-").startswith("--local-rank") else taken
    return before, rest


def _options_with_a_value(verbs: TyperGroup) -> set[str]:
    """The options whose value is the next word, of any verb: read off the verbs, so that there is no second list."""
    options = (parameter for verb in verbs.commands.values() for parameter in verb.params if parameter.nargs == 1)
    flags_aside = (option for option in options if not getattr(option, "is_flag", False))
    return {name for option in flags_aside for name in option.opts} | {"--local_rank", "--local-rank"}


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        _print(f"phased-cpt {__version__}\n")
        raise typer.Exit()


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run a verb; a failure that a user can mend is one message on stderr and its own exit code."""
    try:
        app(normalise(sys.argv[1:] if arguments is None else arguments), prog_name="phased-cpt")
    except PhasedCptError as error:
        console(stderr=True).print(str(error), style="red", markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # `phased-cpt plan | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    sys.exit(0)
