"""The command line: the parts of `check` and `report`, and both as a whole in separate processes."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise

import pytest

from hvd_accordion import Dense, PowerSGD, TopK
from hvd_accordion.cli import check, environment, findings, main, ranks, reference_model, run_report, software
from hvd_accordion.cli.findings import Finding, Verdict
from hvd_accordion.comm.collectives import AllReduce
from hvd_accordion.policy import cost_model
from hvd_accordion.policy.auto import Calibration
from hvd_accordion.policy.cost_model import Link
from hvd_accordion.training.reports import LayerRecord

HOROVOD = find_spec("horovod") is not None
FRAMEWORKS = {"torch", "tensorflow", "keras", "horovod"}
MLFLOW_WARNS = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # MLflow calls deprecated functions of SQLAlchemy


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=200, env=environment)


# arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "--parameters", "12"], r"--parameters must be an integer in \[10000, 200000000\], got 12"),
        (["check", "--parameters", "inf"], "cannot convert float infinity"),
        (["check", "--backward-seconds", "-1"], r"--backward-seconds must be a number in \[0, 3600\], got -1.0"),
        (["check", "--backward-seconds", "nan"], "got nan"),
        (["check", "--framework", "jax"], "invalid choice: 'jax'"),
        (["report"], "the following arguments are required: RUN"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_wrong_arguments_name_what_is_allowed(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [["--help"], ["check", "--help"], ["report", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    code = f"""
import json, sys
from hvd_accordion.cli import main
try:
    main({arguments})
except SystemExit as ended:
    print(json.dumps([ended.code, sorted({{name.split(".")[0] for name in sys.modules}})]))
