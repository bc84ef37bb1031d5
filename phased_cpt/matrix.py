"""The forgetting matrix of a run: what is measured around each phase, and forgetting.json, which holds all of it.

held-out documents of all phases ─┐                       ┌─ source.json of phase 1: row_before, row ─┐
evaluation.general ───────────────┴─ the job of a phase ──┴─ source.json of phase 2: row ─────────────┴─ forgetting.json
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phased_cpt.data.prepared import PreparedRun, PreparedSplit
from phased_cpt.data.text_bytes import text_bytes
from phased_cpt.forgetting import Row, bits_per_byte, measures
from phased_cpt.job import Measure
from phased_cpt.ledger import PhaseRecord, read_record
from phased_cpt.plan import PhasePlan, Plan
from phased_cpt.published import Source, read_source
from phased_cpt.run_dir import RunDir, publish_file

FORMAT = 1
CONTROL = "control"  # in the run folder


def measure_of(phase: PhasePlan, plan: Plan, prepared: PreparedRun, root: Path) -> Measure:
    """What the job of a phase measures besides its own held-out documents."""
    when = phase.settings.evaluation.matrix
    if when == "off":
        return Measure()
    is_last, sets = phase.number == len(plan.phases), _sets(plan, prepared)
    earlier = {*(each.name for each in plan.phases[: phase.number - 1]), *plan.config.evaluation.general}
    lowest = _lowest(rows_of(plan, prepared, root))
    return Measure(
        sets={name: (str(split.index.folder.resolve()), rows) for name, split, rows in sets},
        before=phase.number == 1,
        after=when == "every_phase" or is_last,
        best_so_far={name: lowest.get(name) for name, _, _ in sets if name in earlier},
        prompts=phase.settings.evaluation.samples,
    )


def _sets(plan: Plan, prepared: PreparedRun) -> list[tuple[str, PreparedSplit, int]]:
    """Every set with the rows that are measured at once, as its own phase does."""
    own = [
        (each.plan.name, each.eval, each.plan.settings.evaluation.micro_batch_size)
        for each in prepared.phases
        if each.eval is not None
    ]
    general = plan.config.evaluation.micro_batch_size
    return [*own, *((name, split, general) for name, split in prepared.general.items())]


def _lowest(rows: list[Row]) -> dict[str, float]:
    found: dict[str, float] = {}
    for row in rows:
        for name, loss in row.losses.items():
            if loss is not None:
                found[name] = min(loss, found.get(name, loss))
    return found


def rows_of(plan: Plan, prepared: PreparedRun, root: Path) -> list[Row]:
    """What was measured, as the phases have published it; a set that has other rows now is another set."""
    rows, now = [], {name: split.index.folder.name for name, split, _ in _sets(plan, prepared)}
    for phase in plan.phases:
        found = read_source(root / phase.folder)
        if found is None:
            break
        source = found[1]
        if source.row_before:
            rows.append(Row(None, _losses(source.row_before, now), source.row_before_seconds))
        if source.row:
            rows.append(Row(phase.name, _losses(source.row, now), source.row_seconds))
    return rows


def _losses(row: Mapping[str, Mapping[str, Any]], now: Mapping[str, str]) -> dict[str, float | None]:
    return {name: each["eval_loss"] for name, each in row.items() if each.get("rows") in (None, now.get(name))}


def write_forgetting(plan: Plan, prepared: PreparedRun, root: Path, cache: Path) -> dict[str, Any] | None:
    """forgetting.json, as far as the run has come; None where nothing was measured."""
    rows = rows_of(plan, prepared, root)
    if not rows:
        return None
    tokens, of_text = (
        _tokens(plan, root),
        {name: text_bytes(split, prepared.tokenizer, cache) for name, split, _ in _sets(plan, prepared)},
    )
    phases, general = [phase.name for phase in plan.phases if phase.name in of_text], [*prepared.general]
    found = measures([phase.name for phase in plan.phases], general, rows)  # one that holds nothing out is a row, too
    found["sets"] = {name: found["sets"][name] for name in (*phases, *general)}
    facts = {
        "format": FORMAT,
        "run": plan.name,
        "sets": [
            {"name": name, "kind": kind, "tokens": tokens.get(name), "bytes": of_text[name]}
            for kind, names in (("phase", phases), ("general", general))
            for name in names
        ],
        "rows": [_row_facts(row, [*phases, *general], tokens, of_text) for row in rows],
        "measures": found,
        "controls": _controls(plan, prepared, root, rows),
        "cost": _cost(plan, root),
    }
    publish_file(RunDir(root).forgetting, (json.dumps(facts, indent=1, allow_nan=False) + "\n").encode())
    return facts


def _row_facts(
    row: Row, names: list[str], tokens: Mapping[str, int], of_text: Mapping[str, int | None]
) -> dict[str, Any]:
    losses = {name: row.losses.get(name) for name in names}
    in_bits = {name: bits_per_byte(loss, tokens.get(name, 0), of_text[name]) for name, loss in losses.items()}
    return {"after": row.after, "seconds": row.seconds, "losses": losses, "bits_per_byte": in_bits}


def _sources(plan: Plan, root: Path) -> list[Source]:
    found = (read_source(root / phase.folder) for phase in plan.phases)
    return [each[1] for each in found if each is not None]


def _tokens(plan: Plan, root: Path) -> dict[str, int]:
    """Predicted tokens of each set, by the last row that has it."""
    measured = [row for source in _sources(plan, root) for row in (source.row_before, source.row)]
    return {name: each["tokens"] for row in measured for name, each in row.items()}


def _cost(plan: Plan, root: Path) -> dict[str, float]:
    """Seconds of the rows, and their share of the time of the phases; row 0 is within the time of phase 1."""
    sources = _sources(plan, root)
    after, before = sum(each.row_seconds for each in sources), sum(each.row_before_seconds for each in sources)
    trained = sum(each.seconds for each in sources)
    return {"seconds": round(after + before, 2), "share": round((after + before) / (trained + after), 4)}


# Controls -------------------------------------------------------------------------------------------------------------


def control_of(root: Path, phase: PhaseRecord) -> Source | None:
    """What the control of a phase has lost; None where there is none, or that of another phase than it is now."""
    found = read_source(root / CONTROL / phase.folder)
    made_for = f"{phase.fingerprint.digest}-{CONTROL}" if phase.fingerprint else None
    return found[1] if found and found[1].fingerprint == made_for else None


def _controls(plan: Plan, prepared: PreparedRun, root: Path, rows: list[Row]) -> dict[str, Any]:
    """What each phase has made the model forget, against the same steps on what came before it."""
    record, found = read_record(RunDir(root)), {}
    now = {name: split.index.folder.name for name, split, _ in _sets(plan, prepared)}
    at = {row.after: row.losses for row in rows}
    for phase in plan.phases:
        control = record and control_of(root, record.phase(phase.name))
        if control:
            losses, own = _losses(control.row, now), at.get(phase.name, {})
            earlier = [each.name for each in plan.phases[: phase.number - 1]]
            pairs = {name: (own.get(name), losses.get(name)) for name in earlier}
            lost = {name: one - other for name, (one, other) in pairs.items() if one is not None and other is not None}
            found[phase.name] = {"losses": losses, "forgetting": lost}
    return found
