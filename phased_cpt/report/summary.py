"""The head of the report: what run this is, how far it has come, and what came out, in a few sentences."""

import time
from collections.abc import Iterator

from phased_cpt.report.folder import Facts, Folder
from phased_cpt.report.logs import number
from phased_cpt.report.origins import base_name
from phased_cpt.report.timeline import worked
from phased_cpt.report.written import change, clock, lasted, whole
from phased_cpt.tables.words import counted


def summary(folder: Folder) -> Facts:
    now = time.time()
    stretches = worked(folder, now)
    return {
        "name": folder.name,
        "state": folder.state,
        "where": _where(folder),
        "facts": list(_facts(folder, sum(each.end - each.begin for each in stretches))),
        "findings": list(_findings(folder)),
        "damages": folder.damages,
        "written": clock(now),
    }


def _where(folder: Folder) -> str:
    """How far it is, where it is not done."""
    under_way = next((phase for phase in folder.phases if phase.state in ("running", "interrupted")), None)
    if folder.state not in ("running", "interrupted") or under_way is None:
        return ""
    steps = f", step {whole(under_way.step)} of {whole(under_way.steps)}" if under_way.steps else ""
    return f"in phase {under_way.number} of {len(folder.phases)}, {under_way.name}{steps}"


def _facts(folder: Folder, seconds: float) -> Iterator[tuple[str, str]]:
    """Name and value, of what is known."""
    if folder.record:
        yield "Base", base_name(folder)
        yield "Begun", clock(folder.record.get("created"))
    if seconds:
        yield "Time at work", lasted(seconds)
    if tokens := sum(phase.tokens or 0 for phase in folder.phases):
        yield "Steps", whole(sum(phase.step for phase in folder.phases))
        yield "Tokens trained", whole(tokens)
    found = (number((phase.record.get("execution") or {}).get("ranks")) for phase in folder.phases)
    if ranks := dict.fromkeys(filter(None, found)):
        yield "Ranks", ", then ".join(map(whole, ranks))
    if folder.attempts:
        yield "Restarts", whole(len(folder.attempts) - 1)
        yield "Version", f"phased_cpt {folder.attempts[-1].get('version')}"


def _findings(folder: Folder) -> Iterator[str]:
    """What a reader would want to have read, if it were one thing."""
    taught = [
        (phase.name, after - before)
        for phase in folder.phases
        if (before := number(phase.start.get("eval_loss"))) is not None
        and (after := number(phase.end.get("eval_loss"))) is not None
    ]
    if taught:
        told = ", ".join(f"{name} {change(moved)}" for name, moved in taught)
        yield f"Each phase has moved the loss on its own held-out documents: {told} nats a token."
    sets = ((folder.forgetting.get("measures") or {}).get("sets") or {}).items()
    lost = [(number(facts.get("forgetting")) or 0.0, name, facts.get("best_after")) for name, facts in sets]
    if lost:
        most, name, best_after = max(lost, key=lambda each: each[0])
        if most < 0.0005:
            yield "Nothing that a phase has taught was forgotten by a later one."
        else:
            best = f"after {best_after}" if best_after else "at the base"
            yield f"Most was forgotten of {name}: its loss stands {most:.3f} nats above its best ({best})."
    failed = [phase.name for phase in folder.phases if phase.gate.get("passed") is False]
    if failed:
        yield f"{counted(len(failed), 'gate')} did not hold: {', '.join(failed)}."
