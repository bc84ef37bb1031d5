"""Base beside tuned, in one loaded model."""

import logging
import warnings

from phased_cpt.errors import InputError
from phased_cpt.wanted import ChatWanted


def main(wanted: ChatWanted) -> int:
    """A conversation, or the answers to a file of prompts."""
    if wanted.as_json and wanted.prompts is None:
        raise InputError("--json goes with --prompts FILE: a conversation is not written as JSON")
    warnings.filterwarnings("ignore")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which speaks up as soon as it is imported
    from phased_cpt.chat.session import serve

    return serve(wanted)
