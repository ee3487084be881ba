#!/bin/bash
# Builds the kernels with a stand-in for PyTorch and a test program, and runs it against the reference's values.
#
#     test_kernels.sh PYTHON arm        for ARM, on an emulated processor; CROSS_CXX names another compiler for it
#     test_kernels.sh PYTHON sanitize   for this processor, at every instruction set that it has, watched by
#                                       AddressSanitizer and UndefinedBehaviorSanitizer; CXX names another compiler
#
# PYTHON: of an environment with mixhead and PyTorch.
set -eu -o pipefail
python=$1
how=$2
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
headers=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent / "include")')
flags=$("$python" -c 'from mixhead.ops.cpu.compiling import FLAGS; print(*FLAGS)')

# build PROGRAM COMPILER...: all sources at once, and the program of them.
build() {
  local program=$1
  shift
  mkdir -p "$program.objects"
  for source in "$root"/src/mixhead/ops/cpu/source/*.cpp "$root"/tests/ops/standalone/*.cpp; do
    echo "$source"
  done | xargs -P "$(nproc)" -I{} sh -c '"$@" -c "{}" -o "$0/$(basename "{}").o"' "$program.objects" "${@:1:1}" $flags "-I$headers" "${@:2}"
  "$@" "$program.objects"/*.o -o "$program"
}

test_arm() {
  local compiler emulator
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
  echo "Compiling the kernels for ARM with ${compiler[0]##*/}."
  build "$folder/arm" "${compiler[@]}" -static
  "$emulator" "$folder/arm" "$folder/cases"
}

test_sanitize() {
  local compiler level arguments
  read -ra compiler <<< "${CXX:-c++}"
  for level in $("$python" -c 'from mixhead.ops.cpu import level; print(*level.levels_of_processor())'); do
    read -ra arguments <<< "$("$python" -c "from mixhead.ops.cpu.compiling import FLAGS_OF_LEVEL; print(*FLAGS_OF_LEVEL['$level'])")"
    echo "Compiling the kernels for $level with sanitizers."
    build "$folder/$level" "${compiler[@]}" "${arguments[@]}" -g -O1 -fno-omit-frame-pointer -fsanitize=address,undefined \
      -fno-sanitize-recover=all
    ASAN_OPTIONS=detect_leaks=0 "$folder/$level" "$folder/cases"
  done
}

"$python" "$root/tests/ops/standalone/cases.py" "$folder/cases"
"test_$how"
