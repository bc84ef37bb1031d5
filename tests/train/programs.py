"""What the tests of this room run in ranks: the worker's own PhaseRun with a real DeepSpeed engine, on rows made here.

pytest ─ specs, as JSON ─→ forked ranks: load, train, gather ─→ what was told, what each step saw, the weights in a file

A spec is a dict: `labels` of each row (64 tokens), sections of a configuration over TINY, and what is to go wrong.
"""

import contextlib
import gc
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from phased_cpt import deepspeed_file, worker
from phased_cpt.config import from_record
from phased_cpt.data.mixing import seed_of, training_order
from phased_cpt.errors import PhasedCptError
from phased_cpt.evals.heldout import held_out_losses
from phased_cpt.job import Job, Start
from phased_cpt.model.adapter import adapt
from phased_cpt.model.base import load_base
from phased_cpt.model.quiet import quiet
from phased_cpt.plan import make_plan
from phased_cpt.pulse import Beating
from phased_cpt.schedule import Prepared
from phased_cpt.stopping import Stopping
from phased_cpt.train import phase_run
from phased_cpt.train.checks import Learning, leak
from phased_cpt.train.engine import Rank, join, swept
from phased_cpt.train.masters import before_the_engine, masters_of, trained
from phased_cpt.train.trainer import PhaseTrainer
from tests.train.shapes import SHAPE, TOKENS, WORDS, rows_with

Spec = dict[str, Any]

TINY: dict[str, Any] = {
    "run": {"name": "tiny", "seed": 7},
    "model": {"from_config": SHAPE, "tokenizer": "none.json", "precision": "fp32"},
    "lora": {"r": 4, "alpha": 8, "dropout": 0.2, "target_modules": "auto"},
    "data": {"max_tokens": TOKENS, "overlap_tokens": 8},
    "training": {
        "micro_batch_size": 2, "global_batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 1, "weight_decay": 0.1,
    },
    "evaluation": {"every_steps": 2, "micro_batch_size": 2},
    "phases": [{"name": "one", "sources": "none.jsonl", "max_steps": 4}],
}  # fmt: skip


def config_of(spec: Spec) -> dict[str, Any]:
    """TINY, with the sections of the spec merged over it."""
    config = dict(TINY)
    for name in ("run", "model", "lora", "data", "training", "evaluation"):
        config[name] = {**TINY[name], **spec.get(name, {})}
    config["phases"] = [{"name": "one", "sources": "none.jsonl", **spec.get("phase", {"max_steps": 4})}]
    return config


def job_of(spec: Spec, folder: Path, ranks: int) -> Job:
    """What a conductor would order."""
    config = config_of(spec)
    epoch = Prepared(len(spec["labels"]), max(1, sum(spec["labels"])))
    phase = make_plan(from_record(config, "test"), ranks, {"one": epoch}).phase("one")
    zero = {"stage": spec.get("stage", 2), "stage3_param_persistence_threshold": 0, **spec.get("zero", {})}
    content = {"zero_optimization": zero}
    shape = deepspeed_file.ModelShape(hidden_size=32)
    digest = hashlib.sha256(json.dumps(config["model"]).encode()).hexdigest()[:12]
    return Job(
        run_dir=str(folder),
        signature="",
        attempt=1,
        config=config,
        ranks=ranks,
        phase="one",
        fingerprint="",
        prepared={"one": (epoch.blocks, epoch.tokens_trained)},
        train="train",
        evaluated={name: name for name in spec.get("held_out", {"one": [63, 5]})},
        start=Start(str(folder / f"base-{digest}"), config["model"]["from_config"], None, "", ""),
        deepspeed=deepspeed_file.filled(content, phase, shape, name="test.json", on_gpu=False),
    )


