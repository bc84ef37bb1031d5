"""What a user sees when something fails, and that nothing is left behind: ranks of real DeepSpeed, forked.

The first door is conducted by the test, and tests/launchers has how its processes are watched. Of the second door, the
ranks are what `deepspeed --module phased_cpt` starts; here they write into a log each, and there on one terminal.
"""

import contextlib
import dataclasses
import json
import os
import re
import resource
import signal
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from phased_cpt.errors import PhasedCptError
from phased_cpt.ledger import run_lock
from phased_cpt.run_dir import RunDir
from tests.journeys.conftest import Ran, Tiny
from tests.zygote import ForkedJobs, Zygote, shell

HERE = "tests.journeys.test_failures"


class Told(NamedTuple):
    """What the ranks of the second door have ended with, and what each has written."""

    codes: list[int]
    out: list[str]


def short(tiny: Tiny, **sections: Any) -> dict[str, Any]:
    """One phase of two steps, without evaluations."""
    config = tiny(data={"eval_share": 0.0}, **sections)
    return config | {"phases": [config["phases"][0] | {"max_steps": 2}]}


def second_door(
    zygote: Zygote, config: dict[str, Any], *options: str, program: str = "tests.zygote:shell", first: Any = ()
) -> Told:
    """Called by `deepspeed --num_gpus=2 --module phased_cpt -c run.json`, so to speak."""
    Path("run.json").write_text(json.dumps(config))
    codes = zygote.ranks(program, [*first, ["-c", "run.json", *options]], 2, Path("told"), patience=5.0)
    return Told(codes, [Path(f"told/rank{rank}.log").read_text() for rank in (0, 1)])


def faulty(fault: str, rank: int, arguments: list[str]) -> None:
    """Something befalls one rank while the others train."""
    import phased_cpt.worker as worker
    from phased_cpt.errors import PhasedCptError

    def fails(self: worker.PhaseRun) -> None:
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise (PhasedCptError("this rank cannot go on") if fault == "told" else RuntimeError("an apple"))

    def no_number(self: worker.PhaseRun, batch: Any) -> Any:
        return losses(self, batch) * float("nan")

    losses = worker.PhaseRun._losses
    if int(os.environ["RANK"]) == rank:
        worker.PhaseRun.train = worker.PhaseRun.train if fault == "no number" else fails
        worker.PhaseRun._losses = no_number if fault == "no number" else losses
    if arguments[0].endswith("job.json"):
        worker.main(arguments)
    shell(arguments)


def called_otherwise(rank: int, options: list[str], arguments: list[str]) -> None:
    """One rank was started by another command line, or read another file."""
    shell([*arguments, *(options if int(os.environ["RANK"]) == rank else [])])


def taken_port(arguments: list[str]) -> None:
    """Where the ranks are to meet, somebody else is at home."""
    with socket.create_server(("127.0.0.1", 0)) as somebody:
        if os.environ["RANK"] == "0":
            os.environ["MASTER_PORT"] = str(somebody.getsockname()[1])
        shell(arguments)


def on_another_disk(arguments: list[str]) -> None:
    """The data cache of rank 0 is not where rank 1 runs."""
    import phased_cpt.worker as worker

    def train(job: worker.Job, rank: worker.Rank) -> None:
        trains(dataclasses.replace(job, train="/elsewhere/blocks") if rank.number == 1 else job, rank)

    trains, worker.train_phase = worker.train_phase, train
    worker.main(arguments)


def published() -> list[str]:
    return sorted(str(path) for path in Path("run").glob("phase*/best_adapter"))


# Before anything is trained ---------------------------------------------------------------------------------------------


def test_a_configuration_that_is_wrong_is_told_once_and_every_rank_leaves(tiny: Tiny, zygote: Zygote) -> None:
    told = second_door(zygote, short(tiny) | {"trianing": {}})
    assert told.codes == [2, 2]
    assert told.out[0].startswith("run.json:1: trianing: no such key here; did you mean training? (keys here: ")
    assert told.out[0].count("\n") == 1
    assert told.out[1] == ""
    assert not Path("run").exists()


