# An image per service, by target:
#
#   docker build --target proxy|preprocess|preprocess-slim|predict|jobs .
#
# preprocess-slim has numpy alone, and serves portable bundles only (docs/plan-format.md).
#
# Each contains the packages of its own lock and its own code, and nothing of the other services.
# Further packages, such as those for models in a bucket (docs/loading.md), are added by the name of their lock:
#
#   docker build --target predict --build-arg EXTRAS=s3 .
#
# Packages come from PyPI. For another index pass a pip.conf as a secret; it is not part of the images:
#
#   docker build --target predict --secret id=pip_conf,src=$HOME/.config/pip/pip.conf .
#
# Models are mounted, or built in from a model repository (all of its models, or those named):
#
#   docker build --target predict --build-context models=./models --build-arg MODELS="penguins digits" .

ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG EXTRAS=

FROM ${PYTHON_IMAGE} AS build
# Exactly the locked packages, as wheels: there is no compiler here.
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_DEPS=1 \
    PIP_ONLY_BINARY=:all: \
    PIP_PYTHON=/venv/bin/python \
    PIP_REQUIRE_HASHES=1
# The final images have the same Python at the same path, so the venv's link to it is valid there.
RUN python -m venv --without-pip /venv
WORKDIR /app

# Bytecode is compiled here, by compileall and pip: the containers' file systems are read-only.
FROM build AS code
COPY splitserve splitserve
COPY proxy proxy
COPY preprocess_service preprocess_service
COPY predict_service predict_service
COPY jobs_service jobs_service
# A checkout may be readable by its owner only; the services run as another user.
RUN chmod -R a+rX . && python -m compileall -q .

# The libraries' own tests are a fifth of their size.
FROM build AS proxy-venv
ARG EXTRAS
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=bind,source=requirements,target=/requirements \
    pip install --quiet --requirement /requirements/proxy.txt && \
    for extra in $(echo $EXTRAS | tr , ' '); do pip install --quiet --requirement /requirements/$extra.txt || exit 1; done

FROM build AS preprocess-venv
ARG EXTRAS
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=bind,source=requirements,target=/requirements \
    pip install --quiet --requirement /requirements/preprocess.txt && \
    for extra in $(echo $EXTRAS | tr , ' '); do pip install --quiet --requirement /requirements/$extra.txt || exit 1; done && \
    find /venv -type d -name tests -prune -exec rm -r {} +

FROM build AS preprocess-slim-venv
ARG EXTRAS
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=bind,source=requirements,target=/requirements \
    pip install --quiet --requirement /requirements/preprocess-slim.txt && \
    for extra in $(echo $EXTRAS | tr , ' '); do pip install --quiet --requirement /requirements/$extra.txt || exit 1; done && \
    find /venv -type d -name tests -prune -exec rm -r {} +

FROM build AS predict-venv
ARG EXTRAS
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=bind,source=requirements,target=/requirements \
    pip install --quiet --requirement /requirements/predict.txt && \
    for extra in $(echo $EXTRAS | tr , ' '); do pip install --quiet --requirement /requirements/$extra.txt || exit 1; done && \
    find /venv -type d -name tests -prune -exec rm -r {} +

FROM build AS jobs-venv
ARG EXTRAS
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=bind,source=requirements,target=/requirements \
    pip install --quiet --requirement /requirements/jobs.txt && \
    for extra in $(echo $EXTRAS | tr , ' '); do pip install --quiet --requirement /requirements/$extra.txt || exit 1; done

# No models, unless a build context of this name is given.
FROM scratch AS models

# Each half separately: an image contains the bundles that its service loads, the releases and the routes. An unknown name fails the build.
FROM build AS bundles
ARG MODELS=""
RUN --mount=from=models,target=/models \
    mkdir -p /halves/preprocess /halves/predict && \
    cd /models && for model in ${MODELS:-$(ls)}; do for half in preprocess predict; do \
        mkdir "/halves/$half/$model" && \
        for part in "$half" releases route.json route.sig; do \
            { [ ! -e "$model/$part" ] || cp -r "$model/$part" "/halves/$half/$model/"; } || exit 1; \
        done && \
        [ -d "$model" ] || { echo "no model $model in the models folder" >&2; exit 1; }; \
    done; done && \
    chmod -R a+rX /halves

