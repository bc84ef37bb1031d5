"""What a person sees of prepared data, and the same facts for a program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:  # it loads numpy, which `plan` does without
    from phased_cpt.data.prepare import PreparedPhase, PreparedRun, PreparedSplit
    from phased_cpt.data.tokens import TokenStore

COLUMNS = ("", "phase", "split", "documents", "chunks", "blocks", "trained", "first", "context", "padded", "dropped")
COUNTED = ("documents", "chunks", "blocks", "tokens_trained", "tokens_first", "tokens_context", "tokens_padded")


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
        "phases": [_phase_facts(phase) for phase in run.phases],
        "copies": [copy._asdict() for copy in run.copies()],
    }


def _phase_facts(phase: PreparedPhase) -> dict[str, Any]:
    return {
        "name": phase.plan.name,
        "number": phase.plan.number,
        "splits": {side: _split_facts(split) for side, split in phase.splits.items()},
        "steps": phase.plan.budget.steps(phase.plan.global_rows, phase.epoch),
        "sources": [_store_facts(store) for store in _stores(phase)],
    }


def _split_facts(split: PreparedSplit) -> dict[str, Any]:
    return {
        **asdict(split.index.account),
        "efficiency": round(split.index.account.efficiency, 6),
        "duplicates": split.duplicates,
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


def prepared_table(run: PreparedRun) -> RenderableType:
    """The data on one screen: a row for each side of each phase, then what is worth knowing about the sources."""
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for heading in (*COLUMNS, "full", "copies", "steps", ""):
        table.add_column(heading, justify="left" if heading in ("phase", "split", "") else "right", no_wrap=True)
    for phase in run.phases:
        for side, split in phase.splits.items():
            table.add_row(*_row(phase, side, split))
    title = Text.assemble("tokens of ", (run.tokenizer.name, "bold"), f", documents end with {run.tokenizer.eos}")
    return Group(title, "", table, *_notes(run))


def _row(phase: PreparedPhase, side: str, split: PreparedSplit) -> Iterator[str | Text]:
    account, first = split.index.account, side == "train"
    yield str(phase.plan.number) if first else ""
    yield Text(phase.plan.name if first else "", style="bold cyan")
    yield side
    for name in (*COUNTED, "tokens_dropped"):
        yield f"{getattr(account, name):,}"
    yield f"{account.efficiency:.1%}"
    yield f"{split.duplicates:,}"
    yield _steps(phase) if first else ""
    yield Text(_how(split), style="dim")


def _how(split: PreparedSplit) -> str:
    if split.cached:
        return "from the cache"
    speed = split.megabytes_per_second
    return f"{split.seconds:.1f} s" + (f", {speed:,.0f} MB/s by {split.backend}" if speed else "")


def _steps(phase: PreparedPhase) -> str:
    """Known once the batch is."""
    steps = phase.plan.budget.steps(phase.plan.global_rows, phase.epoch)
    return "?" if steps is None else f"{steps:,}"


def _notes(run: PreparedRun) -> Iterator[RenderableType]:
    told = {
        "bad": "bad records left out",
        "left_out": "left out by data.where",
        "empty": "empty texts",
        "special_texts": "with the text of a special token, kept as text (data.parse_special_tokens reads it as one)",
        "nul_texts": "with NUL characters",
        "slow_documents": "tokenised by the reference, to be sure",
    }
    stores = {store.folder: store for phase in run.phases for store in _stores(phase)}
    for store in stores.values():
        counts = [f"{store.facts[name]:,} {what}" for name, what in told.items() if store.facts[name]]
        if counts:
            yield Text(f"{store.name}: {'; '.join(counts)}", style="dim")
        for problem in store.facts["problems"]:
            yield Text(f"  left out: {problem}", style="yellow")
    for phase in run.phases:
        if shortened := phase.train.index.account.documents_shortened:
            what = f"{shortened:,} documents were shortened to {phase.plan.settings.data.max_tokens:,} tokens"
            yield Text.assemble(("careful: ", "bold yellow"), f"{phase.plan.name}: {what} (data.chunk_long_samples)")
        if phase.eval is None:
            yield Text(f"{phase.plan.name}: nothing is held out, so nothing can be measured", style="yellow")
    for copy in run.copies():
        yield Text.assemble(("careful: " if copy.leaks else "", "bold yellow"), str(copy))
