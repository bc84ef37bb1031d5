"""What each phase was trained on, what became of every token of it, and what that took."""

from collections.abc import Iterator
from typing import Any

from phased_cpt.report.folder import Facts, Folder, FoundPhase
from phased_cpt.report.logs import number
from phased_cpt.report.written import change, lasted, loss, perplexity, share, whole

# Where the positions of a phase's rows went, as a bar: (key of the account, class of the colour, word).
PARTS = (
    ("tokens_trained", "trained", "trained"),
    ("tokens_first", "first", "first, nothing predicts it"),
    ("tokens_masked", "masked", "not said by the assistant"),
    ("tokens_context", "context", "context, seen again"),
    ("tokens_padded", "padded", "padding"),
)


def gains(folder: Folder) -> Facts:
    """Held-out loss and perplexity of each phase's own documents, before and after it."""
    return {"rows": [_gain(phase) for phase in folder.phases if phase.start or phase.end]}


def _gain(phase: FoundPhase) -> Facts:
    before, after = number(phase.start.get("eval_loss")), number(phase.end.get("eval_loss"))
    moved = after - before if before is not None and after is not None else None
    return {
        "number": phase.number, "name": phase.name, "before": loss(before), "after": loss(after),
        "moved": change(moved), "worse": moved is not None and moved >= 0,
        "perplexity_before": perplexity(phase.start.get("perplexity")),
        "perplexity_after": perplexity(phase.end.get("perplexity")),
        "tokens": whole(phase.end.get("tokens") or phase.start.get("tokens")),
        "step": _published_step(phase),
    }  # fmt: skip


def _published_step(phase: FoundPhase) -> str:
    if number(phase.source.get("step")) is None:
        return "so far" if phase.state in ("running", "interrupted") else ""
    return f"step {whole(phase.source['step'])} of {whole(phase.source.get('steps'))}"


def trained(folder: Folder) -> Facts:
    phases = [_trained(phase, folder) for phase in folder.phases if phase.state != "pending" or phase.data]
    there = {part["class"] for phase in phases for part in phase["bar"]}
    return {
        "phases": phases,
        "parts": [{"class": name, "word": word} for _, name, word in PARTS if name in there],
        "drawn": [each for phase in folder.phases for each in _drawn(phase)],
    }


def _trained(phase: FoundPhase, folder: Folder) -> Facts:
    execution = phase.record.get("execution") or {}
    return _account(phase) | {
        "number": phase.number,
        "name": phase.name,
        "steps": whole(phase.step),
        "tokens": whole(phase.tokens),
        "seconds": lasted(phase.seconds),
        "speed": _speed(phase),
        "memory": _memory(phase),
        "ranks": whole(execution.get("ranks")),
        "starts": sum(phase.name in (attempt.get("resumed") or {}) for attempt in folder.attempts),
    }


def _account(phase: FoundPhase) -> Facts:
    """Where its tokens went, as data.json tells it."""
    splits = phase.data.get("splits")
    account = (splits.get("train") if isinstance(splits, dict) else phase.data) or {}
    held_out = (splits.get("eval") if isinstance(splits, dict) else None) or {}
    keys = ("source", "trained", "padded", "dropped")
    return {
        "known": number(account.get("documents")) is not None,
        "documents": whole(account.get("documents")),
        "held_out": whole(held_out.get("documents")),
        **{key: whole(account.get(f"tokens_{key}")) for key in keys},
        "context": whole(_amount(account, "tokens_context")),
        "masked": whole(account.get("tokens_masked")) if account.get("tokens_masked") else "",
        "efficiency": share(account.get("efficiency")),
        "bar": list(_bar(account)),
    }


def _amount(account: Facts, key: str) -> float:
    """What is trained again is in `trained`, and no mere context."""
    repeated = number(account.get("tokens_repeated")) or 0.0 if key == "tokens_context" else 0.0
    return (number(account.get(key)) or 0.0) - repeated


def _bar(account: Facts) -> Iterator[Facts]:
    amounts = [_amount(account, key) for key, _, _ in PARTS]
    at = 0.0
    for (_, name, _), amount in zip(PARTS, amounts, strict=True):
        width = 100 * amount / (sum(amounts) or 1)
        if amount:
            yield {"class": name, "x": round(at, 2), "width": round(width, 2)}
        at += width


def _drawn(phase: FoundPhase) -> Iterator[Facts]:
    """Where its tokens come from, if from several sources or from earlier phases."""
    own, old = _list(phase.data.get("mixture")), _list(phase.data.get("replay"))
    names = [str(each.get("source")) for each in own] + [f"{each.get('phase')} (replay)" for each in old]
    for name, each in zip(names, own + old, strict=True) if len(own) > 1 or old else ():
        yield {
            "number": phase.number,
            "phase": phase.name,
            "from": name,
            "planned": share(each.get("planned_share"), digits=2),
            "share": share(each.get("share"), digits=2),
            "tokens": whole(each.get("tokens")),
            "passes": f"{number(each.get('epochs')) or 0:.2f}",
        }


def _list(value: Any) -> list[Facts]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _speed(phase: FoundPhase) -> str:
    return whole(phase.tokens / phase.seconds) if phase.tokens and phase.seconds else whole(None)


def _memory(phase: FoundPhase) -> str:
    values = [value for line in phase.train if (value := number(line.get("memory_bytes"))) is not None]
    return f"{max(values) / 1e9:,.1f} GB" if values else ""
