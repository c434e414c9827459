# LayerLens in a container: `cpu` (the default target) and `cuda`, both from one wheel that the builder makes.
#
#   docker build -t layerlens .
#   docker run --rm -v "$PWD:/work" layerlens run config.yaml
#   docker build -t layerlens:cuda --target cuda . && docker run --rm --gpus all -v "$PWD:/work" layerlens:cuda doctor

ARG PYTHON_VERSION=3.11

# The wheel, and every package it needs as wheels too, so that the runtime stages need no compiler.
FROM python:${PYTHON_VERSION}-slim-bookworm AS builder
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++=4:12.2.0-3 \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY CMakeLists.txt pyproject.toml README.md LICENSE NOTICE ./
COPY scripts/constraints.txt scripts/
COPY cpp cpp
COPY cython_bindings cython_bindings
COPY layerlens layerlens
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON_VERSION}-slim-bookworm AS runtime
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 \
    HF_HOME=/cache/huggingface LAYERLENS_CACHE=/cache/layerlens
# libgomp1: the wheel built above uses the system's OpenMP runtime (released wheels carry their own).
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libgomp1=12.2.0-14+deb12u1 \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 layerlens \
 && mkdir /work /cache && chown layerlens:layerlens /work /cache

FROM runtime AS cuda
COPY --from=builder /src/scripts/constraints.txt /tmp/constraints.txt
# PyPI's torch is the CUDA build and brings CUDA's libraries with it; the host needs the driver only.
RUN --mount=type=bind,from=builder,source=/wheels,target=/wheels \
    pip install -c /tmp/constraints.txt "$(ls /wheels/layerlens-*.whl)[hf]"
USER 10001
WORKDIR /work
HEALTHCHECK --interval=1m --timeout=30s CMD ["layerlens", "doctor", "--json"]
ENTRYPOINT ["layerlens"]
CMD ["--help"]

FROM runtime AS cpu
COPY --from=builder /src/scripts/constraints.txt /tmp/constraints.txt
RUN --mount=type=bind,from=builder,source=/wheels,target=/wheels \
    pip install -c /tmp/constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu \
      "$(ls /wheels/layerlens-*.whl)[hf]"
USER 10001
WORKDIR /work
HEALTHCHECK --interval=1m --timeout=30s CMD ["layerlens", "doctor", "--json"]
ENTRYPOINT ["layerlens"]
CMD ["--help"]
