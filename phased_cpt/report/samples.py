"""What the base and each phase make of the same few prompts."""

from collections.abc import Iterator
from itertools import groupby

from phased_cpt.report.folder import Facts, Folder
from phased_cpt.tables.words import counted

MOST_ALIKE = 3  # lines in a row; small models say one line for ever


def samples(folder: Folder) -> Facts:
    """Each prompt, how its document goes on, and each model's own continuation."""
    told = [phase for phase in folder.phases if phase.samples]
    prompts: list[Facts] = next((phase.samples["prompts"] for phase in told if phase.samples.get("prompts")), [])
    first = next((phase for phase in told if phase.samples.get("before")), None)
    columns = [("base", first, "before"), *((phase.name, phase, "after") for phase in told)]
    said = [(name, _answers(phase.samples, key)) for name, phase, key in columns if phase]
    return {
        "prompts": [
            {
                "set": prompt.get("set"),
                "text": prompt.get("text"),
                "continues": prompt.get("continues"),
                "answers": [
                    {"name": name, "pieces": list(pieces(texts[prompt["text"]]))}
                    for name, texts in said
                    if prompt.get("text") in texts
                ],
            }
            for prompt in prompts
        ]
    }


def _answers(samples: Facts, key: str) -> dict[str, str]:
    """By the prompt: a phase that came later may have been asked others."""
    prompts, texts = samples.get("prompts") or [], samples.get(key)
    return {each["text"]: text for each, text in zip(prompts, texts, strict=False)} if isinstance(texts, list) else {}


def pieces(text: str) -> Iterator[tuple[str, str]]:
    """(text, note): a line that is said again and again stands once, with a note of how often it follows."""
    kept: list[str] = []
    for line, alike in groupby(text.split("\n")):
        count = len(list(alike))
        if count <= MOST_ALIKE:
            kept += [line] * count
            continue
        if line.strip():
            yield "\n".join([*kept, line]), f"the same line, {counted(count - 1, 'time')} more"
        else:
            yield "\n".join(kept), counted(count, "empty line")
        kept = []
    if kept or not text:
        yield "\n".join(kept), "" if text.strip() else "nothing"
