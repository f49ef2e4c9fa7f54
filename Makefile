# make demo | test | test-all | lint. Each makes the environment .venv itself when it is missing or out of date.
# make test-wheel builds sdist and wheel into dist/check, and runs the wheel there in an empty environment.
# make test-deepspeed runs those that need DeepSpeed, which it installs into .deepspeed.
# make test-quantised runs the tests that need torchao, bitsandbytes and gguf, which it installs into .quantisers.
# make test-app runs those of the page of `flexivid app`, whose gradio it installs into .app.
# make docs makes the documentation as a site, outputs/site, in an environment of its own, .venv-docs.
# make vbench makes .venv-vbench, where VBench lives (docs/vbench.md).
#   make test PYTHON=python3.12                                              another interpreter
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test       torch without CUDA, a far smaller download

PYTHON ?= python3
BUDGET ?= 0.25
PROMPT ?= a dotted green cross growing on a black background

VENV := .venv
READY := $(VENV)/.ready

.PHONY: demo test test-all test-failed test-app test-deepspeed test-quantised test-wheel lint docs vbench

demo: $(READY)
	@mkdir -p outputs
	$(VENV)/bin/flexivid sample --budget $(BUDGET) --compare --prompt "$(PROMPT)" --output outputs/demo.mp4
	@echo "The clips, the picture that compares them and the figures:"
	@ls -1 outputs/demo*

PYTEST := $(VENV)/bin/python -m pytest -q -n auto --dist worksteal

test: $(READY)
	$(PYTEST) -m "not slow"

# The slow ones too: several processes, sweeps, a browser, every family where a few stand for them in make test.
test-all: $(READY)
	$(PYTEST)

# What failed in the last run, one test after the other.
test-failed: $(READY)
	$(VENV)/bin/python -m pytest -q --last-failed --last-failed-no-failures=none

# Quantisers print warnings wherever they are installed, so they stay beside the environment.
test-quantised: $(READY)
	$(VENV)/bin/python -m pip install -q --no-deps --upgrade --target .quantisers \
		torchao==0.18.0 bitsandbytes==0.50.2 gguf==0.19.0
	PYTHONPATH=.quantisers $(VENV)/bin/python -m pytest -q tests/test_quantised.py tests/test_gguf.py

# What gradio needs that the environment has not. Beside it, so that `make test` shows what works without.
test-app: $(READY)
	$(VENV)/bin/python -m pip install -q --no-deps --upgrade --target .app -c constraints.txt gradio gradio_client hf-gradio \
		fastapi starlette uvicorn python-multipart httpx httpcore safehttpx orjson pandas pytz pydub brotli groovy \
		opentelemetry-api semantic-version tomlkit "audioop-lts; python_version >= '3.13'"
	PYTHONPATH=.app $(VENV)/bin/python -m pytest -q tests/test_app.py

# DeepSpeed is built from source, without any of its kernels.
test-deepspeed: $(READY)
	DS_BUILD_OPS=0 $(VENV)/bin/python -m pip install -q --no-deps --no-build-isolation --upgrade --target .deepspeed \
		deepspeed==0.19.8 hjson==3.1.0 msgpack==1.2.4 ninja==1.13.2 py-cpuinfo==9.0.0
	PATH=$(CURDIR)/.deepspeed/bin:$$PATH PYTHONPATH=.deepspeed $(VENV)/bin/python -m pytest -q tests/test_zero.py

# The wheel is made of the sdist. Its environment has the packages of .venv, without what .venv has of flexivid: pip, which
# may not download, finds there all that the wheel asks for.
CHECK := dist/check
test-wheel: $(READY)
	rm -rf $(CHECK)
	$(VENV)/bin/python -m build --no-isolation --outdir $(CHECK) .
	$(VENV)/bin/python -m venv --without-pip $(CHECK)/venv
	$(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> $$(ls -d $(CHECK)/venv/lib/python*/site-packages)/packages.pth
	$(VENV)/bin/python -m pip --python $(CHECK)/venv/bin/python install -q --no-index $(CHECK)/*.whl
	cd $(CHECK) && PATH=$$PWD/venv/bin:$$PATH && flexivid adapters list && \
		flexivid train --config shapes-flex-4 --dry-run && flexivid sample --budget 0.25 --output clip.mp4 && ls clip.mp4 clip.json

lint: $(READY)
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy

# The stamp is written last, so that an interrupted installation is taken up again.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flexivid needs Python 3.11 or later: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt torch==2.13.0
	$(VENV)/bin/python -m pip install -c constraints.txt -e ".[dev,train,eval]"
	@touch $@

vbench: .venv-vbench/.ready

.venv-vbench/.ready: eval/requirements-vbench.txt
	$(PYTHON) -m venv .venv-vbench
	.venv-vbench/bin/python -m pip install -r $<
	@touch $@

# Nothing may come from outside: what the pages load is in the site.
docs: .venv-docs/.ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --quiet --strict
	@! grep -rlE '<(script|img|iframe)[^>]+src="(https?:)?//|<link[^>]+href="(https?:)?//' \
		--include='*.html' outputs/site || { echo "these pages load something from outside"; exit 1; }
	@echo outputs/site/index.html

.venv-docs/.ready: docs/requirements.txt constraints.txt
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install -q -c constraints.txt -r $<
	@touch $@
