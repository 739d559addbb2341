# Every target installs what it needs, once: the stamp is renewed when the pins or the package's metadata change.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SEEDS := 0 1 2

export WANDB_MODE ?= disabled
export TOKENIZERS_PARALLELISM ?= false

.PHONY: run test lab outputs site train saes bench calibrate

run: $(STAMP)
	$(BIN)/python -m mi_utils run

# No test may need the model hub, so that they pass without a network. Two workers of one thread each: the notebooks
# run on one of them against their stored outputs, on the other with another seed.
test: export HF_HUB_OFFLINE = 1
test: export OMP_NUM_THREADS = 1
test: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lab: $(STAMP)
	$(BIN)/jupyter lab --notebook-dir=.

# Run the notebooks from fresh kernels, top to bottom, and store what they print and draw, progress bars aside, and the
# time and memory that they took.
outputs: $(STAMP)
	$(BIN)/python docs/measure.py

# A static site of the stored notebooks, the references and the benchmark results, in build/site.
site: $(STAMP)
	$(BIN)/python -m mi_utils site

train: $(STAMP)
	$(BIN)/python -m mi_utils.smallworld.train --seed $(SEEDS)

saes: $(STAMP)
	$(BIN)/python -m mi_utils.smallworld.train_saes

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py

# The study where the right verdict is known; resumable. The page is part of the repository.
calibrate: export OMP_NUM_THREADS = 1
calibrate: $(STAMP)
	$(BIN)/python -m mi_utils calibrate --page docs/calibration.md

$(STAMP): requirements.txt pyproject.toml
	@test -x $(BIN)/python || for python in $(PYTHON) python3.11 python3.12 python3.13 python3; do \
		if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
			echo "Making $(VENV) with $$python"; $$python -m venv $(VENV) && break; \
		fi; \
	done
	@test -x $(BIN)/python || { echo "Python 3.11 or later with its venv module is needed; make PYTHON=/path/to/python"; exit 1; }
	$(BIN)/python -m pip install -r requirements.txt -e .
	@touch $@
