# SPDX-License-Identifier: GPL-2.0-or-later
# `make demo` and `make test` do all of their own set-up; everything else is for those who change the project.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: help demo quick test kernel kernel-debug qemu real real-all real-qemu real-patched real-read real-agree faults validate calibrate experiments notebooks docs bench lock clean
help:
	@echo 'make demo      migrate the published two-VF machine under v2 and v3; table and figure in out/demo/'
	@echo 'make quick     after each change: lint, types, and one case of each test that is not slow; less than a minute'
	@echo 'make test      lint, types and all tests; twelve minutes on two idle cores'
	@echo 'make kernel    a User-Mode Linux with VFIO, and the driver for it, into the cache; about six minutes the first time'
	@echo 'make kernel-debug  the same with lockdep'
	@echo 'make qemu      Debian'"'"'s QEMU 10 and 11 into the cache, not installed; and QEMU with patches of our own, built in about four minutes'
	@echo 'make real      the tests that need that kernel, in it: three minutes when it is cached; ARGS="-k mtty" for pytest'
	@echo 'make real-all  also those that take longer: all of QEMU'"'"'s migrations'
	@echo 'make real-qemu  the calls of QEMU and of the project compared, into results/real/qemu/'
	@echo 'make real-patched  QEMU with our patches and without, measured in turns, beside the model, into results/real/patched/; ten minutes, idle'
	@echo 'make real-read  measure read() of the driver in that kernel, side by side with its simulation, into results/; ten minutes, idle'
	@echo 'make real-agree  a scenario in virtual time, live, and by devices of that kernel, into results/real/agree; two minutes, idle'
	@echo 'make faults    one fault at every event of small migrations; then two, drawn: SEEDS=500 (24 runs each), from a drawn start'
	@echo 'make validate  hold the simulation against published measurements'
	@echo 'make calibrate  fit the scenarios'"'"' values to the published figures, and print them; five minutes; ARGS="--write" changes the files'
	@echo 'make experiments  run all experiments into results/ (half an hour on two cores), and write results/report.html'
	@echo 'make notebooks    execute the notebooks over the results, in place'
	@echo 'make docs      write anew what is generated in docs/: the state machine, the tests of each rule, the API'
	@echo 'make bench     the virtual clock against SimPy; what a simulation costs; a live stream against a bare relay; live memory'
	@echo 'make lock      pin the dependencies anew (needs uv)'
	@echo 'make clean     remove the virtual environment and what was built; the cache of make kernel stays: rm -r ~/.cache/proto-v3'

demo: $(VENV)/core.stamp
	@$(BIN)/proto-v3 compare mlx5-2vf --out out/demo

# Dots are tests; the percentage behind them is how far it is.
PYTEST = $(BIN)/python -m pytest -q -n auto --dist worksteal
quick: $(VENV)/dev.stamp
	@echo 'one case of each test, but for the slow ones: usually less than a minute on two cores'
	@$(PYTEST) --quick

test: $(VENV)/dev.stamp
	@$(HAS_CC) || $(MAKE) --no-print-directory debian-cc
	@echo 'some 10,400 tests: about twelve minutes on two cores; the slow ones come first'
	@$(PYTEST)

# A kernel takes Python and what Debian has, and no virtual environment. What cannot be had here is skipped, in a line.
kernel:
	@$(HAS_PYTHON)
	@$(PYTHON) -m kernel.build

kernel-debug:
	@$(HAS_PYTHON)
	@$(PYTHON) -m kernel.build --debug

qemu:
	@$(HAS_PYTHON)
	@$(PYTHON) -m kernel.qemu_packages
	@$(PYTHON) -m kernel.qemu_build

real: $(VENV)/dev.stamp
	@$(BIN)/python -m kernel.real $(if $(ARGS),-- $(ARGS))

# With every migration of QEMU's (tests/real/qemu/cases.py).
real-all: $(VENV)/dev.stamp
	@$(BIN)/python -m kernel.real --all

# The same migrations, their calls compared with the project's: records in out/qemu/, the page in results/real/qemu/.
real-qemu: $(VENV)/dev.stamp
	@$(BIN)/python -m tests.real.qemu.run --out out/qemu
	@$(BIN)/python -m tests.real.qemu.report out/qemu --out results/real/qemu

# QEMU of Debian's source package with each patch of kernel/qemu_patches, against the same build without.
real-patched: $(VENV)/dev.stamp
	@$(BIN)/python -m kernel.qemu_build
	@rm -rf out/patched
	@$(BIN)/python -m tests.real.qemu.patched --out out/patched
	@$(BIN)/python -m tests.real.qemu.patched_report out/patched --out results/real/patched

