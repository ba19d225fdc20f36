"""Copies between host and device that nobody waits for."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor``, of the host, on ``device``: itself where that is the CPU.

    To a GPU it goes through page-locked memory, from which the copy is made while the host goes
    on; torch keeps that memory from other use until then.
    """
    if device.type == "cpu":
        return tensor
    if tensor.numel() == 0:  # has no memory to lock
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
