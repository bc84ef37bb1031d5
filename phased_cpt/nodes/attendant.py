"""Any node but the first: it comes to node 0, starts the ranks that are ordered, and watches them as they run.

come ─ wait ─ start: ranks ─┬─ ended well, or not ─→ told ─ wait …
                            ├─ a signal here ──────→ the ranks stop, all of them agreed ─→ told
                            └─ node 0 is gone ─────→ they are ended, exit 1
       leave ─→ the exit code of node 0
"""

import signal
import socket
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from phased_cpt.errors import InputError, Interrupted, PhasedCptError
from phased_cpt.launchers import LAUNCHERS, Place, Program
from phased_cpt.launchers.place import interface_towards
from phased_cpt.launchers.processes import hears, state_of, tell
from phased_cpt.launchers.start import attended
from phased_cpt.nodes.hosts import has_hung_up
from phased_cpt.nodes.identity import Identity
from phased_cpt.nodes.wire import LOST_SECONDS, Message, Wire
from phased_cpt.pulse import Pulse, pulses
from phased_cpt.stopping import Asked, Stopping, Wish, heard

COMING_SECONDS = 1800.0
TRY_SECONDS = 1.0
TELL_SECONDS = 10.0
POLL_SECONDS = 0.2
SEEN_SECONDS = 30.0  # until a file that node 0 has written is here: NFS looks again after some seconds
NEVER = float("inf")

Tell = Callable[[str], None]


def attend(
    address: str, port: int, node: int, of: int, ranks: int, mine: Identity, tell: Tell, *, rehearses: bool = False
) -> int:
    """Be one of the other nodes, for a whole run; returns the exit code.

    Node 0 may rehearse first (preflight); whoever has come for the run helps with that, and comes once more.
    """
    me = f"node {node} of {of}"
    with heard() as stop:
        while True:
            connection = reached(address, port, me, stop, tell)
            with Attendant(connection, (address, port), me, tell, stop) as attendant:
                attendant.greet({"node": node, "of": of, "ranks": ranks, "identity": mine.facts()})
                code = attendant.serve()
            if code or rehearses or not attendant.rehearsed:
                return code


def reached(address: str, port: int, me: str, stop: Stopping, tell: Tell) -> socket.socket:
    """Node 0, which may be called later."""
    began = told = time.monotonic()
    tell(f"{me}: looking for node 0 at {address}:{port}")
    while True:
        stop.require_on()
        try:
            return socket.create_connection((address, port), timeout=TRY_SECONDS * 5)
        except socket.gaierror as error:
            what = f"{address} is no name that this machine knows ({error.strerror})"
            raise InputError(f"launch.master_addr: {what}") from None
        except OSError as error:
            reason = error.strerror or str(error)
        if has_hung_up():
            raise PhasedCptError(f"node 0 has called this machine, and is gone ({address}:{port}: {reason})")
        if time.monotonic() - began > COMING_SECONDS:
            raise PhasedCptError(f"node 0 cannot be reached at {address}:{port}: {reason}; is it called there?")
        if time.monotonic() - told > TELL_SECONDS:
            told = time.monotonic()
            tell(f"still looking for node 0 at {address}:{port} ({reason})")
        time.sleep(TRY_SECONDS)


