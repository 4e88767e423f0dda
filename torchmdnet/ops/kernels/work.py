"""What callers of the loops have to know of them before Numba is imported: vectors, checks, and when threads pay."""

from torchmdnet.switches import is_on

__all__ = ["BITS", "CHECKS", "WORTH_THREADS", "lanes_of"]

#: Multiply-adds below which threads cost more than they bring.
WORTH_THREADS = 2_000_000
#: Size of the vectors in which loops visit channels.
BITS = 256
#: Whether loops compare every access with the size of its array.
CHECKS = is_on("TORCHMDNET_CHECK_LOOPS")


def lanes_of(itemsize: int) -> int:
    """Numbers of a vector, each of so many bytes."""
    return BITS // (8 * itemsize)
