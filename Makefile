# From a bare clone: `make demo` trains and attacks a small AdvMoE, `make test` runs the checks, `make docs`
# builds the documentation. Each makes the environment in .venv first, once. Needed: python3 (3.10 or newer), make
# and a package index.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Newer than what it depends on when the installation is up to date.
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint docs

setup: $(STAMP)
	@echo "==> environment ready in $(VENV); remove that folder to start afresh"

$(STAMP): setup.py mmadvmoe/_requirements.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "mmadvmoe needs Python 3.10 or newer; name one, as in: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@test -x $(PY) || { \
		echo "==> making a virtual environment in $(VENV)" && \
		$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "$(PYTHON) -m venv failed; on Debian or Ubuntu: apt install python3-venv" >&2; exit 1; }; }
	@echo "==> installing mmadvmoe and what it needs into $(VENV)"
	@echo "    (the first time pip downloads about 5 GB, mostly PyTorch and its CUDA libraries:"
	@echo "    minutes on a fast line, and it says nothing while it unpacks them)"
	@$(PY) -m pip install --disable-pip-version-check -e '.[lite,tests]'
	@touch $@

demo: $(STAMP)
	@echo "==> demo: training a small AdvMoE on handwritten digits, then attacking it"
	$(PY) tools/demo.py

docs: $(STAMP)
	@echo "==> documentation: tutorials are executed, warnings are errors"
	$(PY) -m pip install --disable-pip-version-check -q -e '.[docs]'
	$(PY) -m sphinx -W --keep-going -b html docs docs/_build/html
	@! grep -rl --include='*.html' -e '&lt;Figure size' -e '<p>| ' docs/_build/html || \
		{ echo "these pages show figures or tables as text" >&2; exit 1; }
	@echo "==> docs/_build/html/index.html"

lint: $(STAMP)
	@echo "==> style: ruff check and ruff format --check"
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

test: lint
	@echo "==> tests: the whole suite, on the CPU, one process for each core; the slowest ones are listed at the end"
	CUDA_VISIBLE_DEVICES=-1 OMP_NUM_THREADS=1 $(PY) -m pytest -q -n auto --dist loadfile --no-loadscope-reorder --durations=10
