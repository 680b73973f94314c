# Two commands matter: `make replicate` and `make test`. Each sets up .venv first, by itself. `make` alone lists the targets.
PROFILE ?= laptop
PYTHON ?= python3
CORES ?= $(shell getconf _NPROCESSORS_ONLN)
VENV := .venv
BIN := $(VENV)/bin
RUNS := $(if $(SAELIB_DATA),$(SAELIB_DATA),data)/runs
# EXECUTOR names a folder of workflow/executors (docs/cluster.md); THREADS are those of each job there; FLAGS go to Snakemake
EXECUTOR ?=
THREADS ?= 4
FLAGS ?=
WHERE = $(if $(EXECUTOR),--profile workflow/executors/$(EXECUTOR),--cores $(CORES))
CONFIG = profile=$(PROFILE) $(if $(EXECUTOR),fan_out=true threads=$(THREADS))
SNAKEMAKE = $(BIN)/snakemake --snakefile workflow/Snakefile --directory $(RUNS) $(WHERE) --nolock --rerun-incomplete --quiet rules host $(FLAGS) --config $(CONFIG)
export HF_HUB_OFFLINE ?= 1
export PYTHONUTF8 := 1
# keep freed memory for the next batch instead of giving its pages back (glibc); fresh pages cost the harvest a tenth of its time
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
export MALLOC_TRIM_THRESHOLD_ ?= 4294967296
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help replicate test unit pipeline nbval interop serve-test browser-test slurm-test data figures features refresh verdict search bench lint lab clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14
	@echo; echo "profiles (PROFILE=...): $(basename $(notdir $(wildcard notebooks/profiles/*.yaml)))"

$(VENV)/installed: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11; give another one: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --progress-bar on -r requirements.lock
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/%-executor: $(VENV)/installed
	@test -d workflow/executors/$* || { echo "error: no folder workflow/executors/$*; see docs/cluster.md"; exit 1; }
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-build-isolation -e '.[$*]'
	@touch $@

data: $(VENV)/installed  ## fetch and verify the pinned text and model (once, about 140 MB)
	@$(BIN)/python -m saelib.sources

replicate: data $(if $(EXECUTOR),$(VENV)/$(EXECUTOR)-executor)  ## run all notebooks under PROFILE, as far as they are not current; EXECUTOR=slurm: on a cluster
	@mkdir -p $(RUNS)
	@$(SNAKEMAKE) && echo "all notebooks of profile $(PROFILE) are current: $(RUNS)/$(PROFILE)/notebooks"

figures: data  ## make the figures of PROFILE again from what is already computed
	@mkdir -p $(RUNS)
	@$(SNAKEMAKE) --forceall

features: data  ## a page for each feature of a dictionary, to open from disk (HOOK=..., DICTIONARY=...)
	@$(BIN)/python -m saelib.feature_pages $(PROFILE) $(if $(HOOK),--hook $(HOOK)) $(if $(DICTIONARY),--dictionary $(DICTIONARY))

refresh: replicate  ## put the executed notebooks of the laptop profile into notebooks/, for a commit
	@test $(PROFILE) = laptop || { echo "error: only the laptop profile's outputs are committed"; exit 1; }
	cp $(addprefix $(RUNS)/laptop/,$(wildcard notebooks/[0-9]*.ipynb)) notebooks/
	$(BIN)/python -m saelib.verdict

verdict: $(VENV)/installed  ## write the README's table from figures/laptop/x_verdict.csv, which notebook 07 made
	$(BIN)/python -m saelib.verdict

test: unit pipeline nbval  ## everything below: unit tests, smoke pipeline, committed notebooks

unit: data  ## unit tests and notebook lint (three to four minutes)
	$(BIN)/python -m pytest

pipeline: data  ## the smoke profile end to end in a temporary folder
	$(BIN)/python -m pytest -m pipeline

nbval: data  ## run the committed notebooks and compare their checked cells
	$(BIN)/python -m pytest -m notebooks

interop: data  ## load our folders with SAELens and dictionary_learning (installs them in an environment of their own)
	$(BIN)/python -m pytest -m interop

serve-test: data  ## explanation and simulation through the openai client against `transformers serve` on loopback
	$(BIN)/python -m pytest -m serve -s

browser-test: data  ## open feature pages in a headless Chromium (Debian's chromium and chromium-driver)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-build-isolation -c requirements.lock -e '.[browser]'
	$(BIN)/python -m pytest -m browser -s

slurm-test: data $(VENV)/slurm-executor  ## the smoke profile on a SLURM of two nodes on loopback, one of which dies (a quarter of an hour)
	$(BIN)/python -m pytest -m slurm -s

search: data  ## the search over training settings behind notebook 02 (half an hour)
	$(BIN)/python workflow/search_settings.py

bench: data  ## the benchmarks of tests/benchmarks, each against its limit or rival in the same run
	$(BIN)/python -m tests.benchmarks

lint: $(VENV)/installed  ## what pre-commit checks, on all files
	$(BIN)/pre-commit run --all-files

lab: data  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

clean:  ## delete the run of PROFILE; fetched sources stay
	rm -rf $(RUNS)/$(PROFILE)
