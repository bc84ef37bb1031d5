"""A configuration becomes a plan: every value of every phase, and where it came from. Pure: nothing is read or written.

default ─ the run's section ─ the phase's own          the last one that speaks holds, and is the origin
                └──── --set writes into either ────┘
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from phased_cpt.config import Loaded, Lora, Model, Phase, RunConfig
from phased_cpt.config.inherit import OVERRIDABLE, Settings, settings_of_phases
from phased_cpt.config.read import COMMAND_LINE, Keys, dotted
from phased_cpt.config.schema import Section
from phased_cpt.run_dir import phase_folder
from phased_cpt.schedule import Batch, Budget, Prepared, Schedule, batch_of, share_of

FEW_STEPS = 100  # below this a warm-up is a handful of steps and evaluations every 50 steps hardly happen
LARGE_SCALE = 8  # of an adapter; the learning rates in use are tuned for 2
LARGE_RATE = 5e-3  # of any matrix of an adapter


@dataclass(frozen=True)
class Origin:
    """Where a value came from."""

    kind: str  # default, file, phase or command line
    place: str = ""  # run.yaml:12

    def __str__(self) -> str:
        place = "".join(letter if letter.isprintable() else "?" for letter in self.place)  # it stands in comments
        return place + (" (phase)" if self.kind == "phase" else "") if place else self.kind


@dataclass(frozen=True)
class Start:
    """What a phase starts from: what one before it published, or a base (None: random weights) and maybe an adapter."""

    base: str | None = None
    adapter: str | None = None
    phase: str | None = None
    form: str = "base"  # of what that phase published: its adapter, that merged or frozen below a new one, or a base

    def __str__(self) -> str:
        if self.phase is None:
            return " + ".join(filter(None, (self.base or "random weights", self.adapter)))
        forms = {
            "adapter": f"{self.phase}'s adapter",
            "merged": f"{self.phase}, merged",
            "stacked": f"a fresh adapter on {self.phase}'s",
        }
        return forms.get(self.form, f"the base that {self.phase} trained")

    @property
    def handover(self) -> str:
        """How the phase before has handed over."""
        return {"merged": "merge", "stacked": "stack"}.get(self.form, "continue")


@dataclass(frozen=True)
class PhasePlan:
    """One phase with everything resolved."""

    number: int
    phase: Phase
    model: Model
    seed: int
    settings: Settings
    start: Start
    budget: Budget
    batch: Batch | None  # None while the number of ranks is not known
    prepared: Prepared | None
    origins: Mapping[tuple[str, str], Origin]

    @property
    def name(self) -> str:
        return self.phase.name

    @property
    def folder(self) -> str:
        return phase_folder(self.number, self.phase.name)

    @property
    def fresh_adapter(self) -> bool:
        return self.settings.lora.enabled and (self.settings.from_base or self.settings.stacked)

    @property
    def carries(self) -> bool:
        """It goes on with the optimizer of the phase before."""
        return self.number > 1 and self.settings.training.optimizer_at_start == "carry"

    @property
    def global_rows(self) -> int | None:
        return self.batch.rows if self.batch else self.settings.training.global_batch_size

    @property
    def steps(self) -> int | None:
        return self.budget.steps(self.global_rows, self.prepared)

    @property
    def schedule(self) -> Schedule | None:
        """The learning rate over the whole phase, once its length is known."""
        training, steps = self.settings.training, self.steps
        if steps is None:
            return None
        warmup = training.warmup_steps if training.warmup_steps is not None else share_of(steps, training.warmup_ratio)
        warmup = min(warmup, steps - 1) if self.settings.warms_up else 0  # the last step at least is no warm-up
        decay = min(share_of(steps, training.decay_ratio), steps - warmup) if self.settings.anneals else 0
        cooldown = share_of(steps, training.cooldown_ratio) if self.settings.warms_up else 0
        return Schedule(
            shape=training.lr_scheduler,
            peak=training.learning_rate,
            steps=steps,
            warmup_steps=warmup,
            decay_steps=decay,
            min_ratio=training.min_lr_ratio,
            cooldown_steps=min(cooldown, steps - warmup - decay),
            constant_ratio=training.constant_ratio,
        )

    def sections(self) -> dict[str, Section]:
        """What holds in this phase, by section."""
        return {"model": self.model, **self.overridable()}

    @property
    def data_seed(self) -> tuple[str | int, ...]:
        """What the order of the rows depends on."""
        return ("order", self.seed, self.name)

    @property
    def shuffles(self) -> bool:
        """Whether its rows are still to be put into an order."""
        whole = self.prepared is not None and self.prepared.epochs is not None
        return self.settings.data.shuffle and not whole

    @property
    def positions(self) -> int | None:
        """Places for tokens in all of its steps: what its time is told from."""
        if self.steps is None or self.global_rows is None:
            return None
        return self.steps * self.global_rows * self.settings.data.max_tokens

    def overridable(self) -> dict[str, Section]:
        return {name: getattr(self.settings, name) for name in OVERRIDABLE}

    def values(self, change: str) -> dict[str, Any]:
        """The values of one class of change, flat: recipe is what a phase's fingerprint is made from."""
        found = {
            f"{section}.{key}": value
            for section, values in self.sections().items()
            for key, value in values.model_dump(mode="json").items()
            if change_of(values, key) == change and f"{section}.{key}" not in self._idle()
        }
        if isinstance(targets := found.get("lora.target_modules"), list):
            found["lora.target_modules"] = sorted(targets)  # their order says nothing
        found |= {key: value for key, value in self._own_values().items() if change_of(self.phase, key) == change}
        return found | self._decided(change)

    def _idle(self) -> set[str]:
        """Keys that decide nothing here, because another one rules or stands for them."""
        evaluation = self.settings.evaluation
        idle = {"training.global_batch_size", "training.gradient_accumulation_steps", *self._idle_of_the_rate()}
        idle |= {"evaluation.cooldown_ratio"} if evaluation.patience is None else set()
        idle |= {"data.temperature"} if self.settings.data.temperature == 1 else set()
        idle |= {"data.max_line_bytes"} if self.settings.data.on_bad_record == "fail" else set()
        if not self.settings.lora.enabled:
            idle |= {f"lora.{key}" for key in Lora.model_fields if key != "enabled"} | {"training.lora_plus_ratio"}
        idle |= set() if self.fresh_adapter else {"lora.init"}
        if isinstance(self.model.from_config, str):
            idle |= {"model.from_config"}  # a path may change; what lies there is in the digest of the base
        return idle

    def _idle_of_the_rate(self) -> set[str]:
        """Those of the learning rate, of which each shape has its own."""
        training, evaluation = self.settings.training, self.settings.evaluation
        ends, infinite = self.settings.anneals, training.lr_scheduler == "infinite"
        cools = evaluation.patience is not None and evaluation.cooldown_ratio > 0
        decides = {
            "warmup_ratio": self.settings.warms_up and training.warmup_steps is None,
            "warmup_steps": self.settings.warms_up and training.warmup_steps is not None,
            "decay_ratio": ends and training.lr_scheduler in ("wsd", "infinite"),
            "cooldown_ratio": infinite and self.settings.warms_up,
            "constant_ratio": infinite,
            "min_lr_ratio": ends and (training.lr_scheduler != "constant" or cools),
        }
        return {f"training.{key}" for key, does in decides.items() if not does}

    def _decided(self, change: str) -> dict[str, Any]:
        """What several keys decide together: the budget that rules, the batch in rows, and how it is made up."""
        if change == "recipe":
            budget = {"run.seed": self.seed, "budget": f"{self.budget.amount!r} {self.budget.unit}"}
            budget["handover"] = self.start.handover  # that of the phase before: it decides what this one begins with
            if self.settings.training.lr_scheduler == "infinite":  # which the phases around it decide
                budget |= {"training.warms_up": self.settings.warms_up, "training.anneals": self.settings.anneals}
            return budget | ({"training.global_batch_size": self.global_rows} if self.global_rows else {})
        if change == "execution" and self.batch:
            return {"training.gradient_accumulation_steps": self.batch.accumulation, "ranks": self.batch.ranks}
        return {}

    def _own_values(self) -> dict[str, Any]:
        values = self.phase.model_dump(mode="json", exclude={*OVERRIDABLE, "max_steps", "tokens", "epochs", "handover"})
        for key in ("sources", "eval_sources"):  # their paths may change; what is in them is fingerprinted
            values[key] = [{"split": source["split"], "weight": source["weight"]} for source in values[key]]
        return values


