"""Hugging Face's `Trainer` on Horovod ranks, with compressed gradients::

    from hvd_accordion import PowerSGD
    from hvd_accordion.integrations.transformers import HorovodTrainer, HorovodTrainingArguments

    args = HorovodTrainingArguments("out", max_grad_norm=1.0)
    trainer = HorovodTrainer(model, args, train_dataset=data, compression=PowerSGD(4))
    trainer.train()

For your own trainer: `class MyTrainer(HorovodTrainerMixin, Trainer)`.
"""

from hvd_accordion.integrations.transformers.arguments import HorovodArgumentsMixin, HorovodTrainingArguments
from hvd_accordion.integrations.transformers.trainer import HorovodTrainer, HorovodTrainerMixin

__all__ = ["HorovodArgumentsMixin", "HorovodTrainer", "HorovodTrainerMixin", "HorovodTrainingArguments"]
