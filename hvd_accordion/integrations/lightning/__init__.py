"""Lightning 2 on Horovod ranks: a strategy, and a callback for scripts that use another strategy::

    import lightning as L
    from hvd_accordion import Accordion
    from hvd_accordion.integrations.lightning import HorovodStrategy

    trainer = L.Trainer(strategy=HorovodStrategy(compression=Accordion()), accelerator="cpu", devices=1)

Uses `lightning`, or `pytorch_lightning` if the script has imported that and not `lightning`.
"""

from hvd_accordion.integrations.lightning.callback import HorovodCallback
from hvd_accordion.integrations.lightning.strategy import HorovodEnvironment, HorovodStrategy

__all__ = ["HorovodCallback", "HorovodEnvironment", "HorovodStrategy"]
