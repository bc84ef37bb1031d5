"""What merging a LoRA adapter costs: ours beside what else people reach for, on one model, in one run.

    make bench-merge

The model is drawn: 1.58 billion weights in bf16 (3.2 GB, four files), and an adapter of rank 64 on all its linear
layers. Each contender (`benchmarks/merge_contenders.py`) is a fresh process, timed whole, in alternating order; base
and adapter are in memory before each, but for the cold rounds, before which they are taken out of it. Its output is
synced (timed apart), compared in the first round, and deleted. --scratch must be on a disk, with room for six models.

Peers come from the Python that --peers names; those that it lacks are left out, and named. They run on our torch,
transformers and PEFT:

    python -m venv /tmp/peers && /tmp/peers/bin/pip install --no-deps axolotl mergekit immutables
    python benchmarks/merge.py --peers /tmp/peers/bin/python
"""

import argparse
import json
import math
import mmap
import os
import resource
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

CONTENDERS = ("ours", "peft", "axolotl", "mergekit")
TITLES = {
    "ours": "`phased-cpt merge`",
    "peft": "PEFT `merge_and_unload`",
    "axolotl": "axolotl `memory_efficient`",
    "mergekit": "`mergekit-yaml`",
}
PEERS = ("axolotl", "mergekit")
PROGRAM = Path(__file__).with_name("merge_contenders.py")
POLL_SECONDS = 0.05
BLOCK = 32 * 2**20
EXACT_EVERY = 10
CACHED = 2**17  # numbers that are compared at a time
SHAPE = {
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 26, "num_attention_heads": 16,
    "num_key_value_heads": 4, "vocab_size": 100_000, "max_position_embeddings": 2048, "tie_word_embeddings": False,
}  # fmt: skip
SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 4096}
RANK, DRAWN = 64, 0.02  # of the adapter; the deviation of its numbers, B's, too
KIB, MB, GB = 1024, 1e6, 1e9


@dataclass(frozen=True)
class Inputs:
    """What everyone merges."""

    base: Path
    adapter: Path

    @property
    def files(self) -> list[Path]:
        return [path for folder in (self.base, self.adapter) for path in sorted(folder.iterdir()) if path.is_file()]

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)


@dataclass
class Memory:
    """The peak of a process and all below it: looked at every 50 ms."""

    anonymous: int = 0  # the sum of a moment: what cannot be taken back
    resident: dict[int, int] = field(default_factory=dict)  # of each process, mapped files included

    def look(self, root: int) -> None:
        now = 0
        for pid in _tree(root):
            lines = _status(pid)
            now += lines.get("RssAnon", 0) + lines.get("RssShmem", 0)
            self.resident[pid] = max(self.resident.get(pid, 0), lines.get("VmHWM", 0))
        self.anonymous = max(self.anonymous, now)


@dataclass(frozen=True)
class Taken:
    """What one merge has cost."""

    seconds: float
    synced: float  # with an fsync of every file that it has left
    cpu: float
    anonymous: int
    resident: int
    read: int  # from the disk
    written: int  # towards it
    told: dict[str, Any]  # its own figures


def main() -> int:
    parser = argparse.ArgumentParser(description="What merging an adapter costs.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", type=int, default=1, help="rounds with base and adapter out of memory")
    parser.add_argument("--only", choices=CONTENDERS, nargs="+", default=CONTENDERS, help="ours is always there")
    parser.add_argument("--scratch", type=Path, help="a folder on a disk; its base/ and adapter/ are used again")
    parser.add_argument("--peers", default=sys.executable, help="a Python that has axolotl or mergekit")
    parser.add_argument("--small", action="store_true", help="tiny, to see that it works; its figures mean nothing")
    parser.add_argument("--json", action="store_true", help="every figure, and no tables")
    said = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=said.scratch, prefix="merge-bench-") as place:
        inputs = made((said.scratch or Path(place)) / ("small" if said.small else ""), small=said.small)
        found = measured(said, inputs, Path(place))
    print(json.dumps(found, indent=1) if said.json else "\n\n".join(report(found)))
    return 0


