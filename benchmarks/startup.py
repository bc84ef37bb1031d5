"""How long a person waits for the plan, beside what they would wait for if the command line loaded the training stack.

    make bench

The commands take turns, so that a busy machine is busy for all of them; what counts is the ratio.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
ROUNDS = 7
COMMANDS = {
    "phased-cpt plan -c configs/kat-dev-32b.yaml": ["-m", "phased_cpt", "plan", "-c", "configs/kat-dev-32b.yaml"],
    "python -c 'import torch'": ["-c", "import torch"],
    "python -c 'from transformers import Trainer'": ["-c", "from transformers import Trainer"],
}


def seconds(arguments: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, check=True, capture_output=True)
    return time.perf_counter() - begin


def main() -> None:
    for arguments in COMMANDS.values():
        seconds(arguments)  # the first one reads from the disk
    times = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))
    ours = statistics.median(next(iter(times.values())))
    print("| command | median s | min – max s | ratio |\n|---|---|---|---|")
    for name, taken in times.items():
        middle = statistics.median(taken)
        print(f"| `{name}` | {middle:.2f} | {min(taken):.2f} – {max(taken):.2f} | {middle / ours:.1f} |")


if __name__ == "__main__":
    main()
