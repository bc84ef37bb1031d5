"""What a phase has published, back in one call, wherever its run folder lies now.

model, tokenizer = load_published("outputs/my-run-20260102_030405")              the last phase that has published
model, tokenizer = load_published("outputs/my-run-20260102_030405", "foundation")
"""

import sys
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from phased_cpt.blend import require_there
from phased_cpt.errors import InputError
from phased_cpt.ledger import RunRecord, Weights
from phased_cpt.model.adapter import stacked
from phased_cpt.model.base import load_base
from phased_cpt.model.lineup import base_of_run, read_run
from phased_cpt.published import require_published

Loaded = tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]


def load_published(run_dir: Path | str, phase: str | None = None, base: str | None = None, **options: Any) -> Loaded:
    """The model of a phase and its tokenizer, ready to answer; in 4 bits, if the run was.

    Of `handover: stack` all adapters are active at once: "default" learned last, "below_1" … lie below it.
    `base`: where the base is now, if it is no longer where the run found it. `options` go to from_pretrained.
    """
    root = Path(run_dir).expanduser().resolve()
    record, plan = read_run(root, base)
    weights, began_with = _published(record, phase, root), base_of_run(plan, root, record)
    require_there(plan, root, began_with, weights, record.phases, lambda said: sys.stderr.write(f"{said}\n"))
    require_published(root, weights)
    model: PreTrainedModel | PeftModel = load_base(
        root / weights.folder if weights.folder else Path(began_with.folder),
        precision=plan.config.model.precision,
        attention=plan.config.model.attention,
        max_tokens=plan.phases[0].settings.data.max_tokens,
        storage=plan.config.model.bnb_4bit_quant_storage if plan.config.model.use_4bit else None,
        trust_remote_code=plan.config.model.trust_remote_code,
        tell=lambda message: None,
        **options,
    )
    model.config.use_cache = True  # as is wanted where text is made, and no documents stand side by side
    folder = root / (weights.adapters[-1].folder if weights.adapters else weights.folder)
    if weights.adapters:
        model = PeftModel.from_pretrained(model, str(folder))
    below = [root / adapter.folder for adapter in weights.adapters[:-1]]
    return stacked(model, below).eval(), AutoTokenizer.from_pretrained(folder)


def _published(record: RunRecord, name: str | None, root: Path) -> Weights:
    done = {phase.name: phase.published for phase in record.phases if phase.published is not None}
    if name is not None and name not in done:
        raise InputError(f"{root}: {name} has published nothing; {', '.join(done)} has")
    return done[name or list(done)[-1]]
