"""The verbs of what comes out of a run: merge, evaluate, chat. The last two load torch, so __main__ brings them in."""

from pathlib import Path
from typing import Annotated

import typer

from phased_cpt.cli.merging import merged_folders, merged_run, tell_merged
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
def merge(
    config: ConfigFile = None,
    set_: Overrides = None,
    run_dir: RunFolder = None,
    phase: Annotated[
        str | None, typer.Option(metavar="PHASE", help="What this phase has published; the last one if absent.")
    ] = None,
    base: Base = None,
    adapters: Annotated[
        list[Path] | None,
        typer.Option("--adapter", metavar="DIR", help="Any LoRA adapter of --base; repeated: each on those before."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Where to; merge.output_dir of a run.")] = None,
    dtype: Annotated[str | None, typer.Option(metavar="TYPE", help="bf16, fp16 or fp32; auto (merge.dtype).")] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Largest file: 2GB, 500MB … (merge.max_shard_size).")
    ] = None,
    merge_base: Annotated[
        str | None, typer.Option(metavar="KIND", help="After QLoRA: bf16, dequantized, or auto (merge.base).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make one plain model of base and adapters, on the CPU, a tensor at a time; checked before it counts."""
    values = {"merge.dtype": dtype, "merge.max_shard_size": max_shard_size, "merge.base": merge_base}
    overrides = [*(set_ or []), *(f"{key}={value}" for key, value in values.items() if value is not None)]
    if adapters:
        made = merged_folders(base, adapters, out, overrides, config or run_dir or phase)
    else:
        made = merged_run(config, overrides, run_dir, phase, base, out)
    tell_merged(made, as_json)


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
