"""The verbs that make another model of what phases have published: sweep-lambda, soup."""

import math
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from phased_cpt.cli.merging import tell_merged
from phased_cpt.cli.models import Base, Device, FourBits
from phased_cpt.cli.options import (
    AsJson,
    ConfigFile,
    Overrides,
    RunFolder,
    app,
    run_of,
    tell,
    tell_aside,
    the_plan,
    the_run,
)
from phased_cpt.errors import InputError
from phased_cpt.wanted import ModelsWanted, SweepWanted

LAMBDAS = "0.3,0.5,0.7,0.85,1"
Out = Annotated[Path | None, typer.Option(metavar="DIR", help="Where the model goes.")]


@app.command("sweep-lambda")
def sweep_lambda(
    context: typer.Context,
    config: ConfigFile = None,
    set_: Overrides = None,
    run_dir: RunFolder = None,
    strengths: Annotated[
        str, typer.Option("--lambda", metavar="N,N,…", help="How much of it; 0 (the base) and 1 are always shown.")
    ] = LAMBDAS,
    phase: Annotated[
        str | None, typer.Option(metavar="PHASE", help="All that was added up to this one; the last if absent.")
    ] = None,
    write: Annotated[
        str | None, typer.Option(metavar="N", help="Merge so much of it into --out; `best`: as much as is chosen.")
    ] = None,
    out: Out = None,
    base: Base = None,
    four_bits: FourBits = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure base + λ · all that the run has added to it, and choose how much of it to keep."""
    if (write is None) != (out is None):
        raise InputError("--write says how much, and --out where to: --write 0.7 --out DIR, or --write best --out DIR")
    wanted = tuple(_number("--lambda", each) for each in strengths.split(","))
    chosen = None if write in (None, "best") else _number("--write", str(write))
    root = the_run(config, set_, run_dir, base, None, None)
    facts = None
    if chosen is None:
        models = ModelsWanted(root, base, use_4bit=four_bits, device=device)
        facts = context.obj.sweep(SweepWanted(models, phase, wanted))
        chosen = facts["chosen"]
        if not as_json:
            from phased_cpt.tables.sweep import sweep_table

            tell(sweep_table(facts))
    if out is None:
        if as_json and facts:
            tell(facts)
        return
    from phased_cpt.blend import merge_part

    run = run_of(config, set_, run_dir)
    here = [f"model.name={base}", "model.from_config=null"] if base else []
    made = merge_part(the_plan(None, here, run.root), run, phase, chosen, out.expanduser().absolute(), tell_aside)
    if as_json:
        tell((facts or {}) | {"lambda": chosen, "written": {"folder": str(made.folder), **made.facts}})
    else:
        tell_merged(made, False)
        tell(f'base + {chosen:g} · change, as any Transformers folder: from_pretrained("{made.folder}")\n')


@app.command()
def soup(
    context: typer.Context,
    config: ConfigFile = None,
    set_: Overrides = None,
    run_dir: RunFolder = None,
    weights: Annotated[
        list[str] | None, typer.Option("--weight", metavar="PHASE=N", help="So much of this phase; repeatable.")
    ] = None,
    adapters: Annotated[
        list[str] | None, typer.Option("--adapter", metavar="DIR=N", help="So much of any adapter of the base.")
    ] = None,
    base: Base = None,
    out: Out = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="One adapter of all of them, and not merged into the base.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Mix phases: base + the weighted sum of what each has changed, exactly, as one model or one adapter."""
    from phased_cpt.blend import soup_of_folders, soup_of_run
    from phased_cpt.merging import Merged, MergeJob, merge

    if out is None or not (weights or adapters):
        raise InputError("a soup needs what goes in, and where to: --weight PHASE=0.3 --weight OTHER=0.7 --out DIR")
    phases = dict(_weighed("--weight", weights))
    others = [(Path(name).expanduser(), each) for name, each in _weighed("--adapter", adapters)]
    output = out.expanduser().absolute()
    if (total := sum([*phases.values(), *(each for _, each in others)])) != 1 and not math.isclose(total, 1):
        tell_aside(f"the weights add up to {total:g}, and not to 1: it is taken as it was typed")

    def made(job: MergeJob) -> Merged:
        if adapter_only:
            return Merged(output, context.obj.concatenate(job), now=True)
        return merge(job, thorough=True)

    if phases:
        run = run_of(config, set_, run_dir)
        here = [f"model.name={base}", "model.from_config=null"] if base else []
        soup = soup_of_run(the_plan(None, here, run.root), run, phases, others, output, made, tell_aside)
    elif base is None or config or run_dir:
        raise InputError("--adapter alone needs the base that it is for, and no run: --base MODEL --adapter DIR=0.5 …")
    else:
        soup = soup_of_folders(base, others, output, made, tell_aside)
    if as_json or not adapter_only:
        tell_merged(soup, as_json)
    else:
        tell(f"{soup.facts['made_of']} = {soup.folder} (rank {soup.facts['rank']}); PEFT loads it as any adapter\n")


def _weighed(option: str, typed: list[str] | None) -> list[tuple[str, float]]:
    """foundation=0.3"""
    pairs = []
    for each in typed or []:
        name, equals, number = each.rpartition("=")
        if not equals or not name:
            raise InputError(f"{option} {each}: a name and a number are wanted, such as {option} {each}=0.5")
        pairs.append((name, _number(f"{option} {name}=", number)))
    if twice := [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]:
        raise InputError(f"{option} {twice[0]}: is named twice; once, with the sum of both, says the same")
    return pairs


def _number(option: str, typed: str) -> float:
    try:
        number = float(typed)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{option} {typed}: a number is wanted, such as 0.7")
    return number
