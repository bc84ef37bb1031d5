"""A merge, from outside: what it is made of, whether it is there already, and the child process that makes it.

base + adapters ─ python -m phased_cpt.merge ─ .merged_model.building/ ─ checked ─ merge.json, last ─ merged_model/
"""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from phased_cpt.bases import Base, find_weights, require_base_of
from phased_cpt.children import command
from phased_cpt.config import RunConfig, from_record
from phased_cpt.errors import InputError, Interrupted, PhasedCptError
from phased_cpt.launchers import CONDUCTOR
from phased_cpt.ledger import Adapter, PhaseRecord
from phased_cpt.ledger.fingerprint import digest_of
from phased_cpt.merged_folder import alone, clear_left, digest_beside, is_whole, read_marker, require_free
from phased_cpt.plan import Plan
from phased_cpt.published import read_source, source_of, weights_digest
from phased_cpt.stopping import heard

FORMAT = 1
RANK_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GRACE_SECONDS = 10.0


@dataclass(frozen=True)
class FourBitBase:
    """How training has kept the base."""

    precision: str
    storage: str


@dataclass(frozen=True)
class Layer:
    """An adapter on the base, or on the adapters before it."""

    folder: str
    digest: str
    scale: float = 1.0


@dataclass(frozen=True)
class MergeJob:
    """All that the child is told."""

    base: str
    base_digest: str
    adapters: tuple[Layer, ...]
    output: str
    dtype: str  # auto: as the base is kept
    max_shard_size: int
    toward: Layer | None = None  # other whole weights of this base, and how far it is moved to them
    four_bits: FourBitBase | None = None
    base_kind: str = "auto"  # of a base in 4 bits: bf16, dequantized, or the better of both
    tokenizer: str | None = None  # a folder
    held_out: str | None = None  # a block index
    beside: str = ""  # digest of what is copied with the weights
    trust_remote_code: bool = False
    lineage: dict[str, Any] = field(default_factory=dict)  # for the model card alone

    @property
    def digest(self) -> str:
        """Of what the merged model is; where it lies, and what is told of it, is not in it."""
        layers = [[each.digest, each.scale] for each in self.adapters]
        four_bits = asdict(self.four_bits) if self.four_bits else None
        parts = [FORMAT, self.base_digest, layers, self.dtype, self.max_shard_size, four_bits, self.beside]
        moved = [[self.toward.digest, self.toward.scale]] if self.toward else []
        return digest_of([*parts, self.base_kind if four_bits else None, *moved])

    @classmethod
    def parse(cls, text: str) -> "MergeJob":
        values = json.loads(text)
        four_bits = values["four_bits"] and FourBitBase(**values["four_bits"])
        layers = tuple(Layer(**each) for each in values["adapters"])
        toward = values["toward"] and Layer(**values["toward"])
        return cls(**values | {"adapters": layers, "four_bits": four_bits, "toward": toward})


@dataclass(frozen=True)
class Merged:
    """What was made, or was there."""

    folder: Path
    facts: dict[str, Any]
    now: bool


def job_of_run(plan: Plan, root: Path, base: Base, phase: PhaseRecord, output: Path | None = None) -> MergeJob:
    """What the phase has published, on the base that it began with."""
    weights, model = phase.published, plan.config.model
    whole = root / weights.folder if weights and weights.folder else Path(base.folder)
    assert weights is not None
    found = read_source(root / phase.folder)
    tokenizer = found[0] if found else root / "tokenizer"
    kept = FourBitBase(model.precision, model.bnb_4bit_quant_storage) if model.use_4bit and weights.adapters else None
    return MergeJob(
        base=str(whole),
        base_digest=weights.base,
        adapters=tuple(Layer(_place(root, base, each), each.digest, each.scale) for each in weights.adapters),
        output=str(output or root / Path(plan.config.merge.output_dir).expanduser()),
        dtype=model.precision if plan.config.merge.dtype == "auto" else plan.config.merge.dtype,
        max_shard_size=plan.config.merge.max_shard_size,
        four_bits=kept,
        base_kind=plan.config.merge.base,
        tokenizer=str(tokenizer),
        beside=digest_beside(tokenizer, whole),
        held_out=_held_out(root / phase.folder, phase.name),
        trust_remote_code=model.trust_remote_code,
        lineage=_lineage(plan, root, base, phase),
    )


def _place(root: Path, base: Base, adapter: Adapter) -> str:
    return str(root / adapter.folder) if adapter.folder else str(base.adapter)


def _held_out(folder: Path, phase: str) -> str | None:
    """The block index that the phase was measured on, if it is still there."""
    try:
        index = json.loads((folder / "job.json").read_bytes())["evaluated"].get(phase)
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return str(index) if index and Path(index).is_dir() else None


