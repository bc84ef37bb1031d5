"""Node 0, as it meets the others: it waits until all have come, orders their ranks started, and hears how they end."""

import contextlib
import errno
import ipaddress
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

from phased_cpt.errors import InputError, Interrupted, PhasedCptError
from phased_cpt.launchers import Environment, Place, Program, free_port
from phased_cpt.launchers.place import interface_towards
from phased_cpt.nodes.identity import Identity, differences
from phased_cpt.nodes.wire import LOST_SECONDS, PING_SECONDS, Message, Wire
from phased_cpt.pulse import Pulse
from phased_cpt.stopping import Asked, Stopping

COMING_SECONDS = 1800.0  # for people who call a command on each machine, one after the other
TELL_SECONDS = 10.0  # between two words of who is waited for
POLL_SECONDS = 0.1
HELLO_SECONDS = 10.0

Tell = Callable[[str], None]


class Head:
    """The other nodes, seen from node 0; open for as long as the run is conducted."""

    def __init__(
        self, address: str, port: int, of: int, ranks: int, mine: Identity, patience: float, *, rehearses: bool = False
    ) -> None:
        """`rehearses`: the run itself comes afterwards, and with it node 0 once more."""
        self._rehearses = rehearses
        self.address, self.port, self.of, self._mine = address, port, of, mine
        self._counts = {0: ranks}
        self._lost_seconds = max(3 * PING_SECONDS, min(LOST_SECONDS, patience / 2))
        self.others: dict[int, OtherNode] = {}
        self._refused: list[str] = []
        self._greeting = threading.Lock()
        self._all_came = self._over = False
        self._listener = _listener(address, port)
        threading.Thread(target=self._accept, name="nodes", daemon=True).start()

    @property
    def ranks(self) -> int:
        return sum(self._counts.values())

    def gather(self, stop: Stopping, tell: Tell, ended: Callable[[], str | None] = lambda: None) -> None:
        """Wait for all of them; `ended` says why one of them will never come."""
        began = told = time.monotonic()
        tell(f"node 0 of {self.of}: waiting for the others at {self.address}:{self.port}")
        while self._is_missing(tell):
            stop.require_on()
            if self._refused:
                raise InputError(self._refused[0])
            if why := ended():
                raise PhasedCptError(why)
            missing = ", ".join(str(node) for node in range(1, self.of) if node not in self.others)
            if time.monotonic() - began > COMING_SECONDS:
                mend = f"call the same command there with --node-rank, and let it reach {self.address}:{self.port}"
                raise PhasedCptError(f"node {missing} has not come for {COMING_SECONDS / 60:.0f} minutes: {mend}")
            if time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                tell(f"still waiting for node {missing}")
            time.sleep(POLL_SECONDS)
        names = ", ".join(f"node {node} {other.host} ({other.ranks})" for node, other in sorted(self.others.items()))
        tell(f"all {self.of} nodes are here, {self.ranks} ranks: node 0 {self._mine.host} ({self._counts[0]}), {names}")

    def _is_missing(self, tell: Tell) -> bool:
        """Whoever has come and gone again is waited for like the others."""
        with self._greeting:
            for other in [other for other in self.others.values() if other.lost(self._lost_seconds)]:
                tell(f"{other} has left again")
                del self.others[other.number]
            self._all_came = len(self.others) == self.of - 1
            return not self._all_came

    def place(self) -> Place:
        """Of node 0, at a port that is free just now."""
        counts = tuple(self._counts[node] for node in range(self.of))
        interface = interface_towards(self.address)
        return Place(counts, 0, self.address, free_port(self.address), interface)

    def parts(self, program: Program, launcher: str, place: Place) -> list["Order"]:
        """What the others are to start."""
        others = [other for _, other in sorted(self.others.items())]
        return [Order(other, program, launcher, place, self._lost_seconds) for other in others]

    def require_all(self) -> None:
        """None of them has left meanwhile; one that has come back is as good."""
        for other in self.others.values():
            if why := other.lost(self._lost_seconds):
                raise other.gone(why)

    def __enter__(self) -> "Head":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """However the run ends, the others hear of it, and end alike."""
        self._over = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # else the thread that accepts keeps the port
        self._listener.close()
        if isinstance(error, Asked):
            error = Interrupted("it was stopped; the same command, on all nodes, goes on")
        code = 0 if error is None else getattr(error, "exit_code", 1)
        unforeseen = f"exit code {code}; what it says itself tells why" if code else ""
        message = str(error) if isinstance(error, PhasedCptError) else unforeseen
        for other in self.others.values():
            other.wire.send(leave=code, message=message, rehearsed=self._rehearses)
            other.wire.close()

    def _accept(self) -> None:
        while not self._over:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # closed; or there are too many connections at the moment
                time.sleep(POLL_SECONDS)
                continue
            threading.Thread(target=self._greet, args=[connection], name="greeting", daemon=True).start()

    def _greet(self, connection: socket.socket) -> None:
        wire = Wire(connection)
        hello: Any = (wire.next(HELLO_SECONDS) or {}).get("hello")
        if not _is_hello(hello):  # a port scanner, or a browser; or another version of this
            if hello is not None:
                wire.send(refused=f"node 0 ({self._mine.host}) has not understood; it needs one checkout on all nodes")
            wire.close()
            return
        other = OtherNode(hello["node"], hello["ranks"], Identity(**hello["identity"]), wire)
        with self._greeting:
            if why := self._wrong(other, hello["of"]):
                wire.send(refused=why)
                wire.close()
                if not self._all_came:
                    self._refused.append(why)
                return
            self._counts[other.number], self.others[other.number] = other.ranks, other
            wire.send(welcome=self._mine.host, patience=self._lost_seconds)

    def _wrong(self, other: "OtherNode", of: int) -> str | None:
        who, before = str(other), self.others.get(other.number)
        is_there = before and not (before.wire.is_closed or before.wire.lost(self._lost_seconds))
        if is_there and self._all_came:
            return f"{self._mine.host} is node 0 of a run under way, with {before}; another needs another --master-port"
        if of != self.of:
            return f"{who} was called with --nnodes {of}, and node 0 with {self.of}; make them equal"
        if not 0 < other.number < self.of:
            return f"{who}: --node-rank goes from 0 to {self.of - 1}"
        if before and is_there:
            return f"two nodes were called with --node-rank {other.number}: {before.host} and {other.host}"
        if before and self._all_came and before.ranks != other.ranks:
            return f"{who} has come back with {other.ranks} ranks, and had {before.ranks}; begin with all nodes again"
        if found := differences(self._mine, other.identity):
            what = "\n    ".join(found)
            return (
                f"{who} would not do the same as node 0:\n    {what}\nmake them equal: one checkout, one configuration"
            )
        return None