class Notes:
    """A listener that keeps what it hears."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.measured: list[dict[str, Any]] = []
        self.told: list[str] = []

    def train(self, line: dict[str, Any]) -> None:
        self.lines.append(line)

    def evaluated(self, line: dict[str, Any]) -> None:
        self.measured.append(line)

    def tell(self, message: str) -> None:
        self.told.append(message)


class Bench(phase_run.PhaseRun):
    """The worker's run, which keeps what each forward of the training saw, and goes wrong where it is told to."""

    spec: Spec
    seen: list[tuple[int, list[int], list[int]]]  # step, places, labels

    def _losses(self, batch: dict[str, Tensor]) -> Tensor:
        losses = super()._losses(batch)
        if "place" in batch:
            places = batch["place"].tolist()
            labels = (batch["labels"] != -100).sum(1).tolist()
            self.seen.append((self.trainer.state.global_step + 1, places, labels))
            if bad := set(places) & set(self.spec.get("not_finite", ())):
                losses = losses * (float("nan") if min(bad) % 2 else float("inf"))
        return losses

    def _begin(self) -> None:
        super()._begin()
        self.evaluations = self._evaluations() if "batches" in self.spec else {}
        if self.rank.number == self.spec.get("moves_base_of_rank"):
            frozen = next(weight for weight in self.model.parameters() if not weight.requires_grad)
            getattr(frozen, "ds_tensor", frozen).data.view(-1)[3] += 1e-3

    def _evaluations(self) -> dict[str, Any]:
        """The same sets in batches of several sizes; one row at a time, without our loss; and what that has left."""
        first = next(module for module in self.model.modules() if not list(module.children()))
        self.model.train()
        first.eval()
        modes, random = [module.training for module in self.model.modules()], torch.get_rng_state()
        found = {}
        for rows in self.spec["batches"]:
            how = {"batch_rows": rows, "rank": self.rank.number, "ranks": self.rank.of, "device": self.device}
            measured = held_out_losses(self.trainer.model_wrapped, self._losses, self.sets, **how)
            found[str(rows)] = {name: [each.loss, each.tokens] for name, each in measured.items()}
        same = modes == [module.training for module in self.model.modules()]
        unmoved = torch.equal(random, torch.get_rng_state())
        with torch.no_grad():
            self.model.eval()
            sums = {name: self._one_by_one(rows) for name, rows in self.sets.items() if self.spec.get("one_by_one")}
            self.model.train()
        return {"found": found, "one by one": sums, "same modes": same, "same random numbers": unmoved}

    def _one_by_one(self, rows: Any) -> tuple[float, float]:
        """The mean loss over the tokens of a set, as anybody would write it; and over its rows, which is another."""
        total, tokens, means = 0.0, 0, []
        for at in range(len(rows)):
            row = {key: values[None] for key, values in rows[at].items()}
            inputs = {"input_ids": row["input_ids"], "position_ids": row["position_ids"]}
            logits = self.trainer.model_wrapped(**inputs, use_cache=False).logits[0, :-1].double()
            loss, labels = float(cross_entropy(logits, row["labels"][0, 1:], reduction="sum")), row["labels"] != -100
            total, tokens = total + loss, tokens + int(labels.sum())
            means.append(loss / max(1, int(labels.sum())))
        return total / tokens, sum(means) / len(means)

    def _evaluate(self) -> Any:
        return {} if self.spec.get("unevaluated") else super()._evaluate()


def phases(specs: list[Spec], folder: str) -> list[dict[str, Any]]:
    """Every spec trained, one after the other; the weights of number n are in <folder>/n.safetensors."""
    gc.freeze()  # what the zygote has imported; else each sweep between phases looks at all of it, for half a second
    quiet()
    rank = join()
    return [_phase(spec, at, Path(folder), rank) for at, spec in enumerate(specs)]


