"""Changes to modules at the moment of their import; the installed files stay as they are."""

import importlib.abc
import importlib.util


def declare_torchvision_operators(_module=None):
    """Declares two operators before torchvision is imported.

    The published torchvision is built for CUDA, so its library does not load beside a
    CPU torch; its Python part then registers shapes for operators that nobody declared.
    """
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _keep_alive.append(library)


_keep_alive = []  # torch withdraws the declarations of a library that is collected


def complete_attention_backend(module):
    """Gives the torch backend the one method that DP attention asks for on a CPU.

    The value pads the sequence lengths of an idle batch; 1 is what the AMX backend uses.
    """
    backend = module.TorchNativeAttnBackend
    if not hasattr(backend, "get_cpu_graph_seq_len_fill_value"):
        backend.get_cpu_graph_seq_len_fill_value = lambda self: 1


def skip_experts_of_other_ranks(module):
    """Lets the plain MoE layer run under expert parallelism.

    Experts of another rank have the id -1. The compiled kernels skip them, the plain one
    uses them as an index. Here it is given only the (token, expert) pairs of this rank,
    each as a token with one expert, and the results are added up by token.
    """
    forward = module.moe_forward_native

    def moe_forward_native(layer, x, topk_output, moe_runner_config):
        weights, ids, _ = topk_output
        is_local = ids >= 0
        if bool(is_local.all()):
            return forward(layer, x, topk_output, moe_runner_config)
        total = x.new_zeros(x.shape)
        if bool(is_local.any()):
            token = is_local.nonzero(as_tuple=True)[0]
            pairs = topk_output._replace(
                topk_weights=weights[is_local].unsqueeze(1), topk_ids=ids[is_local].unsqueeze(1)
            )
            total.index_add_(0, token, forward(layer, x[token], pairs, moe_runner_config))
        return total

    module.moe_forward_native = moe_forward_native


def never_capturing(_module):
    """Lets the recorder of experts ask a CPU whether it captures a graph: it never does."""
    import torch

    if not hasattr(torch.cpu, "is_current_stream_capturing"):
        torch.cpu.is_current_stream_capturing = lambda: False


# Module → (what runs before its import, what runs on the imported module).
PATCHES = {
    "torchvision": (declare_torchvision_operators, None),
    "sglang.srt.eplb.expert_distribution": (None, never_capturing),
    "sglang.srt.layers.attention.torch_native_backend": (None, complete_attention_backend),
    "sglang.srt.layers.moe.fused_moe_native": (None, skip_experts_of_other_ranks),
}


class PatchFinder(importlib.abc.MetaPathFinder):
    """Patches modules as they are imported; a mere search for one changes nothing."""

    def __init__(self, patches):
        self._patches = dict(patches)
        self._searching = set()

    def find_spec(self, fullname, path=None, target=None):
        """The spec that the other finders give, with a loader that patches."""
        if fullname not in self._patches or fullname in self._searching:
            return None
        self._searching.add(fullname)  # the search below comes by here again
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._searching.discard(fullname)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _PatchingLoader(spec.loader, *self._patches[fullname])
        return spec


class _PatchingLoader(importlib.abc.Loader):
    def __init__(self, loader, before, after):
        self._loader, self._before, self._after = loader, before, after

    def __getattr__(self, name):  # get_source and its like
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        if self._before:
            self._before(module)
        self._loader.exec_module(module)
        if self._after:
            self._after(module)
