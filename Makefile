# make setup | demo | test | test-fast | lint | clean | lock | mutants | lock-cpu | dashboards | demo-models. Each does all the set-up it needs; needs Python >= 3.11 and a C compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO ?= runs/demo
MASTER_PORT ?= 29500
DEMO_CLIP := $(DEMO)/clip.ogg
# Every GPU there is, and without one two processes.
RANKS ?= $(shell ls /dev/nvidia[0-9]* >/dev/null 2>&1 || echo --num_gpus 2)
PYTEST_ARGS ?= --numprocesses 2 --dist loadfile --no-loadscope-reorder
# What the launcher says of itself is kept from the screen. Line by line: mawk would hold the progress of minutes back.
LAUNCHER = '^\[[0-9-]+ [0-9:,]+\] \[(INFO|WARNING)\]'

.DELETE_ON_ERROR:
.PHONY: setup demo test test-fast lint ruff format-check types clean lock mutants lock-cpu dashboards demo-models

setup: $(INSTALLED)

# Runs once, and again when the pins or the project's metadata change.
$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make: $(PYTHON) is Python " + sys.version.split()[0] + ", 3.11 or newer is needed; give one with make PYTHON=/path/to/python3.11")'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo 'make: $(PYTHON) has no ensurepip; install it (Debian: apt-get install python3-venv)' >&2; exit 1; }
	@echo "installing the pins of requirements.lock into $(VENV): about 6 GB, some minutes"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

# PATH as in a shell with the environment active: the commands are then the ones that the README prints.
demo: export PATH := $(CURDIR)/$(BIN):$(PATH)
demo: $(INSTALLED)
	@mkdir -p $(DEMO)
	bash -o pipefail -c "deepspeed $(RANKS) --master_port $(MASTER_PORT) bridle/pretrain.py \
		--deepspeed_config ds_configs/zero2.json --run $(DEMO) 2>&1 | tee $(DEMO)/launcher.log | grep --line-buffered -vE $(LAUNCHER)"
	bridle export $(DEMO) $(DEMO)/model
	python examples/one_clip.py builtin:audio-heldout 12 $(DEMO_CLIP)
	bridle tokenize $(DEMO)/model $(DEMO_CLIP)
	bridle codebooks $(DEMO)/model builtin:audio-heldout --out $(DEMO)/codebooks
	bridle report $(DEMO)
	@echo
	@echo 'It works: a model was pretrained, exported, and has turned a sound into codes. What came out stands above.'
	@echo 'The model folder: $(DEMO)/model'
	@echo 'The picture:      $(DEMO)/codebooks/code_norms.png'
	@echo 'The page:         $(DEMO)/report.html'
	@echo 'Library warnings: $(DEMO)/warnings.log, $(DEMO)/launcher.log'
	@echo 'Next:             . $(BIN)/activate && bridle serve $(DEMO)/model'

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)

# Without the tests that take over 20 seconds, or several training runs.
test-fast: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) -m 'not slow'

lint: ruff format-check types

ruff: $(INSTALLED)
	$(BIN)/ruff check --output-format concise .

format-check: $(INSTALLED)
	$(BIN)/ruff format --check --output-format concise .

types: $(INSTALLED)
	$(BIN)/mypy

# A third of audio-mini's and image-mini's steps; most of video-mini's, which has fewer.
DEMO_STEPS = phases.1.steps=500 phases.1.warmup_steps=50 phases.2.steps=250 phases.2.warmup_steps=25 \
	phases.3.steps=250 phases.3.warmup_steps=25
demo-models: $(INSTALLED)
	for kind in audio image video; do $(BIN)/python bridle/pretrain.py --deepspeed_config ds_configs/zero1.json \
		--recipe $$kind-mini --run runs/demo-$$kind $(DEMO_STEPS) || exit $$?; done
	$(BIN)/python tools/demo_models.py runs/demo-audio runs/demo-image runs/demo-video

# Faults put in on purpose: do the nearest tests notice? Tens of minutes; MUTANTS='--count 200' for more.
mutants: $(INSTALLED)
	$(PYTHON) -m venv $(VENV)-mutants
	$(VENV)-mutants/bin/python -m pip install --quiet 'cosmic-ray>=8.3,<9'
	echo '$(abspath $(VENV))/lib/python'$$($(BIN)/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')'/site-packages' > \
		$$($(VENV)-mutants/bin/python -c 'import site; print(site.getsitepackages()[0])')/of-bridle.pth
	OMP_NUM_THREADS=1 $(VENV)-mutants/bin/python tools/mutants.py $(MUTANTS)

# Leaves runs/ alone: that is somebody's work.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Rules and dashboards of k8s/monitoring, from the names of the metrics in the code.
dashboards: $(INSTALLED)
	$(BIN)/python tools/monitoring/generate.py

# New pins: keeps those that still fit pyproject.toml; with UPGRADE=--upgrade, takes the newest.
lock:
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet uv
	$(VENV)-lock/bin/uv pip compile pyproject.toml --extra dev --extra bench --universal --generate-hashes $(UPGRADE) \
		--custom-compile-command 'make lock' --output-file requirements.lock --quiet
	rm -rf $(VENV)-lock

# The same versions with torch's CPU builds, for images: needs a network that reaches PyTorch's own index.
lock-cpu:
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/python -m pip install --quiet uv
	$(VENV)-lock/bin/uv pip compile pyproject.toml --extra train --extra serving --extra tokens --extra s3 --extra tracing \
		--torch-backend cpu --constraint requirements.lock --python-version 3.11 --python-platform linux --generate-hashes \
		--custom-compile-command 'make lock-cpu' --output-file requirements-cpu.lock --quiet
	rm -rf $(VENV)-lock