def test_a_dry_run_is_shown_once_and_begins_nothing(tiny: Tiny, zygote: Zygote) -> None:
    told = second_door(zygote, short(tiny), "--dry-run")
    assert told.codes == [0, 0]
    assert told.out[0].count("foundation") >= 1
    assert told.out[1] == ""
    assert not Path("run").exists()


def test_a_run_folder_that_is_busy_is_told_once(tiny: Tiny, zygote: Zygote) -> None:
    with run_lock(RunDir(Path("run"))):
        told = second_door(zygote, short(tiny))
    assert told.codes == [1, 1]
    assert f"another run is at work here (process {os.getpid()} on " in told.out[0]
    assert told.out[1] == ""


@pytest.mark.fault("F31", "a node that does not see the data", "named, exit 2")
def test_a_rank_that_does_not_see_the_data_says_what_must_be_shared(tiny: Tiny, ran: Ran, zygote: Zygote) -> None:
    told = r"^/elsewhere/blocks is not seen on .*; run.cache_dir and the model must lie where all nodes see them"
    with pytest.raises(PhasedCptError, match=told) as failure:
        ran(short(tiny), door=ForkedJobs(zygote, 2, f"{HERE}:on_another_disk"))
    assert failure.value.exit_code == 2


@pytest.mark.fault("F33", "the port of the second door is taken", "named, exit 2")
def test_a_port_that_is_taken_is_told(tiny: Tiny, zygote: Zygote) -> None:
    told = second_door(zygote, short(tiny), program=f"{HERE}:taken_port")
    assert told.codes[0] == 2
    assert "is taken by another program, perhaps another run; give the launcher another" in told.out[0]
    assert "Traceback" not in told.out[0]


@pytest.mark.fault("F32", "a rank of the second door with another configuration", "named with both values, exit 2")
@pytest.mark.parametrize("options", [["--set", "training.learning_rate=5e-5"], ["-c", "no-such.yaml"]])
def test_a_rank_with_another_configuration_is_named(options: list[str], tiny: Tiny, zygote: Zygote) -> None:
    told = second_door(zygote, short(tiny), program=f"{HERE}:called_otherwise", first=[1, options])
    assert told.codes[1] == 2
    if "--set" in options:
        assert "rank 1: this rank would not do the same as rank 0:" in told.out[1]
        assert "training.learning_rate is 0.001 on " in told.out[1] and ", 5e-05 on " in told.out[1]
    else:
        assert "no-such.yaml: no such file" in told.out[1]
    assert "Traceback" not in told.out[1]
    assert published() == []
    alike = second_door(zygote, short(tiny), program=f"{HERE}:called_otherwise", first=[1, ["--set", "run.seed=42"]])
    assert alike.codes == [0, 0], "the control: what says the same is no other configuration"


# While it is trained ----------------------------------------------------------------------------------------------------


def test_training_that_leaves_the_numbers_ends_with_its_own_exit_code_through_both_doors(
    tiny: Tiny, ran: Ran, zygote: Zygote
) -> None:
    """Of a row of one rank: all of them know it at the same step."""
    config, fault = short(tiny), ("no number", 1)
    with pytest.raises(PhasedCptError, match=r"step 1: the loss is not finite \(blocks ") as failure:
        ran(config, door=ForkedJobs(zygote, 2, f"{HERE}:faulty", fault))
    assert failure.value.exit_code == 5
    told = second_door(zygote, config, program=f"{HERE}:faulty", first=fault)
    assert told.codes == [5, 5]
    assert told.out[0].count("the loss is not finite") == 1
    assert "Traceback" not in told.out[0]
    assert "finite" not in told.out[1]
    assert published() == []


