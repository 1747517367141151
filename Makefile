# One command for each thing that people do here; `make help` lists them.
VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install reproduce test test-all exercises lint lab app notebooks book benchmark demo-model gpu gpu-demo doctor clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(VENV)/.installed  ## a virtual environment in .venv with the versions this release was tested with

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("clipad needs Python 3.11 or newer, found " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,book]'
	touch $@

reproduce: install  ## execute every notebook on the shipped model and images, offline; results in outputs/demo-demo
	$(BIN)/clipad run --all --preset demo

test: install  ## tests of the method and the studies, in less than two minutes
	$(BIN)/python -m pytest -m "not slow and not notebook and not browser"

test-all: install  ## all tests but `make exercises`: also kernels, browser, sweeps, benchmarks, the demo's training
	$(BIN)/python -m pytest -m "not notebook"

exercises: install  ## solve the notebooks' exercises by the folded solutions, and compare two runs of each notebook
	$(BIN)/python -m pytest -m notebook

lint: install  ## style and common mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lab: install  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

app: install  ## the explorer alone, as a page in the browser
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[app]'
	$(BIN)/voila clipad/studies/explorer/app.ipynb --strip_sources=True

notebooks: install  ## execute the notebooks and store their outputs in the repository
	$(BIN)/python docs/store.py

BOOK_OF ?=
book: install  ## the notebooks that `make reproduce` executed as an offline site, book/index.html; or BOOK_OF=folder
	$(BIN)/python docs/build.py $(BOOK_OF)

benchmark: install  ## speed and memory against reference forms, as ratios within one run
	$(BIN)/python -m benchmarks

demo-model: install  ## train the demo model anew, continuing where it stopped (three to four hours on two cores)
	$(BIN)/python -m demo_world.training --output-dir outputs/demo-model --workers 1

DATASETS ?= mvtec
DATA_ROOT ?= data
gpu: install  ## the paper's protocol: make gpu DATASETS="mvtec visa" DATA_ROOT=/where/they/are
	$(BIN)/clipad doctor
	for name in $(DATASETS); do \
	  other=$(DATA_ROOT)/$$($(BIN)/python -c "import clipad; print(clipad.protocol('$$name').trained_on)"); \
	  train=; test ! -d $$other || train="-p train_root $$other"; \
	  $(BIN)/clipad data check $$name --root $(DATA_ROOT)/$$name && \
	  $(BIN)/clipad run --all --preset paper -p device cuda \
	    -p dataset $$name -p data_root $(DATA_ROOT)/$$name $$train || failed=1; \
	done; test -z "$$failed"

gpu-demo: install  ## the demo on a GPU, and its records beside those that the CPU stored
	$(BIN)/clipad run --all --preset demo -p device cuda --output-dir outputs/gpu-demo
	$(BIN)/python -m benchmarks.records outputs/gpu-demo

doctor: install  ## check versions, device, weights and data
	$(BIN)/clipad doctor

clean:  ## remove results and caches, keep data and the virtual environment
	rm -rf outputs book .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
