# The commands of the README. Everything is installed into .venv, once.
PYTHON ?= python3
ARGS ?=
CONSTRAINTS ?= constraints.txt
BIN := .venv/bin
SOURCES := pyproject.toml setup.py $(CONSTRAINTS) $(wildcard csrc/*)

.PHONY: demo test lint bench clean

demo: .venv/.demo ## fine-tune a pretrained model fully and progressively, and compare
	$(BIN)/progtuning demo $(ARGS)

test: .venv/.test ## the whole test suite
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/.test ## style and format check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/.demo ## MaskedAdamW against torch's fused AdamW
	$(BIN)/python benchmarks/optimizer.py $(ARGS)

clean: ## forget the environment and everything built
	rm -rf .venv build *.egg-info progtuning_kernels/_build.json progtuning_kernels/_C*.so

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