def measured(said: argparse.Namespace, inputs: Inputs, place: Path) -> dict[str, Any]:
    """All that is found out."""
    versions = _versions(said.peers)
    names = [name for name in CONTENDERS if name == "ours" or (name in said.only and name in versions)]
    turn = Turn(inputs, place, said.peers)
    disk = Disk(place / "disk", sum(path.stat().st_size for path in inputs.base.iterdir()))
    rounds, same, loads = [], {}, [os.getloadavg()[0]]
    for at in range(said.rounds):
        disk.measure()
        rounds.append({name: turn.taken(name) for name in (names if at % 2 == 0 else names[::-1])})
        if at == 0:
            same = compared(inputs, {name: place / name / "model" for name in names})
        loads.append(os.getloadavg()[0])
        turn.clear(names)
    colds = []
    for at in range(said.cold):
        colds.append({name: turn.taken(name, cold=True) for name in (names[::-1] if at % 2 == 0 else names)})
        turn.clear(names)
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "loads": loads,
        "versions": versions,
        "missing": [name for name in said.only if name not in names],
        "input_bytes": inputs.bytes,
        "output_bytes": disk.bytes,
        "disk": {"write": disk.write_rates, "read": disk.read_rates},
        "same": same,
        "warm": [{name: asdict(taken) for name, taken in each.items()} for each in rounds],
        "cold": [{name: asdict(taken) for name, taken in each.items()} for each in colds],
    }


# The model ------------------------------------------------------------------------------------------------------------


def made(folder: Path, *, small: bool) -> Inputs:
    """A base and an adapter, drawn; or those that an earlier run has left."""
    inputs = Inputs(folder / "base", folder / "adapter")
    if (inputs.adapter / "adapter_model.safetensors").exists():
        return inputs
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen2", **SHAPE | (SMALL if small else {}))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(inputs.base, max_shard_size="4MB" if small else "1GB")
    wanted = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, wanted)
    for param in adapted.parameters():
        if param.requires_grad:
            param.data.normal_(0, DRAWN)
    adapted.save_pretrained(inputs.adapter)
    return inputs


def _versions(peers: str) -> dict[str, str]:
    """Of what is there; ours runs from this working tree."""
    names = ["torch", "transformers", "peft", *PEERS]
    program = (
        "import sys; from importlib.metadata import version, packages_distributions as there\n"
        "print(*[f'{name}={version(name)}' for name in sys.argv[1:] if name in there()])"
    )
    said = subprocess.run([peers, "-c", program, *names], env=_environment(peers), capture_output=True, text=True)
    return dict(word.split("=", 1) for word in said.stdout.split())


def _environment(python: str) -> dict[str, str]:
    """A Python of peers has our packages, too, and ours first: everyone multiplies with the same torch."""
    theirs = {} if python == sys.executable else {"PYTHONPATH": sysconfig.get_path("purelib")}
    return {**os.environ, **theirs, "TOKENIZERS_PARALLELISM": "false"}


# A turn ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """Everyone's is alike."""

    inputs: Inputs
    place: Path
    peers: str

    def taken(self, name: str, *, cold: bool = False) -> Taken:
        """One merge, from starting the process to its end."""
        folder = self.place / name
        folder.mkdir()
        for path in self.inputs.files:
            (_forget if cold else _warm)(path)
        python = self.peers if name in PEERS else sys.executable
        command = [python, str(PROGRAM), name, str(self.inputs.base), str(self.inputs.adapter), str(folder)]
        memory, used, moved, began = Memory(), _cpu(), _moved(), time.perf_counter()
        with (folder / "log").open("wb") as log:
            child = subprocess.Popen(command, stdout=log, stderr=log, env=_environment(python))
            while child.poll() is None:
                memory.look(child.pid)
                time.sleep(POLL_SECONDS)
        seconds = time.perf_counter() - began
        if child.returncode:
            sys.exit(f"{name}: exit {child.returncode}\n{(folder / 'log').read_text()[-2000:]}")
        read, written = (after - before for after, before in zip(_moved(), moved, strict=True))
        cpu = _cpu() - used
        for path in folder.rglob("*"):
            _sync(path)
        synced = time.perf_counter() - began
        told = folder / "told.json"
        return Taken(
            seconds, synced, cpu, memory.anonymous, sum(memory.resident.values()), read, written,
            json.loads(told.read_bytes())["seconds"] if told.exists() else {},
        )  # fmt: skip

    def clear(self, names: list[str]) -> None:
        for name in names:
            shutil.rmtree(self.place / name)


