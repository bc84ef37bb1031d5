"""What a person sees of a plan, and the same facts for a program."""

from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from phased_cpt.config import Lora, Source
from phased_cpt.config.inherit import OVERRIDABLE
from phased_cpt.config.read import Keys
from phased_cpt.config.schema import Section
from phased_cpt.plan import Origin, PhasePlan, Plan
from phased_cpt.resolved import every_value, flat, origin_of
from phased_cpt.schedule import Budget
from phased_cpt.tables.words import counted, short, words


def plan_facts(plan: Plan) -> dict[str, Any]:
    """The plan for a program: `.phases[].<section>.<key>.value` and `.origin` for each resolved value."""
    config = plan.config
    in_phases = ("run", "model", *OVERRIDABLE, "phases")
    rest = [name for name in type(config).model_fields if name not in in_phases]
    for_all = {name: _with_origins(getattr(config, name), (name,), plan) for name in rest}
    run = config.run.model_dump(mode="json")
    return {
        "run": run | {"origins": _with_origins(config.run, ("run",), plan)},
        **for_all,
        "phases": [_phase_facts(phase, plan) | for_all for phase in plan.phases],
        "warnings": plan.warnings(),
    }


def _with_origins(section: Section, keys: tuple[str | int, ...], plan: Plan) -> dict[str, Any]:
    return {
        key: _with_origins(getattr(section, key), (*keys, key), plan)
        if isinstance(getattr(section, key), Section)
        else _fact(value, plan.origin(*keys, key))
        for key, value in section.model_dump(mode="json").items()
    }


def _fact(value: Any, origin: Origin) -> dict[str, Any]:
    return {"value": value, "origin": origin.kind, "place": origin.place}


def _phase_facts(phase: PhasePlan, plan: Plan) -> dict[str, Any]:
    training, batch, schedule = phase.settings.training, phase.batch, phase.schedule
    sections = {
        name: {key: _fact(value, phase.origins[name, key]) for key, value in section.model_dump(mode="json").items()}
        for name, section in phase.sections().items()
    }
    return {
        "name": phase.name,
        "number": phase.number,
        "folder": phase.folder,
        "starts_from": str(phase.start),
        "fresh_adapter": phase.fresh_adapter,
        "budget": {"unit": phase.budget.unit, "amount": phase.budget.amount},
        "batch": {
            "rows": phase.global_rows,
            "micro_batch_size": training.micro_batch_size,
            "accumulation": batch.accumulation if batch else None,
            "ranks": batch.ranks if batch else None,
        },
        "steps": phase.steps,  # null until the data is prepared
        "warmup_steps": schedule.warmup_steps if schedule else None,
        "phase": _own_facts(phase, plan),
        **sections,
    }


def _own_facts(phase: PhasePlan, plan: Plan) -> dict[str, Any]:
    """The phase's own keys: its sources, its budgets, its handover."""
    own = phase.phase.model_dump(mode="json", exclude={"name", *OVERRIDABLE})
    return {key: _fact(value, plan.origin("phases", phase.number - 1, key)) for key, value in own.items()}


