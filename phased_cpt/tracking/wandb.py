"""One run of Weights & Biases over all phases and restarts, on one axis of steps."""

import importlib
import netrc
import os
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from phased_cpt.errors import PhasedCptError
from phased_cpt.tracking.figures import figures
from phased_cpt.tracking.sink import Line, Sink, Stretch, WandbSettings

STEP = "curriculum_step"
# Its own are 90 s and for ever: every GPU waits meanwhile, and what was not sent can be sent later with `wandb sync`.
INIT_SECONDS = 30
FINISH_SECONDS = 120


def open_wandb(stretch: Stretch) -> Sink | None:
    if stretch.wandb is None or os.environ.get("WANDB_MODE") == "disabled":
        return None
    return Wandb(stretch, stretch.wandb)


class Wandb:
    """A phase opens the run anew, under the id that the ledger keeps."""

    def __init__(self, stretch: Stretch, settings: WandbSettings) -> None:
        wandb = _package()
        wandb.setup(wandb.Settings(silent=True))  # what it says before init has read its settings
        self._stretch = stretch
        self._run = wandb.init(
            id=settings.id,
            resume="allow",
            project=settings.project,
            entity=settings.entity,
            name=stretch.run,
            dir=stretch.root,
            mode=mode(settings),
            settings=_quiet(wandb),
        )
        # Its own step only counts calls, and a restart would shift it.
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)

    def train(self, line: Line) -> None:
        self._run.log({STEP: self._stretch.curriculum_step(line), "phase": self._stretch.number, **figures(line)})

    def evaluated(self, line: Line) -> None:
        self.train(line)

    def tell(self, message: str) -> bool:
        return False

    def close(self) -> None:
        """Within an exception it is marked as failed, until the next attempt goes on with it."""
        self._run.finish(exit_code=0 if sys.exc_info()[0] is None else 1)


def mode(settings: WandbSettings) -> str:
    """online or offline. Without a key, online would ask for one, and stop training until it is typed."""
    wish = os.environ.get("WANDB_MODE") if settings.mode == "auto" else settings.mode
    if wish in ("offline", "dryrun"):
        return "offline"
    if wish == "online" and not _has_key():
        raise PhasedCptError("no key for Weights & Biases: set WANDB_API_KEY, call `wandb login`, or take mode offline")
    return "online" if _has_key() else "offline"


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    try:
        return netrc.netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser()).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _package() -> Any:
    try:
        return importlib.import_module("wandb")
    except ModuleNotFoundError as missing:
        if missing.name != "wandb":
            raise
        raise PhasedCptError("the package wandb is not installed: pip install wandb") from missing


def _quiet(wandb: Any) -> Any:
    """It prints nothing, catches no output, and takes along neither code nor the difference to the last commit."""
    return wandb.Settings(
        silent=True,
        console="off",
        disable_code=True,
        disable_git=True,
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        finish_timeout_raises=True,
    )
