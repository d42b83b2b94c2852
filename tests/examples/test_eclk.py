"""The paper's claims on breast cancer, ten nodes, kappa = 2,906; the example's problems, minima, counts and program."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hvd_accordion import PowerSGD, RandomK, TopK
from hvd_accordion.optim.factories import layer_of
from tests.parallel.launcher import horovodrun

pytest.importorskip("sklearn")
pytest.importorskip("mlxtend")
pytest.importorskip("matplotlib")

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROGRAM = EXAMPLES / "eclk_logistic_regression.py"
TOLERANCE = 1e-10
THETA_BY_FORMULA = {"smoothness_factor": 0.25, "p": 0.33}  # so that theta1 follows kappa


@pytest.fixture(scope="module", autouse=True)
def _path():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def breast():
    """Runs an entry, by its key, on breast cancer among ten nodes."""
    from eclk import methods, runs

    def run(key, settings=None, cap=6000, ridge=None):
        (entry,) = [e for e in methods.entries("breast", defaults=False) if e.key == key]
        entry = entry if settings is None else entry.tuned(settings)
        return runs.simulate(entry, "breast", 10, TOLERANCE, cap, 0, ridge)

    return run


@pytest.fixture(scope="module")
def eclk(breast):
    return breast("ECLK")


def test_tuned_eclk_takes_at_most_1000_rounds(eclk):
    assert eclk.reached
    assert eclk.rounds <= 1000


def test_untuned_eclk_takes_at_most_3000_rounds(breast):
    found = breast("ECLK", {})
    assert found.reached
    assert found.rounds <= 3000


@pytest.fixture(scope="module")
def ec_lsvrg(eclk, breast):
    """Stopped at ten times ECLK's rounds."""
    return breast("EC-LSVRG", cap=10 * eclk.rounds)


def test_ten_times_fewer_rounds_and_half_the_bits_of_ec_lsvrg(eclk, ec_lsvrg):
    assert not ec_lsvrg.reached
    assert ec_lsvrg.suboptimality > 2 * TOLERANCE
    assert ec_lsvrg.kilobits > 2 * eclk.kilobits


def test_rounds_grow_with_the_root_of_kappa(breast, ec_lsvrg):
    """kappa = 291, 2,906, 29,047: ECLK's rounds grow by less than 4 each time, EC-LSVRG's by more than 8."""
    found = [breast("ECLK", THETA_BY_FORMULA, ridge=ridge) for ridge in (1e-2, 1e-3, 1e-4)]
    assert all(outcome.reached for outcome in found)
    assert found[1].rounds <= 4 * found[0].rounds
    assert found[2].rounds <= 4 * found[1].rounds
    easy = breast("EC-LSVRG", {"step": 1.9, "p": 0.1}, ridge=1e-2)  # 1 / p must not outweigh so small a kappa
    assert easy.reached
    assert not ec_lsvrg.reached
    assert ec_lsvrg.rounds >= 8 * easy.rounds


def test_ec_gd_leaves_the_minimum(breast):
    """Started at the minimum it goes away from it; ECLK stays. So more rounds bring it no nearer."""
    from eclk import methods, optimum, problems, runs

    problem = problems.breast_cancer(10)
    best, x = optimum.minimum(problem, accuracy=1e-20)
    gaps = {}
    for entry in methods.entries("breast", defaults=False):
        if entry.key in ("ECLK", "EC-GD"):
            cluster = runs.InOneProcess(entry, problem, 0)
            cluster.simulated.x = [v.copy() for v in x]
            for _ in range(400):
                cluster.round()
            gaps[entry.key] = problem.value(cluster.solution()) - best
    assert gaps["EC-GD"] > 1e-8
    assert abs(gaps["ECLK"]) < 1e-13


@pytest.mark.parametrize("name", ["breast-l1", "multinomial"])
def test_gradients_and_smoothness(name):
    """Against differences of values, and no curvature above L."""
    from eclk import optimum, runs

    problem = runs.PROBLEMS[name](4)
    rng = np.random.default_rng(0)
    smooth = lambda x: problem.value(x) - problem.l1 * sum(np.abs(v).sum() for v in x)  # noqa: E731
    x, u = ([0.1 * rng.normal(size=s) for s in problem.shapes] for _ in range(2))
    ahead, behind = ([a + t * b for a, b in zip(x, u, strict=True)] for t in (1e-5, -1e-5))
    slope = optimum.mean(problem.gradients(x))
    along = sum(float(np.vdot(g, b)) for g, b in zip(slope, u, strict=True))
    assert (smooth(ahead) - smooth(behind)) / 2e-5 == pytest.approx(along, rel=1e-6)
    curvature = (smooth(ahead) + smooth(behind) - 2 * smooth(x)) / 1e-10
    assert problem.ridge < curvature / sum(float(np.vdot(b, b)) for b in u) < problem.smoothness


