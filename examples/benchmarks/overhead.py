"""Step time of this package's torch optimizers against Horovod's own, side by side in one run.

python examples/benchmarks/overhead.py [--model resnet18|small] [--rounds 15] [--json PATH]
"""

from __future__ import annotations

import sys
import time

from side_by_side import launch, parser, report, take_turns


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", choices=["resnet18", "small"], default="resnet18")
    options.add_argument("--batch-size", type=int, default=4)
    options.add_argument("--steps", type=int, default=10, help="steps of a mode's turn")
    args = options.parse_args()
    if not args.worker:
        sys.exit(launch(__file__))

    import horovod.torch as horovod
    import models
    import torch

    import hvd_accordion.torch as hvd
    from hvd_accordion import Accordion, Dense, PowerSGD, TopK

    hvd.init()
    torch.set_num_threads(1)
    modes = {
        "Horovod": (horovod, {}),
        "compression=None": (hvd, {"compression": None}),
        "Dense()": (hvd, {"compression": Dense()}),
        "PowerSGD(4)": (hvd, {"compression": PowerSGD(4)}),
        "Accordion()": (hvd, {"compression": Accordion(interval=1), "steps_per_epoch": 1000}),
        "TopK(0.01)": (hvd, {"compression": TopK(0.01)}),
    }
    trainings = {}
    for name, (module, arguments) in modes.items():
        torch.manual_seed(0)
        net = models.resnet18() if args.model == "resnet18" else models.small_cnn()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        trainings[name] = net, module.DistributedOptimizer(optimizer, net.named_parameters(), **arguments)
    images = torch.randn(args.batch_size, 3, 32, 32)
    labels = torch.randint(0, 10, (args.batch_size,))

    def turn(name: str) -> float:
        net, optimizer = trainings[name]
        hvd.barrier()
        begin = time.perf_counter()
        for _ in range(args.steps):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
        return (time.perf_counter() - begin) / args.steps

    times = take_turns(list(modes), turn, args.rounds)
    if hvd.rank() == 0:
        report(f"{args.model}, batch {args.batch_size}", times, args.json)


if __name__ == "__main__":
    main()