class Attendant:
    """What this node knows of node 0, and of its own ranks."""

    def __init__(self, connection: socket.socket, first: tuple[str, int], me: str, tell: Tell, stop: Stopping) -> None:
        self._first, self._me, self._tell, self._stop = first, me, tell, stop
        self._interface = interface_towards(first[0])
        self._logs: Path | None = None  # of the ranks that run now
        self._ranks = range(0)
        self._code: int | None = None  # to leave with
        self.rehearsed = False  # it was no run that has ended
        self._is_welcome = False
        self._patience = LOST_SECONDS  # with node 0
        self._wire = Wire(connection, self._signs)

    def __enter__(self) -> "Attendant":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Who was stopped says so: to node 0 it would be gone otherwise."""
        if isinstance(error, Asked | Interrupted):
            self._wire.send(stopped=self._stop.asked_by)
        self._wire.close()

    def greet(self, hello: Message) -> None:
        self._wire.send(hello=hello)

    def serve(self) -> int:
        """Do what is ordered until the order is to leave."""
        while self._code is None:
            self._stop.require_on()
            message = self._wire.next(POLL_SECONDS)
            if message is not None:
                self._do(message)
            elif why := self._wire.lost(self._patience):
                raise self._gone(why)
        return self._code

    def _gone(self, why: str) -> PhasedCptError:
        if self._is_welcome:
            return PhasedCptError(f"node 0 is gone: {why}; the same command, on all nodes, goes on")
        what = "{}:{} does not answer as node 0 does: {}".format(*self._first, why)
        return PhasedCptError(f"{what}; is another program there? Give another --master-port, on every node")

    def _do(self, message: Message) -> None:
        if "refused" in message:
            raise InputError(message["refused"])
        if "welcome" in message:
            self._patience, self._is_welcome = message["patience"], True
            self._tell(f"{self._me}: node 0 is {message['welcome']}; waiting for its orders")
        if "leave" in message:
            self._code, self.rehearsed = int(message["leave"]), message["rehearsed"]
            self._tell(f"node 0 has ended the run: {message['message'] or 'it has done what was asked for'}")
        if "start" in message:
            with self._stop.held():  # until node 0 has heard how it ended
                self._start(message["start"], message["job"])

    def _start(self, order: Message, job: int) -> None:
        """Ranks, to their end; however that comes, node 0 hears of it."""
        argument = Path(order["argument"])
        program = Program(order["module"], argument, Path(order["logs"]))
        place = Place(**order["place"] | {"counts": tuple(order["place"]["counts"]), "interface": self._interface})
        orders = Orders(self._wire, job, self._stop, self._patience, self._write_stacks)
        words, ended, exit_code = "", 0, 0
        try:
            self._require_shared(argument, order["content"], orders)
            self._tell(f"ranks {place.first} to {place.first + place.ranks - 1}: {argument.parent.name}")
            self._logs, self._ranks = program.logs, range(place.first, place.first + place.ranks)
            attended(LAUNCHERS[order["launcher"]](program, place), program.logs, orders, NEVER)
        except PhasedCptError as error:
            words, exit_code, ended = str(error), error.exit_code, error.ended or error.exit_code
        except OSError as error:  # a log that cannot be written
            words, exit_code, ended = str(error), 1, 1
        finally:
            self._logs = None
        self._wire.send(job=job, ended=ended, exit_code=exit_code, message=words)
        if words:
            self._tell(words)
        self._do(orders.left)

    def _require_shared(self, argument: Path, content: str, orders: "Orders") -> None:
        """What node 0 has written is read here, byte for byte, or the folder is another one."""
        deadline = time.monotonic() + SEEN_SECONDS
        while time.monotonic() < deadline:
            if argument.exists() and argument.read_text() == content:
                return
            if orders.wish() == Wish.STOP:
                raise orders.as_failure()
            time.sleep(POLL_SECONDS)
        what = f"{argument} of node 0 is not seen on this node ({socket.gethostname()})"
        raise InputError(f"{what}; run.output_dir must lie in a folder that all nodes share, under the same path")

    def _signs(self) -> Message:
        """Where the ranks here are, for node 0, which cannot look."""
        now = time.monotonic()
        return {
            str(rank): {"pulse": asdict(sign), "ago": now - sign.at, "state": state_of(sign.pid)}
            for rank, sign in self._own_pulses().items()
        }

    def _own_pulses(self) -> dict[int, Pulse]:
        signs = pulses(self._logs) if self._logs else {}
        return {rank: sign for rank, sign in signs.items() if rank in self._ranks}

    def _write_stacks(self) -> None:
        """Each rank here writes where it stands, into the folder that all nodes see."""
        for sign in self._own_pulses().values():
            if hears(sign.pid, signal.SIGUSR2):
                tell(sign.pid, signal.SIGUSR2)


class Orders(Stopping):
    """What is asked of ranks that run here: by this node's people, and by node 0."""

    def __init__(
        self, wire: Wire, job: int, people: Stopping, patience: float, write_stacks: Callable[[], None]
    ) -> None:
        super().__init__()
        self._wire, self._job, self._people, self._patience = wire, job, people, patience
        self._write_stacks = write_stacks
        self._ordered = False
        self.left: Message = {}  # an order to leave, which is carried out once they have ended

    def wish(self) -> Wish:
        while (message := self._wire.next()) is not None:
            if message.get("stop") == self._job:
                self._ordered, self.asked_by = True, "node 0"
            if message.get("stacks") == self._job:
                self._write_stacks()
            if "leave" in message:
                self.left = message
            if message.get("end") == self._job or self.left:
                raise PhasedCptError("node 0 has ended them")
        if why := self._wire.lost(self._patience):
            raise PhasedCptError(f"node 0 is gone: {why}")
        wish = self._people.wish()
        if wish == Wish.STOP and not self.asked_by:
            self.asked_by = self._people.asked_by
            self._wire.send(stopped=self.asked_by)  # a second signal ends this without a word
        return Wish.STOP if self._ordered else wish

    def saved(self) -> None:
        self._people.saved()
