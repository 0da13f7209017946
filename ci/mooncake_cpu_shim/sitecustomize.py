"""Lets SGLang 0.5.23 send its KV cache by Mooncake over TCP where there is no GPU.

For Mooncake it copies the numbers of pages through pinned memory, which a CPU build of torch does
not have. Senders without `supports_host_tensor_indices` go another way, which needs none.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

NAME = "sglang.srt.disaggregation.mooncake.conn"


class Finder:
    """Finds the one module, and changes its class once it has been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As `importlib.abc.MetaPathFinder.find_spec`."""
        if name != NAME:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None
        loader: Any = spec.loader
        execute = loader.exec_module

        def execute_and_change(module: Any) -> None:
            execute(module)
            module.MooncakeKVSender.supports_host_tensor_indices = False

        loader.exec_module = execute_and_change
        return spec


sys.meta_path.insert(0, Finder())  # type: ignore[arg-type]
