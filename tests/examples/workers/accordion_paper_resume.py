"""Run by horovodrun: trainings of accordion_paper that are cut off in their third epoch come to the same end, bit for bit.

accordion_paper_resume.py EXAMPLES FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

EXAMPLES, FOLDER = map(Path, sys.argv[1:])
sys.path.insert(0, str(EXAMPLES))

import torch  # noqa: E402
from accordion_paper import experiments, training  # noqa: E402

import hvd_accordion.torch as hvd  # noqa: E402

torch.set_num_threads(1)
EXACT = ("settings", "value", "floats", "sent_bytes", "dense_bytes", "critical_fraction", "regimes")
real_task, real_epoch, works = training.task, training.train_epoch, []


def kept_task(*args):
    works.append(real_task(*args))
    return works[-1]


def cut_off(run, work, optimizer, epoch, bar):
    if epoch == 2:
        raise KeyboardInterrupt
    return real_epoch(run, work, optimizer, epoch, bar)


training.task = kept_task
for run in experiments.runs("tiny", only="*/accordion/1", epochs=3):
    whole = training.train(run, FOLDER / "whole")
    again = FOLDER / "again"
    training.train_epoch = cut_off
    try:
        training.train(run, again)
    except KeyboardInterrupt:
        pass
    else:
        raise AssertionError("was not cut off")
    training.train_epoch = real_epoch
    assert not (again / f"{run.stem}.json").exists()
    mine = sorted((again / run.stem).glob(f"{hvd.rank()}-*.pt"))
    assert [file.stem for file in mine] == [f"{hvd.rank()}-1", f"{hvd.rank()}-2"]
    if hvd.rank() == 1 and run.experiment.family == "powersgd":
        mine[1].unlink()  # it did not come so far: all go on after the first epoch
    hvd.barrier()
    resumed = training.train(run, again)
    assert {key: resumed[key] for key in EXACT} == {key: whole[key] for key in EXACT}, run.name
    if hvd.rank() == 0:
        assert json.loads((again / f"{run.stem}.json").read_text()) == json.loads(json.dumps(resumed))
    hvd.barrier()
    assert not (again / run.stem).exists()
    state = dict(works[-1].network.state_dict())
    for name, x in works[-3].network.state_dict().items():
        torch.testing.assert_close(state[name], x, rtol=0, atol=0)
        both = hvd.allgather(x.reshape(1, -1), name=name)
        torch.testing.assert_close(both[0], both[1], rtol=0, atol=0)
    print(f"same: {run.name}", flush=True)
