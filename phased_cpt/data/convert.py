"""A program of its own, because it loads transformers: writes the tokenizer.json that a folder does not have.

python -m phased_cpt.data.convert FOLDER MADE
"""

import os
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer


def main(folder: str, made: str) -> None:
    """Write it beside, check that it gives the same ids, and move it into place: tokenizer.json last."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with tempfile.TemporaryDirectory(dir=made) as beside:
        tokenizer.save_pretrained(beside)
        if not (Path(beside) / "tokenizer.json").exists():
            sys.exit(f"{type(tokenizer).__name__} cannot be written as a tokenizer.json")
        for name in sorted((path.name for path in Path(beside).iterdir()), key="tokenizer.json".__eq__):
            os.replace(Path(beside) / name, Path(made) / name)


if __name__ == "__main__":
    main(*sys.argv[1:])
