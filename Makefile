# The commands of the project; `make help` lists them. A command that needs .venv sets it up first.
SHELL  := /bin/bash
PYTHON ?= python3
DEVICE ?= cpu
MODEL   =
ROUNDS  = 100
SEED    = 7
SEQUENCES = 20000
STORE   = both
MINUTES = 30
OUT     = learned
BIN    := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install serve learn test check check-deploy rules fuzz audit bench faults soak lab secrets policy lock clean

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  DEVICE=cpu|gpu       which engine to install (now: $(DEVICE))"
	@echo "  MODEL=NAME|PATH      the model that serve loads (default: the packaged policy)"
	@echo "  PYTHON=python3.12    the Python interpreter for .venv (now: $(PYTHON))"
	@echo "  ROUNDS=100 SEED=7 STORE=sqlite|postgresql|both    options of faults"
	@echo "  SEQUENCES=20000 SEED=7    options of fuzz"
	@echo "  MINUTES=30           duration of soak"
	@echo "  OUT=learned          folder of learn; the same command continues a run that was cut"

install: ## Set up .venv for DEVICE, unless it is up to date
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found. Name an interpreter: make install PYTHON=python3.12"; exit 1; }
	@$(PYTHON) deploy/install.py $(DEVICE)

serve: install ## Serve the policy on 127.0.0.1:8000; reads EPISODIC_* and MODEL
	$(if $(MODEL),EPISODIC_MODEL='$(MODEL)') exec $(BIN)/episodic serve

learn: install ## Let the packaged policy learn slippery FrozenLake from its own episodes; takes some minutes
	@$(BIN)/python -m training.learn --out '$(OUT)'

# The tests must not inherit the caller's settings, so EPISODIC_* variables are unset. The slow files are in the middle of
# the order of the folders. With --loadscope-reorder they would be the last, and one process would wait for the other.
test: install ## Run every test, in two processes
	@env $(patsubst %,-u %,$(filter-out EPISODIC_TEST_%,$(filter EPISODIC_%,$(.VARIABLES)))) $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

check: install ## Check format, lint, types and import layers
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/basedpyright
	$(BIN)/lint-imports

check-deploy: ## Check the Dockerfile, the compose files and deploy/
	@$(PYTHON) deploy/install.py deploy
	@.venv-deploy/bin/python deploy/check.py

rules: ## Generate the Kubernetes object from deploy/prometheus/rules.yml
	@$(PYTHON) deploy/prometheus_rule.py

fuzz: install ## Send a million hostile inputs to every parser, check 10,000 schemas, and play SEQUENCES of calls
	@$(BIN)/python -m tests.fuzz --seed $(SEED)
	@$(BIN)/python -m tests.combinations --sequences $(SEQUENCES) --seed $(SEED)

audit: install ## Check the locked packages for known vulnerabilities
	@$(BIN)/python deploy/audit.py

bench: install ## Run the benchmarks and write the report
	$(BIN)/python -m bench

faults: install ## Inject faults under load, ROUNDS times each kind, and verify that nothing is lost
	$(BIN)/python -m tests.faults --rounds $(ROUNDS) --seed $(SEED) --store $(STORE)

soak: install ## Run the service under load for MINUTES and check for leaks
	$(BIN)/python -m bench.soak --minutes $(MINUTES)

secrets: ## Create the secrets of the compose stack in ./secrets, once
	@$(PYTHON) deploy/make_secrets.py

lab: install ## Build the image, run the compose stack on Docker, and test upgrades, failures and restore
	$(BIN)/python -m tests.lab --seed $(SEED)

policy: install ## Train the packaged policy again
	$(BIN)/python -m training.toy_text

lock: install ## Resolve the dependencies again and write requirements/*.lock
	@$(BIN)/python deploy/lock.py

clean: ## Remove the environments and the caches
	rm -rf .venv .venv-deploy .cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
