"""What phases have published, as one model: one of them, a part of what it changes, or a sum of several.

merge          base + every adapter of a phase
sweep-lambda   base + λ · all that the run has added, up to a phase
soup           base + 0.3 · all up to one phase + 0.7 · all up to another
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from phased_cpt.bases import Base, find_base, require_base_of
from phased_cpt.chain import Chain, chain_of, require_straight
from phased_cpt.config.allowed import nearest
from phased_cpt.data.prepare import cache_folder
from phased_cpt.errors import InputError, LedgerRefuses
from phased_cpt.handover import require_base
from phased_cpt.ledger import Adapter, PhaseRecord, Weights, read_record, run_lock
from phased_cpt.merged_folder import digest_beside
from phased_cpt.merging import Layer, Merged, MergeJob, job_of_folders, job_of_run, merge
from phased_cpt.plan import Plan
from phased_cpt.published import require_published, weights_digest
from phased_cpt.run_dir import MERGED_BASE, RunDir
from phased_cpt.stopping import heard

T = TypeVar("T")
Tell = Callable[[str], object]


@dataclass(frozen=True)
class Published:
    """A run that has published something."""

    plan: Plan
    root: Path
    base: Base
    records: tuple[PhaseRecord, ...]

    def phase(self, name: str | None, option: str) -> PhaseRecord:
        """One that has published; the last, unless one is named."""
        done = [each for each in self.records if each.published is not None]
        if not done:
            raise InputError(f"{self.root}: no phase has published anything yet; run it first")
        names = [each.name for each in done]
        if name is not None and name not in names:
            known = f"{', '.join(names)} {'has' if len(names) == 1 else 'have'}"
            raise InputError(f"{option} {name}: has published nothing{nearest(name, names)} ({known})")
        return done[names.index(name)] if name else done[-1]

    def chain(self, phase: PhaseRecord, tell: Tell) -> Chain:
        """All that was added to the base up to a phase, there to the byte."""
        assert phase.published is not None
        chain = chain_of(self.root, phase.published, self.records)
        there = Weights(kind="base", base=chain.digest, folder=chain.folder, adapters=chain.adapters)
        require_there(self.plan, self.root, self.base, there, self.records, tell)
        require_published(self.root, there)
        require_straight([self.root / each.folder for each in chain.adapters])
        return chain

    def layer(self, adapter: Adapter, strength: float) -> Layer:
        return Layer(str(self.root / adapter.folder), adapter.digest, adapter.scale * strength)

    def require_own_base(self) -> None:
        """The base is the one that the run began with."""
        first = self.records[0].started_from
        if first is not None and first.base != self.base.digest:
            what = "this is not the base that the run was trained on; name that with --base"
            raise LedgerRefuses(f"{self.base.folder}: {what}")


@contextmanager
def published(plan: Plan, run_dir: RunDir) -> Iterator[Published]:
    """The run, held until its weights are read."""
    with heard(), run_lock(run_dir):
        record, root = read_record(run_dir), run_dir.root.resolve()
        if record is None or not any(phase.published for phase in record.phases):
            raise InputError(f"{run_dir.root}: no phase has published anything yet; run it first")
        yield Published(plan, root, find_base(plan, root, cache_folder(plan)), record.phases)


def merge_published(
    plan: Plan,
    run_dir: RunDir,
    phase: str | None = None,
    output: Path | None = None,
    base_is_named: bool = False,
    tell: Tell = print,
) -> Merged:
    """What a phase of a run has published, or the last of them, merged now."""
    with published(plan, run_dir) as run:
        chosen = run.phase(phase, "--phase")
        weights = chosen.published
        assert weights is not None
        if output is None and chosen.name != plan.phases[-1].name:
            what = f"{run_dir.root}: {chosen.name} is not its last phase, and merged it is not the model of the run"
            raise InputError(f"{what}; go on with `phased-cpt run`, or say where it should go with --out")
        if base_is_named and weights.folder:
            what = f"{chosen.name} stands on the whole weights of an earlier phase, which are in the run folder"
            raise InputError(f"--base: {what}; leave it out")
        if not weights.folder:
            run.require_own_base()
        require_there(plan, run.root, run.base, weights, run.records, tell)
        require_published(run.root, weights)
        return merge(job_of_run(plan, run.root, run.base, chosen, output), thorough=True)


def require_there(
    plan: Plan, root: Path, base: Base, weights: Weights, records: Sequence[PhaseRecord], tell: Tell
) -> None:
    """The merged base below a phase: of those, only the newest is kept. Nobody waits for it without knowing why."""
    folder = root / weights.folder
    if Path(weights.folder).name == MERGED_BASE and not folder.exists():
        why = "was removed when a later phase had one of its own"
        tell(f"{folder} {why}; it is merged once more, which takes as long as `phased-cpt merge`, and is kept")
    require_base(plan, root, base, weights, records)


def merge_part(plan: Plan, run_dir: RunDir, phase: str | None, strength: float, output: Path, tell: Tell) -> Merged:
    """The base, and so much of all that the run has added to it up to a phase."""
    with published(plan, run_dir) as run:
        chosen = run.phase(phase, "--phase")
        run.require_own_base()
        chain = run.chain(chosen, tell)
        job = _on_the_first_base(run, chosen, [run.layer(each, strength) for each in chain.adapters], output)
        if chain.folder:
            job = replace(job, toward=Layer(str(run.root / chain.folder), chain.digest, strength), four_bits=None)
        return merge(job, thorough=True)


def _on_the_first_base(run: Published, phase: PhaseRecord, layers: Sequence[Layer], output: Path) -> MergeJob:
    job = job_of_run(run.plan, run.root, run.base, phase, output)
    beside = digest_beside(Path(job.tokenizer or run.base.folder), Path(run.base.folder))
    job = replace(job, base=run.base.folder, base_digest=run.base.digest, beside=beside)
    return replace(job, adapters=tuple(layers))


# Soups ----------------------------------------------------------------------------------------------------------------

Strengths = Sequence[tuple[Path, float]]


def soup_of_run(
    plan: Plan,
    run_dir: RunDir,
    weights: Mapping[str, float],
    others: Strengths,
    output: Path,
    make: Callable[[MergeJob], T],
    tell: Tell,
) -> T:
    """Phases of a run, each as strong as its weight, and adapters of the same base from anywhere: made by `make`."""
    with published(plan, run_dir) as run:
        strengths: dict[Adapter, float] = {}
        phases = [run.phase(name, "--weight") for name in weights]
        chains = {phase.name: _adapters_alone(run, phase, tell) for phase in phases}
        below = _one_base(chains)
        for name, chain in chains.items():
            for each in chain.adapters:
                strengths[each] = strengths.get(each, 0.0) + weights[name]
        layers = [run.layer(each, strength) for each, strength in strengths.items()]
        last = max(phases, key=run.records.index)
        job = _on_the_first_base(run, last, layers, output)
        if below.folder:  # what an earlier phase has trained whole
            job = replace(job, base=str(run.root / below.folder), base_digest=below.digest)
        else:
            run.require_own_base()
        more = _layers(others, Path(job.base), None if below.folder else run.base.commit, tell)
        return make(replace(job, adapters=(*job.adapters, *more)))


def _one_base(chains: Mapping[str, Chain]) -> Chain:
    """Adapters add up on one base only."""
    bases = {chain.folder: name for name, chain in chains.items()}
    if len(bases) > 1:
        (one, first), (other, second) = list(bases.items())[:2]
        what = f"{first} stands on {one or 'the base'} and {second} on {other or 'the base'}"
        raise InputError(f"--weight: {what}; a soup is made of adapters on one base")
    return next(iter(chains.values()), Chain(()))


def _adapters_alone(run: Published, phase: PhaseRecord, tell: Tell) -> Chain:
    chain, at = run.chain(phase, tell), f"--weight {phase.name}"
    if not chain.adapters:
        what = "it has trained every weight, and a soup is made of adapters"
        raise InputError(f"{at}: {what} (`phased-cpt sweep-lambda --phase {phase.name} --write N` takes a part of it)")
    if chain.through_merges and run.plan.config.model.precision != "fp32":
        kept = run.plan.config.model.precision
        why = f"it was trained where earlier phases were merged in, and rounded to {kept}"
        tell(f"{at}: {why}; the soup is the sum of the adapters, without that rounding")
    return chain


def _layers(adapters: Strengths, base: Path, commit: str | None, tell: Tell) -> tuple[Layer, ...]:
    """Adapters from anywhere, of this base."""
    for unknown in (require_base_of(folder, base, commit) for folder, _ in adapters):
        if unknown:
            tell(unknown)
    require_straight([folder for folder, _ in adapters])
    return tuple(Layer(str(folder.resolve()), weights_digest(folder), strength) for folder, strength in adapters)


def soup_of_folders(base: str, adapters: Strengths, output: Path, make: Callable[[MergeJob], T], tell: Tell) -> T:
    """Adapters of one base, from anywhere."""
    with heard():
        require_straight([folder for folder, _ in adapters])
        return make(job_of_folders(base, adapters, output, (), tell))
