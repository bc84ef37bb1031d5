"""A base and what every phase has made of it, in one loaded model.

base weights, in memory once ─┬─ every adapter off      base
                              ├─ adapter of phase 1     foundation
                              └─ adapter of phase 2     evolution
other whole weights           ─── loaded when asked for: a phase that trained every weight, the merged model
"""

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from phased_cpt.bases import find_base, find_weights, require_base_of
from phased_cpt.config import from_record
from phased_cpt.config.allowed import nearest
from phased_cpt.data.prepare import cache_folder
from phased_cpt.errors import InputError, PhasedCptError
from phased_cpt.ledger import RunRecord, Weights, read_record
from phased_cpt.merged_folder import is_whole, read_marker
from phased_cpt.model.adapter import base_of
from phased_cpt.model.base import Tell, load_base
from phased_cpt.plan import Plan, make_plan
from phased_cpt.published import MERGED_MARKER, require_published
from phased_cpt.run_dir import RunDir
from phased_cpt.wanted import ModelsWanted

BASE, ADAPTER, MERGED = "base", "adapter", "merged"
PRECISIONS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
OF_A_GPU = ("flash_attention_2", "flash_attention_3", "flex_attention")


@dataclass(frozen=True)
class Whole:
    """A folder of whole weights, and how they are held."""

    folder: Path
    precision: str
    storage: str | None = None  # of 4-bit weights; None without them
    attention: str = "auto"
    max_tokens: int = 0  # of a row, by which `auto` chooses
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Member:
    """What a name stands for: whole weights, and perhaps an adapter on them."""

    whole: Whole
    adapter: Path | None = None


class Lineup:
    """A base and what phases have made of it, in one loaded model."""

    def __init__(
        self,
        members: Mapping[str, Member],
        device: torch.device,
        tell: Callable[[str], object],
        run: RunRecord | None = None,
        root: Path | None = None,
    ) -> None:
        self.names = tuple(members)
        self.device = device
        self.run = run
        self.root = root
        self._members = dict(members)
        self._tell = tell
        self._loaded: dict[Whole, PreTrainedModel | PeftModel] = {}
        self._load(members[self.tuned].whole)
        self.tokenizer = _tokenizer(members[self.tuned])

    @property
    def tuned(self) -> str:
        """The last phase that has published; else the adapter, or the only model."""
        return [name for name in self.names if name != MERGED or len(self.names) == 1][-1]

    @contextlib.contextmanager
    def as_(self, name: str) -> Iterator[PreTrainedModel]:
        """The loaded model as that name; for the base, with every adapter truly off."""
        if name not in self._members:
            raise InputError(f"there is no model {name}{nearest(name, self.names)}; there is {', '.join(self.names)}")
        member = self._members[name]
        if member.whole not in self._loaded:
            self._tell(f"{name} has weights of its own: {member.whole.folder} takes the memory of another model")
            self._load(member.whole)
        model = self._loaded[member.whole]
        if not isinstance(model, PeftModel):
            yield model
        elif member.adapter is None:
            with model.disable_adapter():
                yield base_of(model)
        else:
            model.set_adapter(_inside(name), inference_mode=True)
            yield base_of(model)

    def _load(self, whole: Whole) -> None:
        """Whole weights, with every adapter that is meant for them beside each other."""
        model: PreTrainedModel | PeftModel = _load_whole(whole, self.device, self._tell)
        for name, member in self._members.items():
            if member.whole == whole and member.adapter is not None:
                model = _with_adapter(model, member.adapter, name, self.device)
        model.eval()
        _keep_4bit_weights(model)
        self._loaded[whole] = model


def line_up(wanted: ModelsWanted, *, tell: Callable[[str], object]) -> Lineup:
    """The models that are meant: those of a run, or a base and an adapter from anywhere, or a folder of weights."""
    device = _device(wanted.device)
    with _quiet():
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
            return Lineup({BASE: Member(whole), ADAPTER: Member(whole, adapter)}, device, tell)
        if wanted.run_dir is None:
            raise InputError("no model is named; add --run-dir, --adapter or --model")
        root = wanted.run_dir.expanduser().resolve()
        record, plan = read_run(root, wanted.base)
        members = _of_run(root, record, plan, wanted, device)
        merged = root / Path(plan.config.merge.output_dir).expanduser()
        if _is_of(merged, record, tell):
            trusted = plan.config.model.trust_remote_code
            members[MERGED] = Member(replace(_plain(merged, wanted, device), trust_remote_code=trusted))
        return Lineup(members, device, tell, record, root)


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


def base_folder(plan: Plan, root: Path, digest: str) -> Path:
    """The base that the run began with, by its bytes."""
    found = find_base(plan, root, cache_folder(plan))
    if found.digest != digest:
        raise PhasedCptError(f"{found.folder}: this is not the base of the run; name the one that is with --base")
    return Path(found.folder)


def _of_run(root: Path, record: RunRecord, plan: Plan, wanted: ModelsWanted, device: torch.device) -> dict[str, Member]:
    first = record.phases[0].started_from
    assert first is not None  # something was published
    base = base_folder(plan, root, first.base)
    members = {BASE: Member(_as_trained(base, plan, wanted, device))}
    checked: set[str] = set()
    for phase in record.phases:
        if phase.published is None:
            continue
        _require_once(root, phase.published, checked)
        whole = _as_trained(root / phase.published.folder if phase.published.folder else base, plan, wanted, device)
        adapters = phase.published.adapters  # a phase that starts from an adapter publishes that one, trained further
        name = phase.folder if phase.name in (BASE, MERGED) else phase.name
        members[name] = Member(whole, root / adapters[-1].folder if adapters else None)
    return members


