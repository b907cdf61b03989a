# Everything runs in .venv, which `make` builds; PYTHON needs to be 3.11 or newer.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DEMO ?= demo

.PHONY: demo test test-slow lint bench bench-lds bench-loo bench-mislabels bench-solvers bench-loop bench-pages clean

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/influence demo $(DEMO)

# A file at a time on every core; one thread each, for threads that share cores wait for each other.
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff format --check influence_cli tests bench
	$(BIN)/ruff check influence_cli tests bench
	$(BIN)/mypy

# Beside the peers, each in an environment of its own (28 GB, made once): about two hours on two cores.
bench: $(VENV)/.installed
	$(BIN)/python bench/compare.py --envs build/peers --work build/bench --install
	$(BIN)/python bench/scan.py

# By retraining: 120 trainings of a quarter of a minute each, then the scores.
bench-lds: $(VENV)/.installed
	for net in cnn deep; do \
		$(BIN)/python bench/lds_retrain.py --net $$net --out build/lds/$$net && \
		$(BIN)/python bench/lds.py build/lds/$$net || exit 1; \
	done

# Without single images of MNIST (MNIST=ROOT, as torchvision unpacks it): about an hour on one core.
MNIST ?= build/data
bench-loo: $(VENV)/.installed
	$(BIN)/python bench/verify_loo.py --mnist $(MNIST) --work build/loo

# Known label noise: two to three hours of training on two cores, made once, then half an hour.
bench-mislabels: $(VENV)/.installed
	$(BIN)/python bench/label_noise.py --work build/label-noise
	$(BIN)/python bench/mislabels.py --work build/label-noise
	$(BIN)/python bench/mislabels.py --work build/label-noise --time all

# Products with the curvature, counted: half an hour, 8 GB.
bench-solvers: $(VENV)/.installed
	$(BIN)/python bench/solvers.py --model build/cnn.pt

# The loop from suspects to a better model: twelve trainings on one core, about ten minutes.
bench-loop: $(VENV)/.installed
	$(BIN)/python bench/relabel_loop.py

# The pages in a browser: bytes, time to load, and the pictures of the README. Needs Chromium.
bench-pages: $(VENV)/.installed
	$(BIN)/python bench/report_page.py build/pages --pictures docs

clean:
	rm -rf $(VENV) build *.egg-info
