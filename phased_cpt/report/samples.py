"""What the base and each phase make of the same few prompts."""

from typing import Any

from phased_cpt.report.folder import Facts, Folder


def samples(folder: Folder) -> Facts:
    """Each prompt, how its document goes on, and each model's own continuation."""
    told = [phase for phase in folder.phases if phase.samples]
    prompts: list[Facts] = next((phase.samples["prompts"] for phase in told if phase.samples.get("prompts")), [])
    columns: list[tuple[str, Any]] = [
        ("base", next((phase.samples["before"] for phase in told if phase.samples.get("before")), None)),
        *((phase.name, phase.samples.get("after")) for phase in told),
    ]
    said = [(name, texts) for name, texts in columns if isinstance(texts, list)]
    return {
        "prompts": [
            {
                "set": prompt.get("set"),
                "text": prompt.get("text"),
                "continues": prompt.get("continues"),
                "answers": [{"name": name, "text": texts[at]} for name, texts in said if at < len(texts)],
            }
            for at, prompt in enumerate(prompts)
        ]
    }
