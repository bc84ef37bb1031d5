"""What is said of machines must fit together; else it is told what to type."""

from collections.abc import Callable
from pathlib import Path

import pytest

from phased_cpt.config import Loaded
from phased_cpt.doors import attended_jobs, is_other_node, launched_jobs
from phased_cpt.errors import ConfigError, InputError
from phased_cpt.launchers import free_port
from phased_cpt.plan import make_plan
from tests.conftest import MINIMAL, Answer, Call, Write

TWO = ["launch.nnodes=2", "launch.num_gpus=1"]


@pytest.mark.parametrize(
    ("settings", "node", "told"),
    [
        (TWO, 0, "--nnodes 2: add --master-addr, the name or address of node 0"),
        ([*TWO, "launch.master_addr=a"], None, "--nnodes 2: add --node-rank, 0 on a and 1, 2, … elsewhere"),
        ([*TWO, "launch.master_addr=a"], 2, "--node-rank 2: it goes from 0 to 1"),
        ([], 1, "--node-rank 1: there is one node; add --nnodes N"),
        ([*TWO, "launch.launcher=inline"], 0, "inline is one process, and there are several nodes; take local"),
        (
            [*TWO, "launch.hostfile=hosts"],
            None,
            "launch.hostfile names the machines; leave --nnodes and --node-rank out",
        ),
        (["launch.hostfile=hosts"], 0, "launch.hostfile names the machines; leave --nnodes and --node-rank out"),
        (["launch.hostfile=none"], None, "launch.hostfile: none cannot be read"),
    ],
)
def test_a_contradiction_is_told(
    settings: list[str], node: int | None, told: str, loaded: Callable[..., Loaded], write: Write
) -> None:
    write("127.0.0.1 slots=1\n127.0.0.2 slots=1\n", "hosts")
    plan = make_plan(loaded(MINIMAL, *settings))
    with pytest.raises(InputError) as refused, launched_jobs(plan, node, [], print):
        pass
    assert told in str(refused.value)


def test_one_machine_needs_none_of_it(loaded: Callable[..., Loaded], write: Write) -> None:
    write("localhost slots=2\n", "hosts")
    for setting in ("launch.num_gpus=2", "launch.hostfile=hosts"):
        plan = make_plan(loaded(MINIMAL, setting))
        with launched_jobs(plan, None, [], print) as door:
            assert (door.ranks, door.head) == (2, None)


def test_another_node_is_known_by_its_number(loaded: Callable[..., Loaded]) -> None:
    plan = make_plan(loaded(MINIMAL, *TWO, f"launch.master_port={free_port()}"))
    assert [is_other_node(plan, node) for node in (None, 0, 1)] == [False, False, True]
    with pytest.raises(InputError, match="add --master-addr"):
        attended_jobs(plan, 1, print)


def test_a_plan_for_several_machines_waits_for_what_each_of_them_has(
    loaded: Callable[..., Loaded], write: Write
) -> None:
    """On one of 1 + 2 ranks its own count, twice, would not divide the six rows that three divide."""
    write("a slots=1\nb slots=2\n", "hosts")
    six = ["training.global_batch_size=6", "training.micro_batch_size=1", "launch.num_gpus=4"]
    for settings in (["launch.nnodes=2"], ["launch.hostfile=hosts"]):
        plan = make_plan(loaded(MINIMAL, *six, *settings))
        assert plan.phases[0].batch is None
    with pytest.raises(ConfigError, match="6 is no multiple of micro_batch_size 1 × num_gpus 4"):
        loaded(MINIMAL, *six)  # the control: one machine


def test_what_is_typed_of_machines_reaches_the_plan(write: Write, call: Call) -> None:
    write(MINIMAL)
    answer: Answer = call("run", "-c", "run.yaml", "--dry-run", "--num-gpus", "4", "--nnodes", "2", "--json")
    assert answer.code == 0, answer.err
    assert '"ranks": 8' in answer.out
    refused = call("run", "-c", "run.yaml", "--nnodes", "2", "--node-rank", "0")
    assert (refused.code, refused.err) == (2, "--nnodes 2: add --master-addr, the name or address of node 0\n")
    assert not Path("outputs").exists()