@dataclass(frozen=True)
class Plan:
    """The resolved run."""

    config: RunConfig
    phases: tuple[PhasePlan, ...]
    places: Mapping[Keys, str]

    @property
    def name(self) -> str:
        return self.config.run.name

    def origin(self, *keys: str | int) -> Origin:
        """Where a value of the run came from."""
        return _origin(self.places.get(keys), "file")

    def phase(self, name: str) -> PhasePlan:
        return {phase.name: phase for phase in self.phases}[name]

    def without_run_dir(self) -> "Plan":
        """The same plan without the folder that it was called on: what lies in the folder does not name it."""
        run = self.config.run.model_copy(update={"dir": None})
        places = {keys: place for keys, place in self.places.items() if keys != ("run", "dir")}
        return replace(self, config=self.config.model_copy(update={"run": run}), places=places)

    def smoke(self, steps: int) -> "Plan":
        """The same run with a few steps in every phase, each of them evaluated."""
        phases = [
            replace(
                phase,
                budget=Budget("steps", steps),
                settings=replace(
                    phase.settings, evaluation=phase.settings.evaluation.model_copy(update={"every_steps": 1})
                ),
            )
            for phase in self.phases
        ]
        return replace(self, phases=tuple(phases))

    def warnings(self) -> list[str]:
        """What is allowed and yet worth a second look; a warning that several phases share is given once."""
        found: dict[str, list[str]] = {}
        for phase in self.phases:
            for warning in _warnings(phase):
                found.setdefault(warning, []).append(phase.name)
        told = [f"{', '.join(names)}: {warning}" for warning, names in found.items()]
        deaf = [keys for keys, place in self.places.items() if place == COMMAND_LINE and self._reaches_no_phase(keys)]
        told += [f"--set {dotted(keys)} reaches no phase: each has its own" for keys in deaf]
        if ("phases",) not in self.places:
            told.insert(0, "no `phases` are given, so these three stand for them; write your own list")
        return told

    def _reaches_no_phase(self, keys: Keys) -> bool:
        section, key = str(keys[0]), str(keys[-1])
        return (
            len(keys) == 2
            and section in OVERRIDABLE
            and all(phase.origins[section, key].kind == "phase" for phase in self.phases)
        )


