# The image of one step of a training pipeline: its lock, its code, nothing else. Made by splitserve/pipeline/containers.py.
ARG PYTHON_IMAGE
FROM ${PYTHON_IMAGE}
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONHASHSEED=0 \
    HOME=/attempt
# Any user may run it: files in /scratch belong to whoever runs the pipeline.
RUN mkdir --mode=1777 /attempt
COPY requirements.txt /requirements.txt
# Wheels of SPLITSERVE_TRAINING_WHEELS, if any, are in the context; the folder is always there.
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=bind,source=wheels,target=/wheels \
    [ ! -s /requirements.txt ] || HOME=/root pip install --quiet --root-user-action=ignore --find-links /wheels \
    --requirement /requirements.txt
COPY code /code
WORKDIR /code
ENTRYPOINT ["python", "-m", "splitserve.pipeline.worker"]