def plan_table(plan: Plan) -> RenderableType:
    """The plan on one screen: the phases as rows, then what was set, for all of them or for one."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("", "phase", "sources", "length", "batch", "learning rate", "rows"):
        # On a narrow terminal it is the texts that are folded, never the figures.
        table.add_column(heading, overflow="fold", no_wrap=heading not in ("phase", "sources"))
    for phase in plan.phases:
        table.add_row(
            str(phase.number),
            _who(phase),
            "\n".join(map(_source, phase.phase.sources)),
            _length(phase),
            _batch(phase),
            _rate(phase),
            _rows(phase),
        )
    return Group(_heading(plan), "", table, "", *_what_was_set(plan), *_notes(plan))


def _who(phase: PhasePlan) -> Text:
    what = f"\n{phase.phase.description}" if phase.phase.description else ""
    return Text.assemble((phase.name, "bold cyan"), what, (f"\nstarts from {phase.start}", "dim"))


def _source(source: Source) -> str:
    split = f" ({source.split})" if source.split else ""
    return f"{source.path}{split}" + (f" × {source.weight:g}" if source.weight != 1 else "")


def _heading(plan: Plan) -> Text:
    config = plan.config
    bits = "4-bit" if config.model.use_4bit else config.model.precision
    lora = config.lora
    targets = lora.target_modules if isinstance(lora.target_modules, str) else " ".join(lora.target_modules)
    strength = f"alpha {lora.alpha:g} (scale {lora.scale:.4g})"
    adapter = (
        f"{_kind(lora)} r {lora.r}, {strength}, dropout {lora.dropout:g}, on {targets}"
        if lora.enabled
        else "every weight is trained"
    )
    where = config.run.dir or f"{config.run.output_dir}/{config.run.name}-<time>"
    return Text.assemble(
        (f"{plan.name}", "bold"),
        f": {counted(len(plan.phases), 'phase')} on {config.model.name or 'random weights'} ({bits})\n",
        f"{adapter}\n",
        (f"writes to {where}", "dim"),
    )


def _kind(lora: Lora) -> str:
    kind = "DoRA" if lora.use_dora else "LoRA"
    return f"rs{kind}" if lora.use_rslora else kind


def _length(phase: PhasePlan) -> str:
    budget = length_of(phase.budget)
    if phase.budget.unit == "steps":
        return budget
    return f"{budget}\n{'? steps yet' if phase.steps is None else f'{phase.steps:,} steps'}"


def length_of(budget: Budget) -> str:
    return counted(budget.amount, budget.unit.removesuffix("s"))


def _batch(phase: PhasePlan) -> str:
    return f"{_batch_rows(phase)}\ndeepspeed {phase.settings.training.deepspeed}"


def _batch_rows(phase: PhasePlan) -> str:
    training, batch = phase.settings.training, phase.batch
    if batch:
        return f"{batch.rows} rows\n{batch.micro_batch_size} × {batch.accumulation} × {batch.ranks} ranks"
    if training.global_batch_size:
        return f"{training.global_batch_size} rows"
    return f"{training.micro_batch_size} × {training.gradient_accumulation_steps} rows\non each rank"


def _rate(phase: PhasePlan) -> str:
    training = phase.settings.training
    warmup = (
        f"{training.warmup_ratio:.2%}".replace(".00%", "%")
        if training.warmup_steps is None
        else f"{training.warmup_steps} steps"
    )
    infinite, goes_on = training.lr_scheduler == "infinite", not phase.settings.warms_up
    shares = [] if goes_on else [1.0]
    shares += [training.constant_ratio] if infinite else []
    shares += [training.min_lr_ratio] if phase.settings.anneals and training.lr_scheduler != "constant" else []
    rates = " → ".join(short(training.learning_rate * share) for share in shares)
    plus = f"\nB × {training.lora_plus_ratio:g}" if phase.settings.lora.enabled and training.lora_plus_ratio else ""
    return f"{rates}\n{training.lr_scheduler}\n{'goes on' if goes_on else f'warm-up {warmup}'}{plus}"


def _rows(phase: PhasePlan) -> str:
    data = phase.settings.data
    return f"{data.max_tokens:,} tokens\n{data.packing}\noverlap {data.overlap_tokens:,}"


def _what_was_set(plan: Plan) -> Iterator[RenderableType]:
    """What is no default: for the whole run by section, for a phase beside the value that it would have inherited."""
    grid = Table.grid(padding=(0, 3, 0, 0))
    for section, value in plan.config.model_dump(mode="json", exclude_unset=True, exclude={"phases"}).items():
        values = flat(value, (section,))
        pairs = (
            f"{path.removeprefix(f'{section}.')} {words(child)}{_typed(path, plan)}" for path, child in values.items()
        )
        grid.add_row(Text(section, style="cyan"), " · ".join(pairs))
    for phase in plan.phases:
        for (section, key), origin in phase.origins.items():
            value = getattr(phase.sections()[section], key)
            inherited = getattr(getattr(plan.config, section), key)
            if value != inherited and origin.kind != "default":
                change = f"{section}.{key} {words(value)} (the run: {words(inherited)})"
                grid.add_row(Text(phase.name, style="bold cyan"), Text.assemble(change, (f"  {origin}", "dim")))
        own = phase.phase.model_dump(
            mode="json", exclude_defaults=True, include={"handover", "replay", "gate", "eval_sources"}
        )
        for key, value in own.items():
            listed = words([_source(source) for source in phase.phase.eval_sources] if key == "eval_sources" else value)
            grid.add_row(Text(phase.name, style="bold cyan"), f"{key} {listed}")
    yield Text(
        "Set here; all else is a default (`phased-cpt config show` lists every value and its origin)", style="dim"
    )
    yield grid


def _typed(path: str, plan: Plan) -> str:
    return " (command line)" if plan.origin(*path.split(".")).kind == "command line" else ""


def _notes(plan: Plan) -> Iterator[RenderableType]:
    if any(phase.steps is None for phase in plan.phases):
        yield Text("\n? steps: they follow from epochs and tokens; `phased-cpt prepare` tells them.", style="dim")
    if any(phase.batch is None for phase in plan.phases):
        yield Text(
            "The whole batch is known once the GPUs are: launch.num_gpus, or --set launch.num_gpus=8.", style="dim"
        )
    for warning in plan.warnings():
        yield Text.assemble(("\ncareful: ", "bold yellow"), warning)


def config_facts(plan: Plan) -> dict[str, Any]:
    """Every resolved value by its dotted path, with its origin."""
    index = {phase.name: number for number, phase in enumerate(plan.phases)}
    facts: dict[str, Any] = {}
    for path, value in every_value(plan).items():
        keys = tuple(path.split("."))
        named: Keys = ("phases", index[keys[1]], *keys[2:]) if keys[0] == "phases" else keys
        facts[path] = _fact(value, origin_of(named, plan))
    return facts