@dataclass(frozen=True)
class Wanted:
    """Which part of a run a call is to train, and how."""

    redo_from: str | None = None
    first: str | None = None  # --from
    last: str | None = None  # --until
    resume: str | None = None  # the checkpoint to go on from; the newest whole one, if it is not said
    steps_today: int | None = None
    minutes: float | None = None
    smoke: bool = False
    control: bool = False  # the equal-token controls of the phases, too


def make_plan(loaded: Loaded, ranks: int | None = None, prepared: Mapping[str, Prepared] | None = None) -> Plan:
    """Resolve every phase; ranks and the prepared data are None until they are known."""
    config = loaded.config
    ranks = ranks or config.launch.ranks
    phases = [
        _phase_plan(loaded, index, settings, ranks, (prepared or {}).get(config.phases[index].name))
        for index, settings in enumerate(settings_of_phases(config))
    ]
    return Plan(config, tuple(phases), loaded.places)


def change_of(section: Section, key: str) -> str:
    """What a change of a key means for a run that has begun: recipe, execution or bookkeeping."""
    extra = type(section).model_fields[key].json_schema_extra
    return str(extra["change"]) if isinstance(extra, dict) else "recipe"


def _phase_plan(
    loaded: Loaded, index: int, settings: Settings, ranks: int | None, prepared: Prepared | None
) -> PhasePlan:
    config, training = loaded.config, settings.training
    how = training.micro_batch_size, training.gradient_accumulation_steps, training.global_batch_size
    return PhasePlan(
        number=index + 1,
        phase=config.phases[index],
        model=config.model,
        seed=config.run.seed,
        settings=settings,
        start=_start(config, index, settings),
        budget=_budget(config.phases[index]),
        batch=batch_of(ranks, *how) if ranks else None,
        prepared=prepared,
        origins=dict(_origins(loaded, index, settings.born)),
    )


