# demo, test, soak and bench install what they need; as root, or through sudo. fuzz needs a nightly toolchain.

.PHONY: bench build demo fuzz lint soak test

rival := target/vhost-device-vsock

build:
	cargo build --release --locked

demo: build
	tests/install-guests.sh
	tests/demo.sh

test:
	tests/install-guests.sh
	cargo test --release --locked

# Compares the daemon with vhost-device-vsock 0.3.0, on a machine that does nothing else. BENCH takes more options.
bench: build
	tests/install-guests.sh linux-perf
	test -x $(rival)/bin/vhost-device-vsock || cargo install vhost-device-vsock --version 0.3.0 --root $(rival)
	cargo bench --locked --bench vsock -- --binary ours=target/release/vhost-user-vsock \
		--binary existing=$(rival)/bin/vhost-device-vsock \
		--json target/benchmark.json --svg docs/benchmark.svg $(BENCH)

# Lets a simulated and a real guest do all that guests do, at random, for SOAK_SECONDS. SOAK_SEED repeats a run. The first
# interrupt is for the soak alone, which then comes to its end.
soak:
	tests/install-guests.sh
	cargo test --release --locked --test soak --no-run
	trap '' INT; SOAK_SECONDS=$${SOAK_SECONDS:-600} cargo test --release --locked --test soak

# Every target for FUZZ_SECONDS, in a copy of its corpus. What crashes is left in fuzz/artifacts.
FUZZ_SECONDS ?= 180
fuzz:
	@cargo +nightly --version || { echo "make fuzz needs a nightly toolchain: rustup toolchain install nightly"; exit 1; }
	cargo fuzz --version || cargo +nightly install --locked cargo-fuzz
	set -e; for target in packet handshake connection worker; do \
		mkdir -p target/fuzz-corpus/$$target; \
		cargo +nightly fuzz run $$target target/fuzz-corpus/$$target fuzz/corpus/$$target -- \
			-max_total_time=$(FUZZ_SECONDS) -max_len=1024 -len_control=0 -timeout=20; \
	done

lint:
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
