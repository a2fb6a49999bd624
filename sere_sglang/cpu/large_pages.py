"""Large pages under weights that stay: who reads gigabytes waits for address translation, too."""

from __future__ import annotations

import ctypes
import logging
import os
import sys

import torch

logger = logging.getLogger(__name__)

LARGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14  # allow them here
_MADV_COLLAPSE = 25  # and make them now, from pages in use; Linux 6.1


def ask_allocator_for_large_pages() -> None:
    """Of processes that start from now on: torch's allocator then asks the system at once.

    Moving what is in use later (`use_large_pages`) takes most of a second per gigabyte.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def use_large_pages(*tensors: torch.Tensor) -> int:
    """Put CPU memory that is in use into large pages, as far as the system does that.

    Contents and addresses stay. Nothing but speed depends on it, so a system without is no error.
    The system copies: some seconds per gigabyte, nothing where it gave large pages at first.

    Args:
        tensors: contiguous; the part of each that fills whole large pages is moved.

    Returns:
        Bytes that are in large pages now.
    """
    if sys.platform != "linux":
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    moved = 0
    for tensor in tensors:
        begin = -(-tensor.data_ptr() // LARGE_PAGE) * LARGE_PAGE
        end = (tensor.data_ptr() + tensor.nbytes) // LARGE_PAGE * LARGE_PAGE
        if tensor.device.type != "cpu" or begin >= end:
            continue
        for advice in (_MADV_HUGEPAGE, _MADV_COLLAPSE):
            if madvise(begin, end - begin, advice) != 0:
                logger.debug("no large pages: madvise %d: errno %d", advice, ctypes.get_errno())
                break
        else:
            moved += end - begin
    return moved
