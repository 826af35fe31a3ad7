# Two commands: `make book` and `make test`. Each sets up .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: book html slides pdf repo links notebooks test check unit lint lab studies bench clean help

help:            ## this list
	@grep -hE '^[a-z]+: .*##|^[a-z]+:  *##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

book: $(READY)   ## run every notebook and build the book into _build/html
	$(BIN)/python book/build.py book

html: $(READY)   ## build the book from the stored outputs, in about a minute
	$(BIN)/python book/build.py html

slides: $(READY) ## a lecture's slides from each chapter, into _build/slides (needs npm)
	$(BIN)/python book/slides.py

pdf: $(READY)    ## the whole book as one PDF, into _build/pdf (needs Chromium)
	$(BIN)/python book/pdf.py

repo: $(READY)   ## give the book another address: make repo URL=https://github.com/you/your-fork
	$(BIN)/python book/repository.py $(URL)

links: $(READY)  ## check every link that leaves the book (needs the network)
	$(BIN)/jupyter-book build . --builder linkcheck --path-output _build/links

notebooks: $(READY)  ## run the notebooks in place and store their outputs (ONLY=06 for one)
	$(BIN)/python book/build.py notebooks $(ONLY)

test: check      ## everything: lint, unit tests, notebooks, the book's pages
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --nbval-lax --nbval-cell-timeout 1800 -p no:cacheprovider notebooks/*.ipynb book/solutions/*.ipynb
	$(BIN)/python book/build.py html
	$(BIN)/python -m pytest -n 2 tests/book

check: lint unit ## lint and unit tests: minutes

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

unit: $(READY)
	$(BIN)/cvlib assets smollm2-135m
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 tests cvlib --ignore tests/book

lab: $(READY)    ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir .

studies: $(READY)  ## run the long experiments again (hours); results in benchmarks/results
	for study in benchmarks/[0-9]*.py; do $(BIN)/python $$study || exit 1; done

bench: $(READY)  ## speed, side by side with its limits and peers
	for bench in benchmarks/bench_*.py; do $(BIN)/python $$bench || exit 1; done

clean:           ## remove what was built, keep .venv and the cache of models
	rm -rf _build runs .pytest_cache .ruff_cache

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[book,web,test]'
	touch $@