"""
    done = python("-c", code)
    *shown, last = done.stdout.splitlines()
    status, modules = json.loads(last)
    assert status == 0 and len(" ".join(shown)) > 10
    assert not set(modules) & (FRAMEWORKS | {"mlflow", "matplotlib", "numpy"})


# findings and tables


def test_findings_as_text():
    its = [Finding(Verdict.OK, "torch", "2.13"), Finding(Verdict.BROKEN, "horovod", "missing", "install it")]
    first, second, third = findings.text(its).splitlines()
    assert first.split() == ["ok", "torch", "2.13"] and second.split() == ["broken", "horovod", "missing"]
    assert third.strip() == "-> install it" and third.index("->") == second.index("missing")
    assert findings.broken(its) and not findings.broken(its[:1])


def test_tables_are_aligned():
    lines = findings.table([("name", "n"), ("a", "1"), ("long one", "10,000")]).splitlines()
    assert lines == ["name           n", "a              1", "long one  10,000"]


# software


def test_versions_missing_or_too_old():
    versions = {"python": "3.11.7", "horovod": "0.28.1", "torch": "2.0.1+cpu", "mlflow": "?"}
    found = {x.subject: x for x in software.versions(versions, {"torch": "2.1", "mlflow": "2.9", "horovod": "0.28"})}
    assert found["torch"].verdict is Verdict.BROKEN and "at least 2.1" in found["torch"].advice
    assert found["horovod"].verdict is found["mlflow"].verdict is Verdict.OK
    assert found["tensorflow"].verdict is found["keras"].verdict is Verdict.NOTE
    assert "framework" not in found and "Horovod" not in found


def test_without_horovod_or_any_framework_it_is_broken():
    found = {x.subject: x for x in software.versions({"python": "3.11.7"}, {})}
    assert [name for name, x in found.items() if x.verdict is Verdict.BROKEN] == ["Horovod", "framework"]
    assert found["Horovod"].advice and found["framework"].advice


@pytest.mark.parametrize(
    ("version", "numbers"), [("1.10.2+cpu", (1, 10, 2)), ("2.21.0rc1", (2, 21, 0)), ("0.28", (0, 28)), ("3-dev", (3,))]
)
def test_versions_as_numbers(version, numbers):
    assert software.numbers(version) == numbers


def test_versions_are_compared_as_numbers():
    assert software.numbers("2.9") < software.numbers("2.10")


def test_required_versions_are_those_of_the_packages_own_metadata():
    required = software.required_versions()
    assert {"horovod", "torch", "tensorflow", "mlflow"} <= required.keys()
    assert all(software.numbers(version) > (0,) for version in required.values())


@pytest.mark.parametrize(
    ("features", "gpus", "verdict"),
    [
        (["mpi", "gloo"], 0, Verdict.OK),
        (["gloo", "nccl"], 2, Verdict.OK),
        (["gloo"], 1, Verdict.SLOW),
        (["nccl"], 1, Verdict.BROKEN),
        ([], 0, Verdict.BROKEN),
    ],
)
def test_features_of_horovods_build(features, gpus, verdict):
    finding = software.judge_build("horovod.torch", features, gpus)
    assert finding.verdict is verdict and bool(finding.advice) is (verdict is not Verdict.OK)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise ImportError('undefined symbol: _ZN3c10')", "ImportError: undefined symbol: _ZN3c10"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "ended by SIGSEGV"),
        ("import os; os._exit(3)", "exit status 3"),
        ("import time; time.sleep(60)", "longer than 1.5 s"),
    ],
)
def test_an_extension_that_does_not_fit_gives_one_line(body, reason, tmp_path, monkeypatch):
    package = tmp_path / "horovod"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "torch.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    finding = software.binding("torch", seconds=1.5 if "sleep" in body else 60.0)
    assert finding.verdict is Verdict.BROKEN and reason in finding.found and "\n" not in finding.found


# settings, threads, host names


@pytest.mark.parametrize(
    ("name", "value", "verdict"),
    [
        ("HOROVOD_CYCLE_TIME", "1", Verdict.OK),
        ("HOROVOD_CYCLE_TIME", "5", Verdict.OK),
        ("HOROVOD_CYCLE_TIME", "50", Verdict.SLOW),
        ("HOROVOD_CYCLE_TIME", "fast", Verdict.BROKEN),
        ("HOROVOD_CYCLE_TIME", "-1", Verdict.BROKEN),
        ("HOROVOD_CYCLE_TIME", "nan", Verdict.BROKEN),
        ("HOROVOD_FUSION_THRESHOLD", "0", Verdict.SLOW),
        ("HOROVOD_FUSION_THRESHOLD", "1000000", Verdict.OK),
        ("HOROVOD_CACHE_CAPACITY", "0", Verdict.SLOW),
        ("HOROVOD_STALL_CHECK_DISABLE", "1", Verdict.NOTE),
        ("HOROVOD_AUTOTUNE", "1", Verdict.NOTE),
        ("HOROVOD_DYNAMIC_PROCESS_SETS", "1", Verdict.NOTE),
    ],
)
def test_settings_are_judged(name, value, verdict):
    (finding,) = (x for x in environment.variables({name: value}) if x.subject == name)
    assert finding.verdict is verdict and finding.found == value
    assert bool(finding.advice) is (verdict is not Verdict.OK)


def test_unset_settings_show_horovods_defaults():
    found = environment.variables({})
    assert [x.subject for x in found] == list(environment.DEFAULTS)
    assert all(x.verdict is Verdict.OK and x.found.endswith("(default)") for x in found)


@pytest.mark.parametrize(
    ("ranks", "threads", "cores", "spinning", "advice"),
    [
        (2, 1, 4, True, ""),
        (2, 1, 2, False, ""),
        (2, 1, 2, True, "OMPI_MCA_mpi_yield_when_idle=1"),
        (2, 2, 2, False, "OMP_NUM_THREADS=1"),
        (4, 16, 16, True, "OMP_NUM_THREADS=4"),
        (4, 1, 2, False, "at most 2"),
        (1, 8, 8, False, ""),
    ],
)
def test_more_busy_threads_than_cores(ranks, threads, cores, spinning, advice):
    finding = environment.busy(ranks, threads, cores, spinning)
    assert finding.verdict is (Verdict.SLOW if advice else Verdict.OK)
    assert advice in finding.advice and bool(finding.advice) is bool(advice)


@pytest.mark.parametrize(
    ("given", "threads"), [({}, 8), ({"OMP_NUM_THREADS": "3"}, 3), ({"OMP_NUM_THREADS": "2,1"}, 2)]
)
def test_threads_of_a_rank(given, threads):
    assert environment.threads_of(given, 8) == threads


def test_open_mpis_ranks_spin_by_default():
    ompi = {"OMPI_COMM_WORLD_SIZE": "2"}
    assert environment.spins(ompi) and not environment.spins({})
    assert not environment.spins({**ompi, "OMPI_MCA_mpi_yield_when_idle": "1"})


def test_names_of_hosts():
    table = {"a": ["10.0.0.1", "10.0.0.1"], "home": ["127.0.1.1"]}

    def resolve(name):
        if name not in table:
            raise OSError(name)
        return table[name]

    found = environment.named_hosts("a:2,b:2, home,,a", resolve)
    assert [x.verdict for x in found] == [Verdict.OK, Verdict.BROKEN, Verdict.OK]
    assert found[0].found == "a (10.0.0.1)" and found[1].found.startswith("b: ")
    assert environment.own_name("a", resolve).verdict is Verdict.OK
    assert environment.own_name("home", resolve).verdict is Verdict.NOTE
    assert environment.own_name("b", resolve).verdict is Verdict.SLOW
    assert environment.named_hosts("", resolve) == []


def test_names_of_the_real_resolver():
    assert environment.unresolved(["localhost", "no.such.host.invalid", "x" * 70], environment.addresses) == [
        "no.such.host.invalid",
        "x" * 70,
    ]


# ranks


def rank(host="a", cores=8, threads=1, spinning=False, cycle="1", **packages):
    settings = {**environment.DEFAULTS, "HOROVOD_CYCLE_TIME": cycle}
    return ranks.Rank(host, cores, threads, spinning, {"torch": "2.13", "matplotlib": "3.7", **packages}, settings)


def judged(*its, unresolved=None):
    measured = Calibration(Link(0.0, 1e9), len(its), {}, {})
    return ranks.compare(ranks.Survey(its, unresolved or [[]] * len(its), measured))


def test_check_reports_what_init_will_set():
    started = {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    (finding,) = check.yield_setting(started, 3)
    assert finding.subject == "OMPI_MCA_mpi_yield_when_idle" and "fewer than two of 3 cores" in finding.found
    assert check.yield_setting(started, 4) == [] == check.yield_setting({**started, finding.subject: "0"}, 3)


def test_equal_ranks():
    found = judged(rank(), rank(), rank("b"))
    assert {x.verdict for x in found} == {Verdict.OK, Verdict.NOTE}
    assert [x.found for x in found if x.subject == "host"] == ["a: 2 of 3 ranks", "b: 1 of 3 ranks"]


def test_ranks_that_differ():
    by = {x.subject: x for x in judged(rank(), rank("b", torch="2.12", matplotlib="3.8", cycle="5"))}
    assert by["torch"].verdict is Verdict.BROKEN and by["torch"].found == "2.13 on rank 0 (a), 2.12 on rank 1 (b)"
    assert by["matplotlib"].verdict is Verdict.NOTE
    assert by["HOROVOD_CYCLE_TIME"].verdict is Verdict.SLOW


def test_threads_are_counted_per_host():
    findings_by_host = judged(rank(threads=4), rank(threads=4), rank(threads=4), rank("b", threads=4))
    assert [x.verdict for x in findings_by_host if x.subject == "threads and cores"] == [Verdict.SLOW, Verdict.OK]


def test_a_name_that_another_host_cannot_resolve():
    (finding,) = (x for x in judged(rank(), rank("b"), unresolved=[["b"], []]) if x.verdict is Verdict.SLOW)
    assert finding.found == "b: the name cannot be resolved on a"


@pytest.mark.parametrize(
    ("its", "verdict", "words"),
    [
        (Link(0.0, 125e6, 1e-3), Verdict.OK, "1,000 Mbit/s, 1.00 ms per collective"),
        (Link(0.0, math.inf, 1e-3), Verdict.OK, "bandwidth too high to measure"),
        (Link(0.0, 125e6, 2e-2), Verdict.SLOW, "20.00 ms per collective"),
    ],
)
def test_link_findings(its, verdict, words):
    finding = ranks.link(Calibration(its, 2, {}, {}), "torch")
    assert finding.verdict is verdict and words in finding.found and "by torch" in finding.found


# the reference model


def test_the_reference_model_is_resnet_18():
    its = reference_model.layers()
    assert reference_model.size_of(its) == reference_model.PARAMETERS
    assert sum(len(x.shape) > 1 for x in its) == 21  # 17 convolutions, 3 shortcuts, the last layer
    assert len({x.name for x in its}) == len(its)


@pytest.mark.parametrize("parameters", [10_000, 1_000_000, 60_000_000, 200_000_000])
def test_its_size_follows_the_argument(parameters):
    assert reference_model.size_of(reference_model.layers(parameters)) == pytest.approx(
        parameters, rel=0.35 if parameters < 1e5 else 0.04
    )


def test_gradients_get_ready_from_the_last_layer_to_the_first():
    its = reference_model.layers()
    ready = reference_model.ready_times(its, 0.2)
    times = [ready[x.name] for x in reversed(its)]
    assert times[0] == 0 and times[-1] == pytest.approx(0.2)
    assert all(a < b for a, b in pairwise(times))


def measured(bandwidth: float, gamma: float, n: int = 2) -> Calibration:
    """A link, and compression at `gamma` seconds a value."""
    its = reference_model.layers()
    compression = {(x.name, s): gamma * x.numel for x in its for s in reference_model.choices(its, n).get(x.name, ())}
    return Calibration(Link(0.0, bandwidth, 1e-3), n, {}, compression)


def judgement(m: Calibration, backward: float) -> Finding:
    its = reference_model.layers()
    return reference_model.verdict(*(reference_model.predict(its, m, seconds) for seconds in (backward, 0.0)), backward)


def test_compression_is_faster_on_a_slow_link_only():
    slow, fast = (judgement(measured(bandwidth, 1e-9), 0.1) for bandwidth in (12.5e6, 1e12))
    assert slow.verdict is Verdict.OK and slow.found.startswith("would be faster:")
    assert fast.verdict is Verdict.NOTE and "would not be faster" in fast.found


def test_the_verdict_depends_on_the_overlap():
    wire = 4 * reference_model.PARAMETERS / 0.08  # 80 ms dense, less than the 100 ms of backward
    depends = judgement(measured(wire, 1e-9), 0.1)
    assert depends.verdict is Verdict.NOTE and "only with little overlap" in depends.found
    assert judgement(measured(wire, 1e-9), 0.0).found.startswith("would be faster:")


def test_times_in_the_verdict_are_those_of_the_cost_model():
    m = measured(12.5e6, 0.0)
    dense = 4 * reference_model.PARAMETERS / m.link.bandwidth + cost_model.constant(AllReduce, 2, m.link)
    found = judgement(m, 0.0).found
    best, its, all_dense, faster = re.search(
        r"faster: (.*) takes ([\d,]+) ms .* dense ([\d,]+) ms, ([\d.]+) times", found
    ).groups()
    assert best in map(str, reference_model.CANDIDATES)
    assert float(all_dense.replace(",", "")) == pytest.approx(1e3 * dense, abs=1)
    assert float(faster) == pytest.approx(1e3 * dense / float(its), rel=0.02)


def test_the_prediction_is_the_cost_models():
    its = reference_model.layers()
    m = measured(12.5e6, 1e-9)
    overlapped, exposed = (reference_model.predict(its, m, seconds) for seconds in (0.5, 0.0))
    rows = [
        line.replace(",", "").split()
        for line in reference_model.prediction_table(its, overlapped, exposed).splitlines()[1:]
    ]
    assert [row[0] for row in rows] == [str(spec) for spec in (Dense(), PowerSGD(4), TopK(0.01))]
    (_, overlapped_ms, exposed_ms, work, sent), powersgd, _ = rows
    assert float(sent) == pytest.approx(4e-6 * reference_model.PARAMETERS, abs=0.01) and float(work) == 0
    alone = 1e3 * (4 * reference_model.PARAMETERS / m.link.bandwidth + cost_model.constant(AllReduce, 2, m.link))
    assert float(exposed_ms) == pytest.approx(alone, rel=1e-4)
    assert alone - 500 <= float(overlapped_ms) < alone
    compressed = sum(x.numel for x in its if reference_model.choices([x], 2))
    assert float(powersgd[3]) == pytest.approx(1e3 * 1e-9 * compressed, abs=0.06)
    assert float(powersgd[4]) < 1


def test_a_network_of_small_tensors_only():
    its = [x for x in reference_model.layers() if len(x.shape) == 1]
    bare = reference_model.predict(its, Calibration(Link(0.0, 1e6), 2, {}, {}), 0.0)
    assert len(reference_model.prediction_table(its, bare, bare).splitlines()) == 2  # only dense
    assert "would not be faster" in reference_model.verdict(bare, bare, 0.0).found


# check as a whole


@pytest.mark.skipif(not HOROVOD, reason="needs horovod")
def test_check_in_one_process():
    done = python("-m", "hvd_accordion", "check", "--hosts", "localhost:2")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "not measured: this is one rank" in done.stdout and "Nothing is broken." in done.stdout
    for framework in ("torch", "tensorflow"):
        if find_spec(framework):
            (line,) = (x for x in done.stdout.splitlines() if f"horovod.{framework}" in x)
            assert line.startswith("ok") and "fits; built with" in line


# report


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """An MLflow database, and ids of its runs: two called "twice", and one without windows."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    mlflow = pytest.importorskip("mlflow")
    from hvd_accordion import MLflowLogger

    folder = tmp_path_factory.mktemp("runs")
    uri, ids = f"sqlite:///{folder}/mlflow.db", []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"):
            patch.delenv(name, raising=False)
        for number, (name, adapts) in enumerate([("twice", True), ("twice", True), ("even", False)]):
            logger = MLflowLogger(tracking_uri=uri, run_name=name)
            logger.start({"world_size": 2, "compression": f"number {number} " + "x" * 200})
            for epoch in range(3):
                traffic = {"sent_bytes": 1e6 * (epoch + 1), "dense_bytes": 12e6, "critical_layers": 0.5}
                logger.log_epoch(epoch, {**traffic, "exchange_seconds": 0.0})
                logger.log_metrics({"test_accuracy": 0.9 + epoch / 100}, epoch)
                if adapts:
                    regimes = {"a.weight": "relaxed" if epoch else "critical", "b.weight": "critical"}
                    its = {k: LayerRecord(math.inf, None, v, f"TopK({v})", 4000 + epoch) for k, v in regimes.items()}
                    logger.log_window(epoch, its)
            for step in range(8):
                logger.log_metrics({"loss": 1.0}, step)
            logger.finish()
            ids.append(logger.run_id)
        assert mlflow.MlflowClient(uri).get_run(ids[0]).info.status == "FINISHED"
    return uri, ids