def _phase(spec: Spec, at: int, folder: Path, rank: Rank) -> dict[str, Any]:
    job, notes = job_of(spec, folder, rank.of), Notes()
    blocks = {"train": rows_with(spec["labels"])}
    blocks |= {name: rows_with(spec["held_out"][name], 9) for name in spec.get("held_out", {})}
    blocks.setdefault("one", rows_with([63, 5], 9))
    failed = None
    with swept(), _changed(spec, lambda path: blocks[path.name]):
        phase = job.phase_plan()
        worker._make_base(job, phase, rank, notes)
        run = Bench(
            job, phase, rank, notes, Stopping(), Beating(folder / "pulses", rank.number), contextlib.ExitStack()
        )
        run.spec, run.seen = spec, []
        if spec.get("unevaluated"):
            run.sets = {}
        run.load()
        before = {name: weight.clone() for name, weight in before_the_engine(run.model).items()}
        try:
            run.train()
        except PhasedCptError as error:
            failed = [error.exit_code, str(error)]
        weights = gathered(run.model, keep=True)
        order = run.trainer.train_dataset.order.tolist()
        if rank.first:
            save_file({name: each.contiguous() for name, each in weights.items()}, folder / f"{at}.safetensors")
        unmoved = all(torch.equal(weights[name], each) for name, each in before.items())
        run.tear_down()
    told = {"failed": failed, "seen": run.seen, "unmoved": unmoved, "evaluations": run.evaluations}
    return {
        "lines": notes.lines,
        "measured": notes.measured,
        "told": notes.told,
        "order": order,
        "of_ranks": of_all(told, rank),
    }


@contextlib.contextmanager
def _changed(spec: Spec, open_blocks: Any) -> Iterator[None]:
    """The rows of the page in place of those on disk; and a wrong implementation in place of ours."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(phase_run, "open_blocks", open_blocks))
        for name in spec.get("instead", []):
            stack.enter_context(WRONG[name]())
        yield


def of_all(found: Any, rank: Rank) -> list[Any]:
    """What each rank has found."""
    every: list[Any] = [None] * rank.of
    torch.distributed.all_gather_object(every, found)
    return every


# What others do, and what must not pass -------------------------------------------------------------------------------


def _mean_of_means() -> Any:
    """The mean over a micro batch, and then over micro batches and ranks."""

    def compute_loss(self: Any, model: nn.Module, inputs: Any, *ignored: Any, **ignored_too: Any) -> Tensor:
        self._seed(inputs["place"].tolist()[0])
        self.step_tokens = 1
        tokens = (inputs["labels"] != -100).sum().clamp(min=1)
        return self.losses(inputs).sum() / tokens / self.args.gradient_accumulation_steps

    return mock.patch.object(PhaseTrainer, "compute_loss", compute_loss)


def _unseeded() -> Any:
    """Dropout from one stream of random numbers a rank, as it comes."""
    return mock.patch.object(PhaseTrainer, "_seed", lambda self, place: None)


def _eval_mode_for_all() -> Any:
    """Every module in eval mode, bitsandbytes' too."""

    @contextlib.contextmanager
    def measuring(model: nn.Module) -> Iterator[None]:
        model.eval()
        yield
        model.train()

    return mock.patch("phased_cpt.evals.heldout.measuring", measuring)


def _unchecked() -> Any:
    """Nobody looks at the loss."""
    return mock.patch.object(PhaseTrainer, "_require_finite", lambda self: self._doubtful.clear())


WRONG = {
    "unchecked": _unchecked,
    "mean of means": _mean_of_means,
    "unseeded": _unseeded,
    "eval mode for all": _eval_mode_for_all,
}


# Without DeepSpeed, without the Trainer, without our loss -------------------------------------------------------------


def plain(specs: list[Spec], folder: str) -> list[dict[str, Any]]:
    """The same phases in a loop of plain torch, in one process; the weights are in <folder>/n.safetensors."""
    return [_plain(spec, at, Path(folder)) for at, spec in enumerate(specs)]


def _plain(spec: Spec, at: int, folder: Path) -> dict[str, Any]:
    job = job_of(spec, folder, 1)
    phase, blocks = job.phase_plan(), rows_with(spec["labels"])
    worker._make_base(job, phase, Rank(0, 1), Notes())
    model = _loaded(job, phase)
    schedule, rows, norm = phase.schedule, phase.global_rows, phase.settings.training.max_grad_norm
    assert schedule is not None and rows is not None
    budget = phase.budget.rows(phase.prepared)
    order = training_order(len(blocks), schedule.steps * rows, budget, *phase.data_seed)
    decayed = [weight for name, weight in trained(model) if "norm" not in name]
    others = [weight for name, weight in trained(model) if "norm" in name]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
    losses = []
    for step in range(schedule.steps):
        places = [at for at in range(step * rows, (step + 1) * rows) if order[at] >= 0]
        total = sum(int((blocks[int(order[at])]["labels"] != -100).sum()) for at in places)
        losses.append(0.0)
        size = phase.settings.training.micro_batch_size
        for begin in range(0, len(places), size):
            torch.manual_seed(seed_of("dropout", phase.seed, phase.name, step, places[begin]))
            each = [blocks[int(order[at])] for at in places[begin : begin + size]]
            batch = {key: torch.stack([torch.from_numpy(row[key]) for row in each]) for key in each[0]}  # type: ignore[literal-required]
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
            (loss / total).backward()
            losses[-1] += float(loss.detach()) / total
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        nn.utils.clip_grad_norm_([weight for _, weight in trained(model)], norm or float("inf"))
        optimizer.step()
        optimizer.zero_grad()
    save_file({name: each.detach().contiguous() for name, each in trained(model)}, folder / f"{at}.safetensors")
    return {"losses": losses}


