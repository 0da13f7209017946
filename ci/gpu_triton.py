"""A kernel of Triton, which launches by the driver, for `ci.gpu_recordings`."""

# Triton reads annotations: the one of `block` is no string, and the others have none.

import triton
import triton.language as tl


@triton.jit
def add_one(values, count, block: tl.constexpr):
    """Adds 1 to `count` values."""
    at = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(values + at, tl.load(values + at, mask=at < count) + 1, mask=at < count)
