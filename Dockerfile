# Builds the service's image, for CPUs (target `cpu`, the default) or for NVIDIA GPUs (target `gpu`):
#   docker build -t episodic:cpu .
#   docker build -t episodic:gpu --target gpu .
# Build arguments for pip: PIP_INDEX_URL is the package index, PIP_FIND_LINKS and PIP_TRUSTED_HOST a place of wheels.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

# Builds the project's wheel, which both images install.
FROM ${PYTHON_IMAGE} AS wheel
ARG PIP_FIND_LINKS
ARG PIP_TRUSTED_HOST
ARG PIP_INDEX_URL
WORKDIR /src
COPY pyproject.toml ./
COPY requirements requirements
COPY deploy deploy
RUN --mount=type=cache,target=/root/.cache/pip python deploy/image.py tools
COPY LICENSE README.md ./
COPY episodic episodic
COPY service service
RUN pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /dist .

# Builds the virtual environment of the CPU image, with the runtime dependencies only.
FROM ${PYTHON_IMAGE} AS environment
ARG PIP_FIND_LINKS
ARG PIP_TRUSTED_HOST
ARG PIP_INDEX_URL
WORKDIR /src
# Remove the setuptools that venv installed: the lock pins another version.
RUN python -m venv /opt/episodic && /opt/episodic/bin/pip uninstall --quiet --yes setuptools
COPY pyproject.toml ./
COPY requirements requirements
COPY deploy deploy
RUN --mount=type=cache,target=/root/.cache/pip /opt/episodic/bin/python deploy/image.py cpu
COPY --from=wheel /dist /dist
RUN /opt/episodic/bin/pip install --quiet --no-cache-dir --no-deps /dist/*.whl \
 && /opt/episodic/bin/pip uninstall --quiet --yes pip

FROM ${VLLM_IMAGE} AS gpu
ARG PIP_FIND_LINKS
ARG PIP_TRUSTED_HOST
ARG PIP_INDEX_URL
USER 0
# Versions are not pinned, because Debian's archive keeps only the latest version of a package.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends tini \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin \
 && install -d -o 10001 -g 0 -m 0775 /data /models
WORKDIR /src
COPY pyproject.toml ./
COPY requirements requirements
COPY deploy deploy
# Installs into vLLM's environment. Installed packages stay, unless pyproject.toml requires another version.
RUN --mount=type=cache,target=/root/.cache/pip PIP_BREAK_SYSTEM_PACKAGES=1 python3 deploy/image.py gpu
COPY deploy/health.py /opt/health.py
COPY --from=wheel /dist /dist
RUN PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --no-cache-dir --no-deps /dist/*.whl \
 && rm -rf /src /dist
# HOME is /tmp, so that only /tmp and the two volumes must be writable. Kernels compiled for the GPU stay in /models.
ENV HOME=/tmp \
    USER=episodic \
    LOGNAME=episodic \
    HF_HOME=/models \
    VLLM_CACHE_ROOT=/models/.cache/vllm \
    TRITON_CACHE_DIR=/models/.cache/triton \
    FLASHINFER_WORKSPACE_BASE=/models \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    EPISODIC_HOST=0.0.0.0 \
    EPISODIC_DATA=/data \
    EPISODIC_MAKE_KEY=true \
    EPISODIC_LOG_FORMAT=json
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Episodic" \
      org.opencontainers.image.description="A stateful agent service over vLLM, for NVIDIA GPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
WORKDIR /data
USER 10001:10001
VOLUME ["/data", "/models"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=5s --start-period=60m --retries=3 \
    CMD ["python3", "-IS", "/opt/health.py"]
ENTRYPOINT ["tini", "--", "episodic"]
CMD ["serve"]

FROM ${PYTHON_IMAGE} AS cpu
# The engine's CPU kernels are linked against libnuma1.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends libnuma1 tini \
 && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin \
 && install -d -o 10001 -g 0 -m 0775 /data /models
COPY --from=environment /opt/episodic /opt/episodic
COPY deploy/health.py /opt/health.py
# HOME and the caches are in /tmp, so that only /tmp and the two volumes must be writable.
ENV PATH=/opt/episodic/bin:$PATH \
    HOME=/tmp \
    USER=episodic \
    LOGNAME=episodic \
    HF_HOME=/models \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    EPISODIC_HOST=0.0.0.0 \
    EPISODIC_DATA=/data \
    EPISODIC_MAKE_KEY=true \
    EPISODIC_LOG_FORMAT=json
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Episodic" \
      org.opencontainers.image.description="A stateful agent service over vLLM, for CPUs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
WORKDIR /data
USER 10001:10001
VOLUME ["/data", "/models"]
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=5s --timeout=5s --start-period=5m --retries=3 \
    CMD ["python3", "-IS", "/opt/health.py"]
ENTRYPOINT ["tini", "--", "episodic"]
CMD ["serve"]
