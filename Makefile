# make test    everything that a change must pass
# make demo    a merged pull request becomes a running Apache, on this machine
# make build   the program: target/<host>/release/sockless

.PHONY: build test demo

build:
	cargo build --release --locked

test:
	tests/run.sh

demo:
	tests/demo.sh
