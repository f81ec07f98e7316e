# make demo   train two members on the sample data, ensemble them, show the scores
# make test   lint, types and the test suite
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
SAMPLE := --data_dir data/sample --pretrained all-MiniLM-L6-v2 --overwrite

.PHONY: help demo tables test test-odd test-even test-all gpu-check gpu-rehearsal gpu-counts lint clean

help:
	@grep -E '^# make' Makefile | cut -c3-

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; name it: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.done: requirements.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/dev.done: requirements.txt requirements-dev.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@ $(VENV)/run.done

demo: $(VENV)/run.done
	$(BIN)/python multitask_classifier.py @recipes/small/demo-siamese.args $(SAMPLE) --run_dir $(DEMO)/siamese
	$(BIN)/python multitask_classifier.py @recipes/small/demo-cross.args $(SAMPLE) --run_dir $(DEMO)/cross
	$(BIN)/python ensemble.py $(DEMO)/siamese/best.pt $(DEMO)/cross/best.pt --data_dir data/sample --run_dir $(DEMO)/ensemble
	@echo
	@echo "Curves, confusion matrices and options of both members:"
	@echo "    $(BIN)/tensorboard --logdir $(DEMO)    then open http://localhost:6006"

# make ensemble-NAME   train those members of recipes/r0/ensembles/NAME.args that are missing, then ensemble them;
# make ensemble-NAME DATA=folder FLAGS="..."   the same with other data and more flags for each training
DATA := data
FLAGS :=
R0 := runs/r0

# A run is finished when it has scores.json: its checkpoint is there from the first epoch on.
$(R0)/%/scores.json: | $(VENV)/run.done
	$(BIN)/python multitask_classifier.py @recipes/r0/$*.args --data_dir $(DATA) $(FLAGS) \
		$$(test -f $(@D)/resume.pt -o -f $(@D)/resume-previous.pt && echo --resume || echo --overwrite)

ensemble-%: recipes/r0/ensembles/%.args $(VENV)/run.done
	$(MAKE) --no-print-directory $$(sed -n 's,^\($(R0)/.*\)\.pt$$,\1/scores.json,p' $< | sort -u)
	$(BIN)/python ensemble.py @$< --data_dir $(DATA)

# make tables   list the tables of the reports, each with the command that trains its rows
tables: $(VENV)/run.done
	@for file in recipes/r?/tables.toml; do $(BIN)/python sweep.py --tables $$file; done

# make docs/reports.md   make the page of all tables again, after a change in recipes/r?/tables.toml
docs/reports.md: $(wildcard recipes/r?/tables.toml) | $(VENV)/run.done
	$(BIN)/python -m studies.report_tables > $@.new && mv $@.new $@

lint: $(VENV)/dev.done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Every second file each, so that two cores are busy.
TESTS := $(sort $(shell find tests -name "test_*.py"))
ODD := $(shell printf '%s\n' $(TESTS) | awk 'NR % 2')
test: lint
	$(MAKE) --no-print-directory -j2 test-odd test-even

test-odd: $(VENV)/dev.done
	$(BIN)/python -m pytest -q --durations=10 $(ODD)

test-even: $(VENV)/dev.done
	$(BIN)/python -m pytest -q --durations=10 $(filter-out $(ODD),$(TESTS))

# make test-all   the same with the long checks, and make gpu-rehearsal
test-all: lint
	$(BIN)/python -m pytest -q --durations=20 -m "not gpu"
	$(MAKE) --no-print-directory gpu-rehearsal

# make gpu-check   all that needs a GPU, in at most four minutes, into runs/gpu-check; GPU_PYTHON names an environment of your own, PARTS other parts
GPU_PYTHON = $(BIN)/python
gpu-check: $(if $(findstring $(VENV),$(GPU_PYTHON)),$(VENV)/dev.done)
	$(GPU_PYTHON) -m benchmarks.gpu_check $(PARTS)

# make gpu-rehearsal   the same at small sizes where there is no GPU, on one that the CPU simulates; needs g++
REHEARSAL := .rehearsal
gpu-rehearsal: $(VENV)/dev.done
	$(BIN)/python tests/simulated_gpu.py $(REHEARSAL)
	SIMULATED_GPU=$(REHEARSAL) PYTHONPATH=tests $(BIN)/python -c "import simulated_gpu, sys; from benchmarks.gpu_check import main; main(sys.argv[1:])" --tiny --out $(REHEARSAL)/gpu-check

# make gpu-counts   count what a training step starts on a GPU, on the simulated one
gpu-counts: $(VENV)/run.done
	$(BIN)/python tests/simulated_gpu.py $(REHEARSAL)
	SIMULATED_GPU=$(REHEARSAL) PYTHONPATH=tests $(BIN)/python -c "import simulated_gpu, runpy; runpy.run_module('benchmarks.launch_counts', run_name='__main__')"

clean:
	rm -rf $(VENV) $(REHEARSAL) runs
