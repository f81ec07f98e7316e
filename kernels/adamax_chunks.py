"""The kernel of kernels/adamax.py. Import it only where there is Triton, which torch's builds for CPUs lack."""

import triton
import triton.language as tl


@triton.jit
def adamax_chunks(  # type: ignore[no-untyped-def]  # Triton would compile the annotations
    table, step_size, gain, beta2, eps, keep, decay, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """Update one chunk, as `plain_adamax` does: the one whose row in `table` [C, 5] has the program's number.

    A row has the addresses of a parameter, its gradient and its two states, all fp32, and their number of elements,
    which is at most CHUNK. A program takes BLOCK of them at a time.
    """
    row = table + tl.program_id(0) * 5
    params = tl.load(row).to(tl.pointer_type(tl.float32))
    grads = tl.load(row + 1).to(tl.pointer_type(tl.float32))
    moments = tl.load(row + 2).to(tl.pointer_type(tl.float32))
    norms = tl.load(row + 3).to(tl.pointer_type(tl.float32))
    count = tl.load(row + 4)
    for start in range(0, CHUNK, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < count
        p = tl.load(params + at, mask=inside)
        g = tl.load(grads + at, mask=inside) + decay * p
        m = tl.load(moments + at, mask=inside)
        u = tl.load(norms + at, mask=inside)
        m += gain * (g - m)
        u = tl.maximum(u * beta2, tl.abs(g) + eps, propagate_nan=tl.PropagateNan.ALL)
        tl.store(moments + at, m, mask=inside)
        tl.store(norms + at, u, mask=inside)
        tl.store(params + at, keep * p - step_size * (m / u), mask=inside)
