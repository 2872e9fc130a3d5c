"""Hashes of tensors' contents, for ``guard="content"`` and the audit.

On the host it is XXH3 (128 bits). Elsewhere the hash is computed where the tensor is, and stays
there: nothing waits for the device until two hashes are compared.
"""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING

import torch
import xxhash
from torch import Tensor

from dora_cache.backends import Ready

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Contents", "digest", "is_freed", "sums_of"]

_WORDS_AT_ONCE = 1 << 21  # of four bytes each: hashing takes 16 MiB beside the tensor
_SEED = 0x5EED
_FREED = b"freed"


class Contents:
    """The contents of some tensors, in order; the tensors' storages stay as they are.

    Equal contents compare equal. Different ones, or the same elements in other places, do so with a
    probability of about 2**-60. Tensors whose memory is freed have equal contents.

    Args:
        tensors: strided tensors with data of their own.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        on_host: list[bytes] = []
        elsewhere: dict[torch.device, list[Tensor]] = {}
        with torch.no_grad():
            for tensor in tensors:
                if tensor.device.type == "cpu" or is_freed(tensor):
                    on_host.append(digest(tensor))
                else:
                    elsewhere.setdefault(tensor.device, []).append(sums_of(tensor))
            self._on_host = tuple(on_host)
            self._elsewhere = {device: torch.stack(sums) for device, sums in elsewhere.items()}
            self._ready = [
                (Ready.now([sums]), sums) for sums in self._elsewhere.values() if sums.is_cuda
            ]

    def __eq__(self, other: object) -> bool:
        """Whether the contents are the same; waits for each device that tensors are on."""
        if not isinstance(other, Contents):
            return NotImplemented
        if (
            self._on_host != other._on_host
            or self._elsewhere.keys() != other._elsewhere.keys()
            or any(sums.shape != other._elsewhere[d].shape for d, sums in self._elsewhere.items())
        ):
            return False
        for contents in (self, other):
            for ready, sums in contents._ready:
                if ready is not None:
                    ready.join([sums])
        return all(torch.equal(sums, other._elsewhere[d]) for d, sums in self._elsewhere.items())

    __hash__ = None  # type: ignore[assignment]


def digest(tensor: Tensor) -> bytes:
    """Hash a tensor's contents on the host, 16 bytes; its storage stays as it is."""
    if is_freed(tensor):
        return _FREED
    if not tensor.is_contiguous():
        with torch.no_grad():
            tensor = tensor.contiguous()
    size = tensor.numel() * tensor.element_size()
    if not size:
        return b""
    # Not through numpy: a storage that an array was made of cannot be resized any more, as FSDP
    # does.
    memory = (ctypes.c_char * size).from_address(tensor.data_ptr())
    return xxhash.xxh3_128_digest(memory)


def is_freed(tensor: Tensor) -> bool:
    """Whether the tensor's storage has been shrunk below what the tensor needs."""
    span = tensor.numel()
    if not span:
        return False
    if not tensor.is_contiguous():
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        span = 1 + sum((size - 1) * stride for size, stride in steps)
    needed = (tensor.storage_offset() + span) * tensor.element_size()
    return tensor.untyped_storage().nbytes() < needed


@functools.cache
def _coefficients(device: torch.device, words: int) -> Tensor:
    """Random odd 64-bit numbers, shape (2, words); the same ones on every device."""
    generator = torch.Generator().manual_seed(_SEED)
    numbers = torch.randint(-(1 << 63), (1 << 63) - 1, (2, words), generator=generator)
    return (numbers | 1).to(device)


def sums_of(tensor: Tensor) -> Tensor:
    """Hash a tensor's contents where it is; int64, shape (2,)."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return _sums(plain.view(-1).view(torch.uint8))


def _sums(flat: Tensor) -> Tensor:
    """Hash bytes on their device.

    Multilinear hashing modulo 2**64 (Dietzfelbinger 1996, https://doi.org/10.1007/3-540-60922-9_46),
    over the words and then over the sums of blocks, twice with independent coefficients.

    Args:
        flat: uint8, shape (bytes,).

    Returns:
        int64, shape (2,).
    """
    size = flat.numel()
    if size % 4:
        flat = torch.nn.functional.pad(flat, (0, -size % 4))
    words = flat.view(torch.int32)
    coefficients = _coefficients(flat.device, _WORDS_AT_ONCE)
    total = torch.full((2,), size, dtype=torch.int64, device=flat.device)
    for index, block in enumerate(torch.split(words, _WORDS_AT_ONCE)):
        wide = block.to(torch.int64)
        for lane in range(2):
            part = (wide * coefficients[lane, : len(wide)]).sum()
            # The high half too, which the next product would shift out.
            part = part ^ (part >> 32)
            place = coefficients[1 - lane, -1 - index % _WORDS_AT_ONCE]
            total[lane] = total[lane] * place + part
    return total
