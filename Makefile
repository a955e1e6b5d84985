# Merino. Everything is done by the scripts; this names them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup build release run test lint format bench fuzz install clean

PREFIX ?= /usr/local
export PREFIX DESTDIR COMPAT DISK FORMAT SEEDS FILTER

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  \1\t/' | expand -t 12

setup: ## install the packages that building and testing need (Debian)
	@scripts/setup

build: ## debug build
	@scripts/setup build
	@. scripts/environment && swift build

release: ## the binary that is installed: .build/release/merino
	@scripts/setup build
	@scripts/build-release

run: ## the main job on a real disk: freeze it, copy the frozen view while it is written, prove both (DISK=path: your own)
	@scripts/setup
	@scripts/build-release
	@scripts/run-demo

test: ## the whole suite, with both I/O engines
	@scripts/setup
	@scripts/test

lint: ## formatting, and syntax of the scripts
	@scripts/lint

format: ## format the Swift sources in place
	@. scripts/environment && swift format --in-place --parallel --recursive Sources Tests Package.swift

bench: ## measure against qemu-nbd, qemu-storage-daemon and nbdkit (ARGS="--quick --only …")
	@scripts/setup
	@scripts/build-release
	@bench/run $(ARGS)

fuzz: ## the models and simulations with more seeds than `make test` (SEEDS=…, FILTER=…)
	@scripts/setup
	@scripts/fuzz

install: ## install to $(DESTDIR)$(PREFIX); COMPAT=1 adds links named after QEMU's tools
	@scripts/setup build
	@scripts/install

clean: ## remove what was built
	rm -rf .build out
