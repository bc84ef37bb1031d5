"""The base, its tokenizer and its shape: whether they belong together, and what an adapter would find in it."""

from collections.abc import Iterator
from typing import Any

from phased_cpt import fitting
from phased_cpt.bases import Base
from phased_cpt.config.allowed import nearest
from phased_cpt.plan import PhasePlan
from phased_cpt.preflight.hub import RemoteBase
from phased_cpt.preflight.scene import Scene
from phased_cpt.preflight.seen import Seen, fail, ok, skip, warn
from phased_cpt.run_dir import in_bytes

# Their places are rows of a table, so there are no others; the rest turn by an angle, and only grow worse.
LEARNED_POSITIONS = ("gpt2", "gpt_neo", "gpt_bigcode", "openai-gpt", "opt", "biogpt", "xglm")
NOT_STRETCHED = ("default", "mrope")


def base(scene: Scene) -> Iterator[Seen]:
    """Its files, and the adapter's, are here or can be had; nothing large is downloaded."""
    found, model = scene.base.made(), scene.plan.config.model
    if isinstance(found, RemoteBase):
        what = (
            f"{model.name}, commit {(found.commit or '')[:12]}: the run downloads {in_bytes(found.to_download)} first"
        )
        yield warn(what, f"hf download {model.name}, where the network is faster or the GPUs are not waiting")
    elif found.shape is not None:
        yield ok(f"random weights of {found.shape.get('model_type', 'an unnamed architecture')}")
    else:
        where = f"commit {found.commit[:12]} in the hub's cache" if found.commit else found.folder
        adapter = f", with the adapter {found.adapter}" if found.adapter else ""
        yield ok(f"{model.name}: {in_bytes(found.size_bytes)}, {where}{adapter}")


def tokenizer(scene: Scene) -> Iterator[Seen]:
    """It can be read, and says what ends a document."""
    found = scene.tokenizer.made()
    yield ok(f"{found.name}: {found.vocabulary:,} ids; documents end with {found.eos} ({found.eos_id})")


def vocabulary(scene: Scene) -> Iterator[Seen]:
    """Each id has a row in the embedding, and both mean the same end of a text."""
    scene.vocabulary.made()
    config, found = _text_model(scene.base.given()), scene.tokenizer.given()
    ends = config.get("eos_token_id")
    stops = ends if isinstance(ends, list) else [ends]
    rows = config.get("vocab_size")
    if found.pad_id >= (rows or found.pad_id + 1):
        yield fail(
            f"the padding token is id {found.pad_id}, and the embedding has {rows} rows", "set another pad_token"
        )
    elif ends is not None and found.eos_id not in stops and scene.plan.config.model.from_config is None:
        what = f"documents end with id {found.eos_id} ({found.eos}), and config.json says eos_token_id {ends}"
        yield warn(what, "--set model.eos_token=TOKEN, the one that the model was trained with")
    else:
        yield ok(f"{found.vocabulary:,} ids for {rows if rows is None else f'{rows:,}'} rows of the embedding")


def positions(scene: Scene) -> Iterator[Seen]:
    """Rows are no longer than the model has places for, stretched ones counted."""
    config = _text_model(scene.base.given())
    reach, how = _reach(config)
    longest = max(scene.plan.phases, key=lambda phase: phase.settings.data.max_tokens)
    tokens = longest.settings.data.max_tokens
    if reach is None:
        yield skip("config.json names no max_position_embeddings")
    elif tokens <= reach:
        yield ok(f"rows of {tokens:,} tokens, {reach:,} positions{how}")
    else:
        what = f"{longest.name}: rows of {tokens:,} tokens, and the model has {reach:,} positions{how}"
        fix = f"--set data.max_tokens={reach}"
        if config.get("model_type") in LEARNED_POSITIONS:
            yield fail(f"{what}, which is all there are", fix)
        else:
            yield warn(f"{what}; it has never seen the others", f"{fix}, or rope_parameters in its config.json")


def heads(scene: Scene) -> Iterator[Seen]:
    """What must divide; ranks share no rows, so the length of one need not."""
    config = _text_model(scene.base.given())
    asked, keys = config.get("num_attention_heads"), config.get("num_key_value_heads")
    width, head = config.get("hidden_size"), config.get("head_dim")
    if not isinstance(asked, int) or not isinstance(width, int):
        yield skip("config.json names no num_attention_heads")
    elif asked % (keys or asked):
        what = f"{asked} attention heads cannot share {keys} key-value heads"
        yield fail(what, "num_key_value_heads must divide num_attention_heads")
    elif not head and width % asked:
        yield fail(f"hidden_size {width} is no multiple of {asked} heads", "give head_dim, or another number of heads")
    else:
        yield ok(f"{asked} heads of {head or width // asked}, {keys or asked} key-value heads; ranks share no rows")


def adapter_targets(scene: Scene) -> Iterator[Seen]:
    """The layers that are to get an adapter are in the architecture: asked of the model itself, without weights."""
    phases = [phase for phase in scene.plan.phases if phase.fresh_adapter]
    if not phases:
        yield ok("no phase begins a fresh adapter")
        return
    answer = scene.probe.given()
    if answer.get("linears") is None:
        if answer.get("refused") and not scene.base.missing:
            yield fail(f"no model can be made of config.json: {answer['refused']}", "mend config.json, or name another")
        else:
            yield skip("skipped, because the base is missing")
        return
    wanted = {phase.settings.lora.target_modules: phase for phase in phases}
    for targets, phase in wanted.items():
        yield _targets(targets, set(answer["linears"]), phase)


def _targets(targets: str | tuple[str, ...], there: set[str], phase: PhasePlan) -> Seen:
    if isinstance(targets, str):
        return ok(f"all linear layers: {' '.join(sorted(there))}")
    names = {target: target.rpartition(".")[2] for target in targets}
    absent = [target for target, name in names.items() if name not in there]
    if not absent:
        return ok(f"{phase.name}: {' '.join(targets)}")
    what = f"{phase.name}: the architecture has no {', '.join(absent)}{nearest(absent[0], there)}"
    fix = f"--set lora.target_modules=auto, or some of: {' '.join(sorted(there))}"
    if len(absent) == len(targets):
        return fail(what, fix)
    return warn(f"{what} (those are left out in silence)", fix)


def _text_model(base: Base) -> dict[str, Any]:
    """Its config.json; of a model that also sees or hears, the part that reads."""
    config = fitting.config_of(base)
    return config | (config.get("text_config") or {})


def _reach(config: dict[str, Any]) -> tuple[int | None, str]:
    """How many tokens see each other, and by what."""
    positions = config.get("max_position_embeddings") or config.get("n_positions")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    factor = rope.get("factor")
    if not isinstance(positions, int):
        return None, ""
    if kind in NOT_STRETCHED or not isinstance(factor, int | float):
        return positions, ""
    original = rope.get("original_max_position_embeddings") or (positions if kind != "llama3" else None)
    stretched = int(factor * original) if isinstance(original, int) else positions
    return max(positions, stretched), f" ({kind} × {factor:g})"