def _is_of(merged: Path, record: RunRecord, tell: Callable[[str], object]) -> bool:
    """Whether a merged model is there, and whole, and that of what the run has published last."""
    if not (merged / "config.json").exists():
        return False
    last = next(phase.published for phase in reversed(record.phases) if phase.published)
    facts = read_marker(merged)
    if facts is None and not (merged / MERGED_MARKER).exists():
        return True  # made otherwise, and put there by somebody who knows
    wanted = [last.base, *(adapter.digest for adapter in last.adapters)]
    found = facts and [facts["base"]["digest"], *(each["digest"] for each in facts["adapters"])]
    if facts is None or found != wanted or not is_whole(merged, facts):
        tell(f"{merged} is not what the last phase has published; `phased-cpt merge` makes it anew")
        return False
    return True


def _require_once(root: Path, weights: Weights, checked: set[str]) -> None:
    """What was published is there to the byte; whole weights below several adapters are read once."""
    require_published(root, weights.model_copy(update={"folder": ""}) if weights.folder in checked else weights)
    checked.add(weights.folder)


def _as_trained(folder: Path, plan: Plan, wanted: ModelsWanted, device: torch.device) -> Whole:
    model = plan.config.model
    in_4bit = model.use_4bit if wanted.use_4bit is None else wanted.use_4bit
    return Whole(
        folder=folder,
        precision=model.precision,
        storage=model.bnb_4bit_quant_storage if in_4bit else None,
        attention=_attention(model.attention, device),
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
    return Whole(folder, PRECISIONS.get(written, "bf16"), storage, _attention("auto", device))


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


# Loading --------------------------------------------------------------------------------------------------------------


def _device(name: str | None) -> torch.device:
    """The one that was named, else the first GPU, else the CPU."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise InputError(f"--device {name}: there is no such device; type cpu, cuda or cuda:1") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise InputError(f"--device {name}: {count} GPUs are seen here; type cpu, or one that there is")
        return torch.device("cuda", device.index or 0)
    return device


def _attention(asked: str, device: torch.device) -> str:
    """What the run was trained with, unless only a GPU has it, and this is a CPU."""
    if device.type != "cpu" or asked in ("sdpa", "eager"):
        return asked
    if asked in OF_A_GPU or torch.cuda.is_available():  # where `auto` would take one of these
        return "sdpa"
    return asked


def _load_whole(whole: Whole, device: torch.device, tell: Tell) -> PreTrainedModel:
    try:
        with _quiet():
            model = load_base(
                whole.folder,
                precision=whole.precision,
                attention=whole.attention,
                max_tokens=whole.max_tokens,
                storage=whole.storage,
                trust_remote_code=whole.trust_remote_code,
                tell=tell,
                device_map={"": device},
            )
    except torch.OutOfMemoryError:
        raise PhasedCptError(f"{whole.folder}: {device} has no room for it; try --4bit, or --device cpu") from None
    model.config.use_cache = True  # as is wanted where text is made, and no documents stand side by side
    return model


def _with_adapter(model: PreTrainedModel | PeftModel, folder: Path, name: str, device: torch.device) -> PeftModel:
    """One more adapter beside those that are there, all of it: PEFT leaves what it does not find as it was drawn."""
    inside = _inside(name)
    try:
        with _quiet():
            if not isinstance(model, PeftModel):
                config = LoraConfig.from_pretrained(str(folder))
                # In the precision of the base, as it is trained.
                model = PeftModel(model, config, inside, autocast_adapter_dtype=False)
            found = model.load_adapter(str(folder), inside, torch_device=str(device), autocast_adapter_dtype=False)
    except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: this adapter does not fit {base_of(model).name_or_path}: {reason}") from None
    wrong = [f"{key} is missing" for key in found.missing_keys if inside in key.split(".")]
    wrong += [f"{key} has no place" for key in found.unexpected_keys]
    if wrong:
        raise InputError(f"{folder}: this adapter does not fit {base_of(model).name_or_path}: {wrong[0]}")
    return model


def _inside(name: str) -> str:
    """The name of an adapter within PEFT, whose modules must not be called `train`, `pop` or `lora`."""
    return f"phase_{name}"


def _keep_4bit_weights(model: torch.nn.Module) -> None:
    """On a CPU a forward in eval mode packs 4-bit weights anew, and what is unpacked later are other weights."""
    for module in model.modules():
        if type(module).__module__.startswith("bitsandbytes") and type(module).__name__ == "Linear4bit":
            module.training = True


def _tokenizer(member: Member) -> PreTrainedTokenizerBase:
    """That of an adapter, if it has one; else that of its base."""
    own = member.adapter is not None and any(
        (member.adapter / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")
    )
    folder = member.adapter if own else member.whole.folder
    try:
        with _quiet():
            loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=member.whole.trust_remote_code, local_files_only=True
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"{folder}: no tokenizer can be read: {str(error).strip().splitlines()[0]}") from None
    return loaded


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What the libraries say of themselves while they load does not help anybody."""
    logs = transformers.utils.logging
    before, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()  # type: ignore[no-untyped-call]
    logs.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logs.set_verbosity(before)
        if bars:
            logs.enable_progress_bar()  # type: ignore[no-untyped-call]
