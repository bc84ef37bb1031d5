"""What a person sees of prepared data, and the same facts for a program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # it loads numpy, which `plan` does without
    from phased_cpt.data.prepared import Drawn, PreparedPhase, PreparedRun, PreparedSplit
    from phased_cpt.data.tokens import TokenStore

SHARE_POINT = 0.001  # how far a share may lie from the planned one without a word
COLUMNS = ("", "phase", "split", "documents", "chunks", "blocks", "trained", "first", "context", "padded", "dropped")
LEGEND = (
    "first: nothing predicts it · context: seen again, not trained · full: positions that are no padding · "
    "copies: exact ones on the same side"
)
TOLD = {
    "bad": "bad records left out",
    "left_out": "left out by data.where",
    "empty": "empty texts",
    "special_texts": "with the text of a special token, kept as text (data.parse_special_tokens)",
    "nul_texts": "with NUL characters",
    "silent": "in which the assistant says nothing, so that nothing of them is trained",
    "slow_documents": "tokenised by the reference, to be sure",
}


def prepared_facts(run: PreparedRun) -> dict[str, Any]:
    """The data for a program: `.phases[].splits.train.tokens_trained`."""
    tokenizer = run.tokenizer
    return {
        "tokenizer": {
            "name": tokenizer.name,
            "vocabulary": tokenizer.vocabulary,
            "eos_token": tokenizer.eos,
            "eos_id": tokenizer.eos_id,
            "digest": tokenizer.digest,
        },
        "phases": [phase_facts(run, phase) for phase in run.phases],
        "copies": [copy._asdict() for copy in run.copies()],
    }


def phase_facts(run: PreparedRun, phase: PreparedPhase) -> dict[str, Any]:
    """One phase of it, as its folder keeps it."""
    return {
        "name": phase.plan.name,
        "number": phase.plan.number,
        "splits": {side: _split_facts(run, phase, side) for side in phase.splits},
        "steps": phase.plan.budget.steps(phase.plan.global_rows, phase.epoch),
        "whole_phase": bool(phase.train.parts),  # its train split is all that is trained, and else an epoch of it
        "replay": [{"phase": each.phase, **_drawn(each)} for each in phase.train.replayed(phase.plan.name)],
        "mixture": [{"source": each.source, **_drawn(each)} for each in _own(phase)],
        "sources": [_store_facts(store) for store in _stores(phase)],
    }


def _own(phase: PreparedPhase) -> list[Drawn]:
    return [each for each in phase.train.drawn(phase.plan.name) if each.phase == phase.plan.name]


def _drawn(each: Drawn) -> dict[str, Any]:
    """All the shares of a phase together are 1."""
    return {
        "planned_share": round(each.planned, 6),
        "share": round(each.share, 6),
        "tokens": each.tokens,
        "epochs": round(each.epochs, 4),
    }


def _split_facts(run: PreparedRun, phase: PreparedPhase, side: str) -> dict[str, Any]:
    split = phase.splits[side]
    return {
        **asdict(split.index.account),
        "efficiency": round(split.index.account.efficiency, 6),
        "duplicates": run.duplicates(phase.plan.name, side),
        "tokenizer_backend": split.backend,
        "seconds": round(split.seconds, 3),
        "mb_per_second": split.megabytes_per_second,
        "cached": split.cached,
    }


def _stores(phase: PreparedPhase) -> list[TokenStore]:
    stores = [store for split in phase.splits.values() for store in split.stores]
    return list({store.name: store for store in stores}.values())


def _store_facts(store: TokenStore) -> dict[str, Any]:
    return {"path": store.name, "folder": str(store.folder), **store.facts}


def trained_tokenizer(facts: dict[str, Any]) -> str:
    """What came of `tokenizer train`, in a line."""
    read = f"{facts['documents']:,} documents ({facts['bytes'] / 1e6:,.1f} MB)"
    found = f"{facts['vocabulary']:,} entries from {read}, {facts['bytes_per_token']:.2f} bytes a token"
    return f"{facts['output']}: {found}, {facts['seconds']:.1f} s\n"


def combined_table(facts: dict[str, Any]) -> RenderableType:
    """What `dataset combine` has written, a row a source."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("source", "weight", "records there", "records", "passes", "planned", "share"):
        table.add_column(heading, justify="left" if heading == "source" else "right")
    for each in facts["sources"]:
        shares = (f"{each['planned_share']:.2%}", f"{each['share']:.2%}")
        counts = (f"{each['records_there']:,}", f"{each['records']:,}", f"{each['passes']:.2f}")
        table.add_row(each["source"], f"{each['weight']:g}", *counts, *shares)
    title = f"{facts['output']}: {facts['records']:,} records, {facts['bytes'] / 1e6:,.1f} MB, seed {facts['seed']}"
    return Group(title, "", table)


