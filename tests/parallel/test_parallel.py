"""What only real ranks can show: each case is a pytest file of workers/, run on every rank; several share a start."""

import os
import re
import sys
import time

import pytest

from hvd_accordion.cli import reference_model
from tests.parallel.launcher import WORKERS, horovodrun, marked
from tests.parallel.starts import Case, Starts

pytestmark = pytest.mark.parallel

SMOKE = ("torch/plain", "torch/horovod_names", "tensorflow/horovod_names")
IN_ONE_TRACE = "layer_of_its_own or simulated or conserved"  # every spec, without a model for each
# cases of one framework, number of ranks and transport share a start, in this order
CASES = [
    *(
        Case(f"torch/{file}")
        for file in "plain horovod_names specs local_steps norms batch_size hot_path errors logging_run".split()
        + "differential golden checkpoint_save parity_torch".split()
    ),
    *(Case(f"torch/{file}", transport="gloo") for file in "specs optimizer eclk one_bit_adam uneven auto".split()),
    Case("torch/checkpoint_resume", transport="gloo", after=("torch/checkpoint_save",)),
    # Horovod's ranks talk once a cycle, sent or not: few cycles, or a slow machine counts too much of that
    Case("torch/traffic", transport="gloo", cycle_time="20"),
    *(Case(f"torch/{file}", ranks=3) for file in ("errors", "uneven")),
    *(Case(f"torch/{file}", ranks=4) for file in ("specs", "optimizer", "eclk")),
    Case("torch/local_steps", ranks=4, only="muon or simulated"),
    Case("torch/specs", ranks=4, transport="gloo"),
    *(
        Case(f"tensorflow/{file}")
        for file in "horovod_names plain keras_norms keras_batch_size keras_auto keras_errors keras_logging".split()
        + "eclk differential keras_specs keras_optimizer keras_golden keras_checkpoint_save".split()
    ),
    Case("tensorflow/parity_tensorflow", after=("torch/parity_torch",)),
    Case("tensorflow/keras_specs", transport="gloo", only=IN_ONE_TRACE),
    Case("tensorflow/keras_one_bit_adam", transport="gloo"),
    Case(
        "tensorflow/keras_optimizer", transport="gloo", only="dtypes or process_set or precision or memory or policies"
    ),
    Case("tensorflow/keras_checkpoint_resume", transport="gloo", after=("tensorflow/keras_checkpoint_save",)),
    Case("tensorflow/keras_traffic", transport="gloo", cycle_time="20"),
    Case("tensorflow/keras_optimizer", ranks=3),
    Case("tensorflow/eclk", ranks=4, only="trajectory and eclk-powersgd"),
    Case("tensorflow/keras_specs", ranks=4, only=IN_ONE_TRACE),
]


def test_no_worker_file_is_left_out():
    files = {f"{file.parent.name}/{file.stem}" for file in WORKERS.glob("t*/*.py") if "\ndef test_" in file.read_text()}
    assert files - {case.file for case in CASES} == {"torch/logging_stopped"}  # tests/tracking starts it
    assert {case.file for case in CASES} <= files


@pytest.fixture(scope="session")
def starts(request, tmp_path_factory):
    """Of the cases that this session runs."""
    folder = tmp_path_factory.mktemp("starts")
    cases = [item.callspec.params["case"] for item in request.session.items if "starts" in item.fixturenames]
    folders = {name: str(folder) for name in ("CHECKPOINTS", "LOGS", "PARITY")}
    golden = {} if "GOLDEN_WHOLE" in os.environ else {"GOLDEN_SUBSET": "1"}
    starts = Starts(cases, folder, {**folders, **golden, "HOROVOD_TIMELINE": "DYNAMIC"})
    yield starts
    starts.finish()


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=[pytest.mark.smoke] * (case.file in SMOKE)) for case in CASES]
)
def test_on_ranks(case, starts):
    starts.check(case)


CHECK = ["-m", "hvd_accordion", "check", "--parameters", "1e5"]


@pytest.mark.parametrize(("framework", "transport"), [("torch", "gloo"), ("tensorflow", "mpi")])
def test_check(framework, transport):
    output = horovodrun([sys.executable, *CHECK, "--framework", framework], 2, transport)
    assert output.count("Software") == 1 and "Nothing is broken." in output  # rank 0 alone prints
    # the machine's own memory, on a busy machine, may seem to take no longer for more bytes
    speed = r"(?:([\d,]+) Mbit/s|bandwidth too high to measure)"
    link = re.search(rf"{speed}, ([\d.]+) ms per collective, 2 ranks, by {framework}", output)
    assert link and float((link[1] or "inf").replace(",", "")) > 10 and 0 < float(link[2]) < 1000, output
    assert "the same versions and settings on all 2" in output and ": 2 of 2 ranks" in output
    steps = re.findall(
        r"(Dense\(\)|PowerSGD\(rank=4\)|TopK\(ratio=0.01\)) +([\d.,]+) +([\d.,]+) +([\d.,]+) +([\d.]+)", output
    )
    assert [step[0] for step in steps] == ["Dense()", "PowerSGD(rank=4)", "TopK(ratio=0.01)"]
    assert float(steps[0][4]) == pytest.approx(
        4e-6 * reference_model.size_of(reference_model.layers(100_000)), abs=0.01
    )  # MB, of two ranks
    assert len(re.findall(r"would (?:not )?be faster", output)) == 1


def test_check_where_a_rank_fails():
    code = """
import sys
from hvd_accordion.cli import check, main, ranks
from hvd_accordion.comm.launchers import launched
def fail(names, resolve):
    raise MemoryError("no room")
if launched(check.os.environ).rank == 1:
    ranks.environment.unresolved = fail
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
