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
	$(BIN)/python -m reference.mini demo/checkpoint
	$(BIN)/star-export export demo/checkpoint --out demo/bundle --precision bf16
	$(BIN)/star-export build demo/bundle --target $(TARGET)
	$(BIN)/star-export validate demo/bundle --report demo/report.html
	$(BIN)/star-export generate demo/bundle "a photo of a red cat" -o demo/picture.png
	$(BIN)/star-export edit demo/bundle demo/picture.png "change the color of the cat to blue" -o demo/edited.png
	$(BIN)/star-export ask demo/bundle demo/picture.png "what is the color of the star?" --max-new-tokens 12
	@echo "bundle and plans: demo/bundle   pictures: demo/picture.png demo/edited.png   parity report: demo/report.html"

test: setup
	$(BIN)/python -m pytest
