# make test    everything that a change must pass
# make demo    a merged pull request becomes a running Apache, on this machine
# make build   the program: target/<host>/release/sockless
# make conformance [CASES="40 41"]
#              what it makes of Dockerfiles beside what BuildKit does, case by case
# make bench [WORKLOADS="small big"] [ROUNDS=3]
#              how long it takes beside the other builders that are installed; as root

.PHONY: build test conformance demo bench

build:
	cargo build --release --locked

test:
	tests/run.sh

conformance:
	tests/conformance.sh $(CASES)

demo:
	tests/demo.sh

bench:
	benches/bench.sh $(if $(ROUNDS),--rounds $(ROUNDS)) $(WORKLOADS)
