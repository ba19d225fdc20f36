# make serve    set up and serve; ARGS="--prefill 2" and the like are passed on
# make test     set up, check, and run the tests in two processes; ARGS="-k name" and the like
#               are passed on, ARGS="-n 0" runs them in one
# make setup    the set-up alone; PYTHON=python3.12 chooses the interpreter
# make chaos    outages that take minutes; ARGS="-s" shows what they cost
# make chaos-handoff  200 seeded kills, stops and delays of workers in the midst of hand-offs (15 minutes);
#                  each names the command that repeats it; CHAOS_SEED=1 draws others; ARGS="-s" shows each
# make chaos-pulls  the same of what prefill pulls from decode, at every point (30 minutes)
# make exhaustive  the cases that make test leaves out: minutes
# make test-gpu the tests that need a GPU, in .venv or in PYTHON
# make check    what needs no running: style, types, import contracts, stubs, settings' page, chart
# make proto    generate the gRPC stubs anew from proto/
# make bench-goodput        goodput of disaggregated and colocated serving, by offered rate
#                           (25 minutes; ARGS=--quick takes 3): see benchmarks/README.md
# make bench-routing        cached tokens and TTFT of every routing policy on a trace (25 minutes);
#                           fails where kv_aware misses its goal, an answer or the index is wrong
# make bench-local-prefill  from how many uncached tokens on a prefill worker pays
# make bench-engine         a colocated worker's steps and prompts beside its matrix products alone;
#                           ARGS="--peer vllm --peer llamacpp" beside those too
# make bench-interference   ITL of streams while long prompts arrive: disaggregated, colocated, vLLM
#                           (25 minutes; ARGS=--no-peers takes 9 and needs no vLLM)
# make bench-curves         its steps by context and batch, its memory by blocks
# make bench-quantized      weights in 8 and 4 bits: perplexity, speed, memory
# make bench-handoff        the hand-off beside memcpy and bare gloo, and in an answer's time
# make bench-gpu            one engine on one GPU beside what it does at best; needs torch with CUDA and
#                           triton, in .venv or in PYTHON
# make bench-prefix-cache   TTFT of a repeated 1,000-token prompt beside that of its first time
# make clean    remove what the tools left; make distclean removes .venv too

BIN := .venv/bin

.PHONY: help setup serve test chaos chaos-handoff chaos-pulls exhaustive check proto clean distclean
.PHONY: bench-goodput bench-routing bench-local-prefill bench-prefix-cache bench-engine
.PHONY: bench-curves bench-quantized bench-handoff bench-interference bench-gpu test-gpu
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

setup:
	@sh scripts/setup.sh

serve: setup
	@exec $(BIN)/baton serve $(ARGS)

test: check
	@exec $(BIN)/python -m pytest -n 2 $(ARGS)

chaos: setup
	@exec $(BIN)/python -m pytest -m chaos $(ARGS)

chaos-pulls: setup
	@exec $(BIN)/python -m pytest -m "" tests/e2e/test_pull_faults.py $(ARGS)

chaos-handoff: setup
	@exec $(BIN)/python -m pytest -m "" tests/e2e/test_handoff_faults.py $(ARGS)

exhaustive: setup
	@exec $(BIN)/python -m pytest -m exhaustive $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python scripts/stubs.py --check
	$(BIN)/python scripts/config_page.py --check
	$(BIN)/python scripts/models_page.py --check
	$(BIN)/python scripts/chart_schema.py --check
	$(BIN)/python scripts/chart_lint.py

bench-goodput: setup
	@exec $(BIN)/python -m benchmarks.goodput $(ARGS)

proto: setup
	$(BIN)/python scripts/stubs.py

bench-routing: setup
	@exec $(BIN)/python -m benchmarks.routing.replay $(ARGS)

bench-local-prefill: setup
	@exec $(BIN)/python -m benchmarks.local_prefill $(ARGS)

bench-prefix-cache: setup
	@exec $(BIN)/python -m benchmarks.prefix_cache $(ARGS)

bench-handoff: setup
	@exec $(BIN)/python -m benchmarks.handoff.run $(ARGS)

bench-engine: setup
	@exec $(BIN)/python -m benchmarks.engine.compare $(ARGS)

bench-curves: setup
	@exec $(BIN)/python -m benchmarks.engine.curves $(ARGS)

bench-quantized: setup
	@exec $(BIN)/python -m benchmarks.engine.quantized $(ARGS)

bench-interference: setup
	@exec $(BIN)/python -m benchmarks.interference.compare $(ARGS)

# These two need no set-up of ours: a machine with a GPU has a torch for it.
GPU_PYTHON = $(or $(PYTHON),$(wildcard $(BIN)/python),python3)

bench-gpu:
	@exec $(GPU_PYTHON) -m benchmarks.gpu.bench $(ARGS)

test-gpu:
	@exec $(GPU_PYTHON) -m pytest tests/gpu $(ARGS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
