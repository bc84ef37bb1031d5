"""A base and what every phase has made of it, in one loaded model.

base weights, in memory once ─┬─ every adapter off            base
                              ├─ adapter of phase 1           foundation
                              └─ adapters of phases 1 and 2   evolution, if it stands on foundation's (handover: stack)
other whole weights           ─── loaded when asked for: merged in between, trained every weight, the merged model
"""

import contextlib
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from transformers import PreTrainedModel

from phased_cpt.bases import Base, find_base, find_weights, require_base_of
from phased_cpt.blend import require_there
from phased_cpt.config import from_record
from phased_cpt.config.allowed import nearest
from phased_cpt.data.prepare import cache_folder
from phased_cpt.errors import InputError, PhasedCptError
from phased_cpt.ledger import RunRecord, Weights, read_record
from phased_cpt.merged_folder import is_whole, read_marker
from phased_cpt.model.adapter import base_of
from phased_cpt.model.base import Tell
from phased_cpt.model.loading import (
    Model,
    Whole,
    as_strong,
    attention_on,
    device_of,
    keep_4bit_weights,
    load_whole,
    silently,
    tokenizer_of,
    with_adapter,
)
from phased_cpt.plan import Plan, make_plan
from phased_cpt.published import MERGED_MARKER, require_published
from phased_cpt.run_dir import MERGED_BASE, RunDir
from phased_cpt.wanted import ModelsWanted

BASE, ADAPTER, MERGED = "base", "adapter", "merged"
PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Member:
    """What a name stands for: whole weights, and perhaps adapters on them, all of them at once."""

    whole: Whole
    adapters: tuple[Path, ...] = ()


Ready = Callable[[Path], object]  # whole weights are about to be loaded: makes what is gone and can be made again


class Lineup:
    """A base and what phases have made of it, in one loaded model: in memory as soon as somebody asks for it."""

    def __init__(
        self,
        members: Mapping[str, Member],
        device: torch.device,
        tell: Callable[[str], object],
        run: RunRecord | None = None,
        root: Path | None = None,
        ready: Ready = lambda folder: None,
    ) -> None:
        self.names = tuple(members)
        self.device = device
        self.run = run
        self.root = root
        self.members = dict(members)
        self._tell, self._ready = tell, ready
        self._loaded: dict[Whole, Model] = {}
        folders = dict.fromkeys(folder for member in members.values() for folder in member.adapters)
        # As PEFT knows them, whose modules must not be called `train`, `pop` or `lora`.
        self._inside = {folder: f"adapter_{number}" for number, folder in enumerate(folders)}
        self.tokenizer = tokenizer_of(members[self.tuned].whole, members[self.tuned].adapters)

    @property
    def tuned(self) -> str:
        """The last phase that has published; else the adapter, or the only model."""
        return [name for name in self.names if name != MERGED or len(self.names) == 1][-1]

    @contextlib.contextmanager
    def as_(self, name: str, strength: float = 1.0) -> Iterator[PreTrainedModel]:
        """The loaded model as that name, adapters as strong as is said; for the base, with every one truly off."""
        model, member = self.load(name), self.members[name]
        if not isinstance(model, PeftModel):
            yield model
        elif not member.adapters:
            with model.disable_adapter():
                yield base_of(model)
        else:
            *below, last = (self._inside[folder] for folder in member.adapters)
            model.set_adapter(last, inference_mode=True)
            if below:
                cast(BaseTuner, model.base_model).set_adapter([last, *below], inference_mode=True)  # as in training
            with as_strong(model, [last, *below], strength):
                yield base_of(model)

    def load(self, name: str) -> Model:
        """What a name stands for, in memory."""
        if name not in self.members:
            raise InputError(f"there is no model {name}{nearest(name, self.names)}; there is {', '.join(self.names)}")
        whole = self.members[name].whole
        if whole not in self._loaded:
            self._ready(whole.folder)
            if self._loaded:
                self._tell(f"{name} has weights of its own: {whole.folder} takes the memory of another model")
            self._loaded[whole] = self._with_adapters(whole)
        return self._loaded[whole]

    def with_members(self, members: Mapping[str, Member]) -> "Lineup":
        """Others of the same run, none of them loaded."""
        return Lineup(members, self.device, self._tell, self.run, self.root, self._ready)

    def drop_all_but(self, names: Collection[str]) -> None:
        """Of whole weights that none of these needs, the memory is given back."""
        kept = {self.members[name].whole for name in names}
        for whole in [whole for whole in self._loaded if whole not in kept]:
            del self._loaded[whole]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _with_adapters(self, whole: Whole) -> Model:
        """Whole weights, with every adapter that is meant for them beside each other."""
        model: Model = load_whole(whole, self.device, self._tell)
        mine = (member.adapters for member in self.members.values() if member.whole == whole)
        for folder in dict.fromkeys(folder for adapters in mine for folder in adapters):
            model = with_adapter(model, folder, self._inside[folder], self.device)
        model.eval()
        keep_4bit_weights(model)
        return model


