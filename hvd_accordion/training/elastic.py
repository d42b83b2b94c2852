"""Elastic training: whether ranks may come and go in this job, and what does not work there."""

from __future__ import annotations

import os


def active() -> bool:
    """Whether Horovod's launcher started this process as one of an elastic job.

    Nothing collective may happen then before the state's `sync`: a rank that has just come makes its objects while the
    others are in theirs.
    """
    return os.environ.get("HOROVOD_ELASTIC") == "1"


def check_process_set(process_set: object, everyone: object) -> None:
    """ValueError where an elastic job's optimizer is to exchange among some of the ranks, who would not stay the same."""
    if active() and process_set is not everyone:
        raise ValueError(
            f"process_set must be hvd.global_process_set in elastic training, where ranks change, got {process_set}"
        )


def refuse(what: str, why: str) -> None:
    """ValueError in an elastic job for what can't follow a change of the ranks."""
    if active():
        raise ValueError(f"{what} does not work in elastic training: {why}")


def unsynchronised(what: str, state: str) -> RuntimeError:
    """Raised by an optimizer that is to exchange in an elastic job before its place among the ranks is known."""
    return RuntimeError(
        f"in elastic training {what} must be part of {state} of this package, and train in a function decorated with "
        "@hvd.elastic.run that this state is handed to"
    )
