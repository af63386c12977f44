# The front door. Each verb is a thin line over `python -m package.module key=value`.
#   make stage2 RUN=mine MODEL=tiny DATA=demo ARGS="stage.steps=100 parallel=tp2"

CLUSTER ?= local
# A laptop and any Slurm get the demo, a site with a profile of its own the real model.
SMALL = $(filter local slurm,$(CLUSTER))
RUN ?= $(if $(SMALL),demo,amalia)
MODEL ?= $(if $(SMALL),tiny,amalia_vl_9b)
DATA ?= $(if $(SMALL),demo,amalia)
STAGE ?= stage3
OUT ?= $(if $(filter stage3,$(STAGE)),runs/$(RUN)/hf,runs/$(RUN)/$(STAGE)/hf)
DRY ?=
TEST_ONLY ?=
YES ?=
BENCH ?= speed
ARGS ?=
VENV ?= .venv
# More than two cores: most of the slow tests wait, for Slurm or for ranks of their own.
WORKERS ?= 3

# The first of these that can make a virtual environment.
PYTHON ?= $(shell for p in python3.11 python3.12; do \
	$$p -c 'import ensurepip, venv' 2>/dev/null && echo $$p && break; done)
# Where there is no GPU, the CPU build of torch, a tenth of the download, if an index that pip knows
# has it (PIP_EXTRA_INDEX_URL adds one); else the usual build, which runs without a GPU as well.
TORCH = torch==2.13.0

PY = $(VENV)/bin/python
PIP = $(PY) -m pip --disable-pip-version-check --quiet
# PREPARED=1: VENV is ready as it is (made elsewhere, for a machine without internet).
READY = $(if $(PREPARED),,$(VENV)/.installed)
# nemo-run brings a hundred packages; they stay out of VENV.
VENV_REMOTE ?= .venv-remote
REMOTE_READY = $(VENV_REMOTE)/.installed
# energon, which training does not need; torch and the rest it shares with VENV.
VENV_SERVE ?= .venv-serve
# vLLM's own Python code, without its kernels: 47 MB of source instead of 336 MB for CUDA.
VENV_VLLM ?= .venv-vllm
VLLM = 0.33.0
VENV_ENERGON ?= .venv-energon
# $(call slurm,VERB,MODULE): the module here, or with REMOTE=user@host the verb there, over SSH.
REMOTE ?=
REMOTE_DIR ?=
REMOTE_PYTHON ?=
slurm = $(if $(REMOTE),$(VENV_REMOTE)/bin/python -m slurm.remote 'host=$(REMOTE)' \
	$(if $(REMOTE_DIR),'dir=$(REMOTE_DIR)') $(if $(REMOTE_PYTHON),'python=$(REMOTE_PYTHON)') verb=$(1),$(PY) -m $(2))
LAUNCHER = $(if $(REMOTE),$(REMOTE_READY),$(READY))
SUBMIT = $(call slurm,submit,slurm.submit) run=$(RUN) model=$(MODEL) data=$(DATA) cluster=$(CLUSTER) \
	$(if $(DRY),dry=$(DRY)) $(if $(TEST_ONLY),test_only=$(TEST_ONLY)) $(if $(YES),yes=$(YES))
# Verbs that have no plan of their own to print only show their command with DRY=1.
SHOW = $(if $(DRY),@echo would run:)
# and those that run on this machine only.
HERE = $(if $(REMOTE),$(error REMOTE= goes with stage1, stage2, stage3, pipeline, status, logs, cancel, \
	steer and array; give `make $@` there))$(SHOW)

.DEFAULT_GOAL := help
.PHONY: help setup setup-remote setup-energon setup-serve setup-vllm demo test lint format shards stage1 stage2 stage3 pipeline status logs \
	cancel steer array import export parity serve-check diff average eval plan dryrun profile bench report

help: ## this list
	@grep -hE '^[a-z0-9 -]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' \
		| awk -F '\t' '{ printf "  %-20s %s\n", $$1, $$2 }'
	@echo
	@echo 'Variables (now): CLUSTER=$(CLUSTER) RUN=$(RUN) MODEL=$(MODEL) DATA=$(DATA) STAGE=$(STAGE)'
	@echo '  CLUSTER=mn5 (or another of conf/cluster) queues jobs instead of running them here;'
	@echo '  REMOTE=user@host does so over SSH;'
	@echo '  TEST_ONLY=1 asks Slurm when they would start, YES=1 does not ask about GPU-hours'
	@echo '  DRY=1 prints what would run; ARGS="key=value ..." overrides any setting of conf/'

setup: $(READY) ## make .venv and install everything (every verb does it by itself)

