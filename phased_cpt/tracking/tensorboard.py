"""The run's event files for TensorBoard, on one axis of steps over all phases."""

import sys
import time
from types import ModuleType
from typing import Any

from phased_cpt.tracking.figures import figures
from phased_cpt.tracking.sink import Line, Sink, Stretch

FLUSH_SECONDS = 10  # at the latest; without TensorFlow its writer puts each record on disk at once


def open_tensorboard(stretch: Stretch) -> Sink | None:
    return Tensorboard(stretch) if stretch.tensorboard else None


class Tensorboard:
    """One event file an attempt; what it does again replaces what an earlier one had drawn."""

    def __init__(self, stretch: Stretch) -> None:
        # Here and not above: half a second, and a broken protobuf must not stop training.
        sys.modules.setdefault("tensorboard.compat.notf", ModuleType("notf"))  # its own switch: leave TensorFlow alone
        from tensorboard.compat.proto import event_pb2, summary_pb2  # type: ignore[import-untyped]
        from tensorboard.summary.writer.event_file_writer import EventFileWriter  # type: ignore[import-untyped]

        self._stretch = stretch
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._writer = EventFileWriter(str(stretch.root / "tensorboard"), flush_secs=FLUSH_SECONDS)
        self._write(first_step(stretch), session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))
        self._writer.flush()

    def train(self, line: Line) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in figures(line).items()]
        self._write(self._stretch.curriculum_step(line), summary=self._summary(value=values))

    def evaluated(self, line: Line) -> None:
        self.train(line)
        self._writer.flush()

    def tell(self, message: str) -> bool:
        return False

    def close(self) -> None:
        self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._event(wall_time=time.time(), step=step, **content))


def first_step(stretch: Stretch) -> int:
    """TensorBoard forgets this step and all after it.

    The step that a checkpoint was made at is not done again, and step 0 of a phase is the last one of the phase before
    it; only the very beginning of a curriculum has nothing before it.
    """
    beginning = stretch.steps_before + stretch.begin
    return beginning + 1 if beginning else 0
