"""Lightning 2 on Horovod ranks: a strategy, and a callback for those who want no strategy::

    import lightning as L
    from hvd_accordion import Accordion
    from hvd_accordion.integrations.lightning import HorovodStrategy

    trainer = L.Trainer(strategy=HorovodStrategy(compression=Accordion()), accelerator="cpu", devices=1)

Serves `lightning`, and `pytorch_lightning` where the script has imported that and not `lightning`.
"""

from hvd_accordion.integrations.lightning.callback import HorovodCallback
from hvd_accordion.integrations.lightning.strategy import HorovodEnvironment, HorovodStrategy

__all__ = ["HorovodCallback", "HorovodEnvironment", "HorovodStrategy"]