def _loaded(job: Job, phase: Any) -> nn.Module:
    base = load_base(
        Path(job.start.base),
        precision="fp32",
        attention="auto",
        max_tokens=TOKENS,
        storage=None,
        trust_remote_code=False,
        tell=lambda message: None,
    )
    return adapt(base, None, phase.settings.lora, seed_of("adapter", phase.seed, phase.name) % 2**63).train()


# Checks on models alone -----------------------------------------------------------------------------------------------


class WithoutPositions(nn.Module):
    """A model that is told where its documents begin, and does not listen."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool) -> Any:
        return self.model(input_ids=input_ids, use_cache=use_cache)


def _maskless(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **others: Any) -> Any:
    """An attention that is causal and throws away the mask, as kernels do that know of no documents."""
    return sdpa_attention_forward(module, query, key, value, None, **others)


def leaks() -> dict[str, float]:
    """How much of a document leaks into the next, by model and attention."""
    AttentionInterface.register("maskless", _maskless)
    AttentionMaskInterface.register("maskless", sdpa_mask)
    found = {}
    for attention in ("eager", "sdpa", "maskless"):
        for name, model in _models(attention).items():
            found[f"{name}, {attention}"] = leak(model, WORDS, TOKENS, torch.device("cpu"))
    found["llama, deaf"] = leak(WithoutPositions(_models("sdpa")["llama"]), WORDS, TOKENS, torch.device("cpu"))
    return found


def _models(attention: str) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    gpt2 = AutoConfig.for_model("gpt2", vocab_size=WORDS, n_positions=TOKENS, n_embd=32, n_layer=2, n_head=4)
    llama = AutoConfig.for_model(**SHAPE)
    configs = {"llama": llama, "gpt2": gpt2}
    return {
        name: AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        for name, config in configs.items()
    }


class Parts(nn.Module):
    """Some weights that learn, and some that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.forgotten, self.experts = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.forgotten.bias.requires_grad_(False)


def reached() -> list[Any]:
    """What is said of weights without a gradient: of a layer that is not used, and of an expert."""
    model, said = Parts(), []
    for used in (("used",), ("used", "forgotten"), ("used", "forgotten", "experts")):
        learning = Learning(model, {})
        sum(getattr(model, name)(torch.ones(1, 4)).sum() for name in used).backward()
        said.append(_said_by(learning.require_reached))
    return said


def moved(names: dict[str, list[int]], still: list[str], step: int) -> Any:
    """What is said when some weights, given with their shapes, have not moved at a step."""
    model = nn.Module()
    for name, shape in names.items():
        *above, last = name.split(".")
        inner = model
        for part in above:
            if not hasattr(inner, part):
                setattr(inner, part, nn.Module())
            inner = getattr(inner, part)
        setattr(inner, last, nn.Parameter(torch.zeros(shape)))
    learning = Learning(model, dict.fromkeys(names, 1))
    return _said_by(learning.require_moved, {name: 1 if name in still else 2 for name in names}, step)


def _said_by(check: Any, *arguments: Any) -> Any:
    try:
        return check(*arguments)
    except PhasedCptError as error:
        return str(error)


def gathered(model: Any, keep: bool) -> dict[str, Tensor]:
    """Every master on the CPU, for the ranks that keep them. Collective."""
    return {name: master.float().cpu().clone() for name, _, master in masters_of(model) if keep}
