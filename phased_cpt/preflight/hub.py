"""The base, without downloading it: what the disk has is taken as the run would, what the hub has is only asked for."""

from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from phased_cpt.bases import UNWANTED, WANTED, Base, find_base
from phased_cpt.data.files import is_hub_id
from phased_cpt.errors import InputError
from phased_cpt.fitting.files import PATIENCE_SECONDS, TRANSPORT
from phased_cpt.plan import Plan


@dataclass(frozen=True)
class RemoteBase(Base):
    """A base that the run will download first: only its config.json is here."""

    to_download: int = 0  # bytes

    @property
    def size_bytes(self) -> int:
        return self.to_download


def base_of(plan: Plan, root: Path, cache: Path) -> Base:
    """As the run finds it; but of a hub id that is not whole on the disk, only what the hub says."""
    model = plan.config.model
    if model.name is None or not is_hub_id(model.name) or constants.HF_HUB_OFFLINE:
        return find_base(plan, root, cache)
    try:
        info = HfApi(endpoint=constants.ENDPOINT).model_info(
            model.name, revision=model.revision, timeout=PATIENCE_SECONDS, files_metadata=True
        )
    except (TRANSPORT, OfflineModeIsEnabled, OSError) as error:
        raise _refused(model.name, model.revision, error) from None
    files = {each.rfilename: each.size or 0 for each in info.siblings or () if _is_wanted(each.rfilename)}
    missing = {name: size for name, size in files.items() if not _is_here(model.name, name, info.sha)}
    if not missing:
        return find_base(plan, root, cache)
    if "config.json" not in files:
        raise InputError(f"model.name: {model.name} is no model (it has no config.json); name another")
    config = hf_hub_download(model.name, "config.json", revision=info.sha, endpoint=constants.ENDPOINT)
    return RemoteBase(str(Path(config).parent), digest="", commit=info.sha, to_download=sum(missing.values()))


def _is_wanted(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in WANTED) and not any(fnmatch(name, no) for no in UNWANTED)


def _is_here(name: str, file: str, commit: str | None) -> bool:
    return isinstance(try_to_load_from_cache(name, file, revision=commit), str)


def _refused(name: str, revision: str | None, error: Exception) -> InputError:
    """The hub's answer in words: each of them has another remedy."""
    if isinstance(error, GatedRepoError):
        what = f"gated: accept its terms on {constants.ENDPOINT}/{name}, and set HF_TOKEN to a key of that account"
        return InputError(f"model.name: {name} is {what.replace(': ', '; ', 1)}")
    if isinstance(error, RevisionNotFoundError):
        return InputError(f"model.revision: {name} has no revision {revision}; name a branch, a tag or a commit of it")
    if isinstance(error, RepositoryNotFoundError):
        mend = "look at the spelling, or set HF_TOKEN if it is private"
        return InputError(f"model.name: the hub has no {name} (404), or does not show it; {mend}")
    if isinstance(error, HfHubHTTPError):
        return InputError(f"model.name: {name}: the hub answers {str(error).splitlines()[0]}; try again later")
    mend = "look at the network, name a folder, or set HF_HUB_OFFLINE=1 if it is in the hub's cache"
    return InputError(f"model.name: {name}: the hub cannot be reached ({type(error).__name__}); {mend}")
