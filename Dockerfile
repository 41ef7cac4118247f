# Two images of one server: `docker build --target cpu .` and `docker build --target cuda .`; see docs/docker.md.
#
#   requirements, wheels → {cpu,cuda}-engine    the engine and all we depend on: gigabytes, rebuilt when a pin changes
#   package              → {cpu,cuda}           our own wheel: kilobytes, rebuilt when the code changes

ARG CPU_BASE=python:3.11-slim-bookworm
ARG CUDA_BASE=nvidia/cuda:13.0.3-base-ubuntu24.04
# FlashInfer compiles some kernels on first use; the versions are those of CUDA_BASE
ARG CUDA_PACKAGES="cuda-nvcc-13-0 cuda-cudart-dev-13-0 libcurand-dev-13-0"

# pip reads these from its environment, and takes an empty one for unset
ARG PIP_INDEX_URL=https://pypi.org/simple
ARG PIP_FIND_LINKS=""
ARG PIP_CERT=""

# 0 leaves the embedded model to the first start, which then needs a package index
ARG PREPARE_MODEL=1

# ---------------------------------------------------------------- what goes in

# The pins alone, so that no other change to pyproject.toml reaches the engine's layer.
FROM ${CPU_BASE} AS requirements
WORKDIR /requirements
COPY pyproject.toml constraints.txt ./
RUN python3 -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    [open(f'{extra}.txt', 'w').write('\n'.join([*project['dependencies'], *pins, ''])) \
     for extra, pins in project['optional-dependencies'].items()]"

# Wheels that no index is to be asked for. A COPY that matches nothing is an error, hence LICENSE, which is always there.
FROM ${CPU_BASE} AS wheels
COPY LICENSE wheels* /wheels/

FROM ${CPU_BASE} AS package
ARG PIP_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_CERT
RUN python3 -m venv /build
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY models models
COPY serving serving
COPY benchmarks benchmarks
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    PIP_FIND_LINKS="/wheels $PIP_FIND_LINKS" /build/bin/pip wheel --no-cache-dir --no-deps --wheel-dir /dist .

# ---------------------------------------------------------------- cpu

FROM ${CPU_BASE} AS cpu-engine
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
ARG PIP_FIND_LINKS
ARG PIP_CERT
# g++ compiles the attention kernel for the CPU the container runs on: on first use, because this one may be another;
# vLLM's own kernels need libnuma, and its wheel does not bring it
RUN dpkg -s g++ libnuma1 tini >/dev/null 2>&1 || { apt-get update \
    && apt-get install -y --no-install-recommends g++ libnuma1 tini && rm -rf /var/lib/apt/lists/*; }
RUN useradd --uid 10001 --create-home relay && install -d -o relay -g relay /cache
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1 XDG_CACHE_HOME=/cache VLLM_RELAY_CACHE=/cache/vllm-relay
COPY --from=requirements /requirements/cpu.txt /requirements/constraints.txt /opt/requirements/
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    python3 -m venv /opt/venv \
    && PIP_FIND_LINKS="/wheels $PIP_FIND_LINKS" pip install -r /opt/requirements/cpu.txt -c /opt/requirements/constraints.txt

FROM cpu-engine AS cpu
ARG PIP_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_CERT
ARG PREPARE_MODEL
COPY --from=package /dist /opt/dist
RUN pip install --no-deps --no-index /opt/dist/*.whl
USER relay
WORKDIR /home/relay
RUN [ "$PREPARE_MODEL" = 0 ] || vllm-relay prepare
VOLUME /cache
EXPOSE 8000
ENV HEALTH_URL=http://127.0.0.1:8000/health
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(os.environ['HEALTH_URL'], timeout=4)"]
STOPSIGNAL SIGTERM
# tini, because the first process of a container has to bury the orphans of the others
ENTRYPOINT ["tini", "--", "vllm-relay"]
CMD ["serve", "--host", "0.0.0.0"]

# ---------------------------------------------------------------- cuda

FROM ${CUDA_BASE} AS cuda-engine
ARG CUDA_PACKAGES
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL=""
ARG PIP_FIND_LINKS
ARG PIP_CERT
# g++ and Python's headers for what Triton and Inductor compile on first use; the CUDA libraries come with the wheels
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ tini python3 python3-dev python3-venv ${CUDA_PACKAGES} \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --create-home relay && install -d -o relay -g relay /cache
ENV PATH=/opt/venv/bin:/usr/local/cuda/bin:$PATH PIP_NO_CACHE_DIR=1 XDG_CACHE_HOME=/cache VLLM_RELAY_CACHE=/cache/vllm-relay
ENV TRITON_CACHE_DIR=/cache/triton FLASHINFER_WORKSPACE_BASE=/cache
COPY --from=requirements /requirements/cuda.txt /opt/requirements/
RUN --mount=type=bind,from=wheels,source=/wheels,target=/wheels \
    python3 -m venv /opt/venv \
    && PIP_FIND_LINKS="/wheels $PIP_FIND_LINKS" pip install -r /opt/requirements/cuda.txt

FROM cuda-engine AS cuda
ARG PIP_INDEX_URL
ARG PIP_FIND_LINKS
ARG PIP_CERT
ARG PREPARE_MODEL
COPY --from=package /dist /opt/dist
RUN pip install --no-deps --no-index /opt/dist/*.whl
USER relay
WORKDIR /home/relay
RUN [ "$PREPARE_MODEL" = 0 ] || vllm-relay prepare
VOLUME /cache
EXPOSE 8000
ENV HEALTH_URL=http://127.0.0.1:8000/health
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(os.environ['HEALTH_URL'], timeout=4)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["tini", "--", "vllm-relay"]
CMD ["serve", "--host", "0.0.0.0"]
