"""One tiny run for all of them, and a conversation with it that is written into a text."""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console

from phased_cpt.chat.conversation import Conversation, talk
from phased_cpt.chat.screen import Screen
from phased_cpt.chat.settings import Settings
from phased_cpt.model.lineup import Lineup, line_up
from phased_cpt.wanted import ModelsWanted
from tests.chat.runs import trained_run
from tests.journeys.conftest import zygote  # noqa: F401 - a fixture
from tests.zygote import Zygote

SHORT = Settings(temperature=0.0, max_tokens=12)


@pytest.fixture(autouse=True)
def without_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Later tests fork this process, and threads that were left behind would wait for ever in what is forked."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def run(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    return trained_run(zygote, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def lineup(run: Path) -> Lineup:
    return line_up(ModelsWanted(run_dir=run, device="cpu"), tell=print)


@dataclass
class Talk:
    """A conversation, and what is seen of it."""

    conversation: Conversation
    out: io.StringIO
    notes: io.StringIO

    def __call__(self, *lines: str) -> str:
        """What these lines bring onto the screen."""
        begin = len(self.out.getvalue()), len(self.notes.getvalue())
        talk(self.conversation, iter(lines))
        return self.out.getvalue()[begin[0] :] + self.notes.getvalue()[begin[1] :]


@pytest.fixture
def talking(lineup: Lineup) -> Iterator[Callable[..., Talk]]:
    def made(*compare: str, settings: Settings = SHORT, terminal: bool = False, width: int = 200) -> Talk:
        out, notes = io.StringIO(), io.StringIO()
        seen = Console(file=out, width=width, force_terminal=terminal, markup=False, emoji=False, highlight=False)
        screen = Screen(seen, Console(file=notes, width=500, markup=False, emoji=False, highlight=False))
        return Talk(Conversation(lineup, screen, settings, "plain", compare), out, notes)

    yield made
