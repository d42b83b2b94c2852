"""What only real ranks can show: each case is a pytest file of workers/, run on every rank by horovodrun."""

import re
import sys
import time

import pytest
from launcher import horovodrun, marked, worker

from hvd_accordion.cli import reference_model

pytestmark = pytest.mark.parallel


@pytest.mark.smoke
def test_plain_is_horovod():
    worker("torch/plain", ranks=2)


def test_trajectories_are_as_recorded():
    worker("torch/golden", ranks=2)
    worker("tensorflow/keras_golden", ranks=2, timeout=400)


def test_scripts_of_users():
    worker("torch/differential", ranks=2, transport="gloo", timeout=240)
    worker("tensorflow/differential", ranks=2, timeout=500)


@pytest.mark.parametrize(("ranks", "transport"), [(2, "mpi"), (2, "gloo"), (4, "mpi"), (4, "gloo")])
def test_specs(ranks, transport):
    worker("torch/specs", ranks, transport, timeout=300)


@pytest.mark.parametrize(("ranks", "transport"), [(2, "gloo"), (4, "mpi")])
def test_optimizer(ranks, transport):
    worker("torch/optimizer", ranks, transport, timeout=300)


@pytest.mark.parametrize(("ranks", "transport"), [(2, "gloo"), (4, "mpi")])
def test_eclk(ranks, transport):
    worker("torch/eclk", ranks, transport, timeout=300)


def test_eclk_in_tensorflow():
    worker("tensorflow/eclk", ranks=2, timeout=300)
    worker("tensorflow/eclk", ranks=4, timeout=400, only="trajectory and eclk-powersgd")


def test_norms():
    worker("torch/norms", ranks=2)
    worker("tensorflow/keras_norms", ranks=2, timeout=300)


def test_batch_size():
    worker("torch/batch_size", ranks=2)


@pytest.mark.parametrize(("ranks", "transport"), [(2, "gloo"), (3, "mpi")])
def test_uneven_inputs(ranks, transport):
    worker("torch/uneven", ranks, transport, timeout=300)


def test_keras_batch_size():
    worker("tensorflow/keras_batch_size", ranks=2, timeout=300)


def test_auto():
    worker("torch/auto", ranks=2, transport="gloo")


def test_keras_auto():
    worker("tensorflow/keras_auto", ranks=2, timeout=300)


def test_hot_path():
    worker("torch/hot_path", ranks=2)


@pytest.mark.parametrize("ranks", [2, 3])
def test_errors(ranks):
    worker("torch/errors", ranks)


def test_checkpoint(tmp_path):
    worker("torch/checkpoint_save", ranks=2, CHECKPOINTS=str(tmp_path))
    worker("torch/checkpoint_resume", ranks=2, CHECKPOINTS=str(tmp_path))


def test_logging(tmp_path):
    worker("torch/logging_run", ranks=2, LOGS=str(tmp_path))


def test_traffic():
    # Horovod's ranks talk once a cycle, sent or not: few cycles, or a slow machine counts too much of that
    worker("torch/traffic", ranks=2, transport="gloo", HOROVOD_CYCLE_TIME="20")


@pytest.mark.smoke
@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_every_name_of_horovod(framework):
    worker(f"{framework}/horovod_names", ranks=2, timeout=300, HOROVOD_TIMELINE="DYNAMIC")


def test_keras_plain():
    worker("tensorflow/plain", ranks=2, timeout=300)


def test_keras_specs():
    worker("tensorflow/keras_specs", ranks=2, transport="gloo", timeout=400)


def test_keras_specs_of_four_ranks():
    worker("tensorflow/keras_specs", ranks=4, timeout=400, only="bit_equal_after or simulated or conserved")


@pytest.mark.parametrize(("ranks", "transport"), [(2, "gloo"), (3, "mpi")])
def test_keras_optimizer(ranks, transport):
    worker("tensorflow/keras_optimizer", ranks, transport, timeout=400)