@MLFLOW_WARNS
def test_a_run_as_tables(tracked, tmp_path, monkeypatch, capsys):
    uri, ids = tracked
    monkeypatch.chdir(tmp_path)
    assert main(["report", ids[0], "--tracking-uri", uri, "--out", "pictures/of it"]) == 0
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert f"Run 'twice' ({ids[0]}), FINISHED" in out and "the latest of" not in out
    assert ["world_size", "2"] in lines and "…" in out
    assert ["0", "1.00", "12.00", "12.0", "50%", "-", "0.9"] in lines
    assert ["2", "3.00", "12.00", "4.0", "50%", "-", "0.92"] in lines
    assert ["all", "6.00", "36.00", "6.0"] in lines
    assert "loss" not in out  # logged at other steps than epochs
    assert ["a.weight", "TopK(relaxed)", "relaxed", "3", "33%", "1", "inf", "4,002"] in lines
    assert ["b.weight", "TopK(critical)", "critical", "3", "100%", "0", "inf", "4,002"] in lines
    for name in ("compression.png", "regimes.png"):
        assert (tmp_path / "pictures" / "of it" / name).read_bytes()[:4] == b"\x89PNG"


@MLFLOW_WARNS
def test_a_run_by_its_name_is_the_latest(tracked, tmp_path, monkeypatch, capsys):
    uri, ids = tracked
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert main(["report", "twice"]) == 0
    out = capsys.readouterr().out
    assert f"({ids[1]}), FINISHED; the latest of 2 of this name" in out and "number 1" in out
    assert {path.name for path in tmp_path.iterdir()} == {"compression.png", "regimes.png"}


