# `make demo` shows what the project does, `make test` shows that it is right, `make lint` that it reads
# alike. All install into .venv first.
PYTHON ?= python3
BIN := .venv/bin
TARGET ?= rtx-4090

.PHONY: setup demo lint test peers gpu-check

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt "torch==2.13.0"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: setup
	rm -rf demo && mkdir demo
	$(BIN)/star-export export nano --out demo/bundle --precision bf16
	$(BIN)/star-export build demo/bundle --target $(TARGET)
	$(BIN)/star-export validate demo/bundle --report demo/report.html
	$(BIN)/star-export score demo/bundle --pictures demo
	$(BIN)/star-export generate demo/bundle -o demo/image.png \
		"a green triangle to the left of a purple circle on a white background"
	$(BIN)/star-export edit demo/bundle demo/image.png -o demo/image-edited.png \
		"replace the triangle with a red star"
	$(BIN)/star-export ask demo/bundle demo/image-edited.png "what color is the star?"
	$(BIN)/star-export generate demo/bundle -o demo/riddle.png --reason \
		"as many yellow stars as a dog has legs, on a blue background"
	@echo "bundle and plans: demo/bundle   parity report: demo/report.html"
	@echo "drawn, edited, answered and reasoned, each with its verdict:" \
		"demo/generated.png edited.png answered.png reasoned.png"
	@echo "made just now: demo/image.png image-edited.png riddle.png"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --platform win32

test: lint
	$(BIN)/python -m pytest

peers: setup .venv-peers/installed  # another exporter computes the same: docs/figures.md, "Peers"
	.venv-peers/bin/python -W ignore -m tests.peers.exporter
	$(BIN)/python -m tests.peers.ours

.venv-peers/installed: pyproject.toml tests/peers/constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet -c tests/peers/constraints.txt "torch==2.13.0"
	.venv-peers/bin/python -m pip install --quiet -c tests/peers/constraints.txt -e ".[peers]"
	touch $@

gpu-check: setup  # what only a GPU can show, within 8 minutes: docs/gpu_check.md
	$(BIN)/python -m tests.gpu --out gpu-check
