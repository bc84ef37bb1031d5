"""A rank of ours, and a thread beside it that looks at its memory: what benchmarks/memory.py starts.

    python benchmarks/memory_ranks.py JOB RESULTS

Counted is what belongs to this process alone (RssAnon) or is shared with the other ranks (RssShmem): not the files
that are mapped. It is looked at every other millisecond, which no tensor of a size that counts is too short-lived for.
"""

import atexit
import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

EVERY_SECONDS = 0.002
_FIELDS = (b"RssAnon:", b"RssShmem:")


class Sampler(threading.Thread):
    """The most memory in each thing that the rank was doing, and where it was then."""

    def __init__(self, pulse: Path, result: Path) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, dict[str, Any]] = {}
        self._status = os.open("/proc/self/status", os.O_RDONLY)
        self._pulse, self._result, self._main = pulse, result, threading.main_thread().ident

    def run(self) -> None:
        while True:
            self.look()
            time.sleep(EVERY_SECONDS)

    def look(self) -> None:
        held, doing = self._held(), self._doing()
        before = self.peaks.setdefault(doing, {"bytes": 0, "where": ""})
        if held > before["bytes"] + 2**20:
            before |= {"bytes": held, "where": self._where()}
        elif held > before["bytes"]:
            before["bytes"] = held

    def _held(self) -> int:
        lines = os.pread(self._status, 4096, 0).splitlines()
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(_FIELDS))

    def _doing(self) -> str:
        try:
            return str(json.loads(self._pulse.read_bytes())["doing"])
        except (OSError, ValueError):
            return "starting"

    def _where(self) -> str:
        frame = sys._current_frames().get(self._main or 0)
        stack = traceback.extract_stack(frame)[-8:] if frame else []
        return " < ".join(f"{Path(each.filename).name}:{each.lineno} {each.name}" for each in reversed(stack))

    def tell(self) -> None:
        self._result.write_text(json.dumps(self.peaks))


def main() -> None:
    job, results = Path(sys.argv[1]), Path(sys.argv[2])
    rank = os.environ["RANK"]
    sampler = Sampler(job.parent / f"logs/pulse-{rank}.json", results / f"memory-{rank}.json")
    sampler.start()
    from phased_cpt import worker

    leave, os._exit = os._exit, lambda code: (sampler.tell(), leave(code))  # the worker's way out runs no atexit
    atexit.register(sampler.tell)
    worker.main([str(job)])


if __name__ == "__main__":
    main()