@MLFLOW_WARNS
def test_a_run_without_windows_has_no_table_of_layers(tracked, tmp_path, capsys):
    uri, _ = tracked
    assert main(["report", "even", "--tracking-uri", uri, "--out", str(tmp_path)]) == 0
    assert "bytes per step" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["compression.png"]


@MLFLOW_WARNS
@pytest.mark.parametrize("wanted", ["nope", "0" * 32, "it's", "a/b"])
def test_an_unknown_run(wanted, tracked, capsys):
    assert main(["report", wanted, "--tracking-uri", tracked[0]]) == 2
    out, error = capsys.readouterr()
    assert f"no run has the id or the name {wanted!r}" in error and not out


@pytest.mark.parametrize("uri", ["sqlite:///{}/none.db", "{}/mlruns", "file://{}/mlruns"])
def test_a_missing_store_is_not_created(uri, tmp_path, capsys):
    assert main(["report", "x", "--tracking-uri", uri.format(tmp_path)]) == 2
    assert "there is no MLflow data at" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_dead_server(monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert main(["report", "x", "--tracking-uri", "http://127.0.0.1:9"]) == 2
    assert "MLflow at http://127.0.0.1:9 does not answer" in capsys.readouterr().err


def test_without_mlflow(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert main(["report", "x"]) == 2
    assert "pip install hvd_accordion[mlflow]" in capsys.readouterr().err


@MLFLOW_WARNS
def test_without_matplotlib_tables_are_printed(tracked, tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "hvd_accordion.tracking.figures", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.axes", None)
    assert main(["report", "even", "--tracking-uri", tracked[0], "--out", str(tmp_path)]) == 1
    out, error = capsys.readouterr()
    assert "MB dense" in out and "no figures" in error and not list(tmp_path.iterdir())


@MLFLOW_WARNS
def test_figures_that_cannot_be_saved(tracked, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["report", "even", "--tracking-uri", tracked[0], "--out", str(tmp_path / "file" / "below")]) == 1
    assert "no figures" in capsys.readouterr().err


def test_a_report_imports_no_framework(tracked):
    code = f"""
import json, sys
from hvd_accordion.cli.run_report import load, text
print(len(text(load("even", {tracked[0]!r}))))
print(json.dumps(sorted({{name.split(".")[0] for name in sys.modules}})))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert not set(json.loads(done.stdout.splitlines()[-1])) & FRAMEWORKS


def test_a_run_without_epochs():
    run = run_report.Run("id", "name", "RUNNING", {}, {"loss": {0: 1.0}}, {})
    assert "no traffic to report" in run_report.text(run)


def test_an_unfinished_run():
    run = run_report.Run("id", "name", "RUNNING", {}, {"layer/a/norm": {0: 1.0}, "sent_bytes": {0: 1e6}}, {})
    assert "No table of layers" in run_report.text(run)
