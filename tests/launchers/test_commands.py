"""Golden command lines: what each launcher starts, on one machine and on the second of two."""

import base64
import json
import sys
from pathlib import Path
from typing import get_args

import pytest

from phased_cpt.config.schema import Launch
from phased_cpt.launchers import LAUNCHERS, Command, Place, Program

PROGRAM = Program("phased_cpt.worker", Path("run/phase1_one/job.json"), Path("run/phase1_one/logs"))
ALONE = Place((2,), port=29501)
SECOND = Place((4, 2), 1, "10.0.0.1", 29501, "eth0")
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")


def test_every_launcher_is_a_choice_of_the_configuration() -> None:
    """`inline` besides: it starts nothing, for it is the process that is called."""
    choices = get_args(Launch.model_fields["launcher"].annotation)
    assert sorted(choices) == sorted([*LAUNCHERS, "inline"])


def started(launcher: str, place: Place) -> list[Command]:
    return LAUNCHERS[launcher](PROGRAM, place)


def words(command: Command) -> list[str]:
    return ["python" if word == sys.executable else word for word in command.words]


@pytest.mark.parametrize(
    ("place", "first", "last"),
    [
        (ALONE, "0 0 2 2 127.0.0.1 29501 lo", "1 1 2 2 127.0.0.1 29501 lo"),
        (SECOND, "4 0 6 2 10.0.0.1 29501 eth0", "5 1 6 2 10.0.0.1 29501 eth0"),
    ],
    ids=["alone", "second of two"],
)
def test_local_starts_each_rank(place: Place, first: str, last: str) -> None:
    commands = started("local", place)
    told = [" ".join(command.environment[name] for name in OF_A_RANK) for command in commands]
    assert told == [first, last]
    assert words(commands[0])[:2] == ["python", "-c"] and words(commands[0])[3:] == ["run/phase1_one/job.json"]
    assert "run_module('phased_cpt.worker'" in words(commands[0])[2]
    assert [command.log and command.log.name for command in commands] == (
        [None, "rank1.log"] if place is ALONE else ["rank4.log", "rank5.log"]
    )


@pytest.mark.parametrize(
    ("place", "node", "where", "world"),
    [
        (ALONE, 0, "127.0.0.1", {"localhost": ["0", "1"]}),
        (SECOND, 1, "10.0.0.1", {"node0": ["0", "1", "2", "3"], "node1": ["0", "1"]}),
    ],
    ids=["alone", "second of two"],
)
def test_deepspeed_starts_its_own_launcher(place: Place, node: int, where: str, world: dict[str, list[str]]) -> None:
    (command,) = started("deepspeed", place)
    encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    assert words(command) == [
        "python", "-m", "deepspeed.launcher.launch", f"--world_info={encoded}", f"--node_rank={node}",
        f"--master_addr={where}", "--master_port=29501", "--module", "--no_local_rank", "--quiet",
        "phased_cpt.worker", "run/phase1_one/job.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("place", "meeting"),
    [
        (ALONE, ["--standalone"]),
        (SECOND, ["--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=29501"]),
    ],
    ids=["alone", "second of two"],
)
def test_torchrun_starts_pytorchs_launcher(place: Place, meeting: list[str]) -> None:
    (command,) = started("torchrun", place)
    assert words(command) == [
        "python", "-m", "torch.distributed.run", "--nproc_per_node=2", *meeting,
        "-m", "phased_cpt.worker", "run/phase1_one/job.json",
    ]  # fmt: skip
