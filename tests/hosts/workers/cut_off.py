"""A training that goes on until a host is cut off; rank 0 logs it to MLflow."""

import os
from pathlib import Path

import torch

import hvd_accordion.torch as hvd
from hvd_accordion import Accordion, MLflowLogger

folder = Path(os.environ["TEST_FOLDER"])
hvd.init()
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))
logger = MLflowLogger(f"sqlite:///{folder}/mlflow.db", "hosts", flush_timeout=20) if hvd.rank() == 0 else None
optimizer = hvd.DistributedOptimizer(
    torch.optim.SGD(net.parameters(), lr=0.1),
    net.named_parameters(),
    compression=Accordion(interval=1),
    steps_per_epoch=5,
    logger=logger,
)
for step in range(1_000_000):
    optimizer.zero_grad()
    net(torch.randn(4, 64)).square().mean().backward()
    optimizer.step()
    if step >= 20 and hvd.rank() == 0 and logger.run_id and not (folder / "run").exists():
        (folder / "run.new").write_text(logger.run_id)
        (folder / "run.new").rename(folder / "run")
