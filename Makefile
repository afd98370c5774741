# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/digits

.PHONY: demo test check docs reproduce-cpu clean

# A Python that is too old fails here with a reason, not later without one.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than 3.11; set PYTHON=python3.12"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	touch $@

$(VENV)/.core: $(VENV)/.made pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/.dev: $(VENV)/.core pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(VENV)/.core  ## the whole chain on built-in data
	$(BIN)/rprune run recipes/digits.toml -o $(OUT)
	$(BIN)/rprune verify $(OUT)/export --policy recipes/gate.toml
	$(BIN)/rprune gate $(OUT)/export --policy recipes/gate.toml
	@echo "report: $(OUT)/export/report.html"
	@echo "ONNX:   $(OUT)/export/model.int8.onnx"

test: $(VENV)/.dev  ## the whole suite; make test SLOW='-m "not slow"' leaves out the slow ones
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(SLOW)

check: $(VENV)/.dev  ## lint, types, floors, docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check

docs: $(VENV)/.dev  ## write the generated documentation
	$(BIN)/python docs/generate.py
	$(BIN)/python -m pytest -q tests/cli/test_bad_input.py -k page_of_errors --update-docs

reproduce-cpu: $(VENV)/.core  ## the papers' order on two cores: make reproduce-cpu DATA=npz:FILE
	@test -n "$(DATA)" || { echo "error: say where CIFAR-10 lies: make reproduce-cpu DATA=npz:FILE, or cifar10:DIR"; exit 2; }
	$(BIN)/python benchmarks/reproduce/run.py cpu --data $(DATA) --plot docs/reproduce_cpu.svg

clean:
	rm -rf $(VENV) build dist *.egg-info
