#!/usr/bin/env bash
# install_sglang_cpu.sh TARGET PYTHON
# Makes TARGET a virtual environment with a real SGLang that serves on a CPU. PYTHON must be
# a CPython 3.11. Takes about two minutes and 2 GB; TARGET appears only when it is complete.
set -euo pipefail
target=${1:?usage: install_sglang_cpu.sh TARGET PYTHON}
python=${2:?usage: install_sglang_cpu.sh TARGET PYTHON}
here=$(cd "$(dirname "$0")" && pwd)

partial=$target.partial.$$
trap 'rm -rf "$partial"' EXIT
"$python" -m venv "$partial"
"$partial/bin/python" -m pip install -qq --no-input --disable-pip-version-check \
    --no-deps -r "$here/sglang_cpu_requirements.txt"

site=$("$partial/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp -r "$here"/sglang_cpu_shim/* "$site/"

"$partial/bin/python" - <<'CHECK'
import torch
assert torch.version.cuda is None, f"torch {torch.__version__} is a CUDA build: give pip a CPU one"
CHECK
# Before the import: whether the kernels package is really the small one of ci/.
"$partial/bin/python" -c 'import sgl_kernel, sglang; print("sglang", sglang.__version__)'

# Scripts of a virtual environment name it in their first line.
grep -rlIF "$partial" "$partial/bin" | xargs -r sed -i "s|$partial|$target|g"
mv -T "$partial" "$target"
