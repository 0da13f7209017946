"""Takes the place of SGLang's compiled kernels on a CPU that they do not support.

SGLang imports many names from `sgl_kernel` without asking whether it will call them. On a
CPU without AMX it calls one, which is written out here; every other name is a function
that refuses. No operator `torch.ops.sgl_kernel.*` is registered, and from that SGLang
concludes that it has to take its plain torch paths.
"""

__version__ = "0.0.0"


def assign_req_to_token_pool_cpu(
    req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len
):
    """Notes for each request where in the KV cache its new tokens (start to end) went."""
    taken = 0
    for request, start, end in zip(
        req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True
    ):
        places = out_cache_loc[taken : taken + end - start]
        req_to_token[request, start:end] = places.to(req_to_token.dtype)
        taken += end - start


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def refuse(*_args, **_kwargs):
        raise RuntimeError(f"sgl_kernel.{name} was called on a CPU server")

    return refuse
