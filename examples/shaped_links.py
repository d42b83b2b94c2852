"""Where a training's ranks run: on this machine, or on hosts whose links are shaped."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import launching
from link_seconds import LINKS, LOCAL

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks"))
import hosts


class Ranks:
    """Starts ranks, over any of `links`: network namespaces, which need root and iproute2, or this machine alone.

    Args:
        network: hosts, as many as ranks; None if they can't be made.
        folder: for the script that mpirun uses as ssh.
    """

    def __init__(self, count: int, network: hosts.Network | None, folder: Path) -> None:
        self.count, self.network = count, network
        self.links = [*LINKS] if network else [LOCAL]
        self._agent = hosts.write_agent(network, folder) if network else None

    def start(self, link: str) -> tuple[list[str], dict[str, str]]:
        """The words before a command that start it on every rank over this link, and its environment."""
        rate = LINKS[link]
        if rate is None:
            return launching.local(self.count), {}
        assert self.network and self._agent
        self.network.set_rate(f"{rate:.0f}bit")
        words = self.network.command(0, hosts.mpirun(self.network, self._agent))
        return words, hosts.environment(cycle_time=1.0)


@contextlib.contextmanager
def ranks(count: int) -> Iterator[Ranks]:
    """Ranks on this machine, and on hosts of their own if these can be made; otherwise a line says why not."""
    with contextlib.ExitStack() as stack:
        network, folder = None, stack.enter_context(tempfile.TemporaryDirectory(prefix="ranks-"))
        try:
            network = stack.enter_context(hosts.hosts(count))
            network.burst = "80kb"  # a step's bytes must not pass as one unshaped burst
        except SystemExit as why:
            if not str(why).startswith("hosts:"):
                raise
            print(f"Seconds over links can't be measured ({why})")
        yield Ranks(count, network, Path(folder))
