# Everything runs in .venv, which the first command makes.
PYTHON ?= python3
BIN := .venv/bin
JOBS ?= 2

.PHONY: demo test lint lab handout times book test-browser bench gpu clean

.venv/done: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 14) or sys.exit("minildm needs Python 3.11 to 3.13, this is %d.%d; try make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv .venv
	@echo "installing into .venv: PyTorch is large, this takes minutes"
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[test]"
	touch $@

demo: .venv/done  ## train both stages on the embedded emoji; images in runs/demo
	$(BIN)/python -m minildm demo

test: .venv/done  ## unit tests, then every notebook, twice; JOBS=8 runs eight at once
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -p no:nbval --basetemp .cache
	OMP_NUM_THREADS=1 MINILDM_CACHE=$(CURDIR)/.cache/cache MINILDM_SCALE=$${MINILDM_SCALE:-smoke} \
	    $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --nbval-lax --nbval-current-env \
	    --ignore notebooks/assignments --override-ini filterwarnings= notebooks

lint: .venv/done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/python tests/house.py

lab: .venv/done  ## the notebooks; notebooks/labconfig: what JupyterLab saves with them
	JUPYTER_PREFER_ENV_PATH=1 JUPYTER_CONFIG_PATH=$(CURDIR)/notebooks $(BIN)/jupyter lab notebooks

handout: .venv/done  ## the notebooks without solutions, for a class, in handout/
	for part in . assignments; do \
	    $(BIN)/jupyter nbconvert --to notebook --output-dir handout/$$part notebooks/$$part/*.ipynb \
	        --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_cell_tags solution; \
	done

times: .venv/done  ## time and memory of every notebook; 35 minutes on a quiet machine
	$(BIN)/python data/results/notebook_costs.py

.venv/book: .venv/done
	$(BIN)/python -m pip install --quiet -e ".[book]"
	touch $@

book: .venv/book  ## the course as a site to read; open runs/book/html/index.html
	rm -rf runs/book
	$(BIN)/python -m sphinx --quiet -c notebooks . runs/book/html
	cp runs/book/html/README.html runs/book/html/index.html

test-browser: book  ## every page of the book in headless Chromium (CHROMIUM: another)
	$(BIN)/python -m pytest tests/browser.py

bench: .venv/done  ## times against diffusers; half an hour
	$(BIN)/python tests/bench/bench.py

gpu: .venv/done  ## what needs a GPU; nine minutes
	$(BIN)/python tests/gpu/run.py

clean:
	rm -rf .venv runs notebooks/runs handout .cache
