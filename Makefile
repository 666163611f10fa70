# make serve     set up, then answer at http://127.0.0.1:8000
# make test      set up, then run the tests; with SAFELIGHT_DATA set, those on real data too
# make check     lint, types, layering, docs in step
# make train     train and publish both shipped models again (needs SAFELIGHT_DATA)
# make docs      write the generated parts of the documentation anew
# make bench-serving  measure serving beside a plain FastAPI endpoint
# make bench-peers    measure it beside other model servers (sets them up first: 6 GB in PEERS, a quarter of an hour)
# make bench-stages   what a request costs beside the engine, by stage
# make bench-training  what recipes reach, and in what time, beside what was aimed at (hours)
# make load      open-loop arrivals at half and 80 % of the peak, pass or fail
# make overload  twice the peak for a minute, pass or fail
# make soak      a million requests: memory, descriptors, threads, pass or fail
# make start     from process to first good answer beside `import torch`, pass or fail
# make targets   write what these found beside the targets into README.md and docs/performance.md
# make image     build the container with docker, podman or buildah
# make lock      resolve the dependencies anew

PYTHON ?= python3
# Where torch comes from. Empty: the ordinary index (CUDA build, also runs on CPU). For PyTorch's own CPU wheels:
#   make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# What the container engine is told beyond that: secrets, isolation (docs/container.md)
IMAGE_OPTIONS ?=
# Where the servers that Safelight is measured beside are kept, and options of bench-peers and bench-stages
PEERS ?= .bench/peers
BENCH ?=

BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-deps

.PHONY: setup serve test check docs train bench-serving bench-peers bench-stages bench-training load overload soak start targets image lock

setup: .venv/dev

serve: .venv/runtime
	$(BIN)/python -m service

test: .venv/dev
	OMP_WAIT_POLICY=passive $(BIN)/pytest --numprocesses auto --ignore tests/e2e  # threads that wait would take others' turns
	$(BIN)/pytest tests/e2e  # one at a time: they load, measure and interrupt real servers

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -q tests/test_layering.py tests/test_docs.py

docs: .venv/dev
	$(BIN)/python -m docs.generate

train: .venv/runtime
	$(BIN)/safelight train mnist
	$(BIN)/safelight train cifar10

bench-serving: .venv/dev
	$(BIN)/python -m benchmarks.serving

bench-peers: .venv/dev
	PEERS=$(PEERS) PYTHON=$(PYTHON) TORCH_INDEX=$(TORCH_INDEX) sh benchmarks/peers/setup.sh
	$(BIN)/python -m benchmarks.peers --home $(PEERS) $(BENCH)

bench-stages: .venv/dev
	$(BIN)/python -m benchmarks.stages $(BENCH)

bench-training: .venv/dev
	$(BIN)/python -m benchmarks.training --docs $(BENCH)

load: .venv/dev
	$(BIN)/python -m benchmarks.load open

overload: .venv/dev
	$(BIN)/python -m benchmarks.load overload

soak: .venv/dev
	$(BIN)/python -m benchmarks.load soak

start: .venv/dev
	$(BIN)/python -m benchmarks.load start

targets: .venv/dev
	$(BIN)/python -m benchmarks.targets --docs

# The first engine that works: a docker client without its daemon is passed over. BUILDAH_FORMAT, because the OCI format
# (podman's and buildah's own) has no place for the health check.
image:
	@for engine in docker podman buildah none; do $$engine info > /dev/null 2>&1 && break; done; \
	if [ $$engine = none ]; then \
		echo "make image needs a container engine: no docker (with its daemon running), podman or buildah works here" >&2; \
		exit 1; \
	fi; \
	version=$$(sed -n 's/^__version__ = "\(.*\)"/\1/p' training/__init__.py); \
	export DOCKER_BUILDKIT=1 BUILDAH_FORMAT=docker; \
	set -x; $$engine build $(IMAGE_OPTIONS) --build-arg TORCH_INDEX=$(TORCH_INDEX) \
		--tag safelight:$$version --tag safelight:latest .

.venv/runtime: requirements/runtime.lock requirements/torch.lock pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 14) else f"Safelight needs Python 3.11 to 3.13; $(PYTHON) is {v[0]}.{v[1]} (make PYTHON=python3.12 …)")'
	@echo "Installing the locked dependencies into .venv (once; torch's CUDA build is several gigabytes) …"
	$(PYTHON) -m venv .venv
	$(PIP) --require-hashes -r requirements/runtime.lock
ifeq ($(TORCH_INDEX),)
	$(PIP) --require-hashes -r requirements/torch.lock
else
	$(PIP) --index-url $(TORCH_INDEX) $$(grep -Eo '^torch(vision)?==[0-9.]+' requirements/torch.lock)
endif
	$(PIP) --no-build-isolation --editable .
	@touch $@

.venv/dev: .venv/runtime requirements/dev.lock
	$(PIP) --require-hashes -r requirements/dev.lock
	@touch $@

COMPILE := $(BIN)/uv pip compile --quiet pyproject.toml --universal --python-version 3.11 --generate-hashes --no-header --no-annotate

lock: .venv/dev
	$(COMPILE) --output-file .venv/full.lock
	$(COMPILE) --extra dev --constraint .venv/full.lock --override requirements/overrides.txt --output-file .venv/dev-full.lock
	@awk '/^[^ ]/ { cuda = /^(torch|torchvision|triton|nvidia-|cuda-)/ } { print > (cuda ? "requirements/torch.lock" : "requirements/runtime.lock") }' .venv/full.lock
	@awk 'FNR == NR { if (/^[^ ]/) known[$$1] = 1; next } /^[^ ]/ { skip = $$1 in known } !skip' .venv/full.lock .venv/dev-full.lock > requirements/dev.lock
