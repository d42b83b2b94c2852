"""Predicts the step of a transformer of 1.3 billion parameters on up to 1,024 ranks, by the cost model: nothing runs.

python examples/benchmarks/local_steps_scaling.py [--tokens 16384] [--flops 4e14]
"""

from __future__ import annotations

import argparse

from links_report import markdown

from hvd_accordion import CompressionSpec, Dense, EFSignSGD, PowerSGD
from hvd_accordion.policy import assignment, grouping
from hvd_accordion.policy.cost_model import Link, local_step_seconds, step_seconds
from hvd_accordion.policy.layers import Group, Layer
from hvd_accordion.policy.protocol import policy_of

BLOCKS, WIDTH, WORDS = 24, 2048, 50_304
RANKS = (8, 64, 256, 1024)
RATES = {"1 Gbit/s": 1e9 / 8, "10 Gbit/s": 1e10 / 8}
LATENCY, OVERHEAD = 5e-5, 5e-3  # seconds of a hop, and of Horovod's cycle
WAYS = (
    ("plain Horovod", Dense(), 1),
    ("PowerSGD(4)", PowerSGD(4), 1),
    ("local steps, mean each 20", Dense(), 20),
    ("local steps, signs each 20", EFSignSGD(), 20),
    ("local steps, signs each 50", EFSignSGD(), 50),
)


def layers() -> list[Layer]:
    """Of a GPT: the matrices of each block, its norms and biases, and the embedding that is the head too."""
    shapes = {"qkv": (3 * WIDTH, WIDTH), "proj": (WIDTH, WIDTH), "fc": (4 * WIDTH, WIDTH), "out": (WIDTH, 4 * WIDTH)}
    vectors = {"norm1": (2 * WIDTH,), "norm2": (2 * WIDTH,), "biases": (9 * WIDTH,)}
    found = [Layer("embedding", (WORDS, WIDTH), "float32")]
    for i in range(BLOCKS):
        found += [Layer(f"{i}.{name}", shape, "float32") for name, shape in {**shapes, **vectors}.items()]
    return found


def groups(spec: CompressionSpec, n: int) -> list[Group]:
    every = layers()
    specs = {layer.name: assignment.level(layer, policy_of(spec), 0, n) for layer in every}
    return grouping.grouped([every[::-1]], specs, (), grouping.BUCKET_BYTES)


def seconds(spec: CompressionSpec, every: int, n: int, rate: float, compute: float) -> float:
    link, free = Link(LATENCY, rate, OVERHEAD), Free()
    if every == 1:
        return step_seconds(compute, groups(spec, n), n, link, free)
    return local_step_seconds(compute, groups(spec, n), n, link, free, every)


class Free(dict[CompressionSpec, float]):
    """Compression that costs nothing: it was not measured on a device of this size."""

    def __missing__(self, key: CompressionSpec) -> float:
        return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=16_384, help="of a rank's batch")
    parser.add_argument("--flops", type=float, default=4e14, help="that a rank does a second")
    args = parser.parse_args()
    count = sum(layer.numel for layer in layers())
    compute = 6 * count * args.tokens / args.flops
    print(f"{count / 1e9:.2f} billion parameters, {compute:.2f} s of computing a step; predicted seconds a step\n")
    header = ["way", *(f"{rate}: {n:,} ranks" for rate in RATES for n in RANKS)]
    rows = [
        [name, *(f"{seconds(spec, every, n, rate, compute):.2f}" for rate in RATES.values() for n in RANKS)]
        for name, spec, every in WAYS
    ]
    print(markdown([header, *rows]))


if __name__ == "__main__":
    main()
