"""Where the ranks of a job stand: on this machine alone, or on several (nodes), each with some of them.

node 0   ranks 0 1 2 3   at `address`, where all of them meet
node 1   ranks 4 5 6 7   the same command, the same run folder
"""

import contextlib
import fcntl
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = "127.0.0.1"
LOOPBACK = "lo"
SIOCGIFADDR = 0x8915  # asks an interface for its address, of IPv4 alone
DISCARD = 9  # a port; nothing is sent


@dataclass(frozen=True)
class Place:
    """One machine among those that a job runs on."""

    counts: tuple[int, ...]  # ranks of each node
    node: int = 0  # which of them this is
    address: str = HERE  # of node 0, as the others reach it
    port: int = 0
    interface: str | None = LOOPBACK  # through which this one reaches it; None: the libraries find it

    @classmethod
    def alone(cls, ranks: int) -> "Place":
        """All on this machine."""
        return cls((ranks,), port=free_port())

    @property
    def ranks(self) -> int:
        return self.counts[self.node]

    @property
    def of(self) -> int:
        return sum(self.counts)

    @property
    def first(self) -> int:
        """The number of the first rank here."""
        return sum(self.counts[: self.node])


def place_of_ranks(environment: Mapping[str, str]) -> Place:
    """Of a process that a launcher has started as a rank; of other nodes only what matters here is known."""
    here = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or 1)
    elsewhere = int(environment.get("WORLD_SIZE") or here) - here
    if elsewhere <= 0:
        return Place((here,))
    address = environment["MASTER_ADDR"]
    return Place((here, elsewhere), address=address, interface=interface_towards(address))


def free_port(address: str = HERE) -> int:
    """One that nobody listens on now; a fixed one is taken as soon as two runs share a machine."""
    family, _, _, _, where = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family) as listener:
        listener.bind(where)
        return int(listener.getsockname()[1])


def address_towards(address: str) -> str:
    """The address of this machine from which it reaches another; nothing is sent."""
    family, _, _, _, where = socket.getaddrinfo(address, DISCARD, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as asking:
        asking.connect(where)
        return str(asking.getsockname()[0])


def interface_towards(address: str) -> str | None:
    """Its name, which gloo must be told: it asks what the host's own name means, and Debian says 127.0.1.1."""
    if said := os.environ.get("GLOO_SOCKET_IFNAME"):
        return said
    try:
        here = address_towards(address)
    except OSError:
        return None
    return next((name for _, name in socket.if_nameindex() if here in _addresses(name)), None)


def _addresses(interface: str) -> list[str]:
    found = []
    with contextlib.suppress(FileNotFoundError):  # a kernel without IPv6
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, name = line.split()
            if name == interface:
                found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits)))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            answer = fcntl.ioctl(asking, SIOCGIFADDR, struct.pack("256s", interface.encode()))
        except OSError:  # it has none
            return found
    return [*found, socket.inet_ntoa(answer[20:24])]
