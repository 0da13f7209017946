"""Lets an unmodified SGLang 0.5.23 serve on two plain x86-64 cores, for tests only.

`install_sglang_cpu.sh` copies this package, its `.pth` file and the package `sgl_kernel`
beside it into the site-packages of the environment that it builds; the `.pth` file makes
every interpreter of that environment import this module at start. It imports nothing
heavy: it only leaves two finders in `sys.meta_path`.

- `triton_stub`: there is no triton. SGLang defines hundreds of triton kernels while it is
  imported and calls none of them on a CPU.
- `patches`: four places of torchvision and SGLang that assume a GPU or AVX-512.
"""

import sys

from sglang_cpu_shim.patches import PATCHES, PatchFinder
from sglang_cpu_shim.triton_stub import TritonFinder

if not any(isinstance(finder, PatchFinder) for finder in sys.meta_path):
    sys.meta_path.insert(0, PatchFinder(PATCHES))
    # At the very end: a real triton wins where there is one.
    sys.meta_path.append(TritonFinder())
