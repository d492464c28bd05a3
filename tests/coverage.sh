#!/usr/bin/env bash
# Reports how much of src/ the tests run that need no real guest. Extra arguments go to llvm-cov's report.
set -euo pipefail
cd "$(dirname "$0")/.."

rustup component add llvm-tools
tools=$(dirname "$(rustc --print target-libdir)")/bin
export CARGO_TARGET_DIR=target/coverage
profiles=$PWD/$CARGO_TARGET_DIR/profiles
rm -rf "$profiles"

# The daemon's counters live in a mapped file (%c): most tests end it with SIGKILL, and in its sandbox it can open none.
export RUSTFLAGS="-C instrument-coverage -C llvm-args=-runtime-counter-relocation"
export LLVM_PROFILE_FILE="$profiles/%p-%m%c.profraw"

tests=(--lib)
for file in tests/*.rs; do
	name=$(basename "$file" .rs)
	case $name in real_*|cookbook|install) ;; *) tests+=(--test "$name") ;; esac
done
cargo test --profile tests --locked --no-fail-fast "${tests[@]}"
objects=()
while read -r binary; do
	objects+=(--object "$binary")
done < <(cargo test --profile tests --locked --no-run --message-format=json "${tests[@]}" 2>/dev/null |
	sed -n 's/.*"executable":"\([^"]*\)".*/\1/p')

find "$profiles" -name '*.profraw' > "$profiles/list"
"$tools/llvm-profdata" merge --sparse --failure-mode=all --input-files="$profiles/list" --output="$profiles/all.profdata"
"$tools/llvm-cov" report --instr-profile="$profiles/all.profdata" "${objects[@]}" \
	--sources "$PWD/src" --show-region-summary=false --show-branch-summary=false \
	--ignore-filename-regex='/tests(\.rs|/)|testing\.rs' "$@"
