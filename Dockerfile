# An image per service, by target:
#
#   docker build --target proxy|preprocess|predict .
#
# Each holds the packages of its own lock and its own code, and nothing of the other services.
# More packages, such as those for models in a bucket (docs/loading.md), are named by their locks:
#
#   docker build --target predict --build-arg EXTRAS=s3 .
#
# Packages come from PyPI. Where another index is wanted, hand in a pip.conf; it stays out of the images:
#
#   docker build --target predict --secret id=pip_conf,src=$HOME/.config/pip/pip.conf .
#
# A service gets its models by a mount, or has them inside; then hand in a model repository, and which models of it (all):
#
#   docker build --target predict --build-context models=./models --build-arg MODELS="penguins digits" .

ARG PYTHON_IMAGE=python:3.11-slim-bookworm
ARG EXTRAS=

FROM ${PYTHON_IMAGE} AS build
# Exactly what the lock says, and wheels only: there is no compiler here.
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_DEPS=1 \
    PIP_ONLY_BINARY=:all: \
    PIP_PYTHON=/venv/bin/python \
    PIP_REQUIRE_HASHES=1
# The final images have the same Python at the same path, so the link to it that this makes holds there.
RUN python -m venv --without-pip /venv
WORKDIR /app

# Bytecode is made here, by compileall and by pip, since nothing can write it later.
FROM build AS code
COPY splitserve splitserve
COPY proxy proxy
COPY preprocess_service preprocess_service
COPY predict_service predict_service
# A checkout may be its owner's alone to read; the services run as somebody else.
RUN chmod -R a+rX . && python -m compileall -q .

# The libraries' own tests would be a fifth of their size.
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

FROM build AS predict-venv
ARG EXTRAS
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=bind,source=requirements,target=/requirements \
    pip install --quiet --requirement /requirements/predict.txt && \
    for extra in $(echo $EXTRAS | tr , ' '); do pip install --quiet --requirement /requirements/$extra.txt || exit 1; done && \
    find /venv -type d -name tests -prune -exec rm -r {} +

# No models, unless a folder is handed in under this name.
FROM scratch AS models

# Each half by itself: an image holds the bundles that its service loads, and the routes. A name that is not there ends the build.
FROM build AS bundles
ARG MODELS=""
RUN --mount=from=models,target=/models \
    mkdir -p /halves/preprocess /halves/predict && \
    cd /models && for model in ${MODELS:-$(ls)}; do for half in preprocess predict; do \
        mkdir "/halves/$half/$model" && \
        { [ ! -d "$model/$half" ] || cp -r "$model/$half" "/halves/$half/$model/"; } && \
        { [ ! -f "$model/route.json" ] || cp "$model/route.json" "/halves/$half/$model/"; } && \
        [ -d "$model" ] || { echo "there is no model $model in the folder of models" >&2; exit 1; }; \
    done; done && \
    chmod -R a+rX /halves

FROM ${PYTHON_IMAGE} AS service
ENV PATH=/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    MODEL_CACHE=/var/cache/splitserve
# What a volume for fetched models is laid over, and takes its owner from.
RUN install --directory --owner=10001 --group=10001 --mode=700 /var/cache/splitserve
WORKDIR /app
USER 10001:10001

# Health means "takes calls", which is this container's own doing; see splitserve/server/probe.py. Entrypoints are lists, so that
# python is process 1 and gets SIGTERM.

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

FROM service AS predict
COPY --from=predict-venv /venv /venv
COPY --from=code /app/splitserve splitserve
COPY --from=code /app/predict_service predict_service
COPY --from=bundles /halves/predict /models
# ONNX Runtime reports to its maker unless told not to before it is imported. Source: its Privacy.md, "Disabling Telemetry".
ENV MODEL_REPOSITORY=/models \
    ORT_DISABLE_TELEMETRY=1 \
    PREDICT_HOST=0.0.0.0 \
    PREDICT_GRPC_PORT=8021
EXPOSE 8021
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --start-interval=1s \
    CMD exec python -m splitserve.server.probe "127.0.0.1:$PREDICT_GRPC_PORT"
ENTRYPOINT ["python", "-m", "predict_service"]
