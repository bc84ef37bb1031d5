"""Each check in a place where it has something to say, with its words; the control is a run with nothing wrong."""

import contextlib
import functools
import re
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import huggingface_hub.constants
import pytest

from phased_cpt.fitting import hardware
from phased_cpt.ledger import Ledger, run_lock
from phased_cpt.ledger.fingerprint import Inputs, Weights
from phased_cpt.preflight import CHECKS, Scene, machine, places, seen_by
from phased_cpt.preflight.seen import AGAIN, Seen
from phased_cpt.run_dir import RunDir
from tests.conftest import TOKENIZER
from tests.preflight.conftest import SHAPE, Gpus, seen_scene, server


class Stage(NamedTuple):
    """What a case may change."""

    gpus: Gpus
    patch: pytest.MonkeyPatch
    leaving: contextlib.ExitStack


class Case(NamedTuple):
    verdict: str
    found: str
    fix: str
    scene: Callable[[Stage], Scene]


CASES: dict[str, Case] = {}


def case(
    name: str, verdict: str, found: str, fix: str
) -> Callable[[Callable[[Stage], Scene]], Callable[[Stage], Scene]]:
    def add(scene: Callable[[Stage], Scene]) -> Callable[[Stage], Scene]:
        CASES[name] = Case(verdict, found, fix, scene)
        return scene

    return add