def prepared_table(run: PreparedRun) -> RenderableType:
    """The data on one screen: a row for each side of each phase, its sources, and what is worth knowing about them."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    masks = any(split.index.account.tokens_masked for phase in run.phases for split in phase.splits.values())
    for heading in (*COLUMNS, *["masked"] * masks, "full", "copies", "steps", "made"):
        table.add_column(heading, justify="left" if heading in ("phase", "split", "made") else "right", no_wrap=True)
    for phase in run.phases:
        for side in phase.splits:
            table.add_row(*_row(run, phase, side, masks))
    title = Text.assemble("tokens of ", (run.tokenizer.name, "bold"), f", documents end with {run.tokenizer.eos}")
    legend = LEGEND + " · masked: not said by the assistant" * masks
    return Group(title, "", table, Text(legend, style="dim"), "", _sources(run), *_mixtures(run), *_notes(run))


def _mixtures(run: PreparedRun) -> Iterator[RenderableType]:
    """Where the tokens of a phase come from, if from several sources."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("phase", "draws from", "planned", "share", "tokens", "passes"):
        table.add_column(heading, justify="left" if heading in ("phase", "draws from") else "right")
    for phase in run.phases:
        own, old = _own(phase), phase.train.replayed(phase.plan.name)
        names = [each.source for each in own] + [f"{each.phase} (replay)" for each in old]
        for name, each in zip(names, own + old, strict=True) if len(names) > 1 or old else ():
            figures = (f"{each.planned:.2%}", f"{each.share:.2%}", f"{each.tokens:,}", f"{each.epochs:.2f}")
            table.add_row(Text(phase.plan.name, style="bold cyan"), name, *figures)
    if table.row_count:
        yield from ("", table)


def _row(run: PreparedRun, phase: PreparedPhase, side: str, masks: bool) -> Iterator[str | Text]:
    split = phase.splits[side]
    account, first = split.index.account, side == "train"
    yield str(phase.plan.number) if first else ""
    yield Text(phase.plan.name if first else "", style="bold cyan")
    yield side
    yield f"{account.documents:,}"
    yield f"{account.chunks:,}"
    yield f"{account.blocks:,}"
    yield f"{account.tokens_trained:,}"
    yield f"{account.tokens_first:,}"
    yield f"{account.tokens_context - account.tokens_repeated:,}"  # what is trained again is in `trained`
    yield f"{account.tokens_padded:,}"
    yield f"{account.tokens_dropped:,}"
    if masks:
        yield f"{account.tokens_masked:,}"
    yield f"{account.efficiency:.1%}"
    yield f"{run.duplicates(phase.plan.name, side):,}"
    yield _steps(phase) if first else ""
    yield Text(_how(split), style="dim")


def _how(split: PreparedSplit) -> str:
    if split.cached:
        return "from the cache"
    speed = split.megabytes_per_second
    shown = speed is not None and speed >= 10  # of a small source it is the start that is measured
    return f"{split.seconds:.1f} s" + (f", {speed:,.0f} MB/s by {split.backend}" if shown else f" by {split.backend}")