FROM ${PYTHON_IMAGE} AS service
ENV PATH=/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    MODEL_CACHE=/var/cache/splitserve
# A volume for fetched models is mounted here and inherits this owner.
RUN install --directory --owner=10001 --group=10001 --mode=700 /var/cache/splitserve
WORKDIR /app
USER 10001:10001

# Healthy means "takes calls", which does not depend on other containers; see splitserve/server/probe.py. Entrypoints are lists, so
# that python receives SIGTERM.

FROM service AS proxy
COPY --from=proxy-venv /venv /venv
COPY --from=code /app/splitserve splitserve
COPY --from=code /app/proxy proxy
ENV PROXY_HOST=0.0.0.0 \
    PROXY_HTTP_PORT=8000 \
    PROXY_GRPC_PORT=8001
EXPOSE 8000 8001
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --start-interval=1s \
    CMD exec python -m splitserve.server.probe "127.0.0.1:$PROXY_GRPC_PORT"
ENTRYPOINT ["python", "-m", "proxy"]

FROM service AS preprocess
COPY --from=preprocess-venv /venv /venv
COPY --from=code /app/splitserve splitserve
COPY --from=code /app/preprocess_service preprocess_service
COPY --from=bundles /halves/preprocess /models
ENV MODEL_REPOSITORY=/models \
    PREPROCESS_HOST=0.0.0.0 \
    PREPROCESS_GRPC_PORT=8011
EXPOSE 8011
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --start-interval=1s \
    CMD exec python -m splitserve.server.probe "127.0.0.1:$PREPROCESS_GRPC_PORT"
ENTRYPOINT ["python", "-m", "preprocess_service"]

FROM service AS preprocess-slim
COPY --from=preprocess-slim-venv /venv /venv
COPY --from=code /app/splitserve splitserve
COPY --from=code /app/preprocess_service preprocess_service
COPY --from=bundles /halves/preprocess /models
ENV MODEL_REPOSITORY=/models \
    PREPROCESS_HOST=0.0.0.0 \
    PREPROCESS_GRPC_PORT=8011
EXPOSE 8011
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --start-interval=1s \
    CMD exec python -m splitserve.server.probe "127.0.0.1:$PREPROCESS_GRPC_PORT"
ENTRYPOINT ["python", "-m", "preprocess_service"]

FROM service AS predict
COPY --from=predict-venv /venv /venv
COPY --from=code /app/splitserve splitserve
COPY --from=code /app/predict_service predict_service
COPY --from=bundles /halves/predict /models
# ONNX Runtime sends usage reports unless this is set before it is imported. Source: its Privacy.md, "Disabling Telemetry".
ENV MODEL_REPOSITORY=/models \
    ORT_DISABLE_TELEMETRY=1 \
    PREDICT_HOST=0.0.0.0 \
    PREDICT_GRPC_PORT=8021
EXPOSE 8021
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --start-interval=1s \
    CMD exec python -m splitserve.server.probe "127.0.0.1:$PREDICT_GRPC_PORT"
ENTRYPOINT ["python", "-m", "predict_service"]

# Listens on loopback: the proxy says who calls. See docker-compose.jobs.yml.
FROM service AS jobs
USER root
# A volume for the jobs is mounted here and inherits this owner.
RUN install --directory --owner=10001 --group=10001 --mode=700 /var/lib/splitserve
USER 10001:10001
COPY --from=jobs-venv /venv /venv
COPY --from=code /app/splitserve splitserve
COPY --from=code /app/jobs_service jobs_service
ENV JOBS_DIR=/var/lib/splitserve/jobs \
    JOBS_GRPC_PORT=8031
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --start-interval=1s \
    CMD exec python -m splitserve.server.probe "127.0.0.1:$JOBS_GRPC_PORT" --ready
ENTRYPOINT ["python", "-m", "jobs_service"]
