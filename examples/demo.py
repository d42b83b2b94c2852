"""Five trainings of one example under horovodrun, alike but for the compression, and what came of them.

Writes table.md, results.json, demo.png and a log of each training to build/demo/ (torch) or build/demo-keras/, and
everything to MLflow (mlflow.db).
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MLFLOW_URI = f"sqlite:///{ROOT / 'mlflow.db'}"

SCRIPTS = {  # their names are those of MLflow's experiments, too
    "torch": ROOT / "examples" / "pytorch" / "pytorch_mnist.py",
    "keras": ROOT / "examples" / "keras" / "keras_mnist.py",
}
FOLDERS = {"torch": ROOT / "build" / "demo", "keras": ROOT / "build" / "demo-keras"}
RUNS = {
    "plain Horovod": ["--compression", "none"],
    "PowerSGD, relaxed only": ["--compression", "powersgd", "--level", "relaxed"],
    "PowerSGD, critical only": ["--compression", "powersgd", "--level", "critical"],
    "Accordion over PowerSGD": ["--compression", "accordion-powersgd"],
    "Accordion over TopK": ["--compression", "accordion-topk"],
}
ENVIRONMENT = {  # the same for all
    "HOROVOD_CYCLE_TIME": "1",  # ms, Horovod's default
    "OMPI_MCA_mpi_yield_when_idle": "1",  # two ranks have four busy threads; MPI must not spin while it waits
    "OMP_NUM_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",  # horovodrun imports TensorFlow where there is one
    "TF_ENABLE_ONEDNN_OPTS": "0",
}
TAG = re.compile(r"\[[\d,]+\]<std(?:out|err)>:")  # what horovodrun puts before each write of a rank
BAR = re.compile(r"\d+%\|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--framework", choices=SCRIPTS, default="torch")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--np", type=int, default=2, help="ranks")
    parser.add_argument("--timeout", type=float, default=150.0, help="seconds that one training may take")
    args = parser.parse_args()

    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: sys.exit("demo: interrupted"))
    begin = time.perf_counter()
    script, out = SCRIPTS[args.framework], FOLDERS[args.framework]
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")  # held until this process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"demo: another one is running and writes to {out}")
    client, experiment = mlflow_experiment(script.stem)
    results = {}
    for i, (name, arguments) in enumerate(RUNS.items(), 1):
        print(f"[{i}/{len(RUNS)}] {name}", flush=True)
        arguments = [*arguments, "--seed", str(args.seed), "--epochs", str(args.epochs)]
        results[name] = train(name, script, arguments, args.np, args.timeout, out)

    text = table(results)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    (out / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    draw(results, out)
    log_demo(client, experiment, results, out)
    total = time.perf_counter() - begin
    print(f"\n{text}\n\n{args.epochs} epochs, {args.np} ranks, seed {args.seed}; {total:.0f} s in all")
    print(f"Written to {out.relative_to(ROOT)}/ (table.md, results.json, demo.png) and {MLFLOW_URI}: make ui")


def train(name: str, script: Path, arguments: list[str], ranks: int, timeout: float, out: Path) -> dict[str, Any]:
    """One training in a session of its own, of which nothing is left at the end, however it ends."""
    stem = re.sub(r"\W+", "-", name.lower())
    history, log = out / f"{stem}.json", out / f"{stem}.log"
    horovodrun = Path(sys.executable).with_name("horovodrun")
    command = [str(horovodrun), "-np", str(ranks), sys.executable, str(script), *arguments]
    command += ["--history", str(history), "--mlflow-uri", MLFLOW_URI, "--run-name", name]
    begin = time.monotonic()
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.PIPE,
            env={**os.environ, **ENVIRONMENT},
            cwd=ROOT,
            start_new_session=True,
        )
        timer = threading.Timer(timeout, stop, [process])
        timer.start()
        try:
            show(process.stderr, file)
            code = process.wait()
        finally:
            timer.cancel()
            stop(process)
    lines = [TAG.sub("", line) for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    found = [line for line in lines if line.startswith('{"accuracy"')]
    if code or not found:
        late = time.monotonic() - begin >= timeout
        why = f"took longer than {timeout:g} s" if late else f"ended with exit status {code}"
        sys.exit(f"demo: the training {name!r} {why}; its output is above and in {log}")
    return {"command": command[1:], **json.loads(found[-1]), **json.loads(history.read_text(encoding="utf-8"))}


def show(stream: Any, log: Any) -> None:
    """Passes stderr on without tags: the progress bar in one line that renews itself, or its end where none looks."""
    live, bar, width = sys.stderr.isatty(), "", shutil.get_terminal_size().columns - 1
    for line in lines_of(stream):
        if BAR.search(line):
            bar = line
            sys.stderr.write(f"\r{bar[:width]}" if live else "")
        else:
            os.write(log.fileno(), line.encode() + b"\n")
            sys.stderr.write(f"\n{line}\n" if live and bar else f"{line}\n")
        sys.stderr.flush()
    sys.stderr.write("\n" if live else f"{bar}\n" if bar else "")


def lines_of(stream: Any) -> Iterator[str]:
    """What comes between returns and newlines, without tags, as soon as it is complete."""
    rest = b""
    while chunk := os.read(stream.fileno(), 65536):
        *done, rest = re.split(rb"[\r\n]", rest + chunk)
        yield from filter(None, (TAG.sub("", part.decode(errors="replace")).rstrip() for part in done))
    if rest:
        yield TAG.sub("", rest.decode(errors="replace"))


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends all that the process started: mpirun gives each rank a process group, but they stay in the session."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 5
        for pid in session(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)
        while session(process.pid):
            process.poll()
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        else:
            return


def session(leader: int) -> list[int]:
    """Processes of the session that began with `leader`."""
    members = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(int(pid)) == leader:
                members.append(int(pid))
    return members


def table(results: dict[str, dict[str, Any]]) -> str:
    """In Markdown, legible as it stands."""
    rows = [["run", "test accuracy", "MB sent per rank", "times less than dense", "seconds"]]
    for name, r in results.items():
        less = r["dense_bytes"] / r["sent_bytes"] if r["sent_bytes"] else 1.0
        numbers = [f"{r['accuracy']:.1%}", f"{r['sent_bytes'] / 1e6:,.1f}", f"{less:,.1f}", f"{r['seconds']:.1f}"]
        rows.append([name, *numbers])
    first, *others = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [[row[0].ljust(first), *(cell.rjust(w) for cell, w in zip(row[1:], others, strict=True))] for row in rows]
    lines.insert(1, ["-" * first, *("-" * (w - 1) + ":" for w in others)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def draw(results: dict[str, dict[str, Any]], out: Path) -> None:
    from hvd_accordion.tracking.figures import demo_figure

    curves = {name: [(sent / 1e6, accuracy) for sent, accuracy in r["points"]] for name, r in results.items()}
    regimes = {name: r["regimes"] for name, r in results.items() if any(r["regimes"])}
    demo_figure(curves, regimes).savefig(out / "demo.png", dpi=120)


def mlflow_experiment(name: str) -> tuple[Any, str]:
    """MLflow's client and the experiment of all runs; makes the database before two processes might."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    client = MlflowClient(MLFLOW_URI)
    known = client.get_experiment_by_name(name)
    return client, known.experiment_id if known else client.create_experiment(name, (ROOT / "mlruns").as_uri())


def log_demo(client: Any, experiment: str, results: dict[str, dict[str, Any]], out: Path) -> None:
    run = client.create_run(experiment, run_name="demo").info.run_id
    for name, r in results.items():
        for key in ("accuracy", "sent_bytes", "dense_bytes", "seconds", "critical_fraction"):
            client.log_metric(run, f"{re.sub(r',', '', name)}/{key}", r[key])
    for file in ("table.md", "results.json", "demo.png"):
        client.log_artifact(run, str(out / file))
    client.set_terminated(run)


if __name__ == "__main__":
    main()
