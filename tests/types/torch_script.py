"""A user's script, which mypy must pass; where it must not, it is told so, and an error that it does not find is one."""

import torch

import hvd_accordion.torch as hvd
from hvd_accordion import Accordion, AccordionBatchSize, Auto, MLflowLogger, PowerSGD, TopK

hvd.init()
model = torch.nn.Linear(4, 1)
sgd = torch.optim.SGD(model.parameters(), lr=0.1 * hvd.size(), momentum=0.9)
optimizer = hvd.DistributedOptimizer(
    sgd,
    named_parameters=model.named_parameters(),
    compression=Accordion(critical=PowerSGD(rank=4), relaxed=PowerSGD(rank=1), eta=0.5, interval=10),
    steps_per_epoch=100,
    batch_size=AccordionBatchSize(32, 128),
    logger=MLflowLogger() if hvd.rank() == 0 else None,
)
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)

loss: torch.Tensor = model(torch.ones(2, 4)).sum()
loss.backward()  # type: ignore[no-untyped-call]  # torch's own
optimizer.step()
optimizer.zero_grad()
mean: torch.Tensor = hvd.allreduce(loss.detach(), name="loss", op=hvd.Average)
print(optimizer.compression_report(), optimizer.stats.sent_bytes, mean.item())

hvd.DistributedOptimizer(sgd, compression={"*.weight": TopK(0.01), "*": None})
hvd.DistributedOptimizer(sgd, compression=Auto())
hvd.DistributedOptimizer(sgd, compression=hvd.Compression.fp16)
hvd.DistributedOptimizer(sgd, compression=0.01)  # type: ignore[arg-type]
hvd.DistributedOptimizer(sgd, compresion=TopK(0.01))  # type: ignore[call-arg]
hvd.allreduce(loss, root_rank=0)  # type: ignore[call-arg]
hvd.allredcue(loss)  # type: ignore[attr-defined]
TopK(ratio="1 %")  # type: ignore[arg-type]