class OtherNode:
    """One that has come."""

    def __init__(self, number: int, ranks: int, identity: Identity, wire: Wire) -> None:
        self.number, self.ranks, self.identity, self.wire = number, ranks, identity, wire
        self.host = identity.host
        self.jobs = 0
        self._stopped_by = ""

    def __str__(self) -> str:
        return f"node {self.number} ({self.host})"

    def next(self) -> Message | None:
        """What it has said; that it was stopped is remembered until it is gone."""
        message = self.wire.next()
        if message is not None and "stopped" in message:
            self._stopped_by = message["stopped"]
        return message

    def lost(self, after_seconds: float) -> str | None:
        """Why it cannot be reckoned with, while none of its ranks run."""
        while self.next() is not None:
            pass
        return self.wire.lost(after_seconds)

    def gone(self, why: str) -> PhasedCptError:
        goes_on = "the same command, on all nodes, goes on"
        if self._stopped_by:
            return Interrupted(f"{self} was stopped ({self._stopped_by}); {goes_on}")
        return PhasedCptError(f"{self} is gone: {why}; look at that machine and the network between; {goes_on}")


class Order:
    """The ranks of a job on another node, to be started there."""

    def __init__(self, other: OtherNode, program: Program, launcher: str, place: Place, lost_seconds: float) -> None:
        self._other, self._lost_seconds = other, lost_seconds
        self._order = {
            "module": program.module,
            "argument": str(program.argument),
            "content": program.argument.read_text(),
            "logs": str(program.logs),
            "launcher": launcher,
            "place": asdict(place) | {"node": other.number, "interface": None},
        }

    def start(self, mark: Environment) -> "RanksElsewhere":
        self._other.jobs += 1
        self._other.wire.send(start=self._order, job=self._other.jobs)
        return RanksElsewhere(self._other, self._other.jobs, self._lost_seconds)