@pytest.mark.parametrize("fault, rank", [("told", 1), ("an apple", 1), ("an apple", 0), ("killed", 0), ("killed", 1)])
def test_what_befalls_one_rank_of_the_second_door_is_told_once_and_the_same_command_goes_on(
    fault: str, rank: int, tiny: Tiny, zygote: Zygote
) -> None:
    """A launcher ends whoever is left a second later; so does the one here."""
    config = short(tiny)
    began = time.monotonic()
    told = second_door(zygote, config, program=f"{HERE}:faulty", first=[fault, rank])
    assert time.monotonic() - began < 30
    assert told.codes[rank] == (-signal.SIGKILL if fault == "killed" else 1)
    assert all(told.codes), "no rank calls it a success"
    out, other = told.out[rank], told.out[1 - rank]
    if fault == "told":
        assert out.endswith("rank 1: this rank cannot go on\n")
        assert "Traceback" not in out + other
    elif fault == "an apple":
        assert out.count("RuntimeError: an apple") == 1
        assert "apple" not in other
    if rank == 0:
        assert "Traceback" not in other
    if (fault, rank) == ("killed", 0):
        assert "rank 1: rank 0 is gone" in other
    assert published() == []
    if (fault, rank) == ("killed", 1):
        again = second_door(zygote, config)
        assert again.codes == [0, 0], again.out
        assert published() == ["run/phase1_foundation/best_adapter"]


def test_when_there_is_nothing_left_to_do_every_rank_leaves_at_once(tiny: Tiny, zygote: Zygote) -> None:
    config = short(tiny)
    first = second_door(zygote, config)
    assert first.codes == [0, 0], first.out
    assert "published phase1_foundation/best_adapter" in first.out[0]
    began = time.monotonic()
    told = second_door(zygote, config)
    assert told.codes == [0, 0]
    assert "published phase1" not in told.out[0], "the control: it was not trained again"
    assert "done" in told.out[0]
    assert told.out[1] == ""
    assert time.monotonic() - began < 20


def test_a_rank_of_the_first_door_that_fails_without_a_message_leaves_its_traceback_in_its_log(
    tiny: Tiny, ran: Ran, zygote: Zygote
) -> None:
    with pytest.raises(
        PhasedCptError, match=r"^RuntimeError: an apple \(in phase foundation, step 0, [a-z ]+\)"
    ) as failure:
        ran(short(tiny), door=ForkedJobs(zygote, 2, f"{HERE}:faulty", ("an apple", 1)))
    assert re.search(r"\(2 rows of 128 tokens, [\d.]+ GiB of host memory available\)", str(failure.value))
    logs = Path("run/phase1_foundation/logs")
    assert "Traceback" in (logs / "rank1.log").read_text()
    assert published() == []


# Memory that is not there -----------------------------------------------------------------------------------------------


def with_little_memory(spare: int, arguments: list[str]) -> None:
    """A rank that may have so many bytes more than it has when training begins."""
    import phased_cpt.worker as worker

    begin = worker.PhaseRun._begin

    def begins(self: worker.PhaseRun) -> None:
        begin(self)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + spare,) * 2)

    worker.PhaseRun._begin = begins
    worker.main(arguments)


@pytest.mark.requirement("T-08")
def test_out_of_memory_is_told_with_what_to_change(tiny: Tiny, ran: Ran, zygote: Zygote) -> None:
    config = short(tiny, training={"micro_batch_size": 32, "global_batch_size": 64})
    scarce = ForkedJobs(zygote, 2, program=f"{HERE}:with_little_memory", first=(16 * 2**20,))
    with pytest.raises(PhasedCptError) as failure:
        ran(config, door=scarce)
    message = str(failure.value)
    told, estimated, *advice = message.splitlines()
    assert told.startswith("out of memory in phase foundation, step 1, training: 32 rows of 128 tokens, ")
    assert told.endswith("GiB of host memory available")
    assert re.fullmatch(r"estimated for each rank: [\d.]+ MB of [\d.]+ GB that may be used \(\w.+ MB\)", estimated)
    assert any("training.micro_batch_size" in line for line in advice), advice
    assert published() == []
    enough = ForkedJobs(zygote, 2, program=f"{HERE}:with_little_memory", first=(16 * 2**30,))
    assert ran(config, door=enough).finished, "the control: the same with memory"


