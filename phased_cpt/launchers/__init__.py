"""How the ranks of a job are started: a launcher turns a job into commands and their environment."""

from phased_cpt.launchers.commands import LAUNCHERS, Command, Environment, Launcher, free_port, shared
from phased_cpt.launchers.machine import gpus_here, ranks_here
from phased_cpt.launchers.start import launched

__all__ = [
    "LAUNCHERS",
    "Command",
    "Environment",
    "Launcher",
    "free_port",
    "gpus_here",
    "launched",
    "ranks_here",
    "shared",
]
