"""What stands in the folder of a run besides its phases: the tokenizer, the last weights under a name of their own."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

from phased_cpt.bases import Base
from phased_cpt.data.tokenizer import Tokenizer
from phased_cpt.nodes.identity import versions
from phased_cpt.plan import Plan
from phased_cpt.published import MARKER, read_source
from phased_cpt.run_dir import copied, publish_file


def keep_tokenizer(root: Path, tokenizer: Tokenizer) -> None:
    """As every published folder holds it: what the phases are trained with, whatever becomes of where it was."""
    folder = root / "tokenizer"
    folder.mkdir(exist_ok=True)
    for name, content in tokenizer.files().items():
        publish_file(folder / name, content)


def keep_final(root: Path, plan: Plan, base: Base) -> None:
    """The last weights once more under the run's own name, without a second copy of their bytes."""
    final, last = root / "final_model", plan.phases[-1]
    found = read_source(root / last.folder)
    if found is None or _same(final / MARKER, found[0] / MARKER):
        return
    beside = final.with_name(".final_model.building")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(found[0], beside, copy_function=copied)
    sources = [read_source(root / phase.folder) for phase in plan.phases]
    info = {
        "run": plan.name,
        "base": {"name": plan.config.model.name, "commit": base.commit, "digest": base.digest},
        "phases": [asdict(source[1]) for source in sources if source],
        "versions": versions(),
    }
    publish_file(beside / "training_info.json", (json.dumps(info, indent=2) + "\n").encode())
    shutil.rmtree(final, ignore_errors=True)  # of a run that had fewer phases
    os.replace(beside, final)


def _same(one: Path, other: Path) -> bool:
    return one.exists() and one.read_bytes() == other.read_bytes()
