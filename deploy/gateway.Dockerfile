# A Baton gateway: the HTTP edge, without torch and without Ray.
#
#     docker build -f deploy/gateway.Dockerfile -t baton-gateway:0.1.0 .
#
# --build-arg INSTALL_OPTIONS=--embedded-model puts the embedded model in (98 MB).
FROM python:3.11.14-slim-bookworm AS build
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
RUN python deploy/install.py gateway --into /opt/baton $INSTALL_OPTIONS

FROM python:3.11.14-slim-bookworm
RUN groupadd --gid 10001 baton && useradd --uid 10001 --gid 10001 --create-home baton
COPY --from=build /opt/baton /opt/baton
ENV PATH=/opt/baton/bin:$PATH PYTHONUNBUFFERED=1 BATON_CACHE=/home/baton/.cache/baton
USER 10001:10001
WORKDIR /home/baton
EXPOSE 8000
ENTRYPOINT ["python", "-m", "router.main"]
