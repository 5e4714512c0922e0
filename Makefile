# Every target sets itself up: the first run makes .venv, later ones reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= demo-results

REGIMES := pinn epochs finetune lm lm-lowlr lm-muon

.PHONY: test-storage site options screenshots installed presets coverage demo test frameworks test-oldest golden check audit bench regimes harm harm-quick faults scenarios clean help

help:
	@echo "make demo   train a language model and a physics-informed network plainly and with predicted phases"
	@echo "make test   run the tests"
	@echo "make frameworks  the tests of adapters and trackers that need more than the development environment"
	@echo "make test-oldest  the same with the oldest versions that are supported"
	@echo "make test-storage  a search over PostgreSQL 15: a worker is killed, the server restarted"
	@echo "make golden AGAINST=path  short runs with the checkout there and with this one: the same to the last bit?"
	@echo "make check  ruff (its security rules too), mypy, import order, no secrets, the site, the wheel, known faults"
	@echo "make audit  known faults of what is installed, and secrets; needs the network"
	@echo "make site   the documents as a site, in build/site"
	@echo "make options  write docs/options.md from the settings' classes"
	@echo "make screenshots  pictures of the page and of hpt watch for the docs; needs Chromium"
	@echo "make installed  build wheel and sdist, try the wheel in an environment of its own"
	@echo "make presets  write the preset files with the settings and defaults of today"
	@echo "make coverage  how much of encoder, monitor, gate, phases, dynamics and bandit their tests run"
	@echo "make bench  measure the overhead of a full step"
	@echo "make harm-quick  is ordinary training never made worse?  The short set (two minutes)"
	@echo "make harm  the same, all settings (an hour)"
	@echo "make faults  crashes, damaged files, bad numbers: the table of docs/reliability.md (a quarter of an hour)"
	@echo "make scenarios  10,000 random scenarios of use and misuse (an hour)"
	@echo "make regimes  speed against tuned baselines and published methods, short version (an hour)"

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/hpt compare --task pinn-poisson --steps 2000 --seeds 3 --tune --overwrite --out $(OUT)/pinn-poisson
	$(BIN)/hpt compare --task gpt --preset 0.3M --steps 300 --seeds 2 --budgets 0.5,2 --overwrite --out $(OUT)/language
	@echo "open $(OUT)/pinn-poisson/report.html and $(OUT)/language/report.html"

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# Beyond what `make test` installs: TRL, Weights & Biases, trackio (400 MB more).  trackio takes no pillow beyond 12, and
# matplotlib here takes any.
frameworks:
	$(PYTHON) -m venv $(VENV)-frameworks
	$(VENV)-frameworks/bin/python -m pip install --quiet --constraint constraints.txt "torch==2.13.0"
	grep -v '^pillow==' constraints.txt > $(VENV)-frameworks/constraints.txt
	$(VENV)-frameworks/bin/python -m pip install --quiet --constraint $(VENV)-frameworks/constraints.txt \
		--editable ".[frameworks]"
	$(VENV)-frameworks/bin/python -m pytest tests/test_adapter*.py tests/test_trackers.py

# The oldest versions that pyproject.toml allows, in an environment of its own (7 GB, where PyTorch comes with CUDA: for
# less, install its CPU build of that version there first, and it is kept).
# TRL and trackio are left out: what they bring asks for a newer numpy or has no versions that go together any more.
test-oldest:
	$(PYTHON) -m venv $(VENV)-oldest
	$(PYTHON) tests/oldest.py transformers lightning tensorboard wandb experiments peft pytest pytest-timeout \
		hypothesis > $(VENV)-oldest/requirements.txt
	$(VENV)-oldest/bin/python -m pip install --quiet --requirement $(VENV)-oldest/requirements.txt --editable .
	$(VENV)-oldest/bin/python -m pytest tests/test_adapter*.py tests/test_trackers.py tests/test_engine.py \
		tests/test_checkpoint.py

# Four workers over a PostgreSQL server of its own, on loopback; needs Debian's postgresql-15 (or its programs in PATH).
test-storage: $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[postgresql]"
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.storage

presets: $(STAMP)
	$(BIN)/python -m tests.presets

golden: $(STAMP)
	$(if $(AGAINST),,$(error say AGAINST=path, a checkout of an earlier build: git worktree add path commit))
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.golden --against "$(AGAINST)"

# Statements of the parts that decide, held by their own tests: encoder, monitor and gate, phases, dynamics and bandit.
COVERED := encoder observer divergence monitor_healthy gate phases bandit rssm contract_trace
coverage: $(STAMP)
	$(BIN)/python -m coverage run -m pytest $(COVERED:%=tests/test_%.py)
	$(BIN)/python -m coverage report --fail-under=95 --include='*/observe/encoder.py,*/observe/window_encoder.py'
	$(BIN)/python -m coverage report --fail-under=95 --include='*/observe/divergence.py'
	$(BIN)/python -m coverage report --fail-under=95 --include='*/judge/gate.py'
	$(BIN)/python -m coverage report --fail-under=100 --include='*/cycle/phases.py'
	$(BIN)/python -m coverage report --fail-under=90 --include='*/predictors/rssm*.py'
	$(BIN)/python -m coverage report --fail-under=90 --include='*/propose/horizon.py'

check: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_imports.py tests/test_secrets.py
	$(BIN)/python -m mkdocs build --quiet --strict
	$(BIN)/python tests/installed.py
	$(BIN)/python tests/audit.py

site: $(STAMP)
	$(BIN)/python -m mkdocs build --strict

options: $(STAMP)
	$(BIN)/python docs/site/options.py

# Pictures of the page and of `hpt watch`; needs Chromium.
screenshots: $(STAMP)
	$(BIN)/python docs/site/screenshots.py

# Wheel and sdist build; the wheel works in an environment that has torch and nothing else of ours.
installed: $(STAMP)
	$(BIN)/python tests/installed.py

# As `make check` does, and fails where the network does not tell; and looks for secrets with more patterns than the
# tests have.
audit: $(STAMP)
	$(BIN)/python tests/audit.py --strict
	git ls-files -z | xargs -0 $(BIN)/detect-secrets-hook

bench: $(STAMP)
	$(BIN)/hpt bench overhead

regimes: $(STAMP)
	for regime in $(REGIMES); do $(BIN)/hpt bench regimes --regime $$regime --quick --out $(OUT)/regimes || exit 1; done
	$(BIN)/hpt bench report $(OUT)/regimes --markdown $(OUT)/regimes/tables.md

harm-quick: $(STAMP)
	$(BIN)/hpt bench harm --quick --out $(OUT)/harm

harm: $(STAMP)
	$(BIN)/hpt bench harm --out $(OUT)/harm --markdown $(OUT)/harm/table.md

faults: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/hpt bench faults --markdown docs/reliability.md

scenarios: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --scenarios 10000

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
