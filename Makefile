# make demo    pre-train, continue on synthetic text, unlearn it; prints a table and draws the curves
#              MODEL=DIR: begin from that Hugging Face model
# make sweep   how far to unlearn: weights, lengths and losses compared from the demo's model on
# make test    all tests
# make check   format, lint, types and all tests (what CI runs)
# make faults  FAULTS=100 SEED=1: kill, cut and fill real runs and compare what they leave, to the bit
# make slurm-test  the job scripts of examples/slurm under a Slurm on this machine, nodes lost; needs Debian's packages
# make test-gpu  the tests that need a GPU, and those over NCCL that find enough of them
# make gpu-check  MINUTES=60: those tests, the benchmarks and an unlearning run on one GPU, within that time
# make bench   benchmarks.head, step, layers (on a GPU), experts, launch, preprocess; MEGATRON_LM=DIR adds its own tool
# make study-mini  SEED=1: every model of the paper in miniature, their evaluation and a report
# make setup   the virtual environment; the others make it when it is needed

VENV   := .venv
PYTHON := $(VENV)/bin/python
READY  := $(VENV)/.ready
DEMO   ?= runs/demo$(if $(MODEL),-$(notdir $(abspath $(MODEL))))
FAULTS ?= 100
SEED   ?= 1
MINUTES ?= 60
TE     := --no-deps --target $(VENV)/transformer-engine --requirement tests/transformer_engine.txt

.PHONY: setup demo sweep test test-gpu gpu-check check lint faults slurm-test bench study-mini clean-demo

setup: $(READY)

$(READY): requirements.txt tests/transformer_engine.txt tools/find_python.sh
	@python=$$(PYTHON_3_12="$(PYTHON_3_12)" sh tools/find_python.sh) && { test -x $(PYTHON) || "$$python" -m venv $(VENV); }
	@# uv, where there is one, takes a third of pip's time.
	@uv pip install --quiet --python $(PYTHON) --requirement requirements.txt 2>/dev/null || { \
		$(PYTHON) -m pip install --quiet --upgrade pip && \
		$(PYTHON) -m pip install --quiet --no-compile --requirement requirements.txt; }
	@# 1 MB of Python, where only its test finds it.
	@uv pip install --quiet --python $(PYTHON) $(TE) 2>/dev/null || \
		$(PYTHON) -m pip install --quiet --upgrade $(TE) || echo "its test will be skipped"
	@# On all cores, which pip does not; no tests, and none of the models of transformers: a third of all.
	@$(PYTHON) -W ignore -m compileall -qq -j 0 -x '/tests/|/transformers/models/' $(VENV)/lib || true  # some are not Python 3's
	@touch $@

demo: $(READY)
	$(PYTHON) examples/demo/run.py --output-dir $(DEMO) $(if $(MODEL),--model $(MODEL))

sweep: demo
	$(PYTHON) examples/demo/sweep.py --demo-dir $(DEMO) $(if $(MODEL),--model $(MODEL) --output-dir $(DEMO)-sweep)

# Each file by one of at most four processes, the long files first.
test: $(READY)
	$(PYTHON) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

test-gpu: $(READY)
	$(PYTHON) -m pytest -m gpu

gpu-check: $(READY)
	$(PYTHON) -m pip install --quiet --requirement requirements-bench.txt
	$(PYTHON) -m benchmarks.gpu_check --minutes $(MINUTES)

lint: $(READY)
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy --num-workers auto

check: lint test

faults: $(READY)
	$(PYTHON) -m tests.faults.run --faults $(FAULTS) --seed $(SEED)

slurm-test: $(READY)
	$(PYTHON) -m pytest --no-header --show-capture=no --durations=0 tests/slurm/jobs.py tests/slurm/elastic.py

bench: $(READY)
	$(PYTHON) -m pip install --quiet --requirement requirements-bench.txt
	$(PYTHON) -m benchmarks.head
	$(PYTHON) -m benchmarks.step
	$(PYTHON) -m benchmarks.layers
	$(PYTHON) -m benchmarks.documents
	$(PYTHON) -m benchmarks.experts
	$(PYTHON) -m benchmarks.launch
	$(PYTHON) -m benchmarks.preprocess $(if $(MEGATRON_LM),--peer-path $(MEGATRON_LM))

study-mini: $(READY)
	$(PYTHON) -m pip install --quiet --requirement requirements-eval.txt
	SEED=$(SEED) examples/paper/study_mini.sh

clean-demo:
	rm -rf $(DEMO)
