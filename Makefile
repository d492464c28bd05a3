# demo and test install what they need; as root, or through sudo.

.PHONY: build demo test lint

build:
	cargo build --release --locked

demo: build
	tests/install-guests.sh
	tests/demo.sh

test:
	tests/install-guests.sh
	cargo test --release --locked

lint:
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings
