"""The schema: a sentence and a class for every key, and what editors and the shipped files rely on."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo

from phased_cpt.config import Phase, RunConfig, Source
from phased_cpt.config.allowed import schema
from phased_cpt.config.schema import Gate, Section
from tests.conftest import REPOSITORY

# Keys that nothing reads yet, by the work that will read them. A key leaves this list when its reader lands: the test
# below fails for a key that is read and still listed, and for one that is neither read nor listed.
AWAITED: dict[str, str] = {}
# Keys of a phase that are read for it elsewhere: its sections by inherit.py, its description by people, and how it hands
# over by the phase after it, to which it is the one `before`.
READ_OTHERWISE = {
    "phase.lora",
    "phase.data",
    "phase.training",
    "phase.evaluation",
    "phase.description",
    "phase.handover",
}

# To check a value against another, to show it or to hand it on is no use of it.
NO_USE = ("config/schema.py", "config/rules.py", "config/inherit.py", "tables/plan.py")


def fields(section: type[Section] = RunConfig, path: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key of the schema with its path."""
    for name, field in section.model_fields.items():
        yield f"{path}{name}", field
        for part in parts(field.annotation):
            if isinstance(part, type) and issubclass(part, Section):
                yield from fields(part, f"{path}{name}.")


def parts(annotation: object) -> Iterator[object]:
    """A type and all that it is made of: tuple[Annotated[Source, …], ...] | None holds Source."""
    yield annotation
    for inner in getattr(annotation, "__args__", ()):
        yield from parts(inner)


def test_the_walk_reaches_every_depth() -> None:
    assert {"run.seed", "tracking.wandb.entity", "phases.sources.weight", "phases.lora.r"} <= dict(fields()).keys()


@pytest.mark.parametrize(("path", "field"), [pytest.param(*item, id=item[0]) for item in fields()])
def test_every_key_has_a_sentence_and_a_class(path: str, field: FieldInfo) -> None:
    assert field.description
    assert field.description[0].isupper() or field.description.startswith(("auto", "LoRA"))
    assert field.description.endswith(".")
    assert isinstance(field.json_schema_extra, dict)
    assert field.json_schema_extra["change"] in ("recipe", "execution", "bookkeeping")


@pytest.mark.requirement("C-08")
def test_the_defaults_are_those_that_the_curriculum_was_designed_with() -> None:
    config = RunConfig()
    assert (config.lora.r, config.lora.alpha, config.lora.dropout) == (128, 256, 0.05)
    assert config.lora.target_modules == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    training = config.training
    assert (training.micro_batch_size, training.gradient_accumulation_steps, training.learning_rate) == (1, 6, 1e-4)
    assert (training.lr_scheduler, training.warmup_ratio, training.weight_decay) == ("cosine", 0.03, 0.1)
    assert training.max_grad_norm == 1.0
    assert (config.data.max_tokens, config.data.overlap_tokens) == (32768, 2048)
    assert (config.checkpoint.every_steps, config.checkpoint.keep, config.evaluation.every_steps) == (50, 3, 50)
    phases = [(phase.name, phase.epochs, phase.sources[0].path) for phase in config.phases]
    assert phases == [
        ("foundation", 3, "dataset/phase1_foundation.jsonl"),
        ("evolution", 2, "dataset/phase2_evolution.jsonl"),
        ("pr_mastery", 2, "dataset/phase3_pr_mastery.jsonl"),
    ]


def test_the_schema_that_editors_use_is_the_one_in_force() -> None:
    shipped = json.loads((REPOSITORY / "configs/schema.json").read_text())
    assert shipped == schema(), "run `make schema`"


def test_the_schema_shows_limits_and_sentences() -> None:
    definitions = schema()["$defs"]
    assert definitions["Lora"]["properties"]["r"]["minimum"] == 1
    assert definitions["Training"]["properties"]["max_grad_norm"]["anyOf"][0]["exclusiveMinimum"] == 0
    assert definitions["Phase"]["properties"]["max_steps"]["description"].startswith("Budget in optimizer steps")
    assert definitions["Phase"]["additionalProperties"] is False
    of_sources = definitions["Phase"]["properties"]["sources"]["anyOf"]
    assert [option.get("type", "Source") for option in of_sources] == ["array", "Source", "string"]


def test_every_number_has_a_limit_and_no_limit_is_lost_on_the_way() -> None:
    """pydantic drops a limit that stands behind a validator, or on an optional field, without a word."""
    nodes = [option for section in schema()["$defs"].values() for field in section.get("properties", {}).values()
             for option in [field, *field.get("anyOf", [])]]  # fmt: skip
    numbers = [node for node in nodes if node.get("type") in ("integer", "number")]
    assert len(numbers) > 30
    assert [node for node in numbers if not {"minimum", "exclusiveMinimum"} & node.keys()] == []
    assert "'ge'" not in str(schema())


def test_every_key_is_read_somewhere_or_awaits_its_reader_by_name() -> None:
    own = [path for path, _ in fields() if "." in path and not path.startswith(("phases.", "evaluation.general."))]
    keys = {".".join(path.split(".")[-2:]) for path in own} | {f"gate.{key}" for key in Gate.model_fields}
    keys |= {f"phase.{key}" for key in Phase.model_fields} | {f"source.{key}" for key in Source.model_fields}
    awaited = {key for words in AWAITED.values() for key in words.split()}
    read = _pairs_read(REPOSITORY / "phased_cpt")
    assert sorted(keys - read - awaited - READ_OTHERWISE) == [], "keys that nothing reads: dead options"
    assert sorted(awaited & read) == [], "keys that are read now: take them off the list"
    assert sorted(awaited - keys) == [], "there is no such key"


def _pairs_read(package: Path) -> set[str]:
    """`training.learning_rate` wherever it is written so."""
    files = [file for file in package.rglob("*.py") if str(file.relative_to(package)) not in NO_USE]
    trees = [ast.parse(file.read_text()) for file in files]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    owners = ((node, node.value) for node in nodes)
    return {f"{getattr(owner, 'attr', getattr(owner, 'id', ''))}.{node.attr}" for node, owner in owners}
