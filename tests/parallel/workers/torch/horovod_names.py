"""Every public name of horovod.torch works, or says why it doesn't."""

import tempfile

import numpy as np
import pytest
import torch

import hvd_accordion.torch as hvd
from tests.parallel import names
from tests.parallel.names import Refused


def mine(*shape):
    return torch.full(shape or (2,), hvd.rank() + 1.0)


def total():
    return sum(range(1, hvd.size() + 1))


def holds(value, expected):
    np.testing.assert_allclose(np.asarray(value), expected, rtol=1e-3)
    return True


def everyone():
    return np.repeat(np.arange(1.0, hvd.size() + 1), 2)


def waited(m, handles, expected):
    values = m.synchronize(handles)
    return holds(values[-1] if isinstance(values, list) else values, expected)


def reduced(op, expected):
    return lambda m: holds(m.allreduce(mine(), op=getattr(m, op)), expected())


def mean(name, start=None):
    """Of an allreduce in one of its eight forms: of one tensor or several, in place or not, at once or later."""

    def row(m):
        given = [mine(), mine()]
        several = "grouped" in name
        done = getattr(m, name)(given if several else given[-1])
        done = m.synchronize(done) if "async" in name else done
        found = done[-1] if several else done
        if name.endswith("_"):
            assert found is given[-1] or torch.equal(found, given[-1])
        return holds(found, total() / hvd.size())

    return row


def gathered(name):
    def row(m):
        several = "grouped" in name
        done = getattr(m, name)([mine(), mine()] if several else mine())
        done = m.synchronize(done) if "async" in name else done
        return holds(done[-1] if several else done, everyone())

    return row


def scattered(name):
    def row(m):
        several = "grouped" in name
        done = getattr(m, name)([mine(4), mine(4)] if several else mine(4))
        done = m.synchronize(done) if "async" in name else done
        return holds((done[-1] if several else done)[:1], total() / hvd.size())

    return row


def sent(name):
    def row(m):
        done = getattr(m, name)(mine(), 1)
        return holds(m.synchronize(done) if "async" in name else done, 2.0)

    return row


def swapped(name):
    def row(m):
        done = getattr(m, name)(mine(hvd.size()))
        return holds(m.synchronize(done)[0] if "async" in name else done, np.arange(1, hvd.size() + 1))

    return row


def polled(m):
    handle = m.allreduce_async(mine())
    while not m.poll(handle):
        pass
    return holds(m.synchronize(handle), total() / hvd.size())


def sparse(m):
    one = torch.sparse_coo_tensor([[hvd.rank()]], [hvd.rank() + 1.0], (hvd.size(),))
    done = m.sparse_allreduce_async(one, "sparse", m.Average)()
    return holds(done.to_dense(), np.arange(1, hvd.size() + 1) / hvd.size())


def trained(m):
    net = torch.nn.Linear(3, 2)
    m.broadcast_parameters(net.state_dict(), 0)
    optimizer = m.DistributedOptimizer(torch.optim.SGD(net.parameters(), 0.1, momentum=0.9), net.named_parameters())
    net(mine(4, 3)).sum().backward()
    optimizer.step()
    m.broadcast_optimizer_state(optimizer, 0)
    rows = m.allgather(net.weight.detach()[None])
    return all(torch.equal(rows[0], row) for row in rows)


def parameters(m):
    given = {"w": mine()}
    m.broadcast_parameters(given, 1)
    return holds(given["w"], 2.0)


def timeline(m):
    """Where HOROVOD_TIMELINE=DYNAMIC, as tests/parallel/test_parallel.py sets it."""
    with tempfile.TemporaryDirectory() as folder:
        m.start_timeline(f"{folder}/timeline.json")
        m.allreduce(mine())
        m.stop_timeline()
    return True


def among_ranks(m):
    return (
        0 <= m.local_rank() <= m.rank() < m.size()
        and m.local_rank() < m.local_size()
        and m.cross_rank() < m.cross_size()
    )


def flags(name):
    return lambda m: getattr(m, name)() in (True, False, 0, 1)