def _start(config: RunConfig, index: int, settings: Settings) -> Start:
    if index == 0:
        return Start(base=config.model.name, adapter=config.model.adapter)
    before = config.phases[index - 1]
    if not settings.from_base:
        return Start(phase=before.name, form="stacked" if settings.stacked else "adapter")
    return Start(phase=before.name, form="merged" if before.handover == "merge" else "base")


def _budget(phase: Phase) -> Budget:
    if phase.max_steps is not None:
        return Budget("steps", phase.max_steps)
    if phase.tokens is not None:
        return Budget("tokens", phase.tokens)
    return Budget("epochs", phase.epochs)


def _origins(loaded: Loaded, index: int, born: int) -> Iterator[tuple[tuple[str, str], Origin]]:
    for section in ("model", *OVERRIDABLE):
        # An adapter that goes on has the values of the phase that began it.
        phases = (index, born) if section == "lora" else (index,)
        for key in type(getattr(loaded.config, section)).model_fields:
            places = (loaded.places.get(("phases", phase, section, key)) for phase in phases)
            own = next(filter(None, places), None)
            yield (section, key), _origin(own, "phase") if own else _origin(loaded.places.get((section, key)), "file")


def _origin(place: str | None, kind: str) -> Origin:
    if place is None:
        return Origin("default")
    return Origin("command line") if place == COMMAND_LINE else Origin(kind, place)


def _warnings(phase: PhasePlan) -> Iterator[str]:
    if phase.phase.gate and phase.phase.gate.on_fail == "retry_with_replay" and phase.phase.replay is not None:
        yield "gate.on_fail is retry_with_replay, and it replays already: where its gate stays closed, the run stops"
    training, steps, every = phase.settings.training, phase.steps, phase.settings.evaluation.every_steps
    if steps is not None and steps < FEW_STEPS:
        more = "a larger budget" if phase.budget.unit == "steps" else "a smaller batch or a larger budget"
        yield f"fewer than {FEW_STEPS} optimizer steps; {more} would give more"
    if steps is not None and steps < every:
        yield f"evaluation.every_steps is {every}, longer than the phase: evaluated at the ends of its epochs only"
    if steps is not None and (training.warmup_steps or 0) >= steps and phase.settings.warms_up:
        yield f"training.warmup_steps is {training.warmup_steps}, longer than the phase; it is cut to all steps but one"
    budgets = [key for key in ("max_steps", "tokens", "epochs") if key in phase.phase.model_fields_set]
    if len(budgets) > 1:
        yield f"{budgets[0]} is its budget, so {' and '.join(budgets[1:])} is not used"
    lora = phase.settings.lora
    if lora.enabled and lora.scale > LARGE_SCALE:
        yield f"the adapter is scaled by {lora.scale:.4g} (alpha / {'sqrt(r)' if lora.use_rslora else 'r'}); 2 is usual"
    rate = training.learning_rate * (training.lora_plus_ratio or 1)
    if lora.enabled and training.lora_plus_ratio and rate > LARGE_RATE:
        yield f"B learns at {rate:g} (learning_rate × lora_plus_ratio); above {LARGE_RATE:g} few models learn"
    if phase.fresh_adapter and lora.init == "orthogonal" and phase.model.precision != "fp32":
        what = f"in {phase.model.precision} an orthogonal adapter begins as about 1 % of the weights, not as nothing"
        yield f"lora.init: {what}; default and gaussian do"
    data = phase.settings.data
    if 2 * data.overlap_tokens > data.max_tokens and data.chunk_long_samples:
        what = f"data.overlap_tokens is {data.overlap_tokens} of max_tokens {data.max_tokens}"
        yield f"{what}, so that long documents are mostly read again as context; max_tokens / 16 is usual"
    if phase.number == 1 and phase.settings.lora.enabled and phase.model.from_config is not None:
        yield "an adapter on random weights learns little; let a phase before train every weight (lora.enabled: false)"
    if training.global_batch_size and phase.origins["training", "gradient_accumulation_steps"].kind != "default":
        yield "training.global_batch_size rules, so gradient_accumulation_steps is not used as given"
