"""Where the first weights lie, and their digest: on the hub, in a folder, or random.

A hub id is downloaded once, before anything is launched, so that no rank waits for another's download; its revision is
pinned to the commit that was found.
"""

import contextlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from phased_cpt.config.schema import Lora
from phased_cpt.config.values import CHANGE_THE_BASE
from phased_cpt.data.cache import sha256_of
from phased_cpt.data.files import is_hub_id
from phased_cpt.errors import InputError, PhasedCptError
from phased_cpt.ledger import Adapter, Weights
from phased_cpt.ledger.fingerprint import digest_of
from phased_cpt.plan import Plan
from phased_cpt.published import MARKER, source_of, weights_digest

WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.py", "*.jinja"]
UNWANTED = ["consolidated*.safetensors"]  # the same weights once more, as Mistral names them
WIDTHS = ("hidden_size", "n_embd", "d_model", "hidden_dim", "dim")
USUAL_WIDTH = 4096
RANDOM = "random_base"  # in the run folder


@dataclass(frozen=True)
class Base:
    """The weights that the first phase starts from."""

    folder: str  # where the ranks read it; of random weights, where they make it
    digest: str
    shape: dict[str, Any] | None = None  # of random weights
    commit: str | None = None  # of a hub id
    adapter: str | None = None
    adapter_digest: str = ""

    @property
    def size_bytes(self) -> int:
        """Of the files of the weights; 0 where there are none yet."""
        return sum(path.stat().st_size for path in Path(self.folder).glob("*.safetensors"))

    @property
    def hidden_size(self) -> int:
        """How wide the model is, by any name; only sizes of buffers follow from it."""
        return int(self._config(*WIDTHS) or USUAL_WIDTH)

    def require_ids(self, vocabulary: int, tokenizer: str) -> None:
        """Every id of the tokenizer has a row in the embedding; on a GPU, one without is an assertion of CUDA's."""
        rows = self._config("vocab_size")
        if rows is not None and vocabulary > int(rows):
            what = f"{tokenizer} has ids up to {vocabulary - 1}, and the model {rows} rows in its embedding"
            raise InputError(f"model.tokenizer: {what}; take the tokenizer of the model")

    def _config(self, *keys: str) -> Any:
        """The first of these in config.json that says something."""
        config = self.shape or json.loads((Path(self.folder) / "config.json").read_bytes())
        places = (config, config.get("text_config") or {})
        return next((each[key] for each in places for key in keys if each.get(key)), None)

    @property
    def weights(self) -> Weights:
        adapters = () if self.adapter is None else (Adapter(digest=self.adapter_digest),)
        found = {"kind": "adapter" if adapters else "base", "base": self.digest, "adapters": adapters}
        return Weights.model_validate(found | ({"commit": self.commit} if self.commit else {}))  # kept, not compared


def find_base(plan: Plan, run_root: Path, cache: Path, *, afresh: bool = False) -> Base:
    """The base of a run, on the disk, with its digest; `afresh`: of its bytes now, whatever is remembered of them."""
    model = plan.config.model
    memory = None if afresh else cache / "bases.json"
    if model.from_config is not None:
        shape = _shape(model.from_config)
        _require_as_made(run_root / RANDOM, memory)
        return Base(str(run_root / RANDOM), random_digest(shape, plan.config.run.seed), shape)
    assert model.name is not None
    folder, commit = find_weights(model.name, model.revision, "model.name")
    _require_model(folder, model.name)
    if commit and afresh:
        _require_blobs(folder, model.name)
    digest = _hub_digest(folder, commit) if commit else weights_digest(folder, memory)
    if model.adapter is None:
        return Base(str(folder), digest, commit=commit)
    adapter, _ = find_weights(model.adapter, None, "model.adapter")
    _require_adapter(adapter, plan)
    remembered = None if afresh else cache / "adapters.json"
    return Base(str(folder), digest, None, commit, str(adapter), weights_digest(adapter, remembered))


def random_digest(shape: dict[str, Any], seed: int) -> str:
    """Of weights that are not made yet, and always come out the same."""
    return digest_of(["random", shape, seed])


def require_base_of(adapter: Path, base: Path, commit: str | None) -> str:
    """An adapter of ours knows its bytes, and what it was trained on; of another, only names and shapes will tell.

    Returns what is to be said where the bases cannot be compared, or nothing.
    """
    if not (adapter / "adapter_config.json").exists():
        what = "is no adapter (it has no adapter_config.json)" if adapter.is_dir() else "no such folder"
        raise InputError(f"--adapter: {adapter}: {what}")
    source = source_of(adapter)
    if source is None or not source.base:
        return f"{adapter} does not say what it was trained on; only names and shapes can be compared"
    from_the_hub = source.commit is not None and commit is None
    if not from_the_hub and source.base not in _digests_of(base, commit):
        what = f"this adapter was trained on another base than {base} (digest {source.base[:12]}…)"
        raise InputError(f"{adapter}: {what}; name that one with --base")
    if weights_digest(adapter) != source.digest:
        raise InputError(f"{adapter}: the weights are not what was published; restore them")
    what = f"{adapter} was trained on the hub's commit {source.commit}, which a folder cannot be compared with"
    return what if from_the_hub else ""


