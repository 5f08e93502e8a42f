# SynthMR. `make demo` and `make test` start from nothing: Python 3.11 and make.
.DEFAULT_GOAL := help
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(abspath $(VENV))/bin
READY  := $(VENV)/ready
STUDY  ?= params/demo/study.yaml
RESULTS ?= results/small
export PATH := $(BIN):$(PATH)

.PHONY: help demo test docs lab notebooks export keep bench lock clean

help: ## what can be made
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

# The environment: made once, made again when the lock or the settings change.
$(READY): requirements.lock settings.ini setup.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

demo: $(READY) ## the study on simulated patients: one table, one page (about twenty minutes on two cores)
	synthmr study $(STUDY)

test: $(READY) ## every notebook and every test
	OMP_NUM_THREADS=1 nbdev_test --n_workers 2 --do_print
	python -m pytest -n 2 --dist loadgroup

docs: $(READY) ## the living paper as HTML, in _docs/html/index.html
	python nbs/_site/build.py

lab: $(READY) ## JupyterLab on the notebooks
	jupyter lab nbs

notebooks: $(READY) ## run every notebook and keep its outputs
	jupyter nbconvert --to notebook --execute --inplace $(shell find nbs -name '[0-9]*.ipynb' -not -path '*/reports/*' | sort)
	nbdev_clean

export: $(READY) ## write the package from the notebooks
	nbdev_export
	nbdev_clean

keep: $(READY) ## shrink executed reports that are to be committed, put the answer into README: make keep RESULTS=results/small
	python nbs/_site/keep.py $(RESULTS)
	python nbs/_site/readme.py

bench: $(READY) ## measure against floors and peers; prints ratios
	for file in tests/bench/bench_*.py; do python $$file || exit 1; done

lock: ## exact versions of a fresh environment, from the ranges in settings.ini
	rm -rf $(VENV)-lock && $(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet 'torch==2.13.0' '.[dev]'
	$(VENV)-lock/bin/python -m pip list --format=freeze --exclude pip --exclude setuptools --exclude synthmr | sed 's/^\(torch==[0-9.]*\)+.*/\1/' > requirements.lock
	rm -rf $(VENV)-lock

clean: ## forget the environment and everything that can be made again
	rm -rf $(VENV) _docs build *.egg-info .pytest_cache .ruff_cache .snakemake