def test_keras_errors():
    worker("tensorflow/keras_errors", ranks=2, timeout=300)


def test_keras_checkpoint(tmp_path):
    worker("tensorflow/keras_checkpoint_save", ranks=2, timeout=300, CHECKPOINTS=str(tmp_path))
    worker("tensorflow/keras_checkpoint_resume", ranks=2, timeout=300, CHECKPOINTS=str(tmp_path))


def test_keras_logging(tmp_path):
    worker("tensorflow/keras_logging", ranks=2, LOGS=str(tmp_path))


def test_keras_traffic():
    worker("tensorflow/keras_traffic", ranks=2, transport="gloo", HOROVOD_CYCLE_TIME="20")


def test_torch_and_tensorflow_come_to_the_same_weights(tmp_path):
    worker("torch/parity_torch", ranks=2, PARITY=str(tmp_path))
    worker("tensorflow/parity_tensorflow", ranks=2, PARITY=str(tmp_path))


CHECK = ["-m", "hvd_accordion", "check", "--parameters", "1e5"]


@pytest.mark.parametrize(("framework", "transport"), [("torch", "gloo"), ("tensorflow", "mpi")])
def test_check(framework, transport):
    output = horovodrun([sys.executable, *CHECK, "--framework", framework], 2, transport)
    assert output.count("Software") == 1 and "Nothing is broken." in output  # rank 0 alone prints
    # the machine's own memory, on a busy machine, may seem to take no longer for more bytes
    speed = r"(?:([\d,]+) Mbit/s|too fast to be told)"
    link = re.search(rf"{speed}, ([\d.]+) ms a collective, 2 ranks, by {framework}", output)
    assert link and float((link[1] or "inf").replace(",", "")) > 10 and 0 < float(link[2]) < 1000, output
    assert "the same versions and settings on all 2" in output and ": 2 of 2 ranks" in output
    steps = re.findall(
        r"(Dense\(\)|PowerSGD\(rank=4\)|TopK\(ratio=0.01\)) +([\d.,]+) +([\d.,]+) +([\d.,]+) +([\d.]+)", output
    )
    assert [step[0] for step in steps] == ["Dense()", "PowerSGD(rank=4)", "TopK(ratio=0.01)"]
    assert float(steps[0][4]) == pytest.approx(
        4e-6 * reference_model.size_of(reference_model.layers(100_000)), abs=0.01
    )  # MB, of two ranks
    assert len(re.findall(r"would (?:not )?pay", output)) == 1


def test_check_where_a_rank_fails():
    code = """
import sys
from hvd_accordion.cli import check, main, ranks
from hvd_accordion.launchers import launched
def fail(names, resolve):
    raise MemoryError("no room")
if launched(check.os.environ).rank == 1:
    ranks.surroundings.unresolved = fail
check.software.binding = lambda name: check.launcher()
sys.exit(main(["check", "--framework", "torch"]))
"""
    with pytest.raises(AssertionError, match=r"exit status [1-9]") as ended:
        horovodrun([sys.executable, "-c", code], 2, "gloo", timeout=60)
    output = str(ended.value)
    assert "rank 1: MemoryError: no room" in output
    assert (
        "broken  link" in output and "Something is broken" in output and "Traceback" not in output.split("Something")[0]
    )


@pytest.mark.parametrize("transport", ["mpi", "gloo"])
def test_a_hang_fails_and_leaves_nothing_behind(transport):
    """The launcher itself: a rank that never comes to its collective."""
    hang = "import time, hvd_accordion.torch as hvd; hvd.init(); hvd.rank() or time.sleep(600); hvd.barrier()"
    begin = time.monotonic()
    with pytest.raises(AssertionError, match="not done after"):
        horovodrun([sys.executable, "-c", hang], 2, transport, timeout=12, HVD_ACCORDION_TEST_HANG=transport)
    assert time.monotonic() - begin < 30
    assert not marked(transport, "HVD_ACCORDION_TEST_HANG")
