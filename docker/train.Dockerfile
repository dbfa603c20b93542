# Pretraining. From the repository's root:
#   docker build --file docker/train.Dockerfile --tag bridle-train .
#   docker build --file docker/train.Dockerfile --tag bridle-train:cpu --build-arg FLAVOUR=cpu .
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
        --requirement pyproject.toml --extra train --extra tokens --extra s3
COPY . .
RUN /tools/bin/uv pip install --python /opt/bridle --no-cache --compile-bytecode \
        --no-deps --no-index --no-build-isolation .

FROM ${BASE} AS cpu
ENV DS_ACCELERATOR=cpu

FROM ${BASE} AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

FROM ${FLAVOUR}
ARG BASE
ARG FLAVOUR
ARG VERSION=unknown
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="bridle-train" \
      org.opencontainers.image.description="Pretrains encoders and tokenizers of sound, pictures and video" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}" \
      org.opencontainers.image.base.name="${BASE}" \
      bridle.flavour="${FLAVOUR}"
RUN groupadd --gid 10001 bridle \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin bridle \
    && install --directory --owner=10001 --group=10001 /runs
COPY --from=build /opt/bridle /opt/bridle
ENV PATH=/opt/bridle/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /runs
EXPOSE 9464
STOPSIGNAL SIGTERM
# Node 0 has the run's metrics; of another node docker sees no more than whether its ranks run.
HEALTHCHECK --interval=30s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; os.environ.get('PET_NODE_RANK', '0') != '0' or r.urlopen('http://127.0.0.1:9464/metrics', timeout=4)"]
ENTRYPOINT ["bridle", "launch"]
CMD ["--", "--deepspeed_config", "builtin:zero2", "--recipe", "audio-mini", "--run", "/runs/audio-mini"]
