# modalkit with its bundled model, or with what is mounted at /app: a modalkit.yaml, and the modules it names.
#
#   docker build -t modalkit .                                                        # for the CPU
#   docker build --build-arg TORCH_INDEX=https://pypi.org/simple -t modalkit:cuda .   # for CUDA: docker run --gpus all
#   docker run -p 8000:8000 -v modalkit:/data -e MODALKIT_APP_SETTINGS__AUTH_CONFIG__API_KEY=your-key modalkit
#
# All packages but torch are those of deploy/requirements.txt, by hash (`make lock` writes it anew). torch has its
# version from constraints.txt and comes from TORCH_INDEX, because its builds for the CPU are not on PyPI.

FROM python:3.11-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PATH=/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /build
COPY constraints.txt deploy/requirements.txt ./
RUN python -m venv /venv \
    && pip install --require-hashes --no-deps -r requirements.txt \
    && pip install --constraint constraints.txt --index-url "$TORCH_INDEX" torch
COPY . .
RUN PIP_CONSTRAINT=/build/constraints.txt pip install --no-deps .

FROM python:3.11-slim
COPY --from=build /venv /venv
RUN useradd --uid 1000 --create-home app && mkdir /app /data && chown app /data
# Accepted jobs and downloaded models are kept in /data: mount a volume there, or they are lost with the container.
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/data/hub \
    MODALKIT_APP_SETTINGS__ASYNC_CONFIG__STORE_PATH=/data/modalkit.db
VOLUME /data
WORKDIR /app
USER 1000
EXPOSE 8000
HEALTHCHECK --start-period=10m \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health/live', timeout=5)"]
# On SIGTERM it finishes what was accepted, for up to 30 seconds: docker stop --time 40.
CMD ["modalkit", "serve", "--host", "0.0.0.0", "--port", "8000"]
