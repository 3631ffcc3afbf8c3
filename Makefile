# All targets work in .venv. `make demo` and `make test` are all a fresh machine needs.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
# Files of tests at a time.
TEST_WORKERS ?= 2
CODE := src tests benchmarks examples recipes space docs/make_results.py docs/make_configuration.py

.PHONY: install demo test lint fuzz bench results docs clean

install: $(VENV)/.installed-dev

# Two stamps: the demo needs no test tools, and a second call installs nothing again. Python compiles the few modules that
# the demo imports; compiling all of them ahead takes most of the installation's time.
$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade pip
	touch $@

$(VENV)/.installed-demo: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) install --quiet --no-compile -c constraints.txt -e ".[metrics,report]"
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed-demo
	$(PIP) install --quiet -c constraints.txt -e ".[all]"
	$(PIP) install --quiet -c constraints.txt --no-deps resemblyzer
	touch $@

# Ten thousand damaged files through all readers and commands. What leads to a finding is kept in fuzz-findings.
fuzz: $(VENV)/.installed-dev
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m fuzz --count 10000 --seconds 1800 --seed 0

# Reconstructs three real clips with the embedded default.
demo: $(VENV)/.installed-demo
	$(BIN)/dasheng-tokenizer reconstruct src/dasheng_tokenizer/embedded/clips -o demo-output --overwrite
	@echo
	@echo "Audio:    demo-output/*.reconstructed.wav   (originals: src/dasheng_tokenizer/embedded/clips/)"
	@echo "Pictures: demo-output/*.reconstructed.png   (original, reconstruction, difference)"
	@echo "Figures:  demo-output/metrics.csv and metrics.json"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/speed.py --report docs/reports/speed.json
	$(BIN)/python benchmarks/throughput.py --report docs/reports/throughput.json
	$(BIN)/python benchmarks/busy_neighbour.py --report docs/reports/busy_neighbour.json
	$(BIN)/python benchmarks/training_step.py --report docs/reports/training_step.json
	$(BIN)/python docs/make_results.py

results: $(VENV)/.installed-dev
	$(BIN)/python docs/make_results.py
	$(BIN)/python docs/make_configuration.py

docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict --site-dir site

clean:
	rm -rf build dist site demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks docs -name __pycache__ -type d -exec rm -rf {} +
