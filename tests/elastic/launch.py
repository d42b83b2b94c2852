"""Starts an elastic job as `horovodrun --gloo --host-discovery-script` does, without its two imports of TensorFlow.

launch.py HOSTS_FILE MIN MAX COMMAND...: the file holds a host a line, each good for one worker.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from pathlib import Path


def main(hosts: Path, least: int, most: int, command: list[str]) -> None:
    from horovod.runner.common.util import secret, timeout
    from horovod.runner.elastic import driver
    from horovod.runner.elastic.discovery import HostDiscovery
    from horovod.runner.elastic.settings import ElasticSettings
    from horovod.runner.gloo_run import gloo_run_elastic

    class Discovery(HostDiscovery):
        def find_available_hosts_and_slots(self) -> dict[str, int]:
            return dict.fromkeys(hosts.read_text().split(), 1)

    faulthandler.register(signal.SIGUSR1)
    driver.DISCOVER_HOSTS_FREQUENCY_SECS = 0.3  # of 1
    settings = ElasticSettings(
        Discovery(),
        least,
        most,
        elastic_timeout=60,
        reset_limit=None,
        num_proc=len(hosts.read_text().split()),
        verbose=0,
        key=secret.make_secret_key(),
        start_timeout=timeout.Timeout(60, "Timed out waiting for {activity}."),
        run_func_mode=False,
        nics={"lo"},
    )
    gloo_run_elastic(settings, dict(os.environ), command, sys.executable)


if __name__ == "__main__":  # what it spawns imports this file anew
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
