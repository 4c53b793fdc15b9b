# The two commands: `make demo` compiles the bundled model and shows the pictures, `make test` passes the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= artifacts/shapes
WORKERS ?= 2
# Small tensors on one thread, a test file on each core: half the time of one process with all cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

.PHONY: demo test test-long lint clean

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[compiler,dev]'
	touch $@

demo: $(VENV)/ready
	$(BIN)/otc compile shapes --budgets 4,8,16 -o $(OUT) --force
	$(BIN)/otc run $(OUT) --budget full,16,8,4 --seed 0 -o $(OUT).png --force \
		--prompt "a large red star on blue" --prompt "a striped yellow circle on purple" \
		--prompt "a small white ring on black" --prompt "a large dotted green hexagon on orange" \
		--prompt "a dotted cyan square on red"
	@echo "report:  $(OUT)/report.html"
	@echo "picture: $(OUT).png"

test: $(VENV)/ready
	$(PYTEST)

# Everything that takes minutes to hours: fuzzing, soaks, compiles that are killed at random moments.
test-long: $(VENV)/ready
	$(PYTEST) -m long

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p build/typed/otcache
	ln -sfn $(CURDIR)/schemas $(CURDIR)/runtime $(CURDIR)/compiler $(CURDIR)/artifacts build/typed/otcache/
	MYPYPATH=build/typed $(BIN)/mypy -p otcache.schemas -p otcache.runtime -p otcache.compiler

clean:
	rm -rf $(VENV) build *.egg-info
