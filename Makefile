# Each target does the set-up that it needs; the first run takes about 5 minutes, of which Horovod's build is 3.
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: help setup check demo demo-tf demo-transformer demo-eclk ui test test-fast test-quick lint docs bench bench-accuracy bench-scaling bench-parts bench-keras image test-image dist clean

help:             ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1	/p' $(MAKEFILE_LIST)

$(STAMP): setup.cfg docker/constraints.txt docker/setup.sh docker/build_horovod.sh
	bash docker/setup.sh $(VENV)
	@touch $@

setup: $(STAMP)   ## system packages, virtual environment, Horovod for today's torch and TensorFlow

check: $(STAMP)   ## what is built, what is set wrong, the link between two ranks, and whether compression would pay
	OMP_NUM_THREADS=1 $(BIN)/horovodrun -np 2 $(BIN)/python -m hvd_accordion check

demo: $(STAMP)    ## four compressions, three seeds, two ranks, links if root: table, picture (build/demo/), MLflow run
	$(BIN)/python examples/demo.py

demo-tf: $(STAMP) ## the same with Keras on TensorFlow (build/demo-keras/)
	$(BIN)/python examples/demo.py --framework keras

demo-transformer: $(STAMP) ## a small GPT by four methods, three seeds, links if root: loss over bytes and seconds (build/transformer/)
	$(BIN)/python examples/pytorch/transformer_lm.py --compare --steps 600

demo-eclk: $(STAMP) ## error compensated Katyusha on logistic regression, ten simulated nodes (build/eclk/)
	$(BIN)/python examples/eclk_logistic_regression.py --simulate 10 --mlflow-uri sqlite:///mlflow.db

ui: $(STAMP)      ## MLflow's page on the runs of the demo
	$(BIN)/mlflow ui --backend-store-uri sqlite:///mlflow.db

# side by side: what starts no ranks and measures no time
ALONE := parallel or integrations or serial
BESIDE := -n 2 --dist worksteal

test: $(STAMP)    ## all tests, on simulated and real ranks
	$(BIN)/python -m pytest $(BESIDE) -m "not ($(ALONE))"
	$(BIN)/python -m pytest -m "$(ALONE)"

test-fast: $(STAMP) ## the tests of simulated ranks and of pure functions, for the inner loop
	$(BIN)/python -m pytest $(BESIDE) -m "not ($(ALONE))" $(addprefix tests/,comm compression ops optim policy torch training utils)

test-quick: $(STAMP) ## the tests that start no ranks, and one start of ranks of each framework
	$(BIN)/python -m pytest $(BESIDE) -m "not ($(ALONE))"
	$(BIN)/python -m pytest -m "smoke or serial and not (parallel or integrations)"

lint: $(STAMP)    ## ruff, mypy, and which layer may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

docs: $(STAMP)    ## these pages and the API reference as HTML (build/docs/); a broken link or reference fails
	$(BIN)/python -m sphinx --fail-on-warning --fresh-env -q docs build/docs

bench: $(STAMP)   ## step time over links of 100 Mbit/s, 1 Gbit/s and more, against Horovod and DDP; needs root
	$(BIN)/python examples/benchmarks/links.py

bench-accuracy: $(STAMP) ## seconds to dense training's accuracy over a link of 100 Mbit/s; needs root
	$(BIN)/python examples/benchmarks/time_to_accuracy.py

bench-scaling: $(STAMP) ## exchanges among 2, 4 and 8 hosts, and what they predict for 1,024; needs root
	$(BIN)/python examples/benchmarks/scaling.py

bench-parts: $(STAMP) ## what hides behind backward, memory, selection of entries, agreement of sampled norms
	$(BIN)/python examples/benchmarks/overlap.py
	$(BIN)/python examples/benchmarks/memory.py
	$(BIN)/python examples/benchmarks/selection.py
	$(BIN)/python examples/benchmarks/norm_agreement.py

bench-keras: $(STAMP) ## step time under Keras's fit; two ranks, unshaped link
	$(BIN)/python examples/benchmarks/keras_fit.py

image:            ## the container image hvd-accordion, by Docker, Podman or buildah
	bash docker/image.sh build

test-image: image ## all tests in the container; those of several hosts as its root
	bash docker/image.sh run make test
	bash docker/image.sh privileged python -m pytest tests/hosts tests/benchmarks/test_hosts.py

dist: $(STAMP)    ## source archive and wheel (dist/), their metadata checked
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

clean:            ## everything made here, but not the cached Horovod wheel
	rm -rf $(VENV) build dist *.egg-info mlflow.db mlruns mlartifacts
