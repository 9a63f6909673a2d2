# Two commands: `make demo` shows what the project does, `make test` shows that it is right. Both install into .venv first.
PYTHON ?= python3
BIN := .venv/bin
TARGET ?= rtx-4090

.PHONY: setup demo test

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
	$(BIN)/star-export generate demo/bundle "two blue circles and a small red star on a yellow background" -o demo/image.png
	$(BIN)/star-export edit demo/bundle demo/image.png "change the color of the star to green" -o demo/image-edited.png
	$(BIN)/star-export ask demo/bundle demo/image-edited.png "how many circles are there?"
	$(BIN)/star-export generate demo/bundle "as many red circles as a triangle has corners" --reason -o demo/riddle.png
	@echo "bundle and plans: demo/bundle   parity report: demo/report.html"
	@echo "drawn, edited, answered and reasoned, each with its verdict: demo/generated.png edited.png answered.png reasoned.png"
	@echo "made just now: demo/image.png image-edited.png riddle.png"

test: setup
	$(BIN)/python -m pytest
