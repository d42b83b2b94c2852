"""The simulated cluster: results of its collectives, its count of bytes, and its errors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvd_accordion.comm.collectives import AllFinite, AllGather, AllReduce, AllToAll
from hvd_accordion.comm.simulation import carry_out, run


def yes():
    return np.array(True)


def no():
    return np.array(False)


def ask(*requests):
    """An exchange that asks for these in turn and gives back all the answers."""
    answers = []
    for request in requests:
        answers.append((yield request))
    return answers


def test_allreduce_is_the_mean_of_each_tensor_on_all_ranks():
    requests = [AllReduce([np.full((2, 3), float(r), np.float32), np.array([10.0 * r])]) for r in range(3)]
    for matrix, vector in carry_out(requests):
        np.testing.assert_array_equal(matrix, np.ones((2, 3)))
        np.testing.assert_array_equal(vector, [10.0])
        assert matrix.dtype == np.float32 and vector.dtype == np.float64


def test_allgather_gives_a_row_of_each_rank_to_all():
    for rows in carry_out([AllGather(np.array([r, r + 10])) for r in range(3)]):
        np.testing.assert_array_equal(rows, [[0, 10], [1, 11], [2, 12]])


def test_alltoall_sends_row_r_to_rank_r():
    boxes = [np.array([[10 * sender + to] for to in range(3)]) for sender in range(3)]
    for rank, rows in enumerate(carry_out([AllToAll(box) for box in boxes])):
        np.testing.assert_array_equal(rows, [[rank], [10 + rank], [20 + rank]])


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 4))
def test_alltoall_twice_gives_everything_back(ranks, width):
    boxes = [np.random.default_rng(r).integers(0, 99, (ranks, width)) for r in range(ranks)]
    back = carry_out([AllToAll(x) for x in carry_out([AllToAll(box) for box in boxes])])
    for box, got in zip(boxes, back, strict=True):
        np.testing.assert_array_equal(got, box)


@pytest.mark.parametrize("request_type", [AllGather, AllToAll])
def test_ranks_do_not_share_the_memory_of_answers(request_type):
    answers = carry_out([request_type(np.zeros((2, 2))) for _ in range(2)])
    answers[0][:] = 7
    assert not answers[1].any()


def test_ranks_do_not_share_the_memory_of_means():
    (first,), (second,) = carry_out([AllReduce([np.zeros(2)]) for _ in range(2)])
    first[:] = 7
    assert not second.any()


def test_agree_hands_on_the_common_flag():
    assert [bool(x) for x in carry_out([AllFinite(yes)] * 2)] == [True, True]
    assert [bool(x) for x in carry_out([AllFinite(no)] * 2)] == [False, False]


def test_ranks_that_disagree_are_an_error():
    with pytest.raises(RuntimeError, match=r"disagree.*\[True, False\]"):
        carry_out([AllFinite(yes), AllFinite(no)])


def test_ranks_that_ask_for_different_collectives_are_an_error():
    x = np.zeros((2, 2))
    with pytest.raises(RuntimeError, match=r"different collectives.*AllReduce.*AllGather"):
        run([ask(AllReduce([x])), ask(AllGather(x))])
    with pytest.raises(RuntimeError, match="different collectives"):
        run([ask(AllFinite(yes), AllToAll(x)), ask(AllFinite(yes), AllGather(x))])


def test_ranks_with_different_numbers_or_shapes_of_tensors_are_an_error():
    with pytest.raises(ValueError):
        run([ask(AllReduce([np.zeros(2)])), ask(AllReduce([np.zeros(2), np.zeros(2)]))])
    with pytest.raises(ValueError):
        run([ask(AllReduce([np.zeros(2)])), ask(AllReduce([np.zeros(3)]))])
    with pytest.raises(ValueError):
        run([ask(AllGather(np.zeros(2))), ask(AllGather(np.zeros(3)))])


def test_a_rank_that_ends_early_is_an_error():
    with pytest.raises(RuntimeError, match="some ranks ended"):
        run([ask(AllFinite(yes)), ask(AllFinite(yes), AllFinite(yes))])


def test_run_counts_what_one_rank_sends():
    def exchange():
        return ask(
            AllReduce([np.zeros(100, np.float32), np.zeros(50)]),  # 2 * 3/4 of 400 + 400
            AllGather(np.zeros(10, np.uint8)),  # 3 * 10
            AllToAll(np.zeros((4, 10), np.uint8)),  # 3/4 of 40
            AllFinite(yes),
        )

    answers, nbytes = run([exchange() for _ in range(4)])
    assert nbytes == 1200 + 30 + 30
    assert len(answers) == 4 and len(answers[0]) == 4


def test_one_rank_sends_nothing():
    ((mean, rows, _),), nbytes = run([ask(AllReduce([np.ones(3)]), AllGather(np.ones(3)), AllToAll(np.ones((1, 3))))])
    assert nbytes == 0
    np.testing.assert_array_equal(mean[0], np.ones(3))
    np.testing.assert_array_equal(rows, np.ones((1, 3)))
