"""This machine: its GPUs and who is at work on them, its memory, its limits. Without a GPU, what can be looked at."""

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

from phased_cpt.config.allowed import nearest
from phased_cpt.doors import ranks_of_this_node
from phased_cpt.fitting import making_bytes
from phased_cpt.preflight.gpus import Gpu
from phased_cpt.preflight.scene import Scene
from phased_cpt.preflight.seen import Seen, fail, ok, skip, warn
from phased_cpt.run_dir import in_bytes
from phased_cpt.tables.words import counted

NO_GPU = "there is no GPU, so this cannot be looked at"
FREE_SHARE = 0.95  # of a GPU that nobody uses: the driver keeps some hundred MB
OPEN_FILES = 4096  # shards, workers and sockets of a rank; 1024 is what many systems begin with
PROCESSES = 4096  # threads count, too: some hundred a rank
SHARED_BYTES = 2**30  # NCCL takes some ten MB a pair of ranks; containers give 64 MB in all
SHM = Path("/dev/shm")  # noqa: S108 - what it is called
BF16_SINCE = (8, 0)  # compute capability; before, it is emulated


def gpus(scene: Scene) -> Iterator[Seen]:
    """As many as launch.num_gpus asks for."""
    ranks_of_this_node(scene.plan.config.launch)  # which refuses more than there are GPUs
    found, ranks = scene.gpus.made(), scene.ranks_here.given()
    if not found:
        what = f"no GPU (nvidia-smi, CUDA_VISIBLE_DEVICES): {counted(ranks, 'rank')} on the CPU"
        yield warn(what, "nothing, if that is meant; else `nvidia-smi` must list them")
        return
    yield ok(f"{_named(found)}, driver {found[0].driver}; {ranks} of them are used")
    if len({gpu.name for gpu in found[:ranks]}) > 1:
        yield warn("they are not alike, and all wait for the slowest", "choose with CUDA_VISIBLE_DEVICES=0,1,…")


def gpu_memory(scene: Scene) -> Iterator[Seen]:
    """What is free of each, and who has the rest."""
    used = scene.gpus.given()[: scene.ranks_here.given()]
    if not used:
        yield skip(NO_GPU)
        return
    taken = [*filter(None, map(_taken, used))]
    others = "end them, or choose other GPUs with CUDA_VISIBLE_DEVICES"
    yield from (warn(what, others) for what in taken)
    if not taken:
        yield ok(f"{in_bytes(min(gpu.free for gpu in used))} free on each, and nobody else is at work there")


def torch(scene: Scene) -> Iterator[Seen]:
    """It loads, sees the GPUs that the system sees, and can compute on them in the precision that is asked for."""
    answer, found = scene.probe.made(), scene.gpus.given()
    version = f"torch {answer['torch']}" + (f" for CUDA {answer['cuda']}" if answer["cuda"] else " for the CPU")
    devices = answer["devices"]
    if not found and not devices:
        yield ok(version)
    elif len(devices) < len(found):
        why = answer["no_cuda"] or ("this build has no CUDA" if not answer["cuda"] else "CUDA does not start")
        fix = "pip install torch from the index of your CUDA (pytorch.org), or update the driver"
        yield fail(f"{version} sees {len(devices)} of {len(found)} GPUs: {why}", fix)
    elif broken := [f"GPU {at}: {each['error']}" for at, each in enumerate(devices) if each["error"]]:
        yield fail(
            f"{version} cannot compute on {broken[0]}", "install a torch that knows this GPU, or mend the driver"
        )
    else:
        yield ok(version)
    precision = scene.plan.config.model.precision
    if precision == "bf16" and any(tuple(each["capability"]) < BF16_SINCE for each in devices):
        yield warn(f"{devices[0]['name']} has no bf16 of its own: it is emulated, slowly", "--set model.precision=fp16")


def optimizer(scene: Scene) -> Iterator[Seen]:
    """One that the Trainer knows, in every phase."""
    known = scene.probe.given()["optimizers"]
    asked = {phase.settings.training.optimizer: phase.name for phase in scene.plan.phases}
    unknown = {name: phase for name, phase in asked.items() if name not in known}
    for name, phase in unknown.items():
        fix = "--set training.optimizer=adamw_torch_fused"
        yield fail(f"{phase}: training.optimizer: the Trainer knows no {name!r}{nearest(name, known)}", fix)
    if not unknown:
        yield ok(", ".join(asked))


def attention(scene: Scene) -> Iterator[Seen]:
    """The kernel that training would take, asked of the model itself."""
    answer, asked = scene.probe.given(), scene.plan.config.model.attention
    if answer["kernel"]:
        why = f" (auto; {answer['refused']})" if answer["refused"] else (" (auto)" if asked == "auto" else "")
        yield ok(f"{answer['kernel']}{why}")
        if answer["kernel"] == "flex_attention" and not answer["devices"]:
            yield fail("flex_attention cannot learn on a CPU", "--set model.attention=auto")
    elif answer["linears"] is None and scene.base.missing:
        yield skip("skipped, because the base is missing")
    else:
        yield fail(f"{asked} cannot be used: {answer['refused']}", "--set model.attention=auto")


