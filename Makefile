# make demo | make demo-vision | make demo-draft | make demo-rl | make demo-vision-base | make test | make slow | make fuzz | make fuzz-long | make fuzz-server | make golden | make cpus | make sandbox-test | make elsewhere | make stories3m | make docs | make recordings | make gpu
PYTHON ?= python3
# An activated environment is used as it is; else one is made here.
ifdef VIRTUAL_ENV
VENV := $(VIRTUAL_ENV)
else
VENV := .venv
endif
BIN := $(VENV)/bin
STAMP := $(VENV)/.ar2diff-installed
AR2DIFF_DATA ?= $(abspath ../shared/data)
export AR2DIFF_DATA

.PHONY: docs recordings gpu install demo demo-draft demo-rl demo-vision demo-vision-base test slow sandbox-test fuzz fuzz-long fuzz-server elsewhere lint messages golden cpus stories3m clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  echo "error: $(PYTHON) cannot make a virtual environment"; \
	  echo "  fix: install it (Debian: apt-get install python3-venv), or activate an environment"; \
	  rm -rf $(VENV); exit 2; }
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m ar2diff.demo

# The draft adapter that ships beside the embedded model, trained again.
demo-draft: $(STAMP)
	$(BIN)/python -m ar2diff.demo.build --draft

# The embedded vision-language model, adapted: pictures, questions, and what it says.
demo-vision: $(STAMP)
	$(BIN)/python -m ar2diff.demo.vision

# After make demo: the model tuned on easy questions alone, then rewarded for answers to harder ones.
demo-rl: $(STAMP)
	$(BIN)/python -m ar2diff.demo.answers runs/easy.jsonl --levels 1 --largest 0 10
	$(BIN)/ar2diff sft runs/demo --recipe demo-easy --data runs/easy.jsonl \
	  --output-dir runs/demo-easy --overwrite
	$(BIN)/python -m ar2diff.demo.answers runs/hard.jsonl --levels 2 --largest 11 20 --seed 7
	$(BIN)/ar2diff rl runs/demo-easy --recipe demo-rl --data runs/hard.jsonl \
	  --output-dir runs/demo-rl --overwrite

# The vision-language checkpoint that ships in ar2diff, trained again and measured.
demo-vision-base: $(STAMP)
	$(BIN)/python -m ar2diff.demo.vision.build
	$(BIN)/python benchmarks/vision_base.py

# A worker a core, a file to one of them: what a file builds is built once.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

slow: $(STAMP)
	$(BIN)/python -m pytest -m slow
	$(MAKE) cpus

# Every attempt to escape from the sandbox of code rewards, and what a sandbox costs. Fails without
# bubblewrap, where make test skips them.
sandbox-test: $(STAMP)
	AR2DIFF_SANDBOX=required OMP_NUM_THREADS=1 $(BIN)/python -m pytest -vv --no-header -m 'slow or not slow' \
	  tests/test_sandbox.py tests/test_code_rewards.py
	$(BIN)/python benchmarks/sandbox.py

# What rounding, cores, locale or time zone could turn, under several of each (a part of make slow).
cpus: $(STAMP)
	$(BIN)/python tests/cpus.py

# Hostile checkpoints, rows, recipes and arguments; any finding fails. SEED=1 makes other ones.
fuzz: $(STAMP)
	$(BIN)/python tests/fuzz --minutes 10 --seed $(or $(SEED),0)

fuzz-long: $(STAMP)
	$(BIN)/python tests/fuzz --count 2000 --seed $(or $(SEED),1)

# Hostile clients against a server; any finding fails. SEED=1 makes other ones.
fuzz-server: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/server.py --count 10000 --heavy --seed $(or $(SEED),0)

# Losses, likelihoods and tokens of fixed seeds, to compare two commits by: see the script.
GOLDEN ?= runs/golden.json
golden: $(STAMP)
	OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= HF_HUB_OFFLINE=1 \
	  $(BIN)/python benchmarks/golden.py $(GOLDEN)

# A converted folder in a fresh environment without ar2diff: transformers, its server, lm-eval.
elsewhere: $(STAMP)
	@work=$$(mktemp -d) && trap 'rm -rf "$$work"' EXIT && \
	$(PYTHON) -m venv "$$work/venv" && pip="$$work/venv/bin/python -m pip install -q" && \
	$$pip --disable-pip-version-check -c constraints.txt torch && \
	$$pip --disable-pip-version-check -c constraints.txt \
	  'transformers[serving]' 'lm-eval[hf]' peft && \
	$(BIN)/python benchmarks/elsewhere.py make "$$work/model" && cd "$$work" && \
	venv/bin/python $(CURDIR)/benchmarks/elsewhere.py check model

# Every message and help text on one page, to be read in one go.
messages: $(STAMP)
	$(BIN)/python tests/messages.py > docs/messages.md

# The documentation as a site, in site/; the pictures are drawn from the code. The theme's banner
# about another program is no warning of ours.
docs: $(STAMP)
	$(BIN)/python docs/site/pictures.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Everything that has to be seen on a GPU, in nine minutes; its rows go to benchmarks/results.
gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py

lint: $(STAMP)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# What commands show on a terminal of 80 and 120 columns, as pictures in docs/recordings.
recordings: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/recordings.py

# The converted stories3M-hf that later work starts from; the folder is ignored by git.
stories3m: $(STAMP)
	$(BIN)/ar2diff adapt $(AR2DIFF_DATA)/stories3M-hf --recipe stories3m --resume \
	  --data tinystories/train --data stories3M-samples --output-dir runs/stories3m
	$(BIN)/ar2diff eval runs/stories3m --data tinystories/valid --limit 64

clean:
	rm -rf .venv build dist runs site *.egg-info .pytest_cache .ruff_cache .hypothesis
