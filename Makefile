# Everything runs in .venv, which `make setup` creates; the other targets call it when it is not up to date.
VENV := .venv
PY := $(VENV)/bin/python
SOURCES := pyproject.toml setup.py constraints.txt tools/setup.sh $(wildcard csrc/*.cpp csrc/*/*.cpp csrc/*/*.h)
DEMO_OUT ?= demo-out
ARGS ?=

.PHONY: help setup test lint format demo bench doctor clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.ready: $(SOURCES)
	tools/setup.sh test,demo
	@touch $@

setup: $(VENV)/.ready  ## create .venv and install fastpeft with everything the tests and the demo need

test: $(VENV)/.ready  ## run the whole test suite, a worker a core (ARGS="-k name" for some of it)
	$(PY) -m pytest -n auto --dist worksteal $(ARGS)

lint: $(VENV)/.ready  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(VENV)/.ready  ## let ruff rewrite the sources
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

demo: $(VENV)/.ready  ## fine-tune SmolLM2-135M on small talk, show the curve, samples and the comparison with PEFT (ARGS="--method qlora": in 4 bits)
	$(PY) tools/demo.py --out $(DEMO_OUT) $(ARGS)

bench: $(VENV)/.ready  ## operator benchmarks (pytest-benchmark)
	$(PY) -m pytest bench --benchmark-only --benchmark-columns=median,iqr,rounds

doctor: $(VENV)/.ready  ## what is installed and which backend every operator will use
	$(VENV)/bin/fastpeft doctor

clean:  ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info fastpeft/*.so $(DEMO_OUT)
