"""A program of its own, because it loads transformers: writes the tokenizer.json that a folder does not have.

python -m phased_cpt.data.convert FOLDER MADE
"""

import os
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer


def main(folder: str, made: str) -> None:
    """Write it beside, and move it into place: tokenizer.json, by which it is found, comes last."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # transformers makes one of nothing, and says so nowhere
        sys.exit("the folder holds no vocabulary")
    with tempfile.TemporaryDirectory(dir=made) as beside:
        tokenizer.save_pretrained(beside)
        if not (Path(beside) / "tokenizer.json").exists():
            sys.exit(f"{type(tokenizer).__name__} cannot be written as a tokenizer.json")
        for name in sorted((path.name for path in Path(beside).iterdir()), key=lambda name: name == "tokenizer.json"):
            os.replace(Path(beside) / name, Path(made) / name)


if __name__ == "__main__":
    main(*sys.argv[1:])
