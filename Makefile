# Every command of the project; `make help` lists them. Those that need .venv set it up first, once.
SHELL  := /bin/bash
PYTHON ?= python3
DEVICE ?= cpu
MODEL   =
ROUNDS  = 100
SEED    = 7
STORE   = both
MINUTES = 30
BIN    := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help install serve test check check-deploy rules fuzz audit bench faults soak lab secrets policy lock clean

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  DEVICE=cpu|gpu       which engine to install (now: $(DEVICE))"
	@echo "  MODEL=NAME|PATH      the policy that serve loads (default: the packaged one)"
	@echo "  PYTHON=python3.12    the interpreter that makes .venv (now: $(PYTHON))"
	@echo "  ROUNDS=100 SEED=7 STORE=sqlite|postgresql|both    what faults does"
	@echo "  MINUTES=30           how long soak takes"

install: ## Set up .venv for DEVICE; does nothing when it is up to date
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) here. Name one: make install PYTHON=python3.12"; exit 1; }
	@$(PYTHON) deploy/install.py $(DEVICE)

serve: install ## Serve the policy on 127.0.0.1:8000; reads EPISODIC_* and MODEL
	$(if $(MODEL),EPISODIC_MODEL='$(MODEL)') exec $(BIN)/episodic serve

# The tests set what they need: the caller's EPISODIC_* variables stay out.
test: install ## Run all tests, in two processes
	@env $(patsubst %,-u %,$(filter-out EPISODIC_TEST_%,$(filter EPISODIC_%,$(.VARIABLES)))) $(BIN)/pytest -n 2 --dist loadfile

check: install ## Check format, lint, types and layers
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/basedpyright
	$(BIN)/lint-imports

check-deploy: ## Check the Dockerfile, the compose files and deploy/, with tools of their own
	@$(PYTHON) deploy/install.py deploy
	@.venv-deploy/bin/python deploy/check.py

rules: ## Write the rules of deploy/prometheus into their Kubernetes object
	@$(PYTHON) deploy/prometheus_rule.py

fuzz: install ## Feed a million hostile inputs to every parser; SEED=N for others
	@$(BIN)/python -m tests.fuzz --seed $(SEED)

audit: install ## Look the locks up in the published advisories
	@$(BIN)/python deploy/audit.py

bench: install ## Measure the service and write its report
	$(BIN)/python -m bench

faults: install ## Hurt the service under load, ROUNDS times a kind of fault, and check what it kept
	$(BIN)/python -m tests.faults --rounds $(ROUNDS) --seed $(SEED) --store $(STORE)

soak: install ## Load the service for MINUTES and watch what grows
	$(BIN)/python -m bench.soak --minutes $(MINUTES)

secrets: ## Make the secrets of the compose stack in ./secrets, once
	@$(PYTHON) deploy/make_secrets.py

lab: install ## Build the image, run the compose stack on Docker, play, hurt and restore it
	$(BIN)/python -m tests.lab --seed $(SEED)

policy: install ## Train the packaged policy anew
	$(BIN)/python -m training.toy_text

lock: install ## Resolve the dependencies again and write requirements/*.lock
	@$(BIN)/python deploy/lock.py

clean: ## Remove the environments and every cache
	rm -rf .venv .venv-deploy .cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
