# demo, test, soak and bench install what they need before they build anything; as root, or through sudo. deb builds cargo-deb if
# it is missing, fuzz cargo-fuzz, and needs a nightly toolchain.

.PHONY: bench build deb demo fuzz install lint manual soak test uninstall

rival := target/vhost-device-vsock
cargo_deb := target/cargo-deb

# Where install puts things, behind DESTDIR.
PREFIX = /usr/local
bindir = $(PREFIX)/bin
datadir = $(PREFIX)/share
unitdir = $(PREFIX)/lib/systemd/system
userunitdir = $(PREFIX)/lib/systemd/user
exampledir = $(datadir)/doc/$(name)/examples
sysusersdir = $(PREFIX)/lib/sysusers.d
zshdir = $(datadir)/zsh/site-functions

name := vhost-user-vsock
# All but the binary, as FROM:TO.
files = \
	target/manual/$(name).1:$(datadir)/man/man1/$(name).1 \
	target/manual/$(name).bash:$(datadir)/bash-completion/completions/$(name) \
	target/manual/$(name).fish:$(datadir)/fish/vendor_completions.d/$(name).fish \
	target/manual/_$(name):$(zshdir)/_$(name) \
	dist/50-$(name).json:$(datadir)/qemu/vhost-user/50-$(name).json \
	dist/systemd/$(name)@.service:$(unitdir)/$(name)@.service \
	dist/systemd/$(name)-vmm@.socket:$(unitdir)/$(name)-vmm@.socket \
	dist/systemd/$(name)-host@.socket:$(unitdir)/$(name)-host@.socket \
	dist/systemd/$(name)-metrics.service:$(unitdir)/$(name)-metrics.service \
	dist/systemd/$(name)-metrics.timer:$(unitdir)/$(name)-metrics.timer \
	dist/systemd/user/$(name)@.service:$(userunitdir)/$(name)@.service \
	dist/examples/alerts.yml:$(exampledir)/alerts.yml \
	dist/examples/$(name)-part-of-vm.conf:$(exampledir)/$(name)-part-of-vm.conf \
	dist/examples/libvirt-hook:$(exampledir)/libvirt-hook \
	dist/examples/vm@.service:$(exampledir)/vm@.service \
	dist/systemd/sysusers.conf:$(sysusersdir)/$(name).conf

build:
	@tests/check-rust.sh linker
	cargo build --release --locked

# The manual page, and completions for shells.
manual:
	@tests/check-rust.sh linker
	cargo run --profile tests --locked --example manual -- target/manual

# Once build and manual have run, this takes no cargo: it may be another user's, who has none.
install: target/release/$(name) target/manual/$(name).1
	install -D -m 755 -t $(DESTDIR)$(bindir) target/release/$(name)
	set -e; for file in $(files); do \
		to=$(DESTDIR)$${file#*:}; \
		install -d "$$(dirname "$$to")"; \
		sed 's|@bindir@|$(bindir)|g; s|@datadir@|$(datadir)|g' "$${file%%:*}" >"$$to"; \
		chmod 644 "$$to"; \
	done

target/release/$(name):
	$(MAKE) build

target/manual/$(name).1:
	$(MAKE) manual

uninstall:
	rm -f $(addprefix $(DESTDIR)$(bindir)/,$(name)) $(foreach file,$(files),$(DESTDIR)$(lastword $(subst :, ,$(file))))

# Makes target/vhost-user-vsock.deb. Without dpkg-shlibdeps, cargo-deb would leave out the libraries that the package depends on.
deb:
	@tests/check-rust.sh
	@command -v dpkg-shlibdeps >/dev/null || \
		{ echo "error: make deb needs dpkg-shlibdeps; on Debian and Ubuntu: apt-get install dpkg-dev" >&2; exit 1; }
	$(MAKE) --no-print-directory build manual
	test -x $(cargo_deb)/bin/cargo-deb || cargo install cargo-deb --version 3.8.0 --locked --debug --root $(cargo_deb)
	rm -rf target/deb-root
	$(MAKE) install DESTDIR=target/deb-root PREFIX=/usr zshdir=/usr/share/zsh/vendor-completions
	rm -f target/$(name).deb
	$(cargo_deb)/bin/cargo-deb --no-build --strip --output target/$(name).deb
	@dpkg-deb --field target/$(name).deb Depends | grep -q libc6 || \
		{ rm target/$(name).deb; echo "error: cargo-deb found no library that the program depends on" >&2; exit 1; }

demo:
	@tests/check-rust.sh
	@tests/install-guests.sh demo
	@$(MAKE) --no-print-directory build
	@tests/demo.sh

test:
	@tests/check-rust.sh tests
	@tests/install-guests.sh tests
	cargo test --profile tests --locked

# Compares the daemon with vhost-device-vsock 0.3.0, as it is and with a larger buffer and a smaller ring, on a machine that does
# nothing else. BENCH takes more options.
bench:
	@tests/check-rust.sh tests
	@tests/install-guests.sh bench
	$(MAKE) build
	test -x $(rival)/bin/vhost-device-vsock || cargo install vhost-device-vsock --version 0.3.0 --root $(rival)
	cargo bench --locked --bench vsock -- --binary vhost-user-vsock=target/release/vhost-user-vsock \
		--binary 'vhost-device-vsock, tuned=$(rival)/bin/vhost-device-vsock,--tx-buffer-size=262144,--queue-size=256' \
		--binary vhost-device-vsock=$(rival)/bin/vhost-device-vsock \
		--baseline 'vhost-device-vsock, tuned' --json target/benchmark.json --svg docs/benchmark.svg $(BENCH)

# Lets a simulated and a real guest do all that guests do, at random, for SOAK_SECONDS. SOAK_SEED repeats a run. The first
# interrupt is for the soak alone, which then comes to its end.
soak:
	@tests/check-rust.sh tests
	@tests/install-guests.sh guests
	cargo test --profile tests --locked --test soak --no-run
	trap '' INT; SOAK_SECONDS=$${SOAK_SECONDS:-600} cargo test --profile tests --locked --test soak

# Every target for FUZZ_SECONDS, in a copy of its corpus. What crashes is left in fuzz/artifacts. All unsafe code is for packet to
# reach, with AddressSanitizer; without it, and without traced comparisons, the larger targets are more than twice as fast.
FUZZ_SECONDS ?= 180
fuzz:
	@cargo +nightly --version || { echo "make fuzz needs a nightly toolchain: rustup toolchain install nightly"; exit 1; }
	cargo fuzz --version || cargo +nightly install --locked cargo-fuzz
	set -e; for target in packet connect_line connection worker; do \
		case $$target in \
			packet|connect_line) options= ;; \
			*) options="--sanitizer=none --no-trace-compares" ;; \
		esac; \
		mkdir -p target/fuzz-corpus/$$target; \
		cargo +nightly fuzz run $$options $$target target/fuzz-corpus/$$target fuzz/corpus/$$target -- \
			-max_total_time=$(FUZZ_SECONDS) -max_len=1024 -len_control=0 -timeout=20; \
	done

# cargo fmt does not follow modules that a macro declares.
lint:
	cargo fmt --check
	rustfmt --edition 2024 --check $$(find src tests benches examples fuzz/src -name '*.rs')
	cargo clippy --locked --all-targets -- -D warnings
	cargo clippy --locked --lib --bins -- -D warnings
