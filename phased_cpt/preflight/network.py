"""Whether the ranks can reach each other: a port to meet at, and a real job of them that talks for a moment."""

import json
import os
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from phased_cpt.launchers import Program, free_port
from phased_cpt.preflight.places import there
from phased_cpt.preflight.scene import Scene
from phased_cpt.preflight.seen import Seen, fail, ok, skip
from phased_cpt.stopping import heard

RING = "phased_cpt.probe.ring"
BEHIND_THE_RING_SECONDS = 150.0  # its ranks give up by themselves after 120; this is for those that cannot


def port(scene: Scene) -> Iterator[Seen]:
    """On one machine launchers take a free one; one that is named must be free."""
    launch, named = scene.plan.config.launch, os.environ.get("MASTER_PORT")
    if len(scene.counts.given()) > 1:
        yield _port(str(launch.master_port), "launch.master_port", "--set launch.master_port=29500, on every node")
    elif named is not None:
        yield _port(named, "MASTER_PORT in the environment", "unset MASTER_PORT, or give it another number")
    else:
        yield ok(f"launchers take a free one ({free_port()}, now)")


def _port(number: str, what: str, fix: str) -> Seen:
    if not number.isdecimal() or not 0 < int(number) < 2**16:
        return fail(f"{what} is {number!r}, which is no port", fix)
    if _is_taken(int(number)):
        return fail(f"{what} is {number}, and another program listens there", fix)
    return ok(f"{number} ({what}) is free")


def collective(scene: Scene) -> Iterator[Seen]:
    """All ranks meet and sum up numbers for about two seconds, started as those of training are, on every machine."""
    ranks, visible = scene.ranks.given(), len(scene.gpus.given())
    if ranks == 1:
        yield ok("one rank, which has nobody to talk to")
    elif visible and scene.ranks_here.given() > visible:
        yield skip(f"skipped, because {scene.ranks_here.given()} ranks have {visible} GPUs")
    else:
        scene.watcher.tell(f"starting {ranks} ranks, to hear whether they reach each other …")
        heard_of = _collective(scene)
        speed = heard_of["bytes_per_second"] / 1e9
        hosts = sorted(set(heard_of["hosts"]))
        where = f" on {', '.join(hosts)}" if len(hosts) > 1 else ""
        yield ok(f"{heard_of['ranks']} ranks{where} over {heard_of['backend']}: {speed:,.1f} GB/s")


def _collective(scene: Scene) -> dict[str, Any]:
    """The ring, in the place of the worker; what rank 0 has heard."""
    jobs = scene.jobs.made()
    shared = None if jobs.head is None else there(scene.root)
    with tempfile.TemporaryDirectory(prefix=".phased-cpt-ring-", dir=shared) as folder, heard() as stop:
        program = Program(RING, Path(folder) / "job.json", Path(folder) / "logs")
        program.argument.write_text("{}")
        replace(jobs, hang_seconds=BEHIND_THE_RING_SECONDS).run(program, stop, quiet=True)
        answer: dict[str, Any] = json.loads((Path(folder) / "heard.json").read_bytes())
        return answer


def _is_taken(number: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just been left is free
        try:
            listener.bind(("", number))
        except OSError:
            return True
    return False
