#!/usr/bin/env bash
# Builds the sdist and the wheel into dist/, installs each into an empty environment, and uses it outside the checkout.
#   bash tests/from_wheel.sh [CONSTRAINTS]        PYTHON=python3.12 chooses the interpreter
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
constraints=$(realpath "${1:-$root/constraints.txt}")
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/build"
"$work/build/bin/python" -m pip install --quiet build
rm -rf "$root/dist"
"$work/build/bin/python" -m build --outdir "$root/dist" "$root" > "$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }

for built in "$root"/dist/*.whl "$root"/dist/*.tar.gz; do
    echo "== $(basename "$built")"
    "$python" -m venv --clear "$work/venv"
    "$work/venv/bin/python" -m pip install --quiet --constraint "$constraints" "$built[plots]"
    cd "$work"  # nothing of the checkout is importable here
    "$work/venv/bin/fastdpo" --version
    "$work/venv/bin/python" - <<'EOF'
import importlib.util
from pathlib import Path

import fastdpo

assert "site-packages" in fastdpo.__file__, fastdpo.__file__
assert importlib.util.find_spec("fastdpo.kernels") is not None
assert (Path(fastdpo.__file__).parent / "kernels" / "launch.py").exists()
assert (Path(fastdpo.__file__).parent / "py.typed").exists()
EOF
    "$work/venv/bin/fastdpo" verify --device cpu --dtype float32 --rows 67 --hidden 40 --vocab 1021 | tail -n 1
    "$work/venv/bin/fastdpo" demo --size small --output_dir "$work/demo" --overwrite | tail -n 12
    test -s "$work/demo/report.html"
done
echo "dist/: $(cd "$root/dist" && ls | tr '\n' ' ')"