def _steps(phase: PreparedPhase) -> str:
    """Known once the batch is."""
    steps = phase.plan.budget.steps(phase.plan.global_rows, phase.epoch)
    return "?" if steps is None else f"{steps:,}"


def _sources(run: PreparedRun) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for heading in ("source", "files", "documents", "tokens", "MB", ""):
        table.add_column(heading, justify="left" if heading in ("source", "") else "right")
    for store in {store.folder: store for phase in run.phases for store in _stores(phase)}.values():
        facts = store.facts
        figures = (facts["files"], facts["documents"], facts["tokens"])
        notes = "; ".join(f"{facts[name]:,} {what}" for name, what in TOLD.items() if facts.get(name))
        table.add_row(
            store.name, *(f"{figure:,}" for figure in figures), f"{facts['bytes'] / 1e6:,.1f}", Text(notes, style="dim")
        )
    return table


def _notes(run: PreparedRun) -> Iterator[RenderableType]:
    for store in {store.folder: store for phase in run.phases for store in _stores(phase)}.values():
        for problem in store.facts["problems"]:
            yield Text(f"left out: {problem}", style="yellow")
    if any(_steps(phase) == "?" for phase in run.phases):
        yield Text(
            "? steps: they follow from the number of GPUs; launch.num_gpus, or --set launch.num_gpus=8", style="dim"
        )
    for phase in run.phases:
        if phase.train.parts and phase.plan.budget.unit == "steps" and phase.plan.global_rows is None:
            what = "its rows are counted for one GPU; launch.num_gpus says for how many"
            yield Text(f"{phase.plan.name}: {what}", style="dim")
        for warning in _warnings(run, phase):
            yield Text.assemble(("careful: ", "bold yellow"), f"{phase.plan.name}: {warning}")
    for copy in run.copies():
        yield Text.assemble(("careful: " if copy.leaks else "", "bold yellow"), str(copy))


def _warnings(run: PreparedRun, phase: PreparedPhase) -> Iterator[str]:
    """What is allowed, and yet worth a second look."""
    data, train = phase.plan.settings.data, phase.train.index.account
    if train.documents_shortened:
        what = f"{train.documents_shortened:,} documents were shortened to {data.max_tokens:,} tokens"
        yield f"{what}; data.chunk_long_samples: true trains all of them"
    if train.tokens_first > train.documents and train.tokens_first > 0.01 * train.tokens_source:
        what = f"{train.tokens_first / train.tokens_source:.1%} of the tokens are first in a window and not trained"
        yield f"{what}; data.overlap_tokens: 1 gives all but the first of each document something before them"
    if (copies := run.duplicates(phase.plan.name, "train")) > 0.1 * train.documents:
        yield f"{copies:,} of {train.documents:,} training documents are copies of others"
    yield from _off_the_plan(phase)
    if phase.eval is None:
        yield "nothing is held out, so nothing can be measured; give it eval_sources, or more documents"
        return
    held = phase.eval.index.account.tokens_source
    share = held / (held + train.tokens_source)
    if not phase.plan.phase.eval_sources and not phase.train.parts and share > 3 * data.eval_share:
        what = f"{share:.0%} of the tokens are held out (data.eval_share is {data.eval_share:g} of the documents)"
        yield f"{what}; a lower data.eval_max_tokens holds out less"


def _off_the_plan(phase: PreparedPhase) -> Iterator[str]:
    """Shares that so few tokens cannot hold."""
    own, old = _own(phase), phase.train.replayed(phase.plan.name)
    by_source = sum(part.phase == phase.plan.name for part in phase.train.parts) == len(own)
    for each in (own if by_source else []) + old if phase.train.parts else []:
        if abs(each.share - each.planned) > SHARE_POINT:
            what = f"{each.share:.2%} of its {phase.train.index.account.tokens_trained:,} tokens are of {each.source}"
            yield f"{what}, and {each.planned:.2%} were planned; a larger budget comes nearer"
