# Every task by name. `make` or `make help` lists them.
PYTHON ?= $(shell python3 -c 'import sys; print("%d.%d" % max(sys.version_info[:2], (3, 11)))')
NAMES  := $(notdir $(patsubst %/pyproject.toml,%,$(wildcard packages/*/pyproject.toml)))
# Packages with tests on the real vLLM engine.
VLLM   := $(patsubst packages/%/tests_vllm,%,$(wildcard packages/*/tests_vllm))
# uv where it is installed, or a private copy.
UV     := $(or $(shell command -v uv),.uv/bin/uv)
BIN    := .venv/bin
MODULE  = $(subst -,_,$*)
# Command lines must not depend on the network once the environment stands.
export HF_HUB_OFFLINE ?= 1
export UV_PYTHON_DOWNLOADS = never
# Tests and demos start many interpreters; without bytecode each of them compiles torch and transformers anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test bench report lint format lock lock-check dist dist-check clean vllm

help: ## list the tasks
	@awk -F ':.*## ' '/^[a-z%-]+:.*## /{printf "  \033[1m%-18s\033[0m %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  packages: $(NAMES)"

.uv/bin/uv:
	@echo "setup: uv is not installed; putting a private copy into .uv"
	@python3 -m venv .uv
	@.uv/bin/python -m pip install -q uv

.venv/.made-$(PYTHON): requirements.lock shared/pyproject.toml $(wildcard packages/*/pyproject.toml) | $(filter .uv/%,$(UV))
	@echo "setup 1/3: Python $(PYTHON) environment in .venv"
	@test -e $@ || $(UV) venv -q --clear -p "$$(python3 .ci/find_python.py $(PYTHON))" .venv
	@echo "setup 2/3: installing requirements.lock, hashes checked (about a minute when nothing is cached)"
	@$(UV) pip sync --require-hashes -p .venv requirements.lock
	@echo "setup 3/3: installing the workspace's own packages"
	@$(UV) pip install -q --no-deps -p .venv -e shared $(NAMES:%=-e packages/%)
	@rm -f .venv/.made-*; touch $@

setup: .venv/.made-$(PYTHON) ## make .venv with everything, from requirements.lock

demo: setup ## run every demo, offline; page and table under out/
	@$(BIN)/python .ci/demo.py $(NAMES)

demo-%: setup ## run one demo
	@$(BIN)/python .ci/demo.py $*

test: setup $(if $(VLLM),vllm) ## run every package's tests, each in an environment of its own
	@$(BIN)/python .ci/isolate.py --uv $(UV) --python $(PYTHON) shared $(NAMES) workspace
	@$(if $(VLLM),.ci/vllm test $(VLLM))

test-%: setup ## run one package's tests in an environment of its own
	@$(BIN)/python .ci/isolate.py --uv $(UV) --python $(PYTHON) $*

test-%-vllm: setup vllm ## run one package's tests on the real vLLM engine
	@$(UV) build -q --wheel -o dist shared && $(UV) build -q --wheel -o dist packages/$*
	@.ci/vllm test $*

vllm: .vllm/.made ## make .vllm, the environment with the CPU build of vLLM
.vllm/.made: .ci/vllm
	@.ci/vllm build
	@touch $@

bench: setup ## run every benchmark, one at a time; goes on where it was stopped
	@$(BIN)/python .ci/bench.py $(NAMES); status=$$?; $(BIN)/python -P benchmarks/report.py && exit $$status

bench-%: setup ## run one benchmark
	@$(BIN)/python -P benchmarks/$(MODULE).py

report: setup ## render results into benchmarks/report.html and the README tables
	@$(BIN)/python -P benchmarks/report.py

lint: setup ## ruff, import contracts, types
	@echo "ruff check";         $(BIN)/ruff check -q .
	@echo "ruff format";        $(BIN)/ruff format -q --check .
	@echo "import contracts";   $(BIN)/python .ci/layers.py
	@echo "types";              $(BIN)/mypy -p tenfold_shared $(foreach n,$(NAMES),-p $(subst -,_,$(n)))

format: setup ## let ruff format and mend
	@$(BIN)/ruff format -q .
	@$(BIN)/ruff check -q --fix .

EXPORT = $(UV) export -q --all-packages --all-groups --all-extras --no-emit-workspace --no-header --format requirements.txt

lock: | $(filter .uv/%,$(UV)) ## resolve the workspace anew into requirements.lock
	@$(UV) lock
	@$(EXPORT) -o requirements.lock

lock-check: | $(filter .uv/%,$(UV)) ## fail when requirements.lock is not what the workspace resolves to
	@rm -f uv.lock; $(UV) lock -q
	@$(EXPORT) | diff -u requirements.lock - && echo "requirements.lock is up to date"

dist: | $(filter .uv/%,$(UV)) ## build every wheel and sdist into dist/
	@$(UV) build -q --all-packages --clear -o dist && ls dist

dist-check: setup dist ## prove dist/: contents, sdists that build again, each wheel alone in a fresh environment with its demo
	@$(BIN)/python .ci/wheels.py --uv $(UV) $(NAMES)

clean: ## remove what the other tasks made
	@rm -rf .venv .uv .isolated .vllm dist out uv.lock .mypy_cache .ruff_cache .import_linter_cache benchmarks/results/.partial
