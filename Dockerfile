# deltamem, for a CPU:   docker build --tag deltamem .
# for NVIDIA GPUs:       docker build --build-arg TORCH_BACKEND=cu130 --tag deltamem:cuda .
# docs/container.md says how to run it.
FROM python:3.11.14-slim-bookworm

ARG UV_VERSION=0.13.9
# cpu, or the CUDA build, which brings its libraries as wheels; the driver is the host's
ARG TORCH_BACKEND=cpu

# Triton compiles its launchers with gcc; the workflow records the code's commit with git. Debian drops old versions from
# its archive, so a pinned one would soon fail to build.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc git libc6-dev \
 && rm -rf /var/lib/apt/lists/* \
 && pip install --no-cache-dir uv==${UV_VERSION} \
 && useradd --create-home --uid 1000 deltamem

WORKDIR /deltamem

# The dependencies lie in a layer of their own, which a change of the code leaves as it is
COPY pyproject.toml requirements.lock LICENSE README.md ./
RUN uv pip install --system --no-cache --torch-backend ${TORCH_BACKEND} \
      --constraint requirements.lock --requirements pyproject.toml

COPY deltamem deltamem
COPY kernels kernels
COPY pipelines pipelines
COPY configs configs
COPY workflow workflow
COPY Snakefile ./
COPY examples examples
RUN uv pip install --system --no-cache --no-deps --editable . \
 && ln -s workflow/profiles profiles \
 && mkdir results sessions \
 && chown deltamem results sessions .

USER deltamem
ENV HF_HOME=/deltamem/results/huggingface \
    MLFLOW_TRACKING_URI=sqlite:////deltamem/results/mlflow.db
EXPOSE 8000
CMD ["deltamem", "--help"]