def limits(scene: Scene) -> Iterator[Seen]:
    """What the shell allows each process."""
    files, processes = _limit(resource.RLIMIT_NOFILE), _limit(resource.RLIMIT_NPROC)
    few = [
        warn(f"{count:,} {what} at most (ulimit {flag})", f"ulimit {flag} {enough}")
        for what, flag, count, enough in (
            ("open files", "-n", files, OPEN_FILES),
            ("processes", "-u", processes, PROCESSES),
        )
        if count < enough
    ]
    if (virtual := _limit(resource.RLIMIT_AS)) < 2**63:
        what = f"{in_bytes(virtual)} of virtual memory (ulimit -v), of which torch takes far more than of memory"
        few.append(warn(what, "ulimit -v unlimited"))
    locked = _limit(resource.RLIMIT_MEMLOCK)
    if locked < SHARED_BYTES and scene.gpus.given() and scene.ranks_here.given() > 1:
        few.append(warn(f"{in_bytes(locked)} of memory can be locked, which InfiniBand needs", "ulimit -l unlimited"))
    yield from few or [ok(f"{files:,} open files")]


def shared_memory(scene: Scene) -> Iterator[Seen]:
    """Where NCCL and gloo, and the workers of a DataLoader, pass on what they share."""
    free = shutil.disk_usage(SHM).free if SHM.is_dir() else 0
    if free >= SHARED_BYTES or scene.ranks_here.given() == 1:
        yield ok(f"{in_bytes(free)} free in {SHM}")
        return
    fix = "start the container with --shm-size=16g (or --ipc=host), or delete what others have left there"
    yield warn(f"{in_bytes(free)} free in {SHM}, for {scene.ranks_here.given()} ranks", fix)


def memory(scene: Scene) -> Iterator[Seen]:
    """What each phase needs of a GPU, or of the host where there is none; and what would make it fit."""
    for each in scene.fits.made():
        needed = each.device.peak or each.host.peak
        what = f"{each.phase}: {in_bytes(needed)} a rank ({each.file}), {each.verdict}"
        fixes = [f"{change} ({in_bytes(change.bytes)})" for change in each.changes]
        fix = "; or ".join(fixes) or "a smaller model, or more memory"
        if each.verdict == "does not fit":
            yield fail(f"{what}: {each.why}", fix)
        elif each.verdict == "tight":
            yield warn(f"{what}: {each.why}", fix)
        elif each.verdict == "not known":
            yield skip(f"{what}: {each.why}")
        else:
            yield ok(f"{what} in {in_bytes(each.room)}" if each.room else what)


def merge_memory(scene: Scene) -> Iterator[Seen]:
    """What the merge after the last phase needs of the host."""
    found = scene.merge_fit.made()
    if found is None:
        yield ok("merge.enabled is false")
        return
    what = f"{in_bytes(found.host.peak)} of the host, {found.verdict}"
    fix = "--set merge.enabled=false, and `phased-cpt merge` on a machine with more memory"
    if found.verdict == "fits":
        yield ok(f"{what} in {in_bytes(found.room)}" if found.room else what)
    elif found.verdict == "not known":
        yield skip(f"{found.verdict}: {found.why}")
    else:
        yield (fail if found.verdict == "does not fit" else warn)(f"{what}: {found.why}", fix)


def host_memory(scene: Scene) -> Iterator[Seen]:
    """What the ranks of this machine need of its memory, beside what other programs hold now."""
    fits, ranks = scene.fits.given(), scene.ranks_here.given()
    most = max(fits, key=lambda each: each.host.peak)
    needed, free = most.host.peak * ranks, available_bytes()
    made = making_bytes(scene.base.given())
    if made > free:
        what = f"random weights are made first, {in_bytes(made)} in fp32, and {in_bytes(free)} are available now"
        yield fail(what, "a smaller model.from_config, model.name of one that exists, or a machine with more memory")
    what = f"{most.phase}: {in_bytes(needed)} for {counted(ranks, 'rank')}, {in_bytes(free)} available now"
    if needed <= free:
        yield ok(what)
    else:
        yield warn(what, "end what else is running, or take fewer ranks on this machine (--num-gpus)")


def available_bytes() -> int:
    """What Linux could give a new program: free, or easily freed."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def _named(gpus: tuple[Gpu, ...]) -> str:
    names = [gpu.name for gpu in gpus]
    return ", ".join(f"{names.count(name)} × {name}" for name in dict.fromkeys(names))


def _taken(gpu: Gpu) -> str | None:
    others = [str(work) for work in gpu.at_work if work.pid != str(os.getpid())]
    if not others and (not gpu.total or gpu.free >= FREE_SHARE * gpu.total):
        return None
    free = f"GPU {gpu.index}: {in_bytes(gpu.free)} of {in_bytes(gpu.total)} free"
    return f"{free}; {', '.join(others)}" if others else free


def _limit(which: int) -> int:
    soft, _ = resource.getrlimit(which)
    return 2**63 if soft == resource.RLIM_INFINITY else soft
