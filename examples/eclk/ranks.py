"""The methods on real ranks: hvd_accordion.torch's optimizers in float64, gradients by autograd."""

from __future__ import annotations

import torch

import hvd_accordion.torch as hvd
from eclk.methods import CLASSES, Entry, arguments
from eclk.problems import Problem, Vectors


class OnRanks:
    """This rank's part of a problem with one node per rank."""

    def __init__(self, entry: Entry, problem: Problem, seed: int) -> None:
        self.classes, self.ridge = problem.classes, problem.ridge
        self.features = torch.from_numpy(problem.features[hvd.rank()])
        targets = torch.from_numpy(problem.targets[hvd.rank()])
        self.targets = targets.double() if self.classes == 2 else targets
        self.x = [torch.nn.Parameter(torch.from_numpy(v)) for v in problem.start()]
        hvd.broadcast_parameters([(str(i), v) for i, v in enumerate(self.x)], root_rank=0)
        self.optimizer = getattr(hvd, CLASSES[entry.method])(self.x, **arguments(entry, problem, seed))

    def loss(self) -> torch.Tensor:
        """Returns the mean loss over this rank's rows and computes its gradients. It is closure and full_closure."""
        if self.classes == 2:
            loss = torch.nn.functional.softplus(-self.targets * (self.features @ self.x[0])).mean()
        else:
            weights, biases = self.x
            loss = torch.nn.functional.cross_entropy(self.features @ weights.T + biases, self.targets)
        loss = loss + self.ridge / 2 * sum((v * v).sum() for v in self.x)
        loss.backward()
        return loss

    def round(self) -> None:
        self.optimizer.step(self.loss, self.loss)

    def solution(self) -> Vectors:
        with self.optimizer.solution():
            return [v.detach().numpy().copy() for v in self.x]
