"""A rank that does what its argument says, in the place of one that trains: {"0": "train(40)", "1": "die()"}.

It begins to beat when all have come, as ranks do that meet in a process group.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from phased_cpt.pulse import Beating


def main(argument: Path) -> None:
    rank = int(os.environ["RANK"])
    (argument.parent / f"environment-{rank}.json").write_text(json.dumps(dict(os.environ)))
    beating = Beating(argument.parent / "logs", rank)
    asked = argument.parent / "asked to stop"  # what ranks agree on in a collective

    def heard(number: int, frame: object) -> None:
        asked.write_text(str(rank))

    def wait(name: str) -> None:
        while not (argument.parent / name).exists():
            time.sleep(0.02)

    def say(name: str) -> None:
        (argument.parent / name).write_text(str(os.getpid()))

    def word(code: int, message: str) -> None:
        beside = argument.parent / "logs" / f".{rank}"
        beside.write_text(json.dumps({"exit_code": code, "message": message, "rank": rank}))
        beside.rename(beside.with_name(f"failed-{rank}.json"))

    def train(steps: int) -> None:
        for step in range(steps):
            beating.beat("training", step)
            time.sleep(0.05)
            if asked.exists():
                word(75, "stopped after this step")
                os._exit(75)
        beating.close()

    signal.signal(signal.SIGTERM, heard)
    say(f"began-{rank}")
    exec(json.loads(argument.read_text())[str(rank)])
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
