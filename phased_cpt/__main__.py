"""The way in: of the command, of `python -m phased_cpt`, and of what `deepspeed --module phased_cpt` starts."""

import os
import sys
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from phased_cpt.merging import MergeJob
    from phased_cpt.ranks import Ranks
    from phased_cpt.wanted import ChatWanted, EvaluateWanted, SweepWanted

STOPPED = 130  # what shells say of a program that Ctrl-C has ended


def main() -> NoReturn:
    """Run a verb. It is imported in here, because a Ctrl-C may come in that fifth of a second, too."""
    code = STOPPED
    try:
        from phased_cpt.cli import main as run

        run(rooms=Rooms())
    except KeyboardInterrupt:
        pass
    except SystemExit as stop:
        code = int(stop.code or 0)
    if "phased_cpt.ranks" not in sys.modules:
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the libraries of training take three seconds to leave


class Rooms:
    """Torch and all: what the command line must not import, brought in when a verb asks for it."""

    def ranks(self) -> "Ranks":
        """This process as a rank that trains."""
        from phased_cpt.launchers import before_the_imports, place_of_ranks, shared

        before_the_imports()
        os.environ |= shared(place_of_ranks(os.environ))
        from phased_cpt.ranks import in_ranks

        return in_ranks()

    def evaluate(self, wanted: "EvaluateWanted") -> int:
        from phased_cpt.evaluate import main

        return main(wanted)

    def sweep(self, wanted: "SweepWanted") -> "dict[str, Any]":
        from phased_cpt.evaluate.sweep import swept

        return swept(wanted)

    def concatenate(self, job: "MergeJob") -> "dict[str, Any]":
        from phased_cpt.model.quiet import quiet

        quiet()
        from phased_cpt.merge.concatenated import concatenated

        return concatenated(job)

    def chat(self, wanted: "ChatWanted") -> int:
        from phased_cpt.chat import main

        return main(wanted)


if __name__ == "__main__":
    main()
