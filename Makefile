# Nothing else is needed on a fresh machine: every target first makes what it needs.
# The first run installs (minutes), the next ones take seconds.

PYTHON ?= python3
VENV   ?= .venv
TORCH  := torch==2.13.0

BIN       := $(VENV)/bin
INSTALLED := $(VENV)/installed
BUILT     := $(VENV)/built
# megatron.training is in the wheels for Python 3.12 only; its Python files run here too.
MEGATRON_LM := 0.17.0
UNPACKED    := $(VENV)/megatron-lm-$(MEGATRON_LM)
CPP       := $(shell find csrc tests -name '*.cc' -o -name '*.h' 2>/dev/null)
NATIVE    := setup.py pyproject.toml $(shell find csrc -type f 2>/dev/null)

CUDA_VENV := .venv-cuda

# Several processes per core already: more threads only make them slower.
export OMP_NUM_THREADS := 1

.PHONY: demo demo-megatron test long build lint format types bench matrix clean

demo: $(BUILT)
	$(BIN)/python examples/deepspeed_gpt/demo.py

demo-megatron: $(BUILT)
	$(BIN)/python examples/megatron_gpt/demo.py

# Scenarios take both cores by themselves; the rest goes faster by two at a time.
test: $(BUILT) $(UNPACKED) asan cpp
	$(BIN)/pytest -m 'not long' -n 2 --dist loadfile tests/unit tests/contract
	$(BIN)/pytest -m 'not long' tests/scenarios tests/proxy_torch tests/gpu

long: $(BUILT) $(UNPACKED)
	$(BIN)/pytest -m long

build: $(BUILT)

lint: $(INSTALLED)
	$(BIN)/ruff check --no-cache
	$(BIN)/ruff format --check --no-cache
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

types: $(BUILT)
	$(BIN)/mypy

# The C++ tests, under a sanitizer where they can be; none of them needs torch.
.PHONY: cpp asan tsan
cpp: SANITIZE =
asan: SANITIZE = address,undefined
tsan: SANITIZE = thread
cpp asan tsan: $(INSTALLED)
	$(BIN)/cmake -S tests/cpp -B build/$@ -G Ninja -DMNEMOSYNE_SANITIZE=$(SANITIZE) \
	    -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja)
	$(BIN)/cmake --build build/$@
	$(BIN)/ctest --test-dir build/$@ --output-on-failure --timeout 120 --parallel 2

# torch's CUDA build as it is, on the device proxy and the emulated device. It takes 5 GB.
.PHONY: torch-kernels test-proxy-torch
torch-kernels: $(INSTALLED)
	$(BIN)/cmake -S tests/proxy_torch -B build/proxy_torch -G Ninja \
	    -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja)
	$(BIN)/cmake --build build/proxy_torch

test-proxy-torch: $(BUILT) torch-kernels $(CUDA_VENV)/installed
	MNEMOSYNE_CUDA_PYTHON=$(abspath $(CUDA_VENV)/bin/python) $(BIN)/pytest tests/proxy_torch

# The same on a GPU: what only one can tell. MNEMOSYNE_GPU_CHECKS=emulated tries the
# checks themselves; MNEMOSYNE_WRITE_RESULTS=FOLDER keeps what they have seen.
.PHONY: gpu-programs test-gpu
gpu-programs: $(INSTALLED)
	$(BIN)/cmake -S tests/gpu -B build/gpu -G Ninja \
	    -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja)
	$(BIN)/cmake --build build/gpu

test-gpu: $(BUILT) torch-kernels gpu-programs $(CUDA_VENV)/installed
	MNEMOSYNE_CUDA_PYTHON=$(abspath $(CUDA_VENV)/bin/python) $(BIN)/pytest -s --tb=short tests/gpu

bench: $(BUILT)
	$(BIN)/python -m pip install --quiet matplotlib==3.11.2
	$(BIN)/python benchmarks/recovery.py
	$(BIN)/python benchmarks/recovery.py --engine megatron
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/collectives.py --plot build/collectives.png
	$(BIN)/python benchmarks/single_copy.py
	$(BIN)/python benchmarks/reconfigure.py
	$(BIN)/python benchmarks/proxy_call.py

# Who dies where, in which way of training: under an hour each, see build/matrix_*.txt.
matrix: $(BUILT)
	$(BIN)/python -m tests.matrix deepspeed --output build/matrix_deepspeed.txt
	$(BIN)/python -m tests.matrix megatron --output build/matrix_megatron.txt

clean:
	rm -rf $(VENV) $(CUDA_VENV) build dist runs *.egg-info mnemosyne_plugin/ccl/_C*.so \
	    mnemosyne_plugin/proxy/lib

$(INSTALLED): requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@

# The build without a suffix in its version is the one for CUDA; with two signs a build
# for the CPU, 2.13.0+cpu, would do as well where there is one.
$(CUDA_VENV)/installed: Makefile requirements-dev.txt
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip install --quiet $(subst ==,===,$(TORCH)) wheel \
	    $(shell grep -E '^(numpy|ninja|setuptools)==' requirements-dev.txt)
	$(CUDA_VENV)/bin/python -m pip install --quiet --no-build-isolation \
	    $(shell grep -E '^(deepspeed|megatron-core)==' requirements-dev.txt)
	touch $@

$(UNPACKED): $(INSTALLED)
	rm -rf $@ $(VENV)/wheels
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: \
	    --python-version 3.12 --dest $(VENV)/wheels megatron-core==$(MEGATRON_LM)
	$(BIN)/python -m zipfile -e $(VENV)/wheels/*.whl $@

$(BUILT): $(INSTALLED) $(NATIVE)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@
