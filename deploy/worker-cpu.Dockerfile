# Baton workers and the pool controller on CPUs, with Ray for a cluster of several machines.
#
#     docker build -f deploy/worker-cpu.Dockerfile -t baton-worker:0.1.0-cpu .
#
# --build-arg INSTALL_OPTIONS=--embedded-model puts the embedded model in (98 MB).
FROM python:3.11.14-slim-bookworm AS build
# For the CPU kernels; the image itself has no compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY baton baton
COPY router router
COPY engine engine
COPY kv_transfer kv_transfer
COPY prefill_workers prefill_workers
COPY decode_workers decode_workers
COPY cluster cluster
COPY deploy/install.py deploy/install.py
ARG INSTALL_OPTIONS=""
# Without this, PyPI's torch brings 3 GB of CUDA along.
ARG PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
RUN python deploy/install.py worker-cpu --into /opt/baton $INSTALL_OPTIONS

FROM python:3.11.14-slim-bookworm
RUN groupadd --gid 10001 baton && useradd --uid 10001 --gid 10001 --create-home baton
COPY --from=build /opt/baton /opt/baton
ENV PATH=/opt/baton/bin:$PATH PYTHONUNBUFFERED=1 BATON_CACHE=/home/baton/.cache/baton
# What a worker reads before its first import (baton/worker/environment.py).
ENV GOMP_SPINCOUNT=10000 GRPC_VERBOSITY=ERROR
# Ray's client server forks while gRPC works in other threads. With gRPC's own handlers of
# forks the child died of SIGSEGV in 2 of 9 connections, without in none of 12.
ENV GRPC_ENABLE_FORK_SUPPORT=0
USER 10001:10001
WORKDIR /home/baton
# Followed by a module and its options; KubeRay and the chart set commands of their own.
ENTRYPOINT ["python", "-m"]
CMD ["decode_workers.main", "--help"]