def _lineage(plan: Plan, root: Path, base: Base, last: PhaseRecord) -> dict[str, Any]:
    """The phases up to this one, for the card."""
    phases = []
    for phase in plan.phases:
        if found := read_source(root / phase.folder):
            phases.append(asdict(found[1]) | {"description": phase.phase.description})
        if phase.name == last.name:
            break
    name = plan.config.model.name or f"random weights ({(base.shape or {}).get('model_type')})"
    return {"run": plan.name, "base": name, "commit": base.commit, "phases": phases}


def merge_folders(
    base: str, adapters: Sequence[Path], output: Path, overrides: Sequence[str], tell: Callable[[str], None]
) -> Merged:
    """A base and adapters from anywhere."""
    with heard():
        return merge(job_of_folders(base, [(each, 1.0) for each in adapters], output, overrides, tell), thorough=True)


def job_of_folders(
    base: str,
    adapters: Sequence[tuple[Path, float]],
    output: Path,
    overrides: Sequence[str],
    tell: Callable[[str], object],
) -> MergeJob:
    """A base and adapters from anywhere, each as strong as is said."""
    config = from_record({"model": {"name": base}}, "--base", overrides).config
    folder, commit = find_weights(base, None, "--base")
    folders = [each for each, _ in adapters]
    for unknown in (require_base_of(each, folder, commit) for each in folders):
        if unknown:
            tell(unknown)
    has_tokenizer = (each for each in (*folders[::-1], folder) if (each / "tokenizer_config.json").exists())
    tokenizer = next(has_tokenizer, folder).resolve()
    return MergeJob(
        base=str(folder),
        base_digest=weights_digest(folder),
        adapters=tuple(Layer(str(each.resolve()), weights_digest(each), scale) for each, scale in adapters),
        output=str(output.absolute()),
        dtype=config.merge.dtype,
        max_shard_size=config.merge.max_shard_size,
        four_bits=_kept_in(folders, config),
        base_kind=config.merge.base,
        tokenizer=str(tokenizer),
        beside=digest_beside(tokenizer, folder),
        trust_remote_code=config.model.trust_remote_code,
        lineage={"base": base, "commit": commit},
    )


def _kept_in(adapters: Sequence[Path], config: RunConfig) -> FourBitBase | None:
    """As an adapter of ours remembers it; another's is taken for one of QLoRA only where that is said."""
    known = [source.four_bits for each in adapters if (source := source_of(each)) and source.four_bits]
    if known:
        return FourBitBase(**known[0])
    usual = FourBitBase("bf16" if config.merge.dtype == "auto" else config.merge.dtype, "auto")
    return usual if config.merge.base == "dequantized" else None


def merge(job: MergeJob, *, thorough: bool = False) -> Merged:
    """The merged model of a job: made by a child process, unless it is there (`thorough`: byte by byte)."""
    output = Path(job.output)
    if output.is_symlink():  # to a larger disk, say: it is made there
        output = output.resolve()
        job = replace(job, output=str(output))
    with alone(output):
        facts = read_marker(output)
        if facts is not None and facts["digest"] == job.digest and is_whole(output, facts, thorough=thorough):
            clear_left(output)
            return Merged(output, facts, now=False)
        moved = [job.toward] if job.toward else []
        require_free(output, [Path(job.base), *(Path(each.folder) for each in (*job.adapters, *moved))])
        _run(job)
        facts = read_marker(output)
    if facts is None or facts["digest"] != job.digest:
        raise PhasedCptError(f"{output}: the merge has ended without publishing")
    return Merged(output, facts, now=True)


def _run(job: MergeJob) -> None:
    """Its progress goes where ours does; what it has to say at the end comes through a pipe."""
    child = subprocess.Popen(  # noqa: S603
        command("phased_cpt.merge"), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=_environment(), start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = child.communicate(json.dumps(asdict(job)).encode())
    finally:
        if child.poll() is None:  # stopped, or failed here
            child.send_signal(signal.SIGTERM)
            try:
                child.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
    _judge(child.returncode, said)


def _environment() -> dict[str, str]:
    """No rank of anything, with every core; and whatever DeepSpeed has set is not its business."""
    left = {
        name: value
        for name, value in os.environ.items()
        if name not in RANK_NAMES and not name.startswith(("DS_", "DEEPSPEED_", "OMP_"))
    }
    large_pages = {
        "THP_MEM_ALLOC_ENABLE": "1"
    }  # of torch: a new tensor costs a page fault for 2 MiB, and not for 4 KiB
    return left | large_pages | {"TOKENIZERS_PARALLELISM": "false", CONDUCTOR: str(os.getpid())}


def _judge(code: int, said: bytes) -> None:
    try:
        word = json.loads(said.decode().strip().splitlines()[-1])
    except (ValueError, IndexError):
        word = {}
    if code == 0 and word.get("done"):
        return
    if "message" in word:
        errors: dict[int, type[PhasedCptError]] = {2: InputError, 75: Interrupted}
        raise errors.get(word["exit_code"], PhasedCptError)(word["message"])
    if code == -signal.SIGKILL:
        raise PhasedCptError("the merge was killed (out of memory, it may be); the same command goes on with it")
    raise PhasedCptError(f"the merge has failed (exit {code}); the same command goes on with it")