# Nobody trains on unseen ------------------------------------------------------------------------------------------------


def three_generations(told: str) -> None:
    """conductor → launcher → rank: the conductor is killed, and the launcher is told nothing."""
    from phased_cpt.launchers import CONDUCTOR
    from phased_cpt.train.engine import die_with_the_parent

    conductor = os.fork()
    if conductor == 0:
        os.environ.pop(CONDUCTOR, None)
        if told == "the conductor":
            os.environ[CONDUCTOR] = str(os.getpid())
        launcher = os.fork()
        if launcher == 0:
            rank = os.fork()
            if rank == 0:
                die_with_the_parent()
                Path("rank.pid").write_text(str(os.getpid()))
                time.sleep(20)
            time.sleep(20)
        time.sleep(20)
        os._exit(0)
    pid = _pid(Path("rank.pid"))
    os.kill(conductor, signal.SIGKILL)
    os.waitpid(conductor, 0)
    deadline = time.monotonic() + 1.5
    while _is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    Path("found").write_text(str(_is_alive(pid)))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _pid(path: Path) -> int:
    deadline = time.monotonic() + 10
    while not (path.exists() and path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return int(path.read_text())


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("told, survives", [("the conductor", "False"), ("nobody", "True")])
def test_a_rank_behind_a_launcher_ends_with_the_conductor(told: str, survives: str, tiny: Tiny, zygote: Zygote) -> None:
    assert zygote.ranks(f"{HERE}:three_generations", [told], 1, Path("told")) == [0], Path("told/rank0.log").read_text()
    assert Path("found").read_text() == survives


def comes_late() -> None:
    """As one whose conductor was killed while it imported torch."""
    from phased_cpt.launchers import CONDUCTOR
    from phased_cpt.train.engine import die_with_the_parent

    gone = os.fork()
    if gone == 0:
        os._exit(0)
    os.waitpid(gone, 0)
    os.environ[CONDUCTOR] = str(gone)
    die_with_the_parent()


def test_a_rank_that_comes_after_the_end_of_its_conductor_leaves(tiny: Tiny, zygote: Zygote) -> None:
    assert zygote.ranks(f"{HERE}:comes_late", [], 1, Path("told")) == [1]


# What DeepSpeed leaves on a machine --------------------------------------------------------------------------------------


def joins(kernels: str) -> None:
    from phased_cpt.train.engine import join, meet

    os.environ["TORCH_EXTENSIONS_DIR"] = kernels
    port, shared = os.environ["MASTER_PORT"], Path("/dev/shm")
    meet(join())
    Path(f"left-{os.environ['RANK']}").write_text(str([path.name for path in shared.glob(f"deepspeed*_{port}_*")]))


def test_the_lock_of_a_compiler_that_was_killed_holds_nobody_up_and_no_memory_is_left(
    tiny: Tiny, zygote: Zygote
) -> None:
    """PyTorch would wait for it for ever; DeepSpeed's own start would leave two files of 66 MB."""
    kernels = Path("kernels").resolve()
    for name, age in (("cpu_adam", 3600), ("deepspeed_shm_comm", 3600), ("async_io", 5)):
        (kernels / name).mkdir(parents=True)
        (kernels / name / "lock").touch()
        os.utime(kernels / name / "lock", (time.time() - age,) * 2)
    assert zygote.ranks(f"{HERE}:joins", [str(kernels)], 2, Path("told")) == [0, 0], Path("told/rank0.log").read_text()
    assert [path.parent.name for path in kernels.glob("*/lock")] == ["async_io"], "the control: somebody may be at work"
    assert f"{kernels}/async_io/lock is " in Path("told/rank0.log").read_text()
    assert [Path(f"left-{rank}").read_text() for rank in (0, 1)] == ["[]", "[]"]
