"""A policy as a user writes one: nothing in the package knows of it."""

from __future__ import annotations

from hvd_accordion import Dense, Policy, TopK, Window


class Staircase(Policy):
    """A stair down after every window in which a layer's gradient was not zero; dense before the step `first`."""

    window = Window(interval=2, unit="steps")
    stairs = Dense(), TopK(0.2), TopK(0.05)

    def __init__(self, first: int) -> None:
        self.first, self.stair = first, {}

    def __repr__(self) -> str:
        return f"Staircase({self.first})"

    def specs(self, layer):
        return self.stairs

    def choose(self, layer, step, epoch):
        return self.stairs[self.stair.get(layer, 0) if step >= self.first else 0]

    def next_change(self, step):
        return self.first if step < self.first else None

    def observe(self, norms, lr):
        self.stair |= {name: min(self.stair.get(name, 0) + (norm > 0), 2) for name, norm in norms.items()}

    def state_dict(self):
        return {"stair": dict(self.stair)}

    def load_state_dict(self, state):
        self.stair = dict(state["stair"])


EXPECTED = [Dense()] * 3 + [TopK(0.2)] + [TopK(0.05)] * 4  # at each step with first=3: windows end after steps 2 and 4
