"""The configuration with every default filled in, each value with its origin; a run can be started from it as it is.

training:
  learning_rate: 5.0e-05        # run.yaml:21 (phase)
  lr_scheduler: cosine          # default
"""

from collections.abc import Iterator
from typing import Any

import yaml

from phased_cpt.config.inherit import OVERRIDABLE, with_overlap
from phased_cpt.config.read import Keys, dotted, plain_scalar
from phased_cpt.plan import Origin, Plan

COMMENT_COLUMN = 56


def resolved_values(plan: Plan) -> dict[str, Any]:
    """Plain values; a phase holds what differs from the run, so that a value of the run still reaches the others."""
    values = _of_the_run(plan)
    for phase, written in zip(plan.phases, values["phases"], strict=True):
        for name, section in phase.overridable().items():
            own = {key: value for key, value in section.model_dump(mode="json").items() if value != values[name][key]}
            written[name] = own or None
    return values


def every_value(plan: Plan) -> dict[str, Any]:
    """{"run.seed": 42, "phases.foundation.training.learning_rate": 5e-5, …}: all that holds, in every phase."""
    values = _of_the_run(plan)
    for phase, written in zip(plan.phases, values["phases"], strict=True):
        written |= {name: section.model_dump(mode="json") for name, section in phase.overridable().items()}
    return flat(values)


def _of_the_run(plan: Plan) -> dict[str, Any]:
    config = plan.config
    return config.model_dump(mode="json") | {"data": with_overlap(config.data, config.data).model_dump(mode="json")}


def resolved_yaml(plan: Plan) -> str:
    """The resolved configuration as YAML, with the origins as comments."""
    return "\n".join(_lines(resolved_values(plan), (), plan)) + "\n"


def flat(value: Any, keys: Keys = ()) -> dict[str, Any]:
    """{"run.seed": 42, "phases.foundation.epochs": 3.0, …}: as --set addresses them; values stay whole."""
    if keys == ("phases",):
        return {path: child for phase in value for path, child in flat(phase, (*keys, phase["name"])).items()}
    if isinstance(value, dict) and (not keys or _is_section(keys) or (len(keys) == 2 and keys[0] == "phases")):
        return {path: child for key, inner in value.items() for path, child in flat(inner, (*keys, key)).items()}
    return {dotted(keys): value}


def origin_of(keys: Keys, plan: Plan) -> Origin:
    """Where a value of the resolved configuration came from."""
    if keys[0] == "phases" and len(keys) == 4:
        phase = plan.phases[int(keys[1])]
        return phase.origins.get((str(keys[2]), str(keys[3])), plan.origin(*keys))
    return plan.origin(*keys)


def _lines(value: Any, keys: Keys, plan: Plan) -> Iterator[str]:
    blanks = "  " * len(keys)
    for key, child in value.items():
        here = (*keys, key)
        if isinstance(child, dict) and _is_section(here):
            yield f"{blanks}{key}:"
            yield from _lines(child, here, plan)
        elif here == ("phases",):
            yield f"{blanks}{key}:"
            for index, phase in enumerate(child):
                first, *rest = _lines(phase, (*here, index), plan)
                yield from ("  - " + first.lstrip(), *rest)
        else:
            line = f"{blanks}{key}: {_inline(child)}"
            yield f"{line:<{COMMENT_COLUMN}}  # {origin_of(here, plan)}"


def _is_section(keys: Keys) -> bool:
    """Sections are written out line by line; other mappings (a filter, a model's config) stay whole."""
    if keys[0] == "phases":
        return len(keys) == 3 and keys[2] in OVERRIDABLE
    return len(keys) == 1 or (keys[0] == "tracking" and len(keys) == 2)


class _Dumper(yaml.SafeDumper):
    """YAML that reads the same under 1.1 (PyYAML) and 1.2 (ours), on one line: texts such as 1e5 or no are quoted."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    try:
        plain = isinstance(plain_scalar(value), str) and value.splitlines() == [value]
    except ValueError:  # digits without end
        plain = False
    style = None if plain else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style)


_Dumper.add_representer(str, _text)


def _inline(value: Any) -> str:
    dumped: str = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False
    )
    return dumped.removesuffix("\n").removesuffix("\n...")
