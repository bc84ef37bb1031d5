"""The verbs of data and configuration: prepare, config, tokenizer."""

import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phased_cpt.cli.options import (
    AsJson,
    ConfigFile,
    Overrides,
    RunFolder,
    app,
    config_app,
    tell,
    the_plan,
    tokenizer_app,
)
from phased_cpt.config.allowed import nearest, schema
from phased_cpt.errors import InputError
from phased_cpt.plan import Plan
from phased_cpt.resolved import resolved_yaml
from phased_cpt.tables import config_facts, prepared_facts, prepared_table, trained_tokenizer

if TYPE_CHECKING:
    from phased_cpt.data.prepared import PreparedRun


@app.command("prepare")
def prepare_verb(
    config: ConfigFile = None,
    set_: Overrides = None,
    run_dir: RunFolder = None,
    phase: Annotated[
        list[str] | None,
        typer.Option("--phase", metavar="PHASE", help="This phase alone, by name or index (from 0); repeatable."),
    ] = None,
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

    plan = the_plan(config, set_, run_dir)
    written = {
        "--emit-jsonl": emit_jsonl and emit.new_folder("--emit-jsonl", emit_jsonl.expanduser()),
        "--emit-bin": emit_bin and emit.new_folder("--emit-bin", emit_bin.expanduser()),
    }
    prepared = _prepared(plan, workers, [named_phase(plan, each) for each in phase or []])
    for option, write in {"--emit-jsonl": emit.rows, "--emit-bin": emit.documents}.items():
        if folder := written[option]:
            write(prepared, folder)
            sys.stderr.write(f"{option}: the files of every phase and split are in {folder}\n")
    if inspect:
        shown_block = inspection.block_facts if as_json else inspection.shown_block
        tell(shown_block(prepared, inspect))
    else:
        tell(prepared_facts(prepared) if as_json else prepared_table(prepared))


@config_app.command("show")
def config_show(
    config: ConfigFile = None, set_: Overrides = None, run_dir: RunFolder = None, as_json: AsJson = False
) -> None:
    """Print every value that holds, and where it came from, as a YAML that can be run."""
    planned = the_plan(config, set_, run_dir)
    tell(config_facts(planned) if as_json else resolved_yaml(planned))


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of a configuration, for editors."""
    tell(schema())


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
    tell(facts if as_json else trained_tokenizer(facts))


def named_phase(plan: Plan, given: str) -> str:
    """A phase by its name, or by its index, as tasks of an array know it."""
    names = [phase.name for phase in plan.phases]
    if given.isdecimal() and int(given) < len(names):
        return names[int(given)]
    if given not in names:
        what = f"no phase is called {given!r}{nearest(given, names)} (phases: {', '.join(names)})"
        raise InputError(f"--phase: {what}, or 0 to {len(names) - 1}")
    return given


def _prepared(plan: Plan, workers: int | None = None, only: Collection[str] = ()) -> "PreparedRun":
    # numpy and tokenizers take a third of a second, which the verbs without data do not wait for.
    from phased_cpt.data.prepare import prepare
    from phased_cpt.progress import Bar

    return prepare(plan, Bar(), workers, only)
