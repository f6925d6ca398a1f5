# make demo and make test start from a bare clone: they create .venv, install into it, and, as root on Debian, install the
# system packages that the tests' real peers need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PEERS := chromium dcmtk default-jre-headless dicom3tools docker-compose faketime iproute2 openssl orthanc orthanc-dicomweb pixelmed-apps postgresql prometheus
STAMP := $(VENV)/.installed
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help install peers demo test test-long test-cluster lint clean bench-ingest bench-train bench-scores bench-store bench-serve bench-node fuzz-node chaos

help:
	@echo "make install   create $(VENV) and install cxr-ray into it"
	@echo "make demo      the whole way on synthetic radiographs (SERVE=1 leaves the service up)"
	@echo "make test      lint, types and tests, with real peers where they can be installed; under 25 minutes on 2 cores"
	@echo "make test-long the tests of half a minute each: more presets, searches, fronts and kills; about 9 minutes on 2 cores"
	@echo "make test-cluster   several Ray nodes, also on hosts of their own, cut off, killed and drained; about 35 minutes on 2 cores"
	@echo "make lint      ruff and mypy only"
	@echo "make bench-ingest   speed and memory of ingest beside a pool of processes; about 40 minutes on 2 cores"
	@echo "make bench-train    speed of training beside a bare PyTorch loop, torchrun and a DataLoader; about 30 minutes on 2 quiet cores"
	@echo "make bench-scores   time of the scores of a whole official test split; about 2 minutes"
	@echo "make bench-store    time of a page of 100,000 stored studies; about a minute"
	@echo "make bench-serve    speed, memory and overload of serving beside the engine alone and a plain service; about 40 minutes on 2 quiet cores"
	@echo "make bench-node     speed of receiving by C-STORE beside Orthanc and DCMTK's storescp, and of results; about 6 minutes on 2 quiet cores"
	@echo "make fuzz-node      20,000 associations that break the protocol, with honest peers between them; about 10 minutes"
	@echo "make chaos          2,000 studies through the DICOM node while all around it is killed, filled and cut; about 40 minutes on 2 cores (SEED=N)"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

# RUNLEVEL=1 keeps Debian from starting Orthanc and PostgreSQL as services; the tests start a PostgreSQL of their own. Where they cannot be installed, the tests that need them are skipped with the reason; with CI=true they fail.
peers:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! dpkg -s $(PEERS) >/dev/null 2>&1; then \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt-get install -y -qq --no-install-recommends $(PEERS) >/dev/null; \
	fi || echo "the test peers ($(PEERS)) could not be installed"
	@command -v kubectl >/dev/null || echo "no kubectl, which renders the manifests for their tests, and Debian's is too old: install 1.27 or later, see kubernetes.io/docs/tasks/tools"

demo: install
	$(BIN)/cxr-ray demo $(if $(SERVE),--serve)

test: install peers lint
	$(BIN)/python -m pytest --durations 20

test-long: install peers
	$(BIN)/python -m pytest -m long

test-cluster: install peers
	$(BIN)/python -m pytest -m cluster

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench-ingest: install
	$(BIN)/python bench/bench_ingest.py all

# Ray's workers run at nice 15: on a machine that does anything else, only they wait.
bench-train: install
	$(BIN)/python bench/bench_train.py all

bench-scores: install
	$(BIN)/python bench/bench_scores.py

bench-store: install
	$(BIN)/python bench/bench_store.py

bench-serve: install
	$(BIN)/python bench/bench_serve.py all

bench-node: install peers
	$(BIN)/python bench/bench_node.py
	$(BIN)/python bench/bench_returned.py

fuzz-node: install
	$(BIN)/python bench/fuzz_node.py

chaos: install peers
	$(BIN)/python bench/chaos.py $(if $(SEED),--seed $(SEED))

clean:
	rm -rf $(VENV) demo
