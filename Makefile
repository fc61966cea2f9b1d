# crab's make targets. `make test` and `make demo` install what they need themselves
# (as root, on Debian 12 or 13, with Rust).

PREFIX  ?= /usr/local
DESTDIR ?=
BIN     := target/release
CARGO   ?= cargo

.PHONY: build driver test demo bench fuzz soak install uninstall clean testbed

build: ## the shim and the crab command
	@integration/host-tools
	$(CARGO) build --release --locked

testbed: ## the bed that tests and demo run in
	integration/testbed/build

test: ## everything that CI runs
	integration/test

demo: build ## an agent's session, with a crash in the middle
	integration/demo

driver: ## what drives inspector and store in their tests
	@integration/host-tools
	$(CARGO) build --release --locked --example inspector --example store

bench: build driver ## docs/results.md from recorded sessions (two hours; RESULTS=--quick: a quarter of one); turns, rollbacks, density, inspector, engine
	integration/results/run $(RESULTS) target/results
	integration/results/report target/results
	integration/bench/run
	integration/testbed/enter -- python3 -B /src/integration/bench/turns.py
	integration/testbed/enter -- python3 -B /src/integration/bench/density.py
	integration/testbed/enter --vm -- python3 -B /src/integration/bench/chains.py
	integration/inspector/cost/run
	$(CARGO) run --release --locked --example engine_cost
	$(CARGO) run --release --locked --example engine_sim

fuzz: driver ## longer random tests of what reads foreign input, and of the inspector
	PROPTEST_CASES=$${CASES:-20000} $(CARGO) test --release --locked --lib -- no_list_of_mounts no_bytes shim::tests::random rootfs::layer store::tests::trees store::tests::reuse
	integration/testbed/enter -- python3 -B /src/integration/inspector/fuzz.py --turns $${TURNS:-20000} --seed $${SEED:-2024}

soak: build driver ## the end-to-end tests with chaos in them, again and again; many power losses; a thousand rollbacks of one sandbox
	for i in $$(seq $${ROUNDS:-10}); do CRAB_SOAK=1 integration/e2e/run -k 'chaos or armed or restart or rollback or equality or power' || exit 1; done
	CRAB_E2E_SECONDS=$${SECONDS_OF_CHAOS:-600} integration/e2e/run -s test_engine_chaos.py
	for i in $$(seq $${ROUNDS:-10}); do CRAB_SOAK=1 integration/power/run -s || exit 1; done
	CRAB_E2E_CYCLES=$${CYCLES:-1000} integration/e2e/run -s test_rollback.py -k random_cycles
	CRAB_E2E_LIMIT=600 integration/vm/run --long

SHARE   := $(DESTDIR)$(PREFIX)/share

install: ## what `make build` has made; needs no Rust, which root often has not
	@test -x $(BIN)/crab -a -x $(BIN)/containerd-shim-crab-v2 || { echo 'make install: first `make build`' >&2; exit 1; }
	install -D -m 0755 $(BIN)/containerd-shim-crab-v2 $(DESTDIR)$(PREFIX)/bin/containerd-shim-crab-v2
	install -D -m 0755 $(BIN)/crab $(DESTDIR)$(PREFIX)/bin/crab
	install -D -m 0644 shim-config/crab.toml $(SHARE)/doc/crab/crab.toml
	install -d $(SHARE)/bash-completion/completions $(SHARE)/zsh/site-functions $(SHARE)/fish/vendor_completions.d
	$(BIN)/crab completions bash >$(SHARE)/bash-completion/completions/crab
	$(BIN)/crab completions zsh >$(SHARE)/zsh/site-functions/_crab
	$(BIN)/crab completions fish >$(SHARE)/fish/vendor_completions.d/crab.fish
	$(BIN)/crab man $(SHARE)/man/man1

uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/containerd-shim-crab-v2 $(DESTDIR)$(PREFIX)/bin/crab
	rm -rf $(SHARE)/doc/crab
	rm -f $(SHARE)/bash-completion/completions/crab $(SHARE)/zsh/site-functions/_crab $(SHARE)/fish/vendor_completions.d/crab.fish
	rm -f $(SHARE)/man/man1/crab.1 $(SHARE)/man/man1/crab-*.1

clean:
	$(CARGO) clean
