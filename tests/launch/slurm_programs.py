"""What launch/slurm.sbatch calls of Slurm, on one machine: as far as its manual pages tell, and nothing of its queue.

srun       starts a program a task, with the number of the node in its environment, waits for all, ends with the highest
           exit code; passes a SIGTERM on; FAKE_STEP marks all that is below it, as Slurm's own record of a step does
scancel    --signal=S JOB: to every process of the step, and not to the batch script
scontrol   show hostnames | show job | requeue: the last is written down
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path


def said(*words: str) -> None:
    with Path(os.environ["SLURM_CALLS"]).open("a") as calls:
        calls.write(json.dumps(words) + "\n")


def srun(words: list[str]) -> int:
    at = next(number for number, word in enumerate(words) if not word.startswith("--"))
    options = dict(word.split("=", 1) for word in words[:at])
    said("srun", *words)
    mark = {"FAKE_STEP": os.environ["SLURM_JOB_ID"], "SLURM_STEP_ID": "0"}
    tasks = [
        subprocess.Popen(words[at:], env={**os.environ, **mark, "SLURM_NODEID": str(node), "SLURM_PROCID": str(node)})
        for node in range(int(options["--ntasks"]))
    ]

    def pass_on(number: int, frame: object) -> None:
        for task in tasks:
            task.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    codes = [task.wait() for task in tasks]
    return max(code if code >= 0 else 128 - code for code in codes)


def scancel(words: list[str]) -> int:
    said("scancel", *words)
    name, job = words
    if os.environ.get("SCANCEL_FAILS"):
        return 1
    for folder in Path("/proc").glob(
        "[0-9]*"
    ):  # the strictest reading: launchers and workers below a task hear it, too
        try:
            if f"FAKE_STEP={job}\0".encode() in (folder / "environ").read_bytes():
                os.kill(int(folder.name), signal.Signals[f"SIG{name.removeprefix('--signal=')}"])
        except OSError:
            continue
    return 0


def scontrol(words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        sys.stdout.write("node1\nnode2\n")
    elif words[:2] == ["show", "job"]:
        preempted = os.environ.get("PREEMPTED", "None")
        sys.stdout.write(
            f"JobId={words[2]} JobName=x\n   JobState=RUNNING Reason=None\n"
            f"   PreemptEligibleTime=2026-01-02T03:04:05 PreemptTime={preempted}\n   SuspendTime=None\n"
        )
    else:
        said("scontrol", *words)
        return int(os.environ.get("REQUEUE", "0"))
    return 0


if __name__ == "__main__":
    program, *given = sys.argv[1:]
    sys.exit({"srun": srun, "scancel": scancel, "scontrol": scontrol}[program](given))
