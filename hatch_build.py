"""Compile the inner loop of merging while a wheel (or an editable install) is built. Where there is no C compiler, the package goes without:
the same bytes then come from numpy, more slowly."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = "registry/merge/kernel.c"
LIBRARY = "registry/merge/_kernel.so"
# No flag may let sums be reordered or small numbers be flushed: the error bounds in the source count on IEEE arithmetic.
FLAGS = ("-std=gnu11", "-O3", "-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
X86_FLAGS = ("-mprefer-vector-width=512",)


class KernelHook(BuildHookInterface):  # type: ignore[type-arg]
    """Puts the compiled library beside its source and into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it collects files."""
        del version
        if compile_kernel(Path(self.root)):
            build_data["artifacts"].append(LIBRARY)
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def compile_kernel(root: Path) -> bool:
    """Whether the library could be compiled."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if os.name != "posix" or not compiler:
        return False
    extra = X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else ()
    target = root / LIBRARY
    partial = target.with_suffix(f".{os.getpid()}.partial")
    done = subprocess.run([compiler, *FLAGS, *extra, str(root / SOURCE), "-o", str(partial), "-lm"], check=False)
    if done.returncode == 0:
        partial.replace(target)
    return done.returncode == 0
