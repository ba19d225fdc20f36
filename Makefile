# make serve    set up and serve; ARGS="--prefill 2" and the like are passed on
# make test     set up, check, and run the tests; ARGS="-k name" and the like are passed on
# make setup    the set-up alone; PYTHON=python3.12 chooses the interpreter
# make check    what needs no running: style, types, import contracts, generated stubs, chart
# make proto    generate the gRPC stubs anew from proto/
# make clean    remove what the tools left; make distclean removes .venv too

BIN := .venv/bin

.PHONY: help setup serve test check proto clean distclean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' Makefile

setup:
	@sh scripts/setup.sh

serve: setup
	@exec $(BIN)/baton serve $(ARGS)

test: check
	@exec $(BIN)/python -m pytest $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python scripts/stubs.py --check
	$(BIN)/python scripts/config_page.py --check
	$(BIN)/python scripts/chart_lint.py

proto: setup
	$(BIN)/python scripts/stubs.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
