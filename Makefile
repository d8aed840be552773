# Every verb works in a fresh checkout: it creates .venv first where there is none.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RLHF := $(BIN)/rlhf
READY := $(VENV)/.ready
RUNS := runs
WORKERS := 2
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.PHONY: help setup sft train-rm ppo eval-rm pipeline quickstart seeds defects bench torture gpu-check reproduce-gpu test test-all lint types check clean

help: ## Show the verbs
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

setup: $(READY) ## Create .venv and install the package with its dev extras

$(READY): pyproject.toml constraints.txt
	@echo "Installing rlhf and what it needs (torch first) into $(VENV): minutes the first time, and quiet."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

sft: $(RUNS)/sft/manifest.json ## Supervised fine-tuning on the embedded world
train-rm: $(RUNS)/train-rm/manifest.json ## Reward model, and what it needs
eval-rm: $(RUNS)/eval-rm/manifest.json ## Examine the reward model, and what it needs
ppo: $(RUNS)/ppo/manifest.json ## PPO with an examined reward model, and what it needs

# A run that is up to date is left alone, an unfinished one goes on, a changed one is moved aside and made again.
$(RUNS)/sft/manifest.json: configs/sft.yaml | $(READY)
	$(RLHF) sft -c $< --resume --overwrite

$(RUNS)/train-rm/manifest.json: configs/train-rm.yaml $(RUNS)/sft/manifest.json | $(READY)
	$(RLHF) train-rm -c $< --resume --overwrite

$(RUNS)/eval-rm/manifest.json: configs/eval-rm.yaml $(RUNS)/train-rm/manifest.json | $(READY)
	$(RLHF) eval-rm -c $< --resume --overwrite

$(RUNS)/ppo/manifest.json: configs/ppo.yaml $(RUNS)/sft/manifest.json $(RUNS)/train-rm/manifest.json $(RUNS)/eval-rm/manifest.json | $(READY)
	$(RLHF) ppo -c $< --resume --overwrite

pipeline: $(READY) ## Bring all stages of configs/pipeline.yaml up to date
	$(RLHF) pipeline -c configs/pipeline.yaml

quickstart: $(READY) ## SFT, reward model and PPO on the embedded world, with a table, plots and summary.json
	$(BIN)/python scripts/quickstart.py

seeds: $(READY) ## The quickstart over ten seeds with its comparisons (an hour; resumable)
	$(BIN)/python scripts/quickstart_seeds.py

defects: $(READY) ## Plant defects in labels, and count what the examination finds (two hours; resumable)
	$(BIN)/python scripts/planted_defects.py train --out $(RUNS)/defects
	$(BIN)/python scripts/planted_defects.py examine --out $(RUNS)/defects
	$(BIN)/python scripts/planted_defects.py report --out $(RUNS)/defects

bench: $(READY) ## CPU seconds and memory of a PPO step (beside a peer: scripts/benchmark_ppo.py --help)
	$(BIN)/python scripts/benchmark_ppo.py

torture: $(READY) ## Kill, starve and damage runs; each must end with the same bits (half an hour)
	$(BIN)/python scripts/torture.py

gpu-check: $(READY) ## On a CUDA machine: its tests, single claims, and PPO steps at real sizes (8 minutes)
	PYTHONPATH=. $(BIN)/python scripts/gpu_check.py --out $(RUNS)/gpu-check

reproduce-gpu: $(READY) ## On one GPU of 24 GB: the sentiment study on Qwen2.5-0.5B, and a block to paste (resumable)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[studies]'
	$(BIN)/python scripts/reproduce_gpu.py --out $(RUNS)/reproduce-gpu

test: $(READY) ## The tests that take minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m "not slow"

test-all: $(READY) ## All tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

lint: $(READY) ## Style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## Static types
	$(BIN)/mypy

check: $(READY) ## Check the shipped configs and their data rows
	$(RLHF) check

clean: ## Remove .venv, runs and caches
	rm -rf $(VENV) $(RUNS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
