"""gloo_ranks.py N COMMAND...: N ranks on this host over Gloo, as `horovodrun --gloo` starts them.

horovodrun itself first imports every framework twice, to ask what Horovod was built with; on two cores that takes longer than
most tests. It has tests of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
from horovod.runner.http.http_server import RendezvousServer


def main(size: int, command: list[str]) -> int:
    server = RendezvousServer()
    port = server.start()
    server.init(get_host_assignments(parse_hosts(f"localhost:{size}"), size))
    common = {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        "HOROVOD_GLOO_IFACE": "lo",
        "HOROVOD_HOSTNAME": "localhost",
        "HOROVOD_CROSS_RANK": "0",
        "HOROVOD_CROSS_SIZE": "1",
        **{f"HOROVOD_{of}SIZE": str(size) for of in ("", "LOCAL_")},
    }
    ranks = [
        subprocess.Popen(
            command, env={**os.environ, **common, **{f"HOROVOD_{of}RANK": str(rank) for of in ("", "LOCAL_")}}
        )
        for rank in range(size)
    ]
    try:
        while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
            time.sleep(0.05)
        grace = time.monotonic() + 5  # for the others to say what they met
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < grace:
            time.sleep(0.05)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()
        server.stop()
    return next((abs(rank.returncode) for rank in ranks if rank.returncode), 0)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
