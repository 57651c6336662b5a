# The commands a person types; each sets itself up in .venv first.
#   make demo [DATA=folder-or-lmdb] [RUN=runs/demo]    make test    make lint    make fuzz    make bench    make report
#   make study [STUDY=tiny_table1_cnn] [JOBS=2]
# Only this one uses the Python at hand (which has torch), no .venv and no network:
#   make gpu [PIECE="ceilings parts"] [OUT=folder] [GPU_ARGS="--test words.zip"]; make gpu GPU_ARGS=--list shows the pieces
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p && break; done)
RUN ?= runs/demo
STUDY ?= tiny_table1_cnn
JOBS ?= 2
DATA ?=
PIP_ARGS ?=
PIECE ?=
OUT ?=
GPU_ARGS ?=
FUZZ_ARGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt $(PIP_ARGS)
BUILT_FROM := setup.py pyproject.toml constraints.txt CMakeLists.txt $(wildcard csrc/*)

.PHONY: demo study test lint fuzz bench report gpu clean
demo: .venv/.installed
	$(BIN)/rcmstr demo --run $(RUN) $(if $(DATA),--data $(DATA))

study: .venv/.installed
	$(BIN)/rcmstr study $(STUDY) --jobs $(JOBS) --record bench/results/studies/$(STUDY).json
	$(BIN)/python -m bench.report

test: .venv/.tested lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# The long form of tests/fuzz: minutes to an hour on one core; the first lines of tests/fuzz/run.py say how to repeat an attempt.
fuzz: .venv/.tested
	OMP_NUM_THREADS=1 nice $(BIN)/python -m tests.fuzz.run $(FUZZ_ARGS)

lint: .venv/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.tested
	mkdir -p bench/results/cpu
	$(BIN)/python -m pytest bench -q --benchmark-only --benchmark-json=bench/results/cpu/benchmarks.json
	$(BIN)/rcmstr bench step --config recipes/tiny_cnn_rcmstr.yaml --train.precision fp32 --repetitions 8
	$(BIN)/rcmstr bench methods --batch 16
	$(BIN)/rcmstr bench pipeline --config recipes/tiny_cnn_rcmstr.yaml --train.precision fp32 --seconds 5 --peers true
	$(BIN)/python -m bench.report

report: .venv/.tested
	$(BIN)/python -m bench.report

gpu:
	$(PYTHON) -m bench.gpu $(PIECE) $(if $(OUT),--out $(OUT)) $(GPU_ARGS)

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.10 to 3.13 found; install one or call make PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "make: $(PYTHON) cannot make a virtual environment; on Debian and Ubuntu install python3-venv" >&2; exit 2; }

.venv/.installed: .venv/bin/python $(BUILT_FROM)
	@echo "installing rcmstr_fast and what it needs into .venv (the first time this downloads PyTorch)"
	@$(PIP) -e '.[synth]'
	@touch $@

.venv/.tested: .venv/.installed
	@$(PIP) -e '.[synth,test]'
	@touch $@

clean:
	rm -rf .venv build *.egg-info rcmstr_fast/_C*.so