def _tree(root: int) -> Iterator[int]:
    yield root
    for children in Path(f"/proc/{root}/task").glob("*/children"):
        try:
            found = children.read_text().split()
        except OSError:
            continue
        for child in found:
            yield from _tree(int(child))


def _status(pid: int) -> dict[str, int]:
    """The lines in kB of /proc/PID/status, in bytes."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * KIB for line in lines if line.endswith(" kB")}


def _moved() -> tuple[int, int]:
    """Bytes read from and written towards the disk: by this process and those that it has waited for, and so on."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"]), int(lines["write_bytes"])


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _warm(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(BLOCK):
            pass


def _forget(path: Path) -> None:
    """Out of the page cache: this file alone, which needs no right and disturbs nobody."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


# The disk -------------------------------------------------------------------------------------------------------------


@dataclass
class Disk:
    """How fast it writes and reads as much, one block after the other, when nothing else is done."""

    path: Path
    bytes: int
    write_rates: list[float] = field(default_factory=list)
    read_rates: list[float] = field(default_factory=list)

    def measure(self) -> None:
        block = mmap.mmap(-1, min(BLOCK, self.bytes // 4096 * 4096))  # begins at a page, as O_DIRECT wants it
        block.write(os.urandom(len(block)))
        count = math.ceil(self.bytes / len(block))
        self.write_rates.append(self._rate(os.O_WRONLY | os.O_CREAT, count, lambda file: os.writev(file, [block])))
        self.read_rates.append(self._rate(os.O_RDONLY | os.O_DIRECT, count, lambda file: os.readv(file, [block])))
        self.path.unlink()

    def _rate(self, flags: int, count: int, move: Callable[[int], int]) -> float:
        file = os.open(self.path, flags)
        began = time.perf_counter()
        moved = sum(move(file) for _ in range(count))
        os.fsync(file)
        rate = moved / (time.perf_counter() - began)
        os.close(file)
        return rate


# Whether the results are the same -------------------------------------------------------------------------------------


@dataclass
class Likeness:
    """Of one result: to ours, and to base + scale · B · A in fp64, rounded once."""

    weights: int = 0
    like_ours: int = 0
    off_ours: int = 0  # the most, in steps of bf16
    changed: int = 0  # weights that the adapter changes, of those that were looked at
    like_exact: int = 0
    squares: float = 0.0  # of its errors
    unavoidable: float = 0.0  # of rounding once

    def add(self, found: Tensor, ours: Tensor) -> None:
        self.weights += found.numel()
        same, off = _apart(found, ours)
        self.like_ours += same
        self.off_ours = max(self.off_ours, off)

    def add_exact(self, found: Tensor, against: "Against") -> None:
        same, squares = against.of(found)
        self.changed += found.numel()
        self.like_exact += same
        self.squares += squares
        self.unavoidable += against.unavoidable


class Against:
    """One exact tensor. Results that are the same are compared with it once."""

    def __init__(self, exact: Tensor) -> None:
        self._exact, self._rounded = exact, exact.to(torch.bfloat16)
        self._known: list[tuple[Tensor, tuple[int, float]]] = []
        self.unavoidable = self._squares(self._rounded)

    def of(self, found: Tensor) -> tuple[int, float]:
        for other, known in self._known:
            if torch.equal(other.view(torch.int16), found.view(torch.int16)):
                return known
        self._known.append((found, (_apart(found, self._rounded)[0], self._squares(found))))
        return self._known[-1][1]

    def _squares(self, found: Tensor) -> float:
        return sum(float((one - other).square().sum()) for one, other in _in_cache(found, self._exact))


def compared(inputs: Inputs, folders: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Tensor by tensor; every tenth that the adapter changes with what is exact, too, which takes long."""
    base, adapter = _tensors(inputs.base), _tensors(inputs.adapter)
    scale = _scale(inputs.adapter)
    found = {name: _tensors(folder) for name, folder in folders.items()}
    likeness = {name: Likeness() for name in folders}
    looked_at = [name for name in base if _factor(name, "A") in adapter][::EXACT_EVERY]
    for name, read in base.items():
        against = None
        if name in looked_at:
            a, b = (adapter[_factor(name, which)]().double() for which in "AB")
            against = Against((b @ a).mul_(scale).add_(read()))
        ours = found["ours"][name]()
        for contender, tensors in found.items():
            value = tensors[name]()
            likeness[contender].add(value, ours)
            if against is not None:
                likeness[contender].add_exact(value, against)
    extra = {contender: sorted(set(tensors) - set(base)) for contender, tensors in found.items()}
    return {name: asdict(each) | {"extra": extra[name]} for name, each in likeness.items()}


def _apart(one: Tensor, other: Tensor) -> tuple[int, int]:
    """How many numbers of bf16 are the same, and how many steps apart the others are at most."""
    if torch.equal(one.view(torch.int16), other.view(torch.int16)):
        return one.numel(), 0
    same, most = 0, 0
    for part, its in _in_cache(one, other):
        off = (_place(part) - _place(its)).abs_()
        same += int((off == 0).sum())
        most = max(most, int(off.max()))
    return same, most


def _in_cache(one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(one.reshape(-1).split(CACHED), other.reshape(-1).split(CACHED), strict=True)


def _place(numbers: Tensor) -> Tensor:
    """Of bf16, in the order of all of them."""
    bits = numbers.view(torch.int16).int()
    return torch.where(bits < 0, -(bits & 0x7FFF), bits)


def _tensors(folder: Path) -> dict[str, Callable[[], Tensor]]:
    files = [safe_open(path, "pt") for path in sorted(folder.glob("*.safetensors"))]
    return {name: (lambda file=file, name=name: file.get_tensor(name)) for file in files for name in file.keys()}  # noqa: SIM118


def _factor(weight: str, which: str) -> str:
    return f"base_model.model.{weight.removesuffix('.weight')}.lora_{which}.weight"


def _scale(adapter: Path) -> float:
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    return float(config["lora_alpha"]) / float(config["r"])


# The report -----------------------------------------------------------------------------------------------------------


def report(found: dict[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    loads = " – ".join(f"{each:.1f}" for each in (min(found["loads"]), max(found["loads"])))
    yield (
        f"{found['date']}, {found['cores']} cores (load {loads}), {versions}; {found['input_bytes'] / GB:.2f} GB in, "
        f"{found['output_bytes'] / GB:.2f} GB out; {len(found['warm'])} rounds in alternating order, median (smallest "
        f"– largest), base and adapter in memory"
    )
    if found["missing"]:
        yield f"not there: {', '.join(found['missing'])}"
    if found["warm"]:
        yield _costs(found["warm"])
        yield _own(found["warm"])
        yield _likenesses(found["same"])
        yield _limits(found)
    if found["cold"]:
        yield f"Base and adapter on the disk, {len(found['cold'])} rounds:\n\n{_costs(found['cold'])}"


def _costs(rounds: list[dict[str, Any]]) -> str:
    heads = ["contender", "s", "ratio of a round", "s, synced", "ratio", "CPU s"]
    heads += ["peak MB, anonymous", "peak MB, with files", "GB read", "GB written"]
    rows = []
    for name in sorted(rounds[0], key=CONTENDERS.index):
        mine, ours = [each[name] for each in rounds], [each["ours"] for each in rounds]
        rows.append([
            TITLES[name],
            middle([each["seconds"] for each in mine]), ratio(mine, ours, "seconds"),
            middle([each["synced"] for each in mine]), ratio(mine, ours, "synced"),
            f"{statistics.median(each['cpu'] for each in mine):.1f}",
            f"{max(each['anonymous'] for each in mine) / MB:,.0f}",
            f"{max(each['resident'] for each in mine) / MB:,.0f}",
            *(f"{statistics.median(each[key] for each in mine) / GB:.2f}" for key in ("read", "written")),
        ])  # fmt: skip
    return table(heads, rows)


def _own(rounds: list[dict[str, Any]]) -> str:
    """What ours says that it has taken, apart from starting Python twice and hashing the base."""
    told = [each["ours"]["told"] for each in rounds]
    written, whole = (middle([each[key] for each in told]) for key in ("written", "all"))
    rest = middle([each["ours"]["seconds"] - each["ours"]["told"]["all"] for each in rounds])
    return (
        f"Of ours: {written} s until every layer was checked, written, read back and synced, {whole} s with the logits "
        f"compared; {rest} s for two starts of Python, its libraries, and hashing base and adapter."
    )


def _likenesses(same: dict[str, dict[str, Any]]) -> str:
    heads = ["result", "weights as ours", "farthest, steps", "changed weights as exact", "error"]
    rows = [
        [
            TITLES[name],
            share(each["like_ours"], each["weights"]), f"{each['off_ours']:,}",
            share(each["like_exact"], each["changed"]),
            f"{math.sqrt(each['squares'] / max(each['unavoidable'], 1e-300)):.4f}",
        ]
        for name, each in same.items()
    ]  # fmt: skip
    note = (
        f"Exact: base + scale · B · A in fp64, rounded once, of every {EXACT_EVERY}th changed tensor. Error: root mean "
        f"square, of what rounding once costs."
    )
    extra = "".join(f"\n{name} has {len(each['extra'])} tensors more." for name, each in same.items() if each["extra"])
    return f"{table(heads, rows)}\n\n{note}{extra}"


def _limits(found: dict[str, Any]) -> str:
    """What the disk alone would take."""
    write, read = (statistics.median(found["disk"][key]) for key in ("write", "read"))
    writing, reading = found["output_bytes"] / write, found["input_bytes"] / read
    rows = []
    for name in found["warm"][0]:
        cells = [TITLES[name], _times(found["warm"], name, writing), _times(found["cold"], name, reading + writing)]
        rows.append(cells)
    said = (
        f"The disk writes {middle([each / GB for each in found['disk']['write']])} GB/s with fsync, and reads "
        f"{middle([each / GB for each in found['disk']['read']])} GB/s: {writing:.1f} s to write the model once, "
        f"{reading:.1f} s to read base and adapter. Synced, the contenders take"
    )
    return f"{said}\n\n{table(['contender', '× writing, warm', '× reading and writing, cold'], rows)}"


def _times(rounds: list[dict[str, Any]], name: str, limit: float) -> str:
    return f"{statistics.median(each[name]['synced'] for each in rounds) / limit:.1f}" if rounds else "–"


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def ratio(mine: list[dict[str, Any]], ours: list[dict[str, Any]], key: str) -> str:
    return middle([one[key] / other[key] for one, other in zip(mine, ours, strict=True)], 2)


def middle(values: list[float], places: int = 1) -> str:
    """As every table has it: median (smallest – largest)."""
    inside = f" ({min(values):.{places}f} – {max(values):.{places}f})" if len(values) > 1 else ""
    return f"{statistics.median(values):.{places}f}{inside}"


def share(part: int, whole: int) -> str:
    return "all" if part == whole else f"{part / whole:.5%}"


if __name__ == "__main__":
    sys.exit(main())
