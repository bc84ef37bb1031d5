"""Whether every path that a phase names leads somewhere: those that are wrong are told in one go."""

from phased_cpt.data.files import find_files, is_hub_id
from phased_cpt.errors import InputError
from phased_cpt.plan import Plan


def found_sources(plan: Plan) -> int:
    """How many files there are; data sets of the hub are looked for when they are read."""
    files, wrong = 0, []
    for phase in plan.phases:
        for key in ("sources", "eval_sources"):
            for source in getattr(phase.phase, key):
                if source.split is not None or is_hub_id(source.path):
                    continue
                try:
                    files += len(find_files(source.path))
                except InputError as error:
                    wrong.append(f"phases.{phase.name}.{key}: {error}")
    if wrong:
        raise InputError("\n".join(wrong))
    return files
