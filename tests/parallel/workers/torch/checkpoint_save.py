"""The first half of checkpoint_resume.py: 20 steps, saved after 10 and at the end."""

import pytest
import torch

from tests.parallel.workers.torch.common import SPECS, checkpoint, checkpointed, flat, train


@pytest.mark.parametrize("name", SPECS)
def test_save(name):
    net, optimizer = checkpointed(name)
    train(net, optimizer, range(10))
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint(name, "ten"))
    train(net, optimizer, range(10, 20))
    torch.save({"net": flat(net), "optimizer": optimizer.state_dict()}, checkpoint(name, "twenty"))
