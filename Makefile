.DEFAULT_GOAL := help
.PHONY: help setup check format test unit datapath mesh ship image demo bench clean

PYTEST = .venv/bin/python -m pytest

help: ## show this list
	@grep -hE '^[a-z ]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 26

setup: ## install what is needed, and .venv/bin/lazymesh
	@scripts/setup

check: ## check style, format, types and direction of imports
	@scripts/check

format: setup ## reformat the Python code
	@.venv/bin/ruff check --quiet --fix . ; .venv/bin/ruff format .

test: ## run the checks and every test that this machine can run
	@scripts/test

unit datapath mesh ship: setup ## run the tests of one tier: unit, datapath, mesh or ship
	@$(PYTEST) tests/$@

image: setup ## build the image from packages: an OCI archive and its unpacked root
	@scripts/image

demo: ## run two clusters in network namespaces, without and with lazymesh
	@scripts/demo

bench: ## measure, each figure beside a reference
	@scripts/bench

clean: ## remove .venv, caches and build leftovers
	@rm -rf .venv .cache .*_cache .hypothesis build dist agent/*.egg-info
