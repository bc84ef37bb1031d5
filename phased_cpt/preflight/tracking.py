"""Whether the figures will arrive: Weights & Biases has a key that it knows, or writes to a folder."""

import base64
import json
import netrc
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from phased_cpt.preflight.scene import Scene
from phased_cpt.preflight.seen import Seen, fail, ok, skip, warn
from phased_cpt.tracking import WandbSettings
from phased_cpt.tracking.wandb import mode

PATIENCE_SECONDS = 5.0
OFFLINE = "--set tracking.wandb.mode=offline, and `wandb sync` later; or mend the network"
WHO = json.dumps({"query": "query { viewer { username } }"}).encode()


def wandb(scene: Scene) -> Iterator[Seen]:
    """Off, offline, or online with a key that is accepted; the key is never told."""
    settings = scene.plan.config.tracking.wandb
    if not settings.enabled or os.environ.get("WANDB_MODE") == "disabled":
        yield ok("off (tracking.wandb.enabled)")
        return
    how = mode(WandbSettings(settings.project, settings.entity, settings.mode, ""))  # refuses online without a key
    if how == "offline":
        asked = settings.mode == "offline" or os.environ.get("WANDB_MODE") in ("offline", "dryrun")
        what = "offline: written to the run folder, for `wandb sync` later"
        yield ok(what) if asked else warn(f"no key, so {what}", "wandb login, or export WANDB_API_KEY=…")
        return
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")
    key = _key(server)
    yield _known(server, key) if key else skip(f"online at {server}, by a token that is not looked into")


def _known(server: str, key: str) -> Seen:
    """Whom the server takes the key for."""
    word = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"Authorization": f"Basic {word}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{server}/graphql", WHO, headers)  # noqa: S310 - a setting of the user's
    fix = "wandb login, or export WANDB_API_KEY=… (--set tracking.wandb.mode=offline sends nothing)"
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_SECONDS) as answer:  # noqa: S310
            viewer = (json.load(answer).get("data") or {}).get("viewer")
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return fail(f"{server} does not know this key ({error.code})", fix)
        return warn(f"{server} answers {error.code}; training goes on without it", OFFLINE)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return warn(f"{server} cannot be reached ({reason}); training waits for it half a minute a phase", OFFLINE)
    return (
        ok(f"online at {server}, as {viewer['username']}") if viewer else fail(f"{server} does not know this key", fix)
    )


def _key(server: str) -> str | None:
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    try:
        known = netrc.netrc(Path(os.environ.get("NETRC", "~/.netrc")).expanduser()).authenticators(
            urlsplit(server).netloc
        )
    except (OSError, netrc.NetrcParseError):
        return None
    return known[2] if known else None
