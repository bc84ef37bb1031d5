"""Where weights and values come from: the lineage, the gates on its way, the attempts, the configuration."""

from collections.abc import Iterator
from typing import Any

from phased_cpt.report.folder import Facts, Folder, FoundPhase
from phased_cpt.report.logs import number
from phased_cpt.report.written import change, clock, digest, whole
from phased_cpt.tables.words import words


def lineage(folder: Folder) -> Facts:
    """The base, and behind it what every phase started from, published and handed over."""
    first: Facts = next(filter(None, (phase.record.get("started_from") for phase in folder.phases)), {})
    return {
        "base": {
            "name": base_name(folder),
            "digest": digest(first.get("base")),
            "full": first.get("base"),
            "commit": next(filter(None, (phase.source.get("commit") for phase in folder.phases)), None),
        },
        "phases": [_descent(phase) for phase in folder.phases],
        "merged": _merged(folder),
    }


def base_name(folder: Folder) -> str:
    shape = folder.value("model.from_config")
    kind = f" ({shape['model_type']})" if isinstance(shape, dict) and "model_type" in shape else ""
    return str(folder.value("model.name") or f"random weights{kind}")


def _descent(phase: FoundPhase) -> Facts:
    fingerprint = phase.record.get("fingerprint") or {}
    return {
        "number": phase.number, "name": phase.name, "state": phase.state,
        "fingerprint": digest(fingerprint.get("digest")), "full": fingerprint.get("digest"),
        "started_from": _weights(phase.record.get("started_from")),
        "published": _weights(phase.record.get("published")),
        "handed_over": _weights(phase.record.get("handed_over")),
        "step": _chosen(phase.source),
    }  # fmt: skip


def _chosen(source: Facts) -> str:
    step = number(source.get("step"))
    return "" if step is None else f"step {whole(step)} of {whole(source.get('steps'))}, {source.get('why', '')}"


def _weights(found: Any) -> list[Facts]:
    """[base] or [base, adapter, …], in the order in which they lie on each other."""
    if not isinstance(found, dict):
        return []
    base = {"kind": "base", "digest": found.get("base"), "folder": found.get("folder"), "scale": 1.0}
    adapters = [{"kind": "adapter", **each} for each in found.get("adapters") or ()]
    return [
        {
            "kind": each["kind"],
            "digest": digest(each.get("digest")),
            "full": each.get("digest"),
            "folder": each.get("folder"),
            "scale": "" if number(each.get("scale")) in (None, 1.0) else f"{each['scale']:g}",
        }
        for each in (base, *adapters)
    ]


def _merged(folder: Folder) -> str:
    place = folder.value("merge.output_dir")
    return place if isinstance(place, str) and (folder.root / place / "merge.json").is_file() else ""


def gates(folder: Folder) -> Facts:
    """What phases had to hold, and whether they did."""
    return {"rows": [_gate(phase, phase.gate) for phase in folder.phases if phase.gate]}


def _gate(phase: FoundPhase, gate: Facts) -> Facts:
    return {
        "name": phase.name, "passed": gate.get("passed"), "on_fail": gate.get("on_fail") or "",
        "forgetting": change(gate.get("forgetting")), "most": _limit(gate.get("max_forgetting")),
        "worst": gate.get("worst") or "", "gain": change(gate.get("gain")), "least": _limit(gate.get("min_gain")),
    }  # fmt: skip


def _limit(value: Any) -> str:
    found = number(value)
    return "no limit" if found is None else f"{found:g}"


def attempts(folder: Folder) -> Facts:
    """Every call of `run` on this folder, and in what it was another than the first."""
    return {"rows": [_attempt(at, each) for at, each in enumerate(folder.attempts, 1)]}


def _attempt(at: int, facts: Facts) -> Facts:
    resumed = (facts.get("resumed") or {}).items()
    return {
        "number": at,
        "started": clock(facts.get("started")),
        "host": facts.get("host"),
        "version": facts.get("version"),
        "trained": [f"{name} from step {whole(step)}" if step else name for name, step in resumed],
        "differences": list(_differences(facts.get("differences"))),
        "inexact": list(_differences(facts.get("inexact"))),
    }


def _differences(found: Any) -> Iterator[Facts]:
    for key, (was, now) in (found or {}).items():
        yield {"key": key, "was": _short(was), "now": _short(now)}


def _short(value: Any) -> str:
    text = words(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def configuration(folder: Folder) -> Facts:
    """Every line of config_resolved.yaml with its origin; where that is gone, what the ledger remembers."""
    lines = list(_lines(folder))
    return {
        "lines": lines,
        "own": sum(line["own"] for line in lines),
        "all": sum(bool(line["origin"]) for line in lines),
    }


def _lines(folder: Folder) -> Iterator[Facts]:
    for line in folder.resolved.splitlines():
        text, _, origin = line.rpartition("  # ") if "  # " in line else (line, "", "")
        if not line.startswith("#"):
            yield {"text": text.rstrip(), "origin": origin, "own": origin not in ("", "default")}
    values = folder.record.get("values")
    if not folder.resolved and isinstance(values, dict):
        for key, value in values.items():
            yield {"text": f"{key}: {_short(value)}", "origin": "", "own": False}


def surroundings(folder: Folder) -> Facts:
    """Versions, kernels and ranks, by phase; what all of them had alike is told once."""
    found = [(phase.name, _plain(phase.record.get("execution"))) for phase in folder.phases]
    found = [(name, values) for name, values in found if values]
    keys = dict.fromkeys(key for _, values in found for key in values)
    told = ((key, [(name, values.get(key)) for name, values in found]) for key in keys)
    return {"rows": [_surrounding(key, values) for key, values in told]}


def _plain(execution: Any) -> Facts:
    items = execution.items() if isinstance(execution, dict) else ()
    return {key: _short(value) for key, value in items if not isinstance(value, dict)}


def _surrounding(key: str, values: list[tuple[str, Any]]) -> Facts:
    alike = len({value for _, value in values}) == 1
    return {"key": key, "values": [values[0][1]] if alike else [f"{name}: {value}" for name, value in values]}
