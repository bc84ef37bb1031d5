"""report.html: one file that needs nothing else, of whatever a run folder holds.

read_folder ─→ a part each: plain facts ─→ its template ─→ report.html
                    └── what goes wrong in a part is a sentence in its place
"""

import base64
import functools
import hashlib
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from phased_cpt.config.secrets import scrubbed
from phased_cpt.report.curves import curves
from phased_cpt.report.folder import Facts, Folder, read_folder
from phased_cpt.report.forgotten import forgotten
from phased_cpt.report.origins import attempts, configuration, gates, lineage, surroundings
from phased_cpt.report.samples import samples
from phased_cpt.report.summary import summary
from phased_cpt.report.timeline import timeline
from phased_cpt.report.trained import gains, trained
from phased_cpt.run_dir import RunDir, publish_file

NAME = "report.html"
# In the order of the page; each has a template of its name in pages/.
PARTS: dict[str, Callable[[Folder], Facts]] = {
    "timeline": timeline,
    "curves": lambda folder: curves(folder) | gains(folder),
    "forgotten": forgotten,
    "gates": gates,
    "trained": trained,
    "samples": samples,
    "lineage": lineage,
    "attempts": lambda folder: attempts(folder) | {"around": surroundings(folder)["rows"]},
    "configuration": configuration,
}
UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")  # what HTML forbids, or nobody would see


def write_report(run_dir: RunDir, output: Path | None = None) -> Path:
    """Tell what the folder holds by now, and return where; the old report stays until the new one is whole."""
    path = output or run_dir.root / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_file(path, page(read_folder(run_dir)).encode())
    return path


def page(folder: Folder) -> str:
    style = files("phased_cpt.report").joinpath("pages", "style.css").read_text("utf-8")
    return (
        templates()
        .get_template("page.html")
        .render(
            head=_part("summary", summary, folder),
            parts=[_part(name, facts, folder) for name, facts in PARTS.items()],
            name=folder.name,
            style=Markup(style),  # noqa: S704 - it is ours
            style_digest=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        )
    )


@functools.cache
def templates() -> Environment:
    """What is written into them is escaped, all of it."""
    found = Environment(
        loader=PackageLoader("phased_cpt.report", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=shown,
    )
    found.filters["breakable"] = breakable
    return found


def _part(name: str, facts: Callable[[Folder], Facts], folder: Folder) -> Markup:
    """A part of the page; a folder may hold anything, and one odd file must not cost the others."""
    try:
        return Markup(templates().get_template(f"{name}.html").render(facts(folder)))  # noqa: S704 - escaped when rendered
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        return Markup(templates().get_template("damaged.html").render(part=name, why=why[:200]))  # noqa: S704


def breakable(name: Any) -> Markup:
    """A long name may go on in the next line where its words end."""
    return escape(shown(name)).replace("_", Markup("_<wbr>"))


def shown(value: Any) -> Any:
    """Each text as it goes onto the page: no secret, no half of a character, nothing that cannot be seen."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return "" if value is None else value
    whole = scrubbed(value).encode(errors="replace").decode()
    return UNSEEN.sub(lambda found: chr(0x2400 + ord(found[0])) if ord(found[0]) < 32 else "␡", whole)
