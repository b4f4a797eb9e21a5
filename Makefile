# `make demo` and `make test` are all a fresh machine needs. One environment, .venv, holds everything; it is made
# on first use and brought up to date when pyproject.toml changes.
PROFILE ?= $(or $(EMOCA_NB_PROFILE),$(shell sed -n "s/^profile *= *//p" settings.ini))
PY := .venv/bin/python
PAPERMILL := $(PY) -m papermill --cwd nbs --log-output --no-progress-bar
BENCHMARKS := $(wildcard nbs/benchmarks/*.ipynb)
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.DEFAULT_GOAL := help
.PHONY: help demo test lab docs export bench clean

help:    ## this list
	@sed -n 's/^\([a-z]*\): .*## /\1\t/p' Makefile | expand -t 10

demo: .venv/.ready    ## the tour, a small training of the coarse stage, and a photograph reconstructed with it: reports/demo*
	$(PAPERMILL) nbs/index.ipynb reports/demo.ipynb
	$(PAPERMILL) -p out $(CURDIR)/data/runs/demo nbs/05_train_coarse.ipynb reports/demo_train_coarse.ipynb
	.venv/bin/emoca-nb reconstruct $$($(PY) -c "from skimage import data; print(data.__path__[0])")/astronaut.png -o reports/demo_astronaut --model data/runs/demo/emotion_1/encoders.pt --refine
	@echo "The executed notebooks: reports/demo.ipynb, reports/demo_train_coarse.ipynb; the head: reports/demo_astronaut. To read and change them: make lab"

test: .venv/.ready    ## every notebook and every test; ARGS="-k core" goes to pytest
	$(PY) -m pytest $(ARGS)

lab: .venv/.ready    ## open JupyterLab on the notebooks
	$(PY) -m jupyter lab nbs/index.ipynb $(if $(filter 0,$(shell id -u)),--allow-root)

docs: .venv/.ready    ## build the web pages into site/
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet --strict

export: .venv/.ready    ## clean the notebooks, write emoca_nb/*.py and README.md from them
	$(PY) scripts/strip_widgets.py
	.venv/bin/nbdev-clean
	.venv/bin/nbdev-export
	$(PY) scripts/readme.py

bench: .venv/.ready    ## run the benchmarks, tables to reports/benchmarks; PROFILE=gpu on a GPU
	@mkdir -p reports/runs
	@$(foreach nb,$(BENCHMARKS),$(if $(wildcard nbs/profiles/$(basename $(patsubst nbs/%,%,$(nb)))/$(PROFILE).yaml),,echo "$(nb) has no profile $(PROFILE): its own values are used" &&)) true
	@$(foreach nb,$(BENCHMARKS),$(PAPERMILL) $(nb) reports/runs/$(notdir $(nb)) $(addprefix -f ,$(wildcard nbs/profiles/$(basename $(patsubst nbs/%,%,$(nb)))/$(PROFILE).yaml)) &&) true

clean:    ## remove the environment, caches and built pages; data/ and reports/ stay
	rm -rf .venv .cache site build dist *.egg-info .pytest_cache _proc _docs
	find . -name __pycache__ -prune -exec rm -rf {} +

.venv/.ready: pyproject.toml scripts/environment.sh
	@sh scripts/environment.sh
