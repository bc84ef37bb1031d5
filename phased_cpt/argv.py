"""What is typed becomes what typer understands, so that options may stand before the verb and the verb may be left out.

--local_rank=3 -c a.yaml plan --json   →   plan -c a.yaml --json
-c a.yaml                              →   run -c a.yaml
"""

from typer.core import TyperGroup

from phased_cpt.config.allowed import nearest
from phased_cpt.config.secrets import scrubbed
from phased_cpt.errors import InputError


def normalise(arguments: list[str], verbs: object) -> list[str]:
    """The arguments as typer wants them: verb first, `run` if there is none, the launcher's --local_rank taken out."""
    assert isinstance(verbs, TyperGroup)
    _refuse_secrets(arguments)
    with_value = _options_with_a_value(verbs)
    path, options = _verb_first(_without_local_rank(arguments), verbs, with_value)
    if "--version" in options:
        return ["--version"]
    of_the_app = {option for parameter in verbs.params for option in parameter.opts} | {"-h", "--help"}
    no_verb = not path and options and options[0] not in of_the_app
    return [*(["run"] if no_verb else path), *options]


def _verb_first(arguments: list[str], verbs: TyperGroup, with_value: set[str]) -> tuple[list[str], list[str]]:
    """The verb (and the verb within it), and all the rest behind."""
    before: list[str] = []
    rest = list(arguments)
    while rest and rest[0].startswith("-"):
        taken = rest[: 2 if rest[0] in with_value else 1]
        before, rest = [*before, *taken], rest[len(taken) :]
    if not rest:
        return [], before
    if rest[0] not in verbs.commands:
        _refuse_a_bare_file(rest[0])
        known = ", ".join(verbs.commands)
        raise InputError(f"no verb {rest[0]!r}{nearest(rest[0], verbs.commands)} (verbs: {known}; -h explains them)")
    inner = verbs.commands[rest[0]]
    if isinstance(inner, TyperGroup):
        path, behind = _verb_first(rest[1:], inner, with_value)
        return [rest[0], *path], [*before, *behind]
    for word, previous in zip(rest[1:], rest, strict=False):
        if previous not in with_value:
            _refuse_a_bare_file(word)
    return [rest[0]], [*before, *rest[1:]]


def _refuse_secrets(arguments: list[str]) -> None:
    """typer repeats what it does not know, and what stands in a command line stands in the list of processes too."""
    if any(scrubbed(word) != word for word in arguments):
        raise InputError(
            "given a secret (not shown); take it out of the command line and use HF_TOKEN or WANDB_API_KEY"
        )


def _refuse_a_bare_file(word: str) -> None:
    if word.endswith((".yaml", ".yml", ".json")) and not word.startswith("-"):
        raise InputError(f"a configuration is named with -c: did you mean `-c {word}`?")


def _options_with_a_value(verbs: TyperGroup) -> set[str]:
    """The options whose value is the next word, of any verb: read off the verbs, so that there is no second list."""
    found: set[str] = set()
    for verb in verbs.commands.values():
        if isinstance(verb, TyperGroup):
            found |= _options_with_a_value(verb)
        found |= {name for option in verb.params if not getattr(option, "is_flag", False) for name in option.opts}
    return found


def _without_local_rank(arguments: list[str]) -> list[str]:
    """The deepspeed launcher puts --local_rank=N before everything; the ranks read LOCAL_RANK instead."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in ("--local_rank", "--local-rank"):
            next(words, None)
        elif not word.startswith(("--local_rank=", "--local-rank=")):
            kept.append(word)
    return kept