def line_up(wanted: ModelsWanted, *, tell: Callable[[str], object]) -> Lineup:
    """The models that are meant: those of a run, or a base and an adapter from anywhere, or a folder of weights."""
    device = device_of(wanted.device)
    with silently():
        if wanted.model is not None:
            folder = wanted.model.expanduser().resolve()
            if (folder / "adapter_config.json").exists():
                raise InputError(f"{wanted.model}: this is an adapter; type --adapter {wanted.model}")
            return Lineup({folder.name: Member(_plain(folder, wanted, device))}, device, tell)
        if wanted.adapter is not None:
            adapter = wanted.adapter.expanduser().resolve()
            folder, commit = _base_of_adapter(adapter, wanted.base)
            if unknown := require_base_of(adapter, folder, commit):
                tell(unknown)
            whole = _plain(folder, wanted, device)
            return Lineup({BASE: Member(whole), ADAPTER: Member(whole, (adapter,))}, device, tell)
        if wanted.run_dir is None:
            raise InputError("no model is named; add --run-dir, --adapter or --model")
        root = wanted.run_dir.expanduser().resolve()
        record, plan = read_run(root, wanted.base)
        base = base_of_run(plan, root, record)
        members = _of_run(root, record, plan, base, wanted, device)
        merged = root / Path(plan.config.merge.output_dir).expanduser()
        if _is_of(merged, record, tell):
            trusted = plan.config.model.trust_remote_code
            members[MERGED] = Member(replace(_plain(merged, wanted, device), trust_remote_code=trusted))
        return Lineup(
            members, device, tell, record, root, lambda folder: _restore(folder, plan, root, base, record, tell)
        )


# A run ----------------------------------------------------------------------------------------------------------------


def read_run(root: Path, base: str | None) -> tuple[RunRecord, Plan]:
    """What is known of a run that has published something; `base`: where its base is now."""
    record = read_record(RunDir(root))
    if record is None:
        raise InputError(f"{root}: no run has begun here")
    if not any(phase.published for phase in record.phases):
        raise InputError(f"{root}: no phase has published anything yet")
    written = record.config.get("model", {})
    if base is not None:
        written = {key: value for key, value in written.items() if key != "from_config"} | {"name": base}
    return record, make_plan(from_record(record.config | {"model": written}, str(RunDir(root).ledger)))


def base_of_run(plan: Plan, root: Path, record: RunRecord) -> Base:
    """The base that the run began with, by its bytes."""
    first = record.phases[0].started_from
    assert first is not None  # something was published
    found = find_base(plan, root, cache_folder(plan))
    if found.digest != first.base:
        raise PhasedCptError(f"{found.folder}: this is not the base of the run; name the one that is with --base")
    return found


def _restore(folder: Path, plan: Plan, root: Path, base: Base, record: RunRecord, tell: Tell) -> None:
    """A base that was merged between two phases is removed when it is not needed any more to train."""
    standing = (each.published for each in record.phases if each.published and each.published.folder)
    for weights in standing:
        if root / weights.folder == folder:
            require_there(plan, root, base, weights, record.phases, tell)


