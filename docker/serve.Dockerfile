# The service. From the repository's root:
#   docker build --file docker/serve.Dockerfile --tag bridle-serve .
#   docker build --file docker/serve.Dockerfile --tag bridle-serve:cpu --build-arg FLAVOUR=cpu .
# BASE is any Debian with Python 3.11 or newer and its venv; FLAVOUR is cuda or cpu.
ARG BASE=python:3.11-slim-bookworm
ARG FLAVOUR=cuda

FROM ${BASE} AS build
ARG FLAVOUR
WORKDIR /src
# The installer comes from the lock as well.
COPY requirements*.lock pyproject.toml ./
RUN python3 -m venv /tools \
    && sed -n '/^uv==/,/^    # via/p' requirements.lock > /tools/uv.lock \
    && /tools/bin/python -m pip install --quiet --no-cache-dir --require-hashes --requirement /tools/uv.lock
# A file that the lock does not name, or with another hash, ends the build. Certificates are the base's.
RUN python3 -m venv --without-pip /opt/bridle \
    && set -- --constraint requirements.lock \
    && if [ "$FLAVOUR" = cpu ] && [ -f requirements-cpu.lock ]; then \
        set -- --constraint requirements-cpu.lock --torch-backend cpu; fi \
    && echo "installing with $*" \
    && /tools/bin/uv pip install --system-certs --python /opt/bridle --no-cache --compile-bytecode --require-hashes \
        "$@" --build-constraint requirements.lock \
        --requirement pyproject.toml --extra serving --extra tracing --extra s3
COPY . .
RUN /tools/bin/uv pip install --python /opt/bridle --no-cache --compile-bytecode \
        --no-deps --no-index --no-build-isolation .

FROM ${BASE} AS cpu

FROM ${BASE} AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM ${FLAVOUR}
ARG BASE
ARG FLAVOUR
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="bridle-serve" \
      org.opencontainers.image.description="HTTP service: sound, pictures and video in, discrete codes out" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE}" \
      bridle.flavour="${FLAVOUR}"
RUN groupadd --gid 10001 bridle \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin bridle \
    && install --directory --owner=10001 --group=10001 /models
COPY --from=build /opt/bridle /opt/bridle
# Loopback only, until API keys are given: docs/serving.md.
ENV PATH=/opt/bridle/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /models
EXPOSE 8000
STOPSIGNAL SIGTERM
# Models take a while to load and warm up; a service that drains is no longer healthy.
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; p = os.environ.get('BRIDLE_PORT', ''); r.urlopen('http://127.0.0.1:' + (p if p.isdigit() else '8000') + '/readyz', timeout=4)"]
ENTRYPOINT ["bridle", "serve"]