$(VENV)/.installed: setup.cfg setup.py pyproject.toml constraints.txt $(wildcard data_shards/native/*)
	@test -x $(PY) || test -n '$(PYTHON)' || { echo 'error: no Python 3.11 or 3.12 that can make a \
	virtual environment; install one (Debian: apt install python3.11-venv) or give PYTHON=' >&2; exit 1; }
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo 'installing into $(VENV) (some minutes the first time)'
	@if command -v nvidia-smi >/dev/null 2>&1 || test "$$(uname -s)" != Linux; then \
		$(PIP) install '$(TORCH)'; \
	else \
		$(PIP) install '$(TORCH)+cpu' 2>/dev/null \
		|| $(PIP) install '$(TORCH)'; \
	fi
	@$(PIP) install -c constraints.txt -e '.[dev,eval]'
	@touch $@

setup-remote: $(REMOTE_READY) ## make .venv-remote, from which REMOTE=user@host submits over SSH

$(VENV_REMOTE)/.installed: constraints-remote.txt
	@test -x $(VENV_REMOTE)/bin/python || test -n '$(PYTHON)' || { echo 'error: no Python 3.11 or 3.12 \
	that can make a virtual environment; install one or give PYTHON=' >&2; exit 1; }
	@test -x $(VENV_REMOTE)/bin/python || $(PYTHON) -m venv $(VENV_REMOTE)
	@echo 'installing nemo-run into $(VENV_REMOTE) (some minutes the first time)'
	@$(VENV_REMOTE)/bin/python -m pip --disable-pip-version-check --quiet install \
		-c constraints-remote.txt nemo-run leptonai
	@touch $@

setup-energon: $(VENV_ENERGON)/.installed ## make .venv-energon, to compare and check against energon

$(VENV_ENERGON)/.installed: constraints-energon.txt | $(READY)
	@test -x $(VENV_ENERGON)/bin/python || $(PY) -m venv $(VENV_ENERGON)
	@echo 'installing energon into $(VENV_ENERGON)'
	@$(VENV_ENERGON)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps \
		-r constraints-energon.txt
	@$(PY) -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' > "$$($(VENV_ENERGON)/bin/python \
		-c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/shared.pth"
	@touch $@

setup-serve: $(VENV_SERVE)/.installed ## make .venv-serve, the newest transformers, for serve-check

$(VENV_SERVE)/.installed: constraints-serve.txt | $(READY)
	@test -x $(VENV_SERVE)/bin/python || $(PY) -m venv $(VENV_SERVE)
	@echo 'installing transformers 5 into $(VENV_SERVE)'
	@$(VENV_SERVE)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps \
		-r constraints-serve.txt
	@$(PY) -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' > "$$($(VENV_SERVE)/bin/python \
		-c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/shared.pth"
	@touch $@

setup-vllm: $(VENV_VLLM)/.installed ## make .venv-vllm, vLLM's code without its kernels, for serve-check

$(VENV_VLLM)/.installed: constraints-vllm.txt | $(READY)
	@test -x $(VENV_VLLM)/bin/python || $(PY) -m venv $(VENV_VLLM)
	@echo 'installing vLLM, without its kernels, into $(VENV_VLLM) (a minute)'
	@$(PY) -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' > "$$($(VENV_VLLM)/bin/python \
		-c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/shared.pth"
	@$(VENV_VLLM)/bin/python -m pip --disable-pip-version-check --quiet install --no-deps \
		-r constraints-vllm.txt
	@VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=$(VLLM) $(VENV_VLLM)/bin/python -m pip \
		--disable-pip-version-check --quiet install --no-deps --no-build-isolation \
		--no-binary vllm vllm==$(VLLM)
	@touch $@

demo: $(READY) ## the whole pipeline in miniature, to runs/demo/report.html
	$(HERE) $(PY) -m tools.demo run=$(RUN) $(ARGS)

test: $(READY) ## all tests; what is skipped is listed with its reason
	$(PY) -m pytest -n $(WORKERS) $(ARGS)

lint: $(READY) ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: $(READY) ## ruff, writing
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

shards: $(READY) ## sources of DATA to tar shards and manifests; DRY=1 shows ten samples of each
	$(if $(REMOTE),$(HERE))$(PY) -m data_shards.build model=$(MODEL) data=$(DATA) run=$(RUN) \
		$(if $(DRY),dry=$(DRY)) $(ARGS)

stage1 stage2 stage3: $(LAUNCHER) ## one stage of RUN; the same command resumes
	$(SUBMIT) 'stages=[$@]' $(ARGS)

pipeline: $(LAUNCHER) ## the three stages, each once, and the Hugging Face folder
	$(SUBMIT) 'stages=[stage1,stage2,stage3]' export=true $(ARGS)

status: $(LAUNCHER) ## stages, jobs, steps and GPU-hours of RUN; one call of squeue, kept for a minute
	$(call slurm,status,slurm.status) run=$(RUN) $(ARGS)

logs: $(LAUNCHER) ## the log of what runs now in RUN; ARGS="stage=stage2 follow=true"
	$(call slurm,logs,slurm.logs) run=$(RUN) $(ARGS)

cancel: $(LAUNCHER) ## all queued jobs of RUN; running ones save first (ARGS=now=true: at once)
	$(SHOW) $(call slurm,cancel,slurm.cancel) run=$(RUN) $(ARGS)

steer: $(LAUNCHER) ## DO=save|exit|stop|go: act on RUN by a file, also where the jobs are a colleague's
	$(call slurm,steer,slurm.steer) run=$(RUN) $(DO) $(ARGS)

array: $(LAUNCHER) ## TASK=shards|validate|reference|evaluate of RUN as an array; ARGS="throttle=8"
	$(call slurm,array,slurm.arrays) task=$(TASK) run=$(RUN) model=$(MODEL) data=$(DATA) cluster=$(CLUSTER) \
		$(if $(DRY),dry=$(DRY)) $(if $(TEST_ONLY),test_only=$(TEST_ONLY)) $(if $(YES),yes=$(YES)) \
		$(ARGS)

import: $(READY) ## VISION= LANGUAGE= TOKENIZER= (Hugging Face folders), or LLAVA=, to runs/RUN/import
	$(HERE) $(PY) -m tools.hf_import model=$(MODEL) $(if $(LLAVA),llava=$(LLAVA),\
		vision=$(VISION) language=$(LANGUAGE) tokenizer=$(TOKENIZER)) out=runs/$(RUN)/import $(ARGS)

export: $(READY) ## STAGE of RUN to a Hugging Face folder, OUT= (default runs/RUN/hf); FINAL=1 with the gate
	$(HERE) $(PY) -m tools.hf_export stage=runs/$(RUN)/$(STAGE) out=$(OUT) $(if $(FINAL),final=true) $(ARGS)

parity: $(READY) ## the gate: is HF= (default OUT) the model of STAGE of RUN? writes parity.json
	$(HERE) $(PY) -m tools.parity_gate stage=runs/$(RUN)/$(STAGE) hf=$(or $(HF),$(OUT)) $(ARGS)

serve-check: $(READY) ## does HF= (default OUT) answer the same in transformers 4.57.6, 5.x and vLLM
	$(HERE) $(PY) -m tools.serve_check hf=$(or $(HF),$(OUT)) $(ARGS)

diff: $(READY) ## A= and B=, exports, stages or checkpoints: what differs, tensor by tensor
	$(HERE) $(PY) -m tools.diff_checkpoints a=$(A) b=$(B) $(ARGS)

average: $(READY) ## mean of the LAST= checkpoints of STAGE, a stage of its own: runs/RUN/STAGE_mean
	$(HERE) $(PY) -m tools.average_checkpoints stage=runs/$(RUN)/$(STAGE) last=$(or $(LAST),2) \
		out=runs/$(RUN)/$(STAGE)_mean $(ARGS)

eval: $(READY) ## held-out questions to the export of STAGE
	$(HERE) $(PY) -m tools.evaluate run=$(RUN) stage=$(STAGE) $(ARGS)

plan: $(READY) ## memory, speed, GPU-hours and disk of each stage before anything is queued; alternatives
	$(HERE) $(PY) -m tools.plan_run run=$(RUN) model=$(MODEL) data=$(DATA) cluster=$(CLUSTER) $(ARGS)

dryrun: $(READY) ## build and step every rank of a layout on this machine, without memory or network
	$(HERE) $(PY) -m tools.dry_run run=$(RUN) model=$(MODEL) data=$(DATA) cluster=$(CLUSTER) $(ARGS)

profile: $(READY) ## some steps of STAGE under torch's profiler, to runs/RUN/profile
	$(HERE) $(PY) -m tools.profile_run run=$(RUN) model=$(MODEL) data=$(DATA) stage=$(STAGE) $(ARGS)

bench: $(READY) ## measure what this machine can (BENCH=speed|data|interchange); tables to docs/benchmarks
	$(if $(filter data,$(BENCH)),$(HERE) $(MAKE) -s setup-energon || echo 'note: no energon to compare with')
	$(HERE) $(PY) -m tools.bench bench=$(BENCH) $(ARGS)

report: $(READY) ## report.html and report.json of RUN
	$(HERE) $(PY) -m tools.report run=$(RUN) $(ARGS)
