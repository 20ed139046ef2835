.DEFAULT_GOAL := help
.PHONY: help setup check format test unit datapath mesh ship image demo bench clean

PYTEST = .venv/bin/python -m pytest

help: ## show this list
	@grep -hE '^[a-z ]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 26

setup: ## install what is needed; the program is then .venv/bin/lazymesh
	@scripts/setup

check: ## style, format, types, direction of imports
	@scripts/check

format: setup ## rewrite the Python code in the house style
	@.venv/bin/ruff check --quiet --fix . ; .venv/bin/ruff format .

test: ## the checks and every test this machine can run
	@scripts/test

unit datapath mesh ship: setup ## tests of one tier: unit, datapath, mesh or ship
	@$(PYTEST) tests/$@

image: setup ## the image, from packages: an OCI archive and its unpacked root
	@scripts/image

demo: ## two clusters in network namespaces, without and with lazymesh
	@scripts/demo

bench: ## figures, each beside what it is compared with
	@scripts/bench

clean: ## remove .venv, caches and build leftovers
	@rm -rf .venv .cache .*_cache .hypothesis build dist agent/*.egg-info
