"""The verbs of what comes out of a run: evaluate, chat. They load torch, so __main__ brings them in."""

from pathlib import Path
from typing import Annotated

import typer

from phased_cpt.cli.options import AsJson, ConfigFile, Overrides, RunFolder, app, the_run
from phased_cpt.wanted import ChatWanted, EvaluateWanted, ModelsWanted

Base = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Base model, folder or hub id; of a run: where its base is now.")
]
AdapterFolder = Annotated[Path | None, typer.Option("--adapter", metavar="DIR", help="A LoRA adapter of that base.")]
ModelFolder = Annotated[
    Path | None, typer.Option("--model", metavar="DIR", help="A whole model, such as a merged_model/ folder.")
]
FourBits = Annotated[
    bool | None, typer.Option("--4bit/--16bit", help="How the base is loaded; as the run was trained if absent.")
]
Device = Annotated[str | None, typer.Option(metavar="NAME", help="cuda, cuda:1, cpu; the first GPU if absent.")]


@app.command()
def evaluate(
    context: typer.Context,
    config: ConfigFile = None,
    set_: Overrides = None,
    run_dir: RunFolder = None,
    base: Base = None,
    adapter: AdapterFolder = None,
    model: ModelFolder = None,
    only: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Of these alone: base, a phase, merged; repeatable.")
    ] = None,
    questions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSONL with `prompt` and `answer`: asked, and compared.")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--task", metavar="NAME", help="Task of lm-evaluation-harness; repeatable.")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where lm-evaluation-harness tasks of one's own lie.")
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="The first N questions, or of a task.")] = None,
    four_bits: FourBits = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure base, every phase and the merged model: perplexity, questions, tasks."""
    models = ModelsWanted(the_run(config, set_, run_dir, base, adapter, model), base, adapter, model, four_bits, device)
    wanted = EvaluateWanted(models, tuple(only or ()), questions, tuple(tasks or ()), include_path, limit, as_json)
    raise typer.Exit(context.obj.evaluate(wanted))


@app.command()
def chat(
    context: typer.Context,
    config: ConfigFile = None,
    set_: Overrides = None,
    run_dir: RunFolder = None,
    base: Base = None,
    adapter: AdapterFolder = None,
    model: ModelFolder = None,
    compare: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Answer as these side by side: base, a phase; repeatable.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Answer the prompts of a file (text, or JSONL) and end.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Of what is drawn: the same seed, the same words.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="N", help="0 for the likeliest tokens, as --prompts has it; 0.7 in a talk.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="Of an answer, at most; 512 if absent.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Continue prompts as they stand, without a template.")] = False,
    four_bits: FourBits = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Talk to what a run has made, beside the base that it began with."""
    models = ModelsWanted(the_run(config, set_, run_dir, base, adapter, model), base, adapter, model, four_bits, device)
    wanted = ChatWanted(
        models, prompts, as_json, seed, tuple(dict.fromkeys(compare or ())), temperature, max_tokens, plain
    )
    raise typer.Exit(context.obj.chat(wanted))
