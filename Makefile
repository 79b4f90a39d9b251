# Recipes only call the scripts in hack/, which say what they do and can be run by hand.
DESTDIR ?=
PREFIX ?= /usr/local

.PHONY: help setup build image demo test check bench install clean node test-node test-matrix test-badcases test-powercut

help:
	@echo 'make demo       run a Python service as a microVM on a private containerd, and take it down again'
	@echo 'make test       set up, build, run every test'
	@echo 'make check      format, lints, licences, shell scripts'
	@echo 'make bench      measure; writes target/bench.json'
	@echo 'make setup      what a build needs; make image: a Debian root with Python, as an image and as a tar'
	@echo 'make build      shim, chsnap, agent and guest; ARCH=arm64 for the other architecture'
	@echo 'make node       a shell in an emulated machine with KVM; ARCH=amd64|arm64 CPU=model RUN=command'
	@echo 'make test-node  the integration tests in it, on real KVM; ARCH=amd64|arm64 TESTS=filters'
	@echo '                CHSNAP_CLOUD_HYPERVISOR_AMD64=, _ARM64= binaries of Cloud Hypervisor; PATIENCE=4 NAME='
	@echo 'make test-matrix  test-node on both, with both VMMs, which takes hours; writes docs/matrix.md'
	@echo 'make test-badcases  what can go wrong with a node: one clear line each, nothing left; ARCH=amd64|arm64'
	@echo 'make test-powercut  what a store of snapshots is after a power cut, in a node; ARCH=amd64|arm64 CUTS=4'
	@echo 'make install    DESTDIR= PREFIX=/usr/local'
	@echo 'make clean      remove everything that was made'

setup:
	@hack/setup.sh

build: setup
	@hack/build.sh

image:
	@hack/image.sh

demo:
	@hack/demo.sh

test:
	@hack/test.sh

check:
	@hack/check.sh

bench:
	@hack/bench.sh

# As it was written: a dollar is for the node's shell, not for make.
node: override export RUN := $(value RUN)
node:
	@hack/node.sh

test-node:
	@hack/node.sh test $(TESTS)

test-matrix:
	@hack/node/matrix.sh $(TESTS)

test-badcases:
	@hack/node/badcases.sh

test-powercut:
	@hack/node/powercut.sh

install:
	@DESTDIR='$(DESTDIR)' PREFIX='$(PREFIX)' hack/install.sh

clean:
	@hack/clean.sh
