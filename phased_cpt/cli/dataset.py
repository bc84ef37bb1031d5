"""The verbs of data files: dataset combine."""

from pathlib import Path
from typing import Annotated

import typer

from phased_cpt.cli.data import named_phase
from phased_cpt.cli.options import AsJson, ConfigFile, Overrides, RunFolder, dataset_app, tell, tell_aside, the_plan
from phased_cpt.errors import InputError
from phased_cpt.tables import combined_table

Sources = Annotated[
    list[str] | None,
    typer.Argument(metavar="SOURCES...", help="Files, folders or globs, each with its weight: a.jsonl b.jsonl:0.5"),
]


@dataset_app.command("combine")
def dataset_combine(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write; its name ends with .jsonl.")],
    sources: Sources = None,
    config: ConfigFile = None,
    set_: Overrides = None,
    run_dir: RunFolder = None,
    phase: Annotated[
        str | None, typer.Option(metavar="PHASE", help="Mix the sources of this phase of the configuration.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Which part of a fractional weight it is; run.seed, or 42.")] = None,
    text_field: Annotated[
        str | None, typer.Option(metavar="FIELD", help="Weigh records by this field; by all of the record if absent.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Shares go with (weight × bytes)^(1 / T); 1 leaves them.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Mix sources by weight into one JSONL file: 0.5 is half of the records, 2.5 is two and a half times."""
    from phased_cpt.data.combine import combine, ingredients_named, ingredients_of

    settled: dict[str, float] = {"seed": 42, "temperature": 1.0}
    if config is not None or run_dir is not None:
        if sources:
            raise InputError("sources are named twice: with -c they are those of --phase; leave one of the two out")
        plan = the_plan(config, set_, run_dir)
        planned = plan.phase(named_phase(plan, phase)) if phase else plan.phases[0]
        if phase is None and len(plan.phases) > 1:
            names = ", ".join(each.name for each in plan.phases)
            raise InputError(f"--phase: which one's sources? there are {names}")
        settled = {"seed": planned.seed, "temperature": planned.settings.data.temperature}
        mixed = ingredients_of(planned, plan, text_field)
    else:
        mixed = ingredients_named(sources or [], text_field or "auto")
    heat = settled["temperature"] if temperature is None else temperature
    if not 0 < heat <= 100:
        raise InputError(f"--temperature {heat:g}: allowed: above 0, at most 100")
    chosen = int(settled["seed"]) if seed is None else seed
    facts = combine(mixed, output.expanduser(), chosen, heat, force, tell_aside)
    tell(facts if as_json else combined_table(facts))