ALLREDUCES = [
    f"{kind}allreduce{when}{where}" for kind in ("", "grouped_") for when in ("", "_async") for where in ("", "_")
]
DYNAMIC = "dynamic process sets|HOROVOD_DYNAMIC_PROCESS_SETS"
TABLE = {
    "Adasum": reduced("Adasum", lambda: hvd.allreduce(mine(), op=hvd.Adasum, name="adasum").numpy()),
    "Average": reduced("Average", lambda: total() / hvd.size()),
    "Max": reduced("Max", lambda: hvd.size()),
    "Min": reduced("Min", lambda: 1),
    "Product": reduced("Product", lambda: np.prod(np.arange(1, hvd.size() + 1))),
    "Sum": reduced("Sum", total),
    "Compression": lambda m: holds(m.allreduce(mine(), compression=m.Compression.fp16), total() / hvd.size()),
    "DistributedOptimizer": trained,
    "HorovodInternalError": lambda m: issubclass(m.HorovodInternalError, RuntimeError),
    "ProcessSet": lambda m: m.ProcessSet([0]).ranks == [0],
    "SyncBatchNorm": Refused(
        ValueError, "expected input tensor to be on GPU", lambda m: m.SyncBatchNorm(3)(torch.ones(4, 3))
    ),
    "add_process_set": Refused(ValueError, DYNAMIC, lambda m: m.add_process_set([0])),
    "remove_process_set": lambda m: m.remove_process_set(m.ProcessSet([0])) is False,
    **{name: mean(name) for name in ALLREDUCES},
    **{
        name: gathered(name)
        for name in ("allgather", "allgather_async", "grouped_allgather", "grouped_allgather_async")
    },
    **{
        f"{kind}reducescatter{when}": scattered(f"{kind}reducescatter{when}")
        for kind in ("", "grouped_")
        for when in ("", "_async")
    },
    **{name: sent(name) for name in ("broadcast", "broadcast_", "broadcast_async", "broadcast_async_")},
    **{name: swapped(name) for name in ("alltoall", "alltoall_async")},
    "allgather_object": lambda m: m.allgather_object({"rank": hvd.rank()})[1] == {"rank": 1},
    "barrier": lambda m: m.barrier() is None,
    "broadcast_object": lambda m: m.broadcast_object({"rank": hvd.rank()}, 1) == {"rank": 1},
    "broadcast_optimizer_state": trained,
    "broadcast_parameters": parameters,
    **{
        name: flags(name)
        for name in ("ccl_built", "cuda_built", "ddl_built", "gloo_enabled", "mpi_enabled", "nccl_built", "rocm_built")
    },
    "gloo_built": lambda m: m.gloo_built() or m.mpi_built(),
    "mpi_built": lambda m: m.gloo_built() or m.mpi_built(),
    "mpi_threads_supported": lambda m: not m.mpi_enabled() or m.mpi_threads_supported() in (True, False),
    "check_extension": Refused(
        ImportError,
        "has not been built",
        lambda m: m.check_extension("nothing", "HOROVOD_WITH_NOTHING", __file__, "nothing"),
    ),
    **{name: among_ranks for name in ("cross_rank", "cross_size", "local_rank", "local_size", "rank", "size")},
    "global_process_set": lambda m: m.global_process_set.size() == hvd.size(),
    "init": lambda m: m.init() is None and m.is_initialized(),
    "is_initialized": lambda m: m.is_initialized(),
    "join": lambda m: 0 <= m.join() < hvd.size(),
    "poll": polled,
    "shutdown": lambda m: callable(m.shutdown),  # each worker calls it at its end
    "sparse_allreduce_async": sparse,
    "start_timeline": timeline,
    "stop_timeline": timeline,
    "synchronize": polled,
}
SUBMODULES = {"compression", "elastic", "functions", "mpi_lib_v2", "mpi_ops", "optimizer", "sync_batch_norm"}


def test_every_name_has_a_row():
    assert not names.differences("horovod.torch", TABLE, SUBMODULES)
    assert not names.missing_from_page("horovod.torch")


@pytest.mark.parametrize("name", TABLE)
def test_a_name_works_or_says_why_not(name):
    names.check(TABLE[name], hvd)


def test_submodules_are_found():
    for name in SUBMODULES:
        assert names.left_out(f"torch.{name}") == []