def _digests_of(folder: Path, commit: str | None) -> set[str]:
    """What a folder of weights may be known by."""
    if commit is not None:
        return {_hub_digest(folder, commit)}
    made = {}
    with contextlib.suppress(OSError, ValueError):
        made = json.loads((folder / MARKER).read_bytes())
    return {weights_digest(folder), *filter(None, [made.get("base")])}


def _require_as_made(folder: Path, memory: Path | None) -> None:
    """The random weights, once they are there."""
    with contextlib.suppress(FileNotFoundError):
        made = json.loads((folder / MARKER).read_bytes())
        if weights_digest(folder, memory) != made["digest"]:
            what = "the random weights are not those that the run has begun with"
            raise PhasedCptError(f"{folder}: {what}; delete the folder, and they are made again, the same")


def _shape(given: dict[str, Any] | str) -> dict[str, Any]:
    if not isinstance(given, str):
        return dict(given)
    path = Path(given).expanduser()
    try:
        shape = json.loads((path / "config.json" if path.is_dir() else path).read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"model.from_config: {given} cannot be read: {error}") from None
    if not isinstance(shape, dict):
        raise InputError(f"model.from_config: {given} holds no object; a model's config.json is meant")
    return shape


def find_weights(name: str, revision: str | None, key: str) -> tuple[Path, str | None]:
    """A folder, or a snapshot of the hub and its commit."""
    hub_id = is_hub_id(name)  # which knows whether there is such a home folder
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve(), None
    if not hub_id:
        raise InputError(f"{key}: {name}: no such folder (looked from {Path.cwd()}), and no hub id")
    try:
        snapshot = Path(snapshot_download(name, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except LocalEntryNotFoundError:
        raise InputError(f"{key}: {name}: not in the hub's cache, and the hub cannot be reached") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"{key}: {name}: the hub does not give it: {reason} (HF_TOKEN for a gated one)") from None
    return snapshot, snapshot.name


def _hub_digest(snapshot: Path, commit: str) -> str:
    """The hub's cache names each file by the hash of its bytes, so nothing has to be read again."""
    files = sorted(
        path for path in snapshot.iterdir() if path.suffix in (".safetensors", ".bin") or path.name == "config.json"
    )
    return digest_of([commit, {path.name: path.resolve().name for path in files}])


def _require_blobs(snapshot: Path, name: str) -> None:
    """The large files of the cache are what they are called: by their sha256."""
    for path in snapshot.iterdir():
        blob = path.resolve()
        if re.fullmatch(r"[0-9a-f]{64}", blob.name) and sha256_of(blob) != blob.name:
            raise InputError(f"model.name: {name}: {blob} is damaged; delete it, and it is downloaded again")


def _require_model(folder: Path, name: str) -> None:
    """Before anything is prepared: a config that can be read, and all of the weights."""
    if (folder / "adapter_config.json").exists():  # beside a config.json or not: what a phase publishes has one
        raise InputError(f"model.name: {name} is an adapter, which is named as model.adapter, beside its base")
    if not (folder / "config.json").exists():
        raise InputError(f"model.name: {name} is no model (it has no config.json)")
    _object(folder / "config.json", f"model.name: {name}")
    _require_weights(folder, f"model.name: {name}")


def _require_weights(folder: Path, what: str) -> None:
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise InputError(f"{what} has no weights in it (*.safetensors)")
    index = folder / "model.safetensors.index.json"
    shards = sorted(set(_object(index, what).get("weight_map", {}).values())) if index.exists() else []
    if missing := [shard for shard in shards if not (folder / shard).exists()]:
        raise InputError(
            f"{what} lacks {', '.join(missing[:3])} ({len(missing)} of {len(shards)} files that its index names)"
        )


def _object(path: Path, what: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{what} has no {path.name} that can be read: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{what} has a {path.name} that holds no object")
    return value


def _require_adapter(folder: Path, plan: Plan) -> None:
    """LoRA settings that were written down must be those of the adapter."""
    has = _object(folder / "adapter_config.json", f"model.adapter: {folder}")
    _require_weights(folder, f"model.adapter: {folder}")
    if has.get("peft_type") != "LORA":
        raise InputError(f"model.adapter: {folder} is a {has.get('peft_type')} adapter; LoRA is needed")
    began = str(has.get("init_lora_weights", True)).lower()
    if began.startswith(CHANGE_THE_BASE):
        mend = "save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain one of it"
        raise InputError(f"model.adapter: {folder} was begun as {began}, which changes the base, too; {mend}")
    phase = plan.phases[0]
    lora: Lora = phase.settings.lora
    pairs: dict[str, tuple[Any, Any]] = {
        "r": (lora.r, has.get("r")),
        "alpha": (lora.alpha, has.get("lora_alpha")),
        "use_rslora": (lora.use_rslora, has.get("use_rslora", False)),
        "use_dora": (lora.use_dora, has.get("use_dora", False)),
    }
    targets = has.get("target_modules")
    if isinstance(targets, list) and lora.target_modules != "auto":
        pairs["target_modules"] = (sorted(lora.target_modules), sorted(targets))
    for key, (planned, inherited) in pairs.items():
        origin = phase.origins["lora", key]
        if planned != inherited and origin.kind != "default":
            what = f"lora.{key} is {planned} ({origin}), and the adapter {folder} has {inherited}"
            raise InputError(f"{what}; make them equal, or take lora.{key} out")
