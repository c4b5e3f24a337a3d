# The commands of the README. Everything is installed into .venv, once.
PYTHON ?= python3
ARGS ?=
WORKERS ?= 2
OUT ?= runs/bench
DATA ?= glue
EXPERIMENTS ?= minilm minilm-whole minilm-ablation minilm-peers minilm-8bit llama-20m
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
SOURCES := pyproject.toml setup.py $(CONSTRAINTS) $(wildcard csrc/*)

.PHONY: demo test lint types docs serve bench bench-packing bench-ranks bench-rows bench-host bench-budget bench-compare gpu-suite accuracy accuracy-runs clean

demo: .venv/.demo ## fine-tune a pretrained model fully and progressively, and compare
	$(BIN)/progtuning demo $(ARGS)

# in the order of the files: xdist would begin with those of most tests, and long ones would be last
test: .venv/.test ## the whole test suite, a file at a time on each of WORKERS
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

lint: .venv/.lint ## style and format of Python and C++; installs nothing heavy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.h csrc/*.cpp csrc/*.cu

types: .venv/.test ## types of the public modules
	$(BIN)/pyright

docs: .venv/.docs ## the site, strictly: a broken link or a missing page fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

serve: .venv/.docs ## the site in a browser, made anew as its pages change
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

bench: .venv/.bench ## this machine's CPU: the optimizer, dropout, and whole training runs against other packages
	$(BIN)/python benchmarks/optimizer.py --output $(OUT)
	$(BIN)/python benchmarks/dropout.py --output $(OUT)
	set -e; for name in $(EXPERIMENTS); do \
	  $(BIN)/python benchmarks/run.py benchmarks/experiments/$$name.toml --output $(OUT) $(ARGS); done
	$(BIN)/python benchmarks/plot.py $(OUT) --docs $(OUT)

bench-packing: .venv/.bench ## rows of real lengths, padded and packed: make bench-packing DATA=FOLDER, of <task>/train.jsonl
	$(BIN)/python benchmarks/packing.py $(if $(filter-out glue,$(DATA))$(wildcard $(DATA)),--data $(DATA)) --output $(OUT) $(ARGS)
	$(BIN)/python benchmarks/plot.py $(OUT) --docs $(OUT)

bench-ranks: .venv/.bench ## two processes on this CPU: the share of a step that communication takes, by stage
	$(BIN)/python benchmarks/communication.py --output $(OUT) $(ARGS)

bench-budget: .venv/.bench ## this machine's CPU: steps within a budget, predicted and measured; 5 minutes
	$(BIN)/python benchmarks/budget.py --output $(OUT) $(ARGS)

bench-rows: .venv/.bench ## the rows of 300 new tokens: this library, torch and PEFT in turn, on this CPU
	$(BIN)/python benchmarks/rows.py --output $(OUT) $(ARGS)

bench-host: .venv/.bench ## the update on the host beside DeepSpeed's CPUAdam and torch's, where they are installed
	$(BIN)/python benchmarks/host_update.py --output $(OUT) $(ARGS)

bench-compare: .venv/.bench ## this commit against a saved one: ARGS="--benchmark-save=NAME", then ARGS="--benchmark-compare"
	$(BIN)/python -m pytest benchmarks/test_speed.py $(ARGS)

accuracy: OUT = benchmarks/results/amd-epyc-2-threads/study
accuracy: .venv/.bench ## the accuracy study's tables and figure, from the stored runs or those of OUT=FOLDER
	$(BIN)/python benchmarks/accuracy_study.py table --output $(OUT) --picture runs/study.png $(ARGS)

accuracy-runs: OUT = runs/accuracy
accuracy-runs: .venv/.bench ## its runs on this machine, one at a time, for days: make accuracy-runs DATA=FOLDER, of <task>/*.jsonl
	$(BIN)/python benchmarks/accuracy_study.py prepare
	$(BIN)/python benchmarks/accuracy_study.py times --data $(DATA) --output $(OUT) $(ARGS)
	$(BIN)/python benchmarks/accuracy_study.py runs --data $(DATA) --output $(OUT) $(ARGS)

# not in .venv: the GPU's machine has a torch of its own, and may have no network
gpu-suite: OUT = runs/gpu-suite
gpu-suite: ## everything that needs a GPU, in 8 minutes, with ARGS=--short in 5: make gpu-suite OUT=FOLDER PYTHON=python3
	$(PYTHON) benchmarks/gpu_suite.py --output $(OUT) $(ARGS)

clean: ## forget the environment and everything built
	rm -rf .venv build *.egg-info progtuning_kernels/_build.json progtuning_kernels/_C*.so

.venv/.lint: $(CONSTRAINTS)
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) ruff clang-format
	@touch $@

# the reference is read from the sources: nothing of the package is imported or installed; ruff breaks
# the lines of its signatures
.venv/.docs: $(CONSTRAINTS)
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) mkdocs-material "mkdocstrings[python]" ruff
	@touch $@

# torch first and pinned: resolved with the rest, pip would fetch every candidate to read its metadata
.venv/.torch: $(CONSTRAINTS)
	@echo "Making .venv and installing torch (once, a minute or two) ..."
	@test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) torch
	@touch $@

.venv/.demo: .venv/.torch $(SOURCES)
	@echo "Installing progtuning_kernels and what the demo needs ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[demo]"
	@touch $@

.venv/.test: .venv/.torch $(SOURCES)
	@echo "Installing progtuning_kernels and what its tests need ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[demo,test]"
	@touch $@

.venv/.bench: .venv/.torch $(SOURCES)
	@echo "Installing progtuning_kernels and the packages that benchmarks compare with ..."
	@$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[demo,test,bench]"
	@touch $@
