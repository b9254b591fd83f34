#!/usr/bin/env bash
# What a GPU machine without a network lacks for the whole suite, as wheels: bash benchmarks/gpu_wheels.sh DIR [NAME==VERSION ...]
# Run where there is a network; gpu_suite.sh looks in benchmarks/wheels, or where --wheels says. A few MB: torch, Triton,
# transformers, pyarrow and huggingface_hub are taken for granted there (name them behind DIR to bring other versions;
# what is downloaded says which ones it wants). PYTHON_VERSION is that machine's, 3.12 by default.
set -eu
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ $# -eq 0 ]; then
  echo "usage: bash benchmarks/gpu_wheels.sh DIR [NAME==VERSION ...]" >&2
  exit 2
fi
dir=$1
shift
python=${PYTHON:-python3}
mkdir -p "$dir"

download() {
  # --no-deps: what these packages need beyond each other is there; pip matches a platform's number exactly
  "$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --dest "$dir" \
    --python-version "${PYTHON_VERSION:-3.12}" --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 \
    --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 "$@"
}

pinned() { grep -E "^$1==" constraints.txt | cut -d ';' -f 1; }

# of one package's needs: those named, with the versions that it allows
needs() {
  "$python" - "$dir" "$@" <<'PYTHON'
import email, pathlib, sys, zipfile
folder, package, *names = sys.argv[1:]
wheel = max(pathlib.Path(folder).glob(f"{package}-*.whl"), key=lambda path: path.stat().st_mtime)
with zipfile.ZipFile(wheel) as archive:
    metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    fields = email.message_from_bytes(archive.read(metadata))
for need in fields.get_all("Requires-Dist", []):
    requirement, _, marker = need.partition(";")
    name = requirement.strip().split("[")[0].rstrip("<>=!~0123456789.,* ()").strip().lower().replace("_", "-")
    if name in names and "extra" not in marker:
        print(requirement.replace(" ", "").replace("(", "").replace(")", ""))
PYTHON
}

download "$(pinned datasets)" "$(pinned trl)" "$(pinned liger-kernel)" "$(pinned cut-cross-entropy)" "$@"
mapfile -t more < <(needs datasets dill multiprocess)
download "${more[@]}"
for package in datasets trl; do
  echo "$package wants of what is taken for granted: $(needs "$package" pyarrow huggingface-hub transformers accelerate | tr '\n' ' ')"
done
du -sh "$dir"
