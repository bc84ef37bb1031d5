"""A build that is stopped at any file operation leaves nothing that is taken for whole; the next makes the same bytes.

Operations are counted by an audit hook, which sees those of Python, of numpy and of the standard library alike.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from phased_cpt.config import load
from phased_cpt.data.prepare import prepare
from phased_cpt.plan import make_plan
from tests.conftest import Write
from tests.data.conftest import lines
from tests.data.test_tokens import stores

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree", "fcntl.flock")


def stopped(path: Path, at: int, action: str) -> bool:
    """Prepare in a child that is stopped before its n-th file operation; False if it has no n-th."""
    child = os.fork()
    if child == 0:
        exit_code = 9
        try:
            left = _stop_before(at, action, os.getpid())
            prepare(make_plan(load(path)), workers=1)
            exit_code = 0 if left[0] > 0 else 8  # a failure may be one that it can live with
        finally:
            os._exit(exit_code)
    return os.waitpid(child, 0)[1] != 0


def _stop_before(at: int, action: str, process: int) -> list[int]:
    left = [at]

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event not in EVENTS or os.getpid() != process:  # its workers have nothing to do with files
            return
        if event == "open" and not _is_ours(arguments[0]):
            return
        left[0] -= 1
        if left[0] == 0:
            if action == "kill":
                os.kill(process, signal.SIGKILL)
            raise OSError(28, "No space left on device")

    sys.addaudithook(hook)
    return left


def _is_ours(path: object) -> bool:
    """A file of the run, and no module that is imported meanwhile."""
    return isinstance(path, str | Path | bytes) and b".py" not in os.fsencode(path) and not os.fsencode(path).startswith(
        os.fsencode(sys.prefix)
    )  # fmt: skip


@pytest.mark.parametrize("action", ["kill", "fail"])
def test_a_build_stopped_anywhere_is_made_again_to_the_same_bytes(
    write: Write, config: Callable[..., Path], action: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(lines(*({"text": f"text {number} é"} for number in range(60))), "a.jsonl")
    path = config("a.jsonl", tokenizer_backend="tokenizers")  # it needs no proof, which has a test of its own
    prepare(make_plan(load(path)), workers=1)
    undisturbed = stores("tokens"), stores("blocks")
    Path("outputs").rename("undisturbed")
    partly = 0
    for at in range(1, 400):
        was_stopped = stopped(path, at, action)
        for kind, whole in zip(("tokens", "blocks"), undisturbed, strict=True):
            assert all(whole.get(name) == files for name, files in stores(kind).items()), "what is sealed is whole"
        partly += was_stopped and stores() == {}
        prepare(make_plan(load(path)), workers=1)
        assert (stores("tokens"), stores("blocks")) == undisturbed
        assert not list(Path("outputs/cache").glob("*/.*.building")), "nothing is left lying about"
        Path("outputs").rename(tmp_path / f"{at}")
        if not was_stopped:
            assert at > 20, "there was something to stop"
            assert partly > 5, "the control: some stops came before the tokens were sealed"
            return
    raise AssertionError("it never came to an end")