class RanksElsewhere:
    """Running there."""

    is_elsewhere = True

    def __init__(self, other: OtherNode, job: int, lost_seconds: float) -> None:
        self._other, self._job, self._lost_seconds = other, job, lost_seconds
        self._code: int | None = None
        self._failure: PhasedCptError | None = None

    def poll(self) -> int | None:
        while self._code is None and (message := self._other.next()) is not None:
            if message.get("job") == self._job and "ended" in message:
                self._code, self._failure = message["ended"], self._told(message)
        if self._code is None and (why := self._other.wire.lost(self._lost_seconds)):
            # As one that was killed, it drags the others along, and is the one to be told of.
            self._code, self._failure = -signal.SIGKILL, self._other.gone(why)
        return self._code

    def _told(self, message: Message) -> PhasedCptError:
        code = message["exit_code"]
        if code == Interrupted.exit_code:
            return Interrupted(message["message"])
        error = PhasedCptError(f"{self._other}: {message['message']}")
        error.exit_code = code
        return error

    def ask_to_stop(self, ranks: Sequence[Pulse]) -> int | None:
        self._other.wire.send(stop=self._job)
        return None

    def ask_for_stacks(self) -> None:
        self._other.wire.send(stacks=self._job)

    def end(self, how: signal.Signals) -> None:
        self._other.wire.send(end=self._job)

    def wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def signs(self) -> Mapping[int, Pulse]:
        """What came with its last sign of life: how long ago each was, then; and what the system says of each."""
        heard: Any = self._other.wire.last_signs
        at = self._other.wire.heard_at
        return {
            int(rank): Pulse(**sign["pulse"] | {"at": at - sign["ago"], "state": sign["state"]})
            for rank, sign in heard.items()
        }

    def failure(self, logs: Any, stopped_by: str) -> PhasedCptError:
        assert self._failure is not None
        return self._failure


def _is_hello(said: Any) -> bool:
    """Whether these are the words of a node."""
    if not isinstance(said, dict) or not isinstance(identity := said.get("identity"), dict):
        return False
    numbers = all(type(said.get(name)) is int for name in ("node", "of", "ranks")) and said["ranks"] > 0
    kinds = {name: type(value) for name, value in identity.items()}
    return numbers and kinds == {"host": str, "code": dict, "settings": dict}


def _listener(address: str, port: int) -> socket.socket:
    try:
        family, _, _, _, means = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
        _require_reachable(address, str(means[0]))
        return socket.create_server((address, port), family=family)
    except socket.gaierror as error:
        raise InputError(
            f"launch.master_addr: {address} is no name that this machine knows ({error.strerror})"
        ) from None
    except OSError as error:
        raise InputError(_unheard(address, port, error)) from None


def _unheard(address: str, port: int, error: OSError) -> str:
    """Why nobody can be listened to there."""
    if error.errno == errno.EADDRNOTAVAIL:
        mend = "give its own with --master-addr, or this machine another --node-rank"
        return f"{address} is no address of this machine ({socket.gethostname()}), which is node 0; {mend}"
    why = "is taken by another program" if error.errno == errno.EADDRINUSE else f"is refused ({error.strerror})"
    return f"{address}:{port} {why}; give another with --master-port"


def _require_reachable(address: str, means: str) -> None:
    """Debian writes a machine's own name beside 127.0.1.1 into its /etc/hosts."""
    if address in ("localhost", means) or not ipaddress.ip_address(means).is_loopback:
        return
    what = f"{address} means {means} on this machine, where no other one reaches it"
    raise InputError(f"launch.master_addr: {what}; give the address of node 0 in its place, or mend /etc/hosts there")
