"""Whether a module's weights and buffers are the same as before, judged by value."""

from __future__ import annotations

import hashlib
from itertools import chain

import torch
from torch import nn

from lit_resnorm.measures.passes.sharded import own_part


@torch.no_grad()
def fingerprint(module: nn.Module) -> str:
    """Return a digest of all parameters and buffers: names, types, shapes and bits.

    Version counters don't tell: writes through `.data` leave them, a swap of equal
    weights raises them, and buffers change without the weights (BLAKE2b: that two
    states of a network agree by chance is out of the question).
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        values = own_part(tensor)
        if values.layout != torch.strided:
            values = values.to_dense()
        flat = values.contiguous().flatten().cpu()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