@pytest.mark.parametrize("name", ["breast", "breast-l1"])
def test_minimum_is_one(name):
    """Of the proved accuracy: by Newton's method, and nothing near is lower."""
    from eclk import optimum, runs

    problem = runs.PROBLEMS[name](10)
    best, x = optimum.minimum(problem)
    rng = np.random.default_rng(0)
    assert all(problem.value([x[0] + 1e-3 * rng.normal(size=30) * (x[0] != 0)]) > best for _ in range(20))
    if problem.l1:
        assert 5 < np.count_nonzero(x[0]) < 25
        return
    rows, labels, y = problem.features.reshape(-1, 30), problem.targets.ravel(), np.zeros(30)
    for _ in range(30):
        chance = 1 / (1 + np.exp(labels * (rows @ y)))
        slope = -(rows.T @ (labels * chance)) / len(rows) + problem.ridge * y
        curvature = (rows.T * (chance * (1 - chance))) @ rows / len(rows) + problem.ridge * np.eye(30)
        y = y - np.linalg.solve(curvature, slope)
    assert abs(best - problem.value([y])) < 1e-13


def test_nodes_have_unlike_data():
    from eclk import problems

    assert problems.mnist(10).targets.std(1).max() == 0  # one digit each
    means = problems.breast_cancer(10).features[..., 0].mean(1)
    assert (np.diff(means) > 0).all()
    with pytest.raises(ValueError, match="nodes must be at most the number of rows, 569, got 600"):
        problems.breast_cancer(600)


def test_bits_are_counted_as_the_papers_do():
    from eclk import methods, problems

    layer = layer_of("0", (30,), "float64")
    assert methods.bits(TopK(1 / 30, algorithm="allgather"), layer, 10) == 32 + 5
    assert methods.bits(TopK(0.1, algorithm="allgather"), layer, 10) == 3 * (32 + 5)
    assert methods.bits(RandomK(0.1), layer, 10) == 3 * 32
    assert methods.bits(PowerSGD(1), layer_of("0", (8, 6), "float64"), 10) == 8 * 14 * 8

    problem = problems.breast_cancer(10)
    sent = {}
    for entry in methods.entries("breast", defaults=False):
        counted = methods.on(entry, methods.Counted)(problem.start(), size=10, **methods.arguments(entry, problem, 0))
        refreshed = [0] + [step + 1 for step in range(99) if counted.method.coin(step)]
        sent[entry.key] = sum(counted.bits(step) for step in range(100)), len(refreshed)
    assert sent["L-Katyusha"][0] == 100 * 32 * 30
    assert sent["EC-GD"][0] == 100 * 37
    assert sent["EF21"][0] == 99 * 37 + 32 * 30
    assert sent["ECLK learnt"][0] == 100 * 37 + 99 * 37 + 32 * 30
    bits, refreshes = sent["ECLK"]
    assert bits == 100 * 37 + refreshes * 32 * 30
    assert 20 < refreshes < 50


def test_the_program(tmp_path):
    """Simulated: rows, pictures, MLflow."""
    out, rows = tmp_path / "out", tmp_path / "rows.json"
    words = ["--simulate", "4", "--problem", "breast", "--method", "ECLK", "EC-GD", "--cap", "60", "--jobs", "1"]
    words += ["--out", str(out), "--json", str(rows), "--mlflow-uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *words], cwd=tmp_path, timeout=200, capture_output=True, text=True, check=True
    )
    assert "| breast cancer | ECLK   | TopK 1/30" in done.stdout
    found = json.loads(rows.read_text())
    assert found == json.loads((out / "results.json").read_text())
    assert [(row["method"], row["shift"]) for row in found] == [
        ("ECLK", "refresh"),
        ("ECLK", "refresh"),
        ("ECLK", "learnt"),
        ("ECLK", "refresh"),
        ("EC-GD", "-"),
    ]
    assert all(row["rounds"] == 60 and not row["reached"] and 0 < row["suboptimality"] < 1 for row in found)
    assert found[-1]["kilobits"] == pytest.approx(60 * 0.037)
    assert all((out / name).stat().st_size > 10_000 for name in ("rounds.png", "bits.png"))

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("eclk_logistic_regression")
    logged = client.search_runs([experiment.experiment_id])
    assert len(logged) == 1 + len(found)
    assert sorted(run.data.params["method"] for run in logged if run.data.params) == ["EC-GD"] + 4 * ["ECLK"]
    curve = client.get_metric_history(next(run for run in logged if run.data.params).info.run_id, "suboptimality")
    assert [point.step for point in curve] == [0, 10, 20, 30, 40, 50, 60]


@pytest.mark.parallel
def test_ranks_do_what_simulated_nodes_do(tmp_path):
    """The same rows from torch's optimizers and autograd as from numpy."""
    from eclk import methods, runs

    rows = tmp_path / "rows.json"
    words = ["--problem", "breast-l1", "--cap", "80", "--out", str(tmp_path / "out"), "--json", str(rows)]
    horovodrun([sys.executable, str(PROGRAM), *words], ranks=2, timeout=200)
    found = json.loads(rows.read_text())
    entries = methods.entries("breast-l1")
    assert len(found) == len(entries)
    for row, entry in zip(found, entries, strict=True):
        expected = runs.simulate(entry, "breast-l1", 2, TOLERANCE, 80)
        assert row["suboptimality"] == pytest.approx(expected.suboptimality, rel=1e-6), entry.label
        assert row["kilobits"] == pytest.approx(expected.kilobits)