@pytest.fixture
def stage(here: Path, gpus: Gpus, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    with contextlib.ExitStack() as leaving:
        yield Stage(gpus, monkeypatch, leaving)


PHASES = [
    {"name": "one", "sources": "a.jsonl", "max_steps": 100},
    {"name": "two", "sources": "a.jsonl", "max_steps": 100},
]
SECRET = "0123456789abcdef" * 2 + "01234567"


@case("configuration", "warn", "one: an adapter on random weights learns little",
      r"let a phase before train every weight \(lora.enabled: false\)")  # fmt: skip
def an_adapter_on_nothing(stage: Stage) -> Scene:
    return seen_scene(phases=PHASES)


@case("batch", "fail", "6 rows cannot be shared by 4 ranks × micro_batch_size 1",
      "take a multiple of 4, or another number of ranks")  # fmt: skip
def a_batch_that_four_gpus_cannot_share(stage: Stage) -> Scene:
    stage.gpus(4)
    return seen_scene(launch=None, training={"micro_batch_size": 1, "global_batch_size": 6})


@case("DeepSpeed file", "fail", "mine.json: zero_optimization.stage is 1", "write 2, or 3 to shard the weights, too")
def a_file_of_stage_1(stage: Stage) -> Scene:
    Path("mine.json").write_text('{"zero_optimization": {"stage": 1}}')
    return seen_scene(training={"deepspeed": "mine.json"})


@case("4 bits", "warn", r"ZeRO-3 \(one\) shards a 4-bit base only after each rank has loaded all of it",
      "--set training.deepspeed=zero2")  # fmt: skip
def four_bits_under_zero_3(stage: Stage) -> Scene:
    return seen_scene(model={"use_4bit": True, "precision": "bf16"}, training={"deepspeed": "zero3"})


@case("run folder", "fail", r"run: another run is at work here \(process \d+ on", "wait for it, or stop it")
def a_folder_with_a_run_in_it(stage: Stage) -> Scene:
    stage.leaving.enter_context(run_lock(RunDir(Path("run"))))
    return seen_scene(run={"dir": "run"})


@case("ledger", "fail", r"phase one has begun, with other values than it has now:\n.*learning_rate", AGAIN)
def a_rate_that_was_changed_under_a_phase(stage: Stage) -> Scene:
    plan = seen_scene(run={"dir": "run"}).by_ranks.made()
    start = Weights(kind="base", base="b" * 64)
    Ledger.open(RunDir(Path("run")), plan).begin(plan.phases[0], Inputs(start=start, tokenizer="t", sources={}))
    return seen_scene(run={"dir": "run"}, training={"learning_rate": 5e-5})


@case("write access", "fail", "^/proc: a file cannot be made and locked there|^/proc cannot be written to",
      "name another folder")  # fmt: skip
def a_folder_where_nobody_can_write(stage: Stage) -> Scene:
    return seen_scene(run={"output_dir": "/proc/runs", "cache_dir": "cache"})


@case("clock", "warn", "are made 3,600 s late", "timedatectl set-ntp on")
def a_disk_that_is_an_hour_late(stage: Stage) -> Scene:
    stage.patch.setattr(places, "file_time", lambda path: path.stat().st_mtime - 3600)
    return seen_scene()


@case("limits", "warn", r"256 open files at most \(ulimit -n\)", "ulimit -n 4096")
def few_open_files(stage: Stage) -> Scene:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    stage.leaving.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
    return seen_scene()


@case("shared memory", "warn", "0.0 MB free in nowhere, for 2 ranks", "start the container with --shm-size=16g")
def no_shared_memory(stage: Stage) -> Scene:
    stage.patch.setattr(machine, "SHM", Path("nowhere"))
    return seen_scene()


@case("port", "fail", r"MASTER_PORT in the environment is \d+, and another program listens there", "unset MASTER_PORT")
def a_port_where_somebody_listens(stage: Stage) -> Scene:
    listener = stage.leaving.enter_context(socket.create_server(("127.0.0.1", 0)))
    stage.patch.setenv("MASTER_PORT", str(listener.getsockname()[1]))
    return seen_scene()


@case("packages", "fail", "flash-attn is not installed", 'pip install "flash-attn>=2.8"')
def a_package_that_is_not_there(stage: Stage) -> Scene:
    return seen_scene(model={"attention": "flash_attention_2", "precision": "bf16"})


@case("GPUs", "fail", "launch.num_gpus is 3, and 2 GPUs are visible here", "lower it, or look at CUDA_VISIBLE_DEVICES")
def more_ranks_than_gpus(stage: Stage) -> Scene:
    stage.gpus(2)
    return seen_scene(launch={"num_gpus": 3})


@case("GPU memory", "warn", r"GPU 0: 42.5 GB of 85.9 GB free; python \(4242\) holds 41.9 GB", "CUDA_VISIBLE_DEVICES")
def a_gpu_that_another_program_uses(stage: Stage) -> Scene:
    stage.gpus(2, free=40500, at_work="4242, python, 40000")
    return seen_scene()


@case("W&B", "fail", r"http://127.0.0.1:\d+ does not know this key \(401\)", "wandb login, or export WANDB_API_KEY")
def a_key_that_is_not_known(stage: Stage) -> Scene:
    stage.patch.setenv("WANDB_API_KEY", SECRET)
    stage.patch.setenv("WANDB_BASE_URL", stage.leaving.enter_context(server(401)))
    return seen_scene(tracking={"wandb": {"enabled": True}})


@case("sources", "fail", r"(?s)phases.one.sources: .*nowhere.jsonl.*\n.*phases.two.eval_sources: .*gone.jsonl", AGAIN)
def two_files_that_are_not_there(stage: Stage) -> Scene:
    return seen_scene(phases=[{**PHASES[0], "sources": "nowhere.jsonl"}, {**PHASES[1], "eval_sources": "gone.jsonl"}])


@case("tokenizer", "fail", "this tokenizer does not say which token ends a document", "set model.eos_token to one of")
def a_tokenizer_without_an_end(stage: Stage) -> Scene:
    Path("tokenizer.json").write_bytes(TOKENIZER.read_bytes())
    return seen_scene(model={"tokenizer": "tokenizer.json"})


@case("base", "fail", "some/model: not in the hub's cache, and the hub cannot be reached", AGAIN)
def a_base_of_the_hub_without_a_network(stage: Stage) -> Scene:
    stage.patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return seen_scene(model={"name": "some/model", "from_config": None})


@case("vocabulary", "fail", r"tokenizer.json has ids up to 4095, and the model 100 rows in its embedding",
      "take the tokenizer of the model")  # fmt: skip
def a_base_with_fewer_rows_than_ids(stage: Stage) -> Scene:
    return seen_scene(model={"from_config": SHAPE | {"vocab_size": 100}})


@case("positions", "fail", "one: rows of 64 tokens, and the model has 32 positions, which is all there are",
      "--set data.max_tokens=32")  # fmt: skip
def rows_longer_than_a_table_of_positions(stage: Stage) -> Scene:
    return seen_scene(model={"from_config": {"model_type": "gpt2", "vocab_size": 4096, "n_positions": 32}})


@case("heads", "fail", "4 attention heads cannot share 3 key-value heads", "num_key_value_heads must divide")
def heads_that_do_not_divide(stage: Stage) -> Scene:
    return seen_scene(model={"from_config": SHAPE | {"num_key_value_heads": 3}})


@case("memory", "fail", r"one: .*does not fit: .* are needed of the GPU", "a smaller model|--set")
def a_gpu_that_is_too_small(stage: Stage) -> Scene:
    stage.gpus(2, total=16, free=16)
    return seen_scene()


@case("host memory", "warn", r"one: .* for 2 ranks, 0.0 MB available", "fewer ranks on this machine")
def a_host_without_memory(stage: Stage) -> Scene:
    stage.patch.setattr(machine, "available_bytes", lambda: 1)
    return seen_scene()


@case("optimizer", "fail", r"one: training.optimizer: the Trainer knows no 'adamw_toch'; did you mean adamw_torch",
      "--set training.optimizer=adamw_torch_fused")  # fmt: skip
def an_optimizer_that_nobody_knows(stage: Stage) -> Scene:
    return seen_scene(training={"optimizer": "adamw_toch"})


@case("merge memory", "fail", r"of the host, does not fit", "--set merge.enabled=false, and `phased-cpt merge`")
def a_host_too_small_for_the_merge(stage: Stage) -> Scene:
    stage.patch.setattr(hardware, "host_memory", lambda: 1)
    return seen_scene()


@case("data", "fail", r"^a\.jsonl:2: ", ".")
def a_line_that_is_no_json(stage: Stage) -> Scene:
    Path("a.jsonl").write_text('{"text": "one"}\n{"text": two}\n')
    return seen_scene()


@case("rows", "warn", r"one: 1 row is all it has, and a step takes 4", "give it more documents")
def fewer_rows_than_a_step_takes(stage: Stage) -> Scene:
    Path("a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    return seen_scene()


@case("disk", "fail", r": .* of 0.0 MB free \(most of it ", "make room, another run.output_dir")
def a_disk_that_is_full(stage: Stage) -> Scene:
    stage.patch.setattr(places, "free_bytes", lambda place: 0)
    return seen_scene()


def without_torch(stage: Stage) -> Scene:
    """An installation that is damaged, for every process that is started."""
    Path("broken/torch").mkdir(parents=True)
    Path("broken/torch/__init__.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    stage.patch.setenv("PYTHONPATH", str(Path("broken").resolve()))
    return seen_scene()


case("torch", "fail", "torch and transformers cannot be loaded: ImportError: libcudart.so.12", "install them anew")(
    without_torch
)
case("collective", "fail", r"(?s)rank \d ended with exit code 1.*libcudart.so.12: cannot open", AGAIN)(without_torch)


@functools.cache
def the_wrong_model() -> Scene:
    """Torch is asked once."""
    layers = ["query_key_value", "dense"]
    return seen_scene(model={"attention": "flash_attention_2", "precision": "bf16"}, lora={"target_modules": layers})


def wrong_model(stage: Stage) -> Scene:
    return the_wrong_model()


case("adapter targets", "fail", "one: the architecture has no query_key_value, dense",
     "--set lora.target_modules=auto, or some of: down_proj gate_proj")(wrong_model)  # fmt: skip
case(
    "attention",
    "fail",
    "flash_attention_2 cannot be used: FlashAttention2 has been toggled on",
    "--set model.attention=auto",
)(wrong_model)


@case("compiler", "warn", "there is no C\\+\\+ compiler, and DeepSpeed may want one for the offload of one",
      "apt-get install g\\+\\+, or set CXX")  # fmt: skip
def an_offload_without_a_compiler(stage: Stage) -> Scene:
    stage.patch.setenv("PATH", "/nowhere")
    return seen_scene(training={"deepspeed": "zero2_offload"})


# The table is run --------------------------------------------------------------------------------------------------------


def test_every_check_has_a_case() -> None:
    assert set(CASES) == set(CHECKS)


@pytest.mark.requirement("P-03")
@pytest.mark.parametrize("name", CHECKS)
def test_each_check_finds_what_is_wrong_and_says_what_to_do(
    name: str, stage: Stage, good: dict[str, list[Seen]]
) -> None:
    wanted = CASES[name]
    found = list(seen_by(CHECKS[name], wanted.scene(stage)))
    assert [each.verdict for each in found if _matches(each, wanted)] == [wanted.verdict], found
    assert not any(_matches(each, wanted) for each in good[name]), "the control"
    assert not any(SECRET in each.found + each.fix for each in found)


@pytest.mark.parametrize("name", CHECKS)
def test_a_run_with_nothing_wrong_fails_nowhere(name: str, good: dict[str, list[Seen]]) -> None:
    assert {each.verdict for each in good[name]} <= {"ok", "skip"} | ({"warn"} if name == "GPUs" else set()), name
    assert all(each.fix == "" for each in good[name] if each.verdict in ("ok", "skip"))


def _matches(seen: Seen, wanted: Case) -> bool:
    return bool(
        seen.verdict == wanted.verdict and re.search(wanted.found, seen.found) and re.search(wanted.fix, seen.fix)
    )
