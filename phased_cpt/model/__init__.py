"""The model: its base, the adapter on it, and what a token of it costs. This room loads torch."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it misses a package that nothing needs
