# Everything a user calls. Each target sets up what it needs in .venv first.

VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/ready

# Transparent huge pages for large buffers: a CPU step takes a quarter less time (docs/architecture.md). Linux only, and
# ignored elsewhere.
export GLIBC_TUNABLES := glibc.malloc.hugetlb=1

.PHONY: help train test lint bench docs clean

help:
	@echo "make train   train configs/tiny.py on the standard library's source, then print results and a sample"
	@echo "make test    run all tests"
	@echo "make lint    check style"
	@echo "make bench   measure step time, compile time and program size on this machine; render docs/benchmarks.md"
	@echo "make docs    run the notebooks again and keep their outputs"
	@echo "make clean   remove .venv and caches (runs/ is kept)"

$(READY): setup.cfg pyproject.toml constraints.txt .ci/find-python
	python=$$(sh .ci/find-python) && "$$python" -m venv --clear $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	touch $@

train: $(READY)
	$(PYTHON) -m experiments.pretrain --config=configs/tiny.py --workdir=runs/tiny

test: $(READY)
	$(PYTHON) -m pytest -n auto --maxprocesses 8 --dist worksteal

lint: $(READY)
	$(PYTHON) -m flake8 dsv3 experiments configs tests
	$(PYTHON) -m isort --check-only --quiet dsv3 experiments configs tests

bench: $(READY)
	$(PYTHON) -m experiments.benchmark
	$(PYTHON) -m experiments.benchmark render

docs: $(READY)
	$(VENV)/bin/jupyter-execute --inplace notebooks/*.ipynb

clean:
	rm -rf $(VENV) .cache .pytest_cache .hypothesis build *.egg-info
