# make test    everything that a change must pass
# make demo    a merged pull request becomes a running Apache, on this machine
# make build   the program: target/<host>/release/sockless
# make conformance [CASES="40 41"]
#              what it makes of Dockerfiles beside what BuildKit does, case by case

.PHONY: build test conformance demo

build:
	cargo build --release --locked

test:
	tests/run.sh

conformance:
	tests/conformance.sh $(CASES)

demo:
	tests/demo.sh
