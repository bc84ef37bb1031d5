"""A plan held against what was begun: what may go on, what is refused, what is redone."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from phased_cpt.config import Loaded
from phased_cpt.config.schema import Phase, Run, RunConfig
from phased_cpt.errors import InputError, LedgerRefuses
from phased_cpt.ledger.fingerprint import differences, told
from phased_cpt.ledger.record import Archiving, PhaseRecord, RunRecord
from phased_cpt.plan import PhasePlan, Plan, make_plan
from phased_cpt.run_dir import MADE_FROM_ALL_PHASES


def amended(plan: Plan, record: RunRecord | None, redo_from: str | None = None) -> Plan:
    """With the replay that a gate has asked for, where the user asks for none; what is to be redone begins without."""
    phases = record.phases if record else ()
    names = [phase.name for phase in phases]
    begins = names.index(redo_from) if record and redo_from in names and redo_from != record.redoing else len(names)
    shares = {phase.name: phase.replay_by_gate for phase in phases[:begins] if phase.replay_by_gate}
    changed = tuple(
        phase.model_copy(update={"replay": shares[phase.name]}) if phase.name in shares and not phase.replay else phase
        for phase in plan.config.phases
    )
    ranks = next((phase.batch.ranks for phase in plan.phases if phase.batch), None)
    prepared = {phase.name: phase.prepared for phase in plan.phases if phase.prepared}
    return make_plan(Loaded(plan.config.model_copy(update={"phases": changed}), plan.places), ranks, prepared)


def reconcile(record: RunRecord, plan: Plan, redo_from: str | None, archive_number: int) -> RunRecord:
    """The record as it stands under this plan; refuses a plan whose beginning is not what was begun.

    New phases at the end are welcome. What is redone, and all that stands on it, is forgotten and marked for the
    archive; nothing is deleted. A redo that is under way and still matches is gone on with, not begun anew.
    """
    _require_same_run(record, plan)
    if redo_from is not None and not (redo_from == record.redoing and _matches(record.begun, plan)):
        record = _forget(record, plan, redo_from, archive_number)
    _require_match(record.begun, plan)
    to_come = fresh(plan.phases[len(record.begun) :])
    tried = {phase.name: phase for phase in record.phases if phase.state == "pending" and phase.replay_by_gate}
    return record.model_copy(update={"phases": (*record.begun, *(tried.get(each.name, each) for each in to_come))})


def _require_same_run(record: RunRecord, plan: Plan) -> None:
    """A folder in which not one phase is of this plan is somebody else's, and there is nothing in it to redo."""
    begun = [phase.name for phase in record.begun]
    if begun and not set(begun) & {phase.name for phase in plan.phases}:
        whose = f"this is the folder of the run {record.config.get('run', {}).get('name', Run().name)}"
        raise LedgerRefuses(f"{whose}, with other phases ({', '.join(begun)}); name another folder with --run-dir")


def fresh(phases: Sequence[PhasePlan]) -> tuple[PhaseRecord, ...]:
    return tuple(PhaseRecord(name=phase.name, folder=phase.folder) for phase in phases)


def require_same(record: PhaseRecord, now: dict[str, Any], planned: PhasePlan) -> None:
    """Refuse a phase that has begun as something else, field by field."""
    was = record.fingerprint.parts if record.fingerprint else now
    if found := differences(_with_younger_keys(was, now), now):
        state = "is done" if record.state == "done" else "has begun"
        what = f"phase {record.name} {state}, with other values than it has now:\n{told(found)}{_hints(found, planned)}"
        raise LedgerRefuses(f"{what}\n{_ways_out(record.name)}")


def _with_younger_keys(was: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What an older version has not written down, because it had no such key, it has done as the default says.

    A key that was left out because it decided nothing gets its default, too: whatever makes it decide is another key.
    """
    defaults = RunConfig().model_dump(mode="json", exclude={"phases"})
    named = {f"{section}.{key}": value for section, values in defaults.items() for key, value in values.items()}
    named |= {key: field.get_default() for key, field in Phase.model_fields.items() if not field.is_required()}
    return {key: named[key] for key in now.keys() & named.keys()} | was


def _hints(found: dict[str, tuple[Any, Any]], planned: PhasePlan) -> str:
    """What stands behind a difference that nobody has written as such."""
    hints = []
    rows = found.get("training.global_batch_size", (None, None))[0]
    if planned.batch and rows and rows % (planned.batch.micro_batch_size * planned.batch.ranks) == 0:
        keep = f"--set phases.{planned.name}.training.global_batch_size={rows}"
        hints.append(f"    (the batch follows from the number of GPUs, {planned.batch.ranks} now; `{keep}` keeps it)")
    for key, sources in (("sources", planned.phase.sources), ("eval_sources", planned.phase.eval_sources)):
        hints += [f"    ({key}.{n} is {source.path})" for n, source in enumerate(sources) if f"{key}.{n}" in found]
    if "training.anneals" in found:
        why = "whether the last steps of `infinite` go down depends on the phase behind it"
        hints.append(f"    ({why}: give a new phase another training.lr_scheduler)")
    return "".join(f"\n{hint}" for hint in hints)


def _forget(record: RunRecord, plan: Plan, redo_from: str, archive_number: int) -> RunRecord:
    names = [phase.name for phase in record.phases]
    if redo_from not in names:
        raise InputError(f"--redo-from: this run has no phase {redo_from!r}; it has {', '.join(names)}")
    kept, redone = record.phases[: names.index(redo_from)], record.phases[names.index(redo_from) :]
    merged = {plan.config.merge.output_dir, str(record.config.get("merge", {}).get("output_dir", "merged_model"))}
    inside = sorted(path for path in merged if not path.startswith("/"))  # an absolute one is not the run's to move
    left = (*(phase.folder for phase in redone), *MADE_FROM_ALL_PHASES, *inside)
    archiving = Archiving(number=archive_number, names=left)
    return record.model_copy(update={"phases": kept, "redoing": redo_from, "archiving": archiving})


def _matches(begun: Sequence[PhaseRecord], plan: Plan) -> bool:
    try:
        _require_match(begun, plan)
    except LedgerRefuses:
        return False
    return True


def _require_match(begun: Sequence[PhaseRecord], plan: Plan) -> None:
    for old, planned in zip_longest(begun, plan.phases[: len(begun)]):
        if planned is None or planned.name != old.name:
            now = f"is {planned.name} now" if planned else "is gone"
            raise LedgerRefuses(f"{old.folder} was phase {old.name}, which {now}\n{_ways_out(old.name)}")
        if old.fingerprint is not None:
            require_same(old, old.fingerprint.parts | planned.values("recipe"), planned)


def _ways_out(name: str) -> str:
    return (
        "put them back, start another run with `--new`, "
        f"or train it again with `--redo-from {name}` (what it made is archived)"
    )
