"""`check`: examines one process, and measures the link if there are several ranks. Only rank 0 prints."""

from __future__ import annotations

import os
import shutil
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec

from hvd_accordion.cli import environment, ranks, reference_model, software
from hvd_accordion.cli.findings import Finding, Verdict, broken, text
from hvd_accordion.comm.launch import YIELD, available_cores, yields
from hvd_accordion.comm.launchers import launched

FRAMEWORKS = ("torch", "tensorflow")
MEASURE = "to measure the link: horovodrun -np 2 -H host1:1,host2:1 python -m hvd_accordion check"


def main(parameters: int, backward: float, framework: str | None, hosts: str) -> int:
    """Prints the findings and returns 1 if something is broken, otherwise 0."""
    process = launched(os.environ)
    rank, size = process.rank, process.size
    failed = False

    def show(title: str, findings: Sequence[Finding]) -> None:
        nonlocal failed
        failed = failed or broken(findings)
        if rank == 0:
            print(f"{title}\n{text(findings)}\n", flush=True)

    if rank == 0:
        show("Software", software.versions(software.installed_versions(), software.required_versions()))
        show("Settings", environment.variables(os.environ))
        show("Machine", machine(hosts))
    if size > 1:
        check_ranks(rank, size, parameters, backward, framework, show)
    elif rank == 0:
        show("Ranks", [Finding(Verdict.NOTE, "link", "not measured: this is one rank", MEASURE)])
    if rank == 0:  # last, because importing frameworks takes seconds
        bindings = [software.binding(name) for name in FRAMEWORKS if find_spec(name) and find_spec("horovod")]
        show("Horovod", [launcher(), *bindings])
        print("Something is broken: see above." if failed else "Nothing is broken.", flush=True)
    return int(failed)


def check_ranks(
    rank: int, size: int, parameters: int, backward: float, framework: str | None, show: Callable[..., None]
) -> None:
    """Compares the ranks and measures the link between them. A collective call: every rank must make it."""
    chosen = framework or next((name for name in FRAMEWORKS if find_spec(name)), FRAMEWORKS[0])
    missing = [name for name in (chosen, "horovod") if not find_spec(name)]
    if missing:
        show("Ranks", [Finding(Verdict.BROKEN, "link", f"not measured: {' and '.join(missing)} not installed")])
        return
    network = reference_model.layers(parameters)
    try:
        survey = ranks.survey(chosen, network, reference_model.choices(network, size))
    except Exception as error:  # Horovod has no common class for an extension that does not fit and a rank that fails
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        if rank:
            print(f"rank {rank}: {reason}", file=sys.stderr)
        show("Ranks", [Finding(Verdict.BROKEN, "link", f"not measured: {reason}")])
        return
    show("Ranks", [*ranks.compare(survey), ranks.link(survey.measured, chosen)])
    if rank == 0:
        overlapped, exposed = (reference_model.predict(network, survey.measured, s) for s in (backward, 0.0))
        millions = reference_model.size_of(network) / 1e6
        print(f"A network like ResNet-18: {millions:,.3g} M parameters, backward {1e3 * backward:,.0f} ms")
        print(reference_model.prediction_table(network, overlapped, exposed))
        print(text([reference_model.verdict(overlapped, exposed, backward)]), end="\n\n", flush=True)


def machine(hosts: str) -> list[Finding]:
    """Checks host names, cores and load of this machine."""
    cores = available_cores()
    threads = environment.threads_of(os.environ, cores)
    return [
        environment.own_name(socket.gethostname(), environment.addresses),
        *environment.named_hosts(hosts, environment.addresses),
        Finding(Verdict.NOTE, "cores", f"{cores}; a rank computes with {threads} thread{'s' * (threads != 1)}"),
        environment.load(os.getloadavg()[0], cores),
        *yield_setting(os.environ, cores),
    ]


def yield_setting(environ: Mapping[str, str], cores: int) -> list[Finding]:
    """Reports what `init` will set for ranks of Open MPI that have fewer than two cores each."""
    found = f"1, set by hvd_accordion's init(): each rank has fewer than two of {cores} core{'s' * (cores != 1)}"
    return [Finding(Verdict.NOTE, YIELD, found)] if yields(environ, cores) else []


def launcher() -> Finding:
    """Looks for mpirun."""
    found = shutil.which("mpirun")
    return Finding(Verdict.NOTE, "mpirun", found or "not on the PATH: horovodrun uses Gloo")
