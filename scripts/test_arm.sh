#!/bin/bash
# Builds the kernels and a test program for ARM, and runs it on an emulated processor against the reference's values.
# test_arm.sh PYTHON: an environment with mixhead and PyTorch. CROSS_CXX names another compiler for aarch64 Linux.
set -eu -o pipefail
python=$1
root=$(cd "$(dirname "$0")/.." && pwd)

if [ -n "${CROSS_CXX:-}" ]; then
  read -ra compiler <<< "$CROSS_CXX"
elif command -v aarch64-linux-gnu-g++ >/dev/null; then
  compiler=(aarch64-linux-gnu-g++)
elif "$python" -c 'import ziglang' 2>/dev/null; then
  compiler=("$python" -m ziglang c++ -target aarch64-linux-musl)
else
  echo "A compiler for ARM is needed: install g++-aarch64-linux-gnu (Debian, Ubuntu), or run $python -m pip install ziglang." >&2
  exit 2
fi
emulator=$(command -v qemu-aarch64 || command -v qemu-aarch64-static) || {
  echo "An emulated ARM processor is needed: install qemu-user (Debian, Ubuntu)." >&2
  exit 2
}

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
headers=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent / "include")')
flags=$("$python" -c 'from mixhead.ops.cpu.compiling import FLAGS; print(*FLAGS)')
echo "Compiling the kernels for ARM with ${compiler[0]##*/}."
for source in "$root"/src/mixhead/ops/cpu/source/*.cpp "$root"/tests/ops/arm/*.cpp; do
  echo "$source"
done | xargs -P "$(nproc)" -I{} sh -c '"$@" -c "{}" -o "$0/$(basename "{}").o"' "$folder" "${compiler[@]}" $flags "-I$headers"
"${compiler[@]}" -static "$folder"/*.o -o "$folder/kernels"
"$python" "$root/tests/ops/arm/cases.py" "$folder/cases"
"$emulator" "$folder/kernels" "$folder/cases"