# The measurement, then the question that reads it. The machine must have nothing else to do: see the manifest's load.
real-read: $(VENV)/dev.stamp
	@$(BIN)/python -m benchmarks.real_read --out results/real/read
	@$(BIN)/proto-v3 run kernel_read --half-width 0 --out results
	@$(BIN)/proto-v3 report results

real-agree: $(VENV)/dev.stamp
	@$(BIN)/python -m kernel.guest --memory 2048 --out results/real -- proto-v3 agree live-sample --real \
		--protocols v2,v3-n1,v3-n2 --seeds 5 --out results/real/agree || [ $$? = 1 ] # 1: not within 10 %, as it says

SEEDS ?= 500
faults: $(VENV)/dev.stamp
	@$(BIN)/python -m tests.proto_v3.test_every_event
	@$(BIN)/python -m tests.proto_v3.test_double_faults --seeds $(SEEDS)

validate: $(VENV)/core.stamp
	@$(BIN)/proto-v3 validate --seeds 30 || [ $$? = 1 ] # 1: a figure is not within 15 %, as the last lines say

calibrate: $(VENV)/core.stamp
	@$(BIN)/python -m experiments.calibration $(ARGS)

experiments: $(VENV)/core.stamp
	@$(BIN)/proto-v3 run all --resume --half-width 0 --out results
	@$(BIN)/proto-v3 report results

notebooks: $(VENV)/dev.stamp
	@$(BIN)/python -m experiments.notebook notebooks/*.ipynb

docs: $(VENV)/core.stamp
	@$(BIN)/python -m proto_v3.vfio.fsm_diagram > docs/states.md
	@$(BIN)/python -m tests.rules
	@$(BIN)/python -m experiments.api.document > docs/api.md
	@$(BIN)/python -m experiments.report.left_out

bench: $(VENV)/dev.stamp
	@$(BIN)/python benchmarks/clock_vs_simpy.py
	@$(BIN)/python benchmarks/simulation.py
	@$(BIN)/python benchmarks/live_stream.py
	@$(BIN)/python benchmarks/live_memory.py

# pip takes nothing that the lock does not name with a hash; the project itself needs no build isolation, for
# setuptools is in the lock too.
$(VENV)/%.stamp: requirements/%.txt pyproject.toml | $(VENV)/python.stamp
	@echo 'set-up: installing the pinned, hash-checked dependencies of requirements/$*.txt (once, about a minute)'
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r $<
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-index --editable .
	@touch $@

$(VENV)/python.stamp:
	@$(HAS_PYTHON)
	@$(HAS_VENV) || $(MAKE) --no-print-directory debian-venv
	@echo 'set-up: making a virtual environment in $(VENV)/'
	@$(PYTHON) -m venv $(VENV)
	@touch $@

HAS_PYTHON = $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	{ echo 'set-up: Python 3.11 or newer is needed; name it with: make PYTHON=/path/to/python3.11 ...' >&2; exit 1; }

# Debian ships Python without ensurepip, in a package of its own.
HAS_VENV = $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null
.PHONY: debian-venv
debian-venv:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo 'set-up: this Python cannot make virtual environments: installing the package python3-venv'; \
		apt-get update -qq && apt-get install -qq -y --no-install-recommends python3-venv >/dev/null; \
	fi
	@$(HAS_VENV) || { echo 'set-up: this Python cannot make virtual environments; on Debian, as root:' \
		'apt-get install python3-venv' >&2; exit 1; }

# For the tests of docs/vfio_v3.h alone: without a C compiler and the kernel's headers they are skipped.
HAS_CC = echo '\#include <linux/types.h>' | cc -E -x c - >/dev/null 2>&1
CC_PACKAGES = gcc libc6-dev linux-libc-dev
.PHONY: debian-cc
debian-cc:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		echo 'set-up: no C compiler: installing the packages $(CC_PACKAGES)'; \
		apt-get update -qq && apt-get install -qq -y --no-install-recommends $(CC_PACKAGES) >/dev/null; \
	fi || true
	@$(HAS_CC) || echo 'set-up: no C compiler: what needs one is not tested; on Debian, as root:' \
		'apt-get install $(CC_PACKAGES)' >&2

# The locks name no index and no host: pip and its configuration decide where packages come from.
UV_COMPILE = uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	--no-emit-index-url --no-emit-find-links pyproject.toml requirements/build.in
lock:
	$(UV_COMPILE) --extra dev -o requirements/dev.txt
	$(UV_COMPILE) --constraint requirements/dev.txt -o requirements/core.txt

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
