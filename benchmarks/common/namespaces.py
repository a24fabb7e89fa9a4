"""Two hosts on one machine: network namespaces joined by a pair of virtual interfaces.

They need Linux, root (or CAP_SYS_ADMIN and CAP_NET_ADMIN) and iproute2. Traffic between the hosts
stays on their link. Neither can the rest of the machine be reached from inside, nor the hosts from
outside.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

_CLONE_NEWNET = 0x40000000
_LIMIT_S = 20.0
_numbers = itertools.count()


@dataclass(frozen=True)
class Host:
    """One of the two hosts: a namespace with one interface, which leads to the other host."""

    namespace: str
    interface: str
    address: str

    def enter(self) -> None:
        """Moves the calling thread, and threads that it starts from now on, to this host."""
        libc = ctypes.CDLL(None, use_errno=True)
        handle = os.open(f"/run/netns/{self.namespace}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if libc.setns(handle, _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"cannot enter namespace {self.namespace}")
        finally:
            os.close(handle)
        os.environ["GLOO_SOCKET_IFNAME"] = self.interface
        os.environ["FASTDDP_HOST_ID"] = self.namespace

    def bytes_sent(self) -> int:
        """Returns the number of bytes sent over the link so far, including headers."""
        links = json.loads(
            _ip("-json", "-stats", "link", "show", self.interface, of=self.namespace)
        )
        sent: int = links[0]["stats64"]["tx"]["bytes"]
        return sent

    def unplug(self) -> None:
        """Takes the link down, for both hosts."""
        _ip("link", "set", self.interface, "down", of=self.namespace)


def why_not() -> str | None:
    """Returns the reason why two hosts cannot be made here; None if they can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if shutil.which("ip") is None:
        return "there is no ip (iproute2)"
    try:
        with two_hosts():
            return None
    except RuntimeError as error:
        return str(error)


@contextlib.contextmanager
def two_hosts(mbit: int | None = None) -> Iterator[tuple[Host, Host]]:
    """Makes two hosts, and removes them at the end of the block.

    Args:
        mbit: the speed of the link in Mbit/s, in each direction; None for no limit.

    Raises:
        RuntimeError: if the system does not permit it; the message holds the command's output.
    """
    stem = f"fd{os.getpid()}-{next(_numbers)}"  # interfaces have names of at most 15 characters
    hosts = (Host(f"{stem}a", f"{stem}a", "10.98.0.1"), Host(f"{stem}b", f"{stem}b", "10.98.0.2"))
    with contextlib.ExitStack() as stack:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            stack.callback(_ip, "netns", "delete", host.namespace)
        here, there = hosts
        peer = ("peer", "name", there.interface, "netns", there.namespace)
        _ip("link", "add", here.interface, "type", "veth", *peer, of=here.namespace)
        for host in hosts:
            name = host.interface
            # With an IPv6 address the kernel would send packets of its own, which would be counted.
            _ip("link", "set", name, "addrgenmode", "none", of=host.namespace)
            _ip("addr", "add", f"{host.address}/24", "dev", name, of=host.namespace)
            _ip("link", "set", name, "up", of=host.namespace)
            _ip("link", "set", "lo", "up", of=host.namespace)
            if mbit is not None:
                burst_kib = max(128, mbit // 8)  # at least the bytes of a millisecond
                shape = f"tbf rate {mbit}mbit burst {burst_kib}kb latency 50ms"
                command = f"qdisc add dev {name} root {shape}"
                _run("tc", "-netns", host.namespace, *command.split())
        yield hosts


def _ip(*arguments: str, of: str | None = None) -> str:
    return _run("ip", *(() if of is None else ("-netns", of)), *arguments)


def _run(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_LIMIT_S, check=False
        )
    except OSError as error:
        raise RuntimeError(f"{command[0]}: {error}") from error
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
