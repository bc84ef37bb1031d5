"""How the ranks of a job are started: a launcher turns a job into commands and their environment."""

from phased_cpt.launchers.commands import (
    LAUNCHERS,
    Command,
    Environment,
    Launcher,
    Program,
    before_the_imports,
    shared,
    threads_of_a_rank,
)
from phased_cpt.launchers.machine import gpus_here, ranks_here
from phased_cpt.launchers.parents import CONDUCTOR
from phased_cpt.launchers.place import Place, free_port, place_of_ranks
from phased_cpt.launchers.start import launched

__all__ = [
    "CONDUCTOR",
    "LAUNCHERS",
    "Command",
    "Environment",
    "Launcher",
    "Place",
    "Program",
    "before_the_imports",
    "free_port",
    "gpus_here",
    "launched",
    "place_of_ranks",
    "ranks_here",
    "shared",
    "threads_of_a_rank",
]
