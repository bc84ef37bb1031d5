"""What a phase has published, back in one call, wherever its run folder lies now.

model, tokenizer = load_published("outputs/my-run-20260102_030405")              the last phase that has published
model, tokenizer = load_published("outputs/my-run-20260102_030405", "foundation")
"""

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from phased_cpt.bases import find_base
from phased_cpt.config import from_record
from phased_cpt.data.prepare import cache_folder
from phased_cpt.errors import InputError, PhasedCptError
from phased_cpt.ledger import PhaseRecord, RunRecord, read_record
from phased_cpt.model.base import load_base
from phased_cpt.plan import Plan, make_plan
from phased_cpt.published import require_published
from phased_cpt.run_dir import RunDir

Loaded = tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]


def load_published(run_dir: Path | str, phase: str | None = None, base: str | None = None, **options: Any) -> Loaded:
    """The model of a phase and its tokenizer, ready to answer; in 4 bits, if the run was.

    `base`: where the base is now, if it is no longer where the run found it. `options` go to from_pretrained.
    """
    run = RunDir(Path(run_dir).expanduser().resolve())
    record = read_record(run)
    if record is None:
        raise InputError(f"{run.root}: no run has begun here")
    weights = _phase(record, phase, run).published
    assert weights is not None
    require_published(run.root, weights)
    plan = make_plan(from_record(_with_base(record.config, base), str(run.ledger)))
    model: PreTrainedModel | PeftModel = load_base(
        run.root / weights.folder if weights.folder else _base(plan, run, weights.base),
        precision=plan.config.model.precision,
        attention=plan.config.model.attention,
        max_tokens=plan.phases[0].settings.data.max_tokens,
        storage=plan.config.model.bnb_4bit_quant_storage if plan.config.model.use_4bit else None,
        trust_remote_code=plan.config.model.trust_remote_code,
        tell=lambda message: None,
        **options,
    )
    model.config.use_cache = True  # as is wanted where text is made, and no documents stand side by side
    folder = run.root / (weights.adapters[-1].folder if weights.adapters else weights.folder)
    for adapter in weights.adapters:
        model = PeftModel.from_pretrained(model, str(run.root / adapter.folder))
    return model.eval(), AutoTokenizer.from_pretrained(folder)


def _phase(record: RunRecord, name: str | None, run: RunDir) -> PhaseRecord:
    done = {phase.name: phase for phase in record.phases if phase.published is not None}
    if not done:
        raise InputError(f"{run.root}: no phase has published anything yet")
    if name is not None and name not in done:
        raise InputError(f"{run.root}: {name} has published nothing; {', '.join(done)} has")
    return done[name or list(done)[-1]]


def _with_base(config: dict[str, Any], base: str | None) -> dict[str, Any]:
    model = {key: value for key, value in config.get("model", {}).items() if base is None or key != "from_config"}
    return config | {"model": model | ({"name": base} if base else {})}


def _base(plan: Plan, run: RunDir, digest: str) -> Path:
    """The base that the run began with, by its bytes."""
    found = find_base(plan, run.root, cache_folder(plan))
    if found.digest != digest:
        raise PhasedCptError(f"{found.folder}: this is not the base of the run; name the one that is")
    return Path(found.folder)
