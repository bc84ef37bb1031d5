# make demo      install, then a curriculum of four phases make test     install, then the tests
# make install   the set-up alone                          make check    style, types, floors, figures of the code
# make clean     take away what these have made (never outputs/)  make test-faults   every fault, and docs/fault_matrix.md

PYTHON ?= python3
BIN := .venv/bin
# Python caches its compiled code even where the environment asks it not to: without it every start is seconds slower.
unexport PYTHONDONTWRITEBYTECODE
# Nothing of an outer environment leaks in.
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.PHONY: demo test test-faults install check format schema bench bench-prepare bench-train bench-checkpoint bench-memory bench-merge bench-science clean

demo: install
	$(BIN)/phased-cpt run -c configs/demo.yaml

test: install
	$(BIN)/pytest

# Half an hour.
test-faults: install
	$(BIN)/pytest -m fault --fault-matrix=docs/fault_matrix.md

install: .venv/installed

# The stamp is written last, so an install that was cut off goes on at the next call.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed; name one: make PYTHON=python3.12 install' >&2; exit 1; }
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear .venv || \
	  { rm -rf .venv; echo 'python3 -m venv failed; on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	@echo 'installing into .venv (minutes the first time, most of them PyTorch) …'
	@$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off -q -c constraints.txt -e '.[dev,tracking,lm-eval]'
	@touch $@

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/reference.py --check
	$(BIN)/python tools/figures.py

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

schema: install
	$(BIN)/phased-cpt config schema > configs/schema.json
	$(BIN)/python tools/reference.py

bench: install
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/packing.py

# A quarter of an hour.
bench-train: install
	$(BIN)/python benchmarks/train.py

# Six minutes, and 6 GB of memory.
bench-memory: install
	$(BIN)/python benchmarks/memory.py

# Eight minutes.
bench-checkpoint: install
	$(BIN)/python benchmarks/checkpoint.py

# Six minutes; with --peers a quarter of an hour.
bench-merge: install
	$(BIN)/python benchmarks/merge.py

# Twenty minutes: what replay, handovers and λ do, on tiny models with three seeds; --quick takes one of them.
bench-science: install
	$(BIN)/python benchmarks/science.py

# Ten minutes, and needs `pip install trl`.
bench-prepare: install
	$(BIN)/python benchmarks/prepare.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .grimp_cache .hypothesis *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
