# `make demo` and `make test` work on a fresh Debian or Ubuntu machine: they make .venv by themselves.
READY := .venv/.ready
PY := .venv/bin/python
SOURCES := trimtab.py compression monitoring services examples benchmarks tests
export BENTOML_DO_NOT_TRACK := True
export DO_NOT_TRACK := 1

.PHONY: help setup demo test lint format build bench-serving bench-guardrails bench-reports bench-compression clean
.DEFAULT_GOAL := help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

$(READY): pyproject.toml constraints.txt scripts/setup.sh
	@scripts/setup.sh

setup: $(READY)  ## make .venv with the pinned packages

demo: $(READY)  ## the whole story on real data; KEEP=1 leaves the server up
	@$(PY) -m examples.demo $(if $(KEEP),--keep)

test: $(READY)  ## all tests; ARGS='-k name' picks some
	@$(PY) -m pytest $(ARGS)

lint: $(READY)  ## style, types and import rules
	@.venv/bin/ruff check $(SOURCES)
	@.venv/bin/ruff format --check $(SOURCES)
	@.venv/bin/mypy
	@.venv/bin/lint-imports

format: $(READY)  ## rewrite the sources in the project's style
	@.venv/bin/ruff check --fix --quiet $(SOURCES) || true
	@.venv/bin/ruff format $(SOURCES)

build: $(READY)  ## a bento of the default workload
	@$(PY) -m trimtab compress examples/employment -r int8-dynamic
	@BENTOML_HOME=$${BENTOML_HOME:-$(CURDIR)/.trimtab/bentoml} .venv/bin/bentoml build

bench-serving: $(READY)  ## throughput and latency against other servers; ARGS=--quick, ARGS='--only NAME'
	@$(PY) -m benchmarks.serving $(ARGS)

bench-guardrails: $(READY)  ## error rates and delays of rollouts beside other judges; ARGS=--quick, ARGS='--only NAME'
	@$(PY) -m benchmarks.guardrails $(ARGS)

bench-reports: $(READY)  ## CPU and memory of the Monitor's reports; ARGS=--quick
	@$(PY) -m benchmarks.reports $(ARGS)

bench-compression: $(READY)  ## size, speed and quality of variants beside other libraries; ARGS=--quick, ARGS='--only NAME'
	@$(PY) -m benchmarks.compression $(ARGS)

clean:  ## remove what running made (.trimtab, caches), not .venv
	rm -rf .trimtab .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist *.egg-info