def _of_run(
    root: Path, record: RunRecord, plan: Plan, base: Base, wanted: ModelsWanted, device: torch.device
) -> dict[str, Member]:
    members = {BASE: Member(_as_trained(Path(base.folder), plan, wanted, device))}
    checked: set[str] = set()
    for phase in record.phases:
        if phase.published is None:
            continue
        _require_once(root, phase.published, checked)
        folder = root / phase.published.folder if phase.published.folder else Path(base.folder)
        adapters = tuple(root / each.folder for each in phase.published.adapters)
        name = phase.folder if phase.name in (BASE, MERGED) else phase.name
        members[name] = Member(_as_trained(folder, plan, wanted, device), adapters)
    return members


def _is_of(merged: Path, record: RunRecord, tell: Callable[[str], object]) -> bool:
    """Whether a merged model is there, and whole, and that of what the run has published last."""
    if not (merged / "config.json").exists():
        return False
    last = next(phase.published for phase in reversed(record.phases) if phase.published)
    facts = read_marker(merged)
    if facts is None and not (merged / MERGED_MARKER).exists():
        return True  # made otherwise, and put there by somebody who knows
    wanted = [last.base, *((adapter.digest, adapter.scale) for adapter in last.adapters)]
    found = facts and [facts["base"]["digest"], *((each["digest"], each["scale"]) for each in facts["adapters"])]
    if facts is None or found != wanted or not is_whole(merged, facts):
        tell(f"{merged} is not what the last phase has published; `phased-cpt merge` makes it anew")
        return False
    return True


def _require_once(root: Path, weights: Weights, checked: set[str]) -> None:
    """What was published is there to the byte; whole weights below several adapters are read once.

    A merged base that is gone is made again when it is loaded, and looked at then.
    """
    gone = Path(weights.folder).name == MERGED_BASE and not (root / weights.folder / "config.json").exists()
    known = gone or weights.folder in checked
    require_published(root, weights.model_copy(update={"folder": ""}) if known else weights)
    checked.add(weights.folder)


def _as_trained(folder: Path, plan: Plan, wanted: ModelsWanted, device: torch.device) -> Whole:
    model = plan.config.model
    in_4bit = model.use_4bit if wanted.use_4bit is None else wanted.use_4bit
    return Whole(
        folder=folder,
        precision=model.precision,
        storage=model.bnb_4bit_quant_storage if in_4bit else None,
        attention=attention_on(model.attention, device),
        max_tokens=plan.phases[0].settings.data.max_tokens,
        trust_remote_code=model.trust_remote_code,
    )


# Folders from anywhere ------------------------------------------------------------------------------------------------


def _plain(folder: Path, wanted: ModelsWanted, device: torch.device) -> Whole:
    """A Transformers folder, in the precision that it was written in."""
    if not (folder / "config.json").exists():
        raise InputError(f"{folder}: this is no model (it has no config.json)")
    config = _object(folder / "config.json")
    written = str(config.get("dtype") or config.get("torch_dtype"))
    storage = "auto" if wanted.use_4bit else None
    return Whole(folder, PRECISIONS.get(written, "bf16"), storage, attention_on("auto", device))


def _base_of_adapter(adapter: Path, base: str | None) -> tuple[Path, str | None]:
    """The base that was named, or the one that the adapter names."""
    if not (adapter / "adapter_config.json").exists():
        raise InputError(f"{adapter}: this is no adapter (it has no adapter_config.json)")
    kind = _object(adapter / "adapter_config.json").get("peft_type")
    if kind != "LORA":
        raise InputError(f"{adapter}: this is a {kind} adapter; LoRA is needed")
    name = base or _object(adapter / "adapter_config.json").get("base_model_name_or_path")
    if not name:
        raise InputError(f"{adapter}: it does not say which base it is for; name it with --base")
    return find_weights(
        str(name), None, "--base" if base else f"{adapter}: its base, as it says (or name it with --base)"
    )


def _object(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
