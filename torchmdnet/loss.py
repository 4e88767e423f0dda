"""The established address of the losses; they live in :mod:`torchmdnet.losses`."""

from torchmdnet.losses import huber_loss, l1_loss, loss_class_mapping, mse_loss

__all__ = ["huber_loss", "l1_loss", "loss_class_mapping", "mse_loss"]
