# make image                                                        tags it; CUDA wheels, which also run without a GPU
# make image TORCH_INDEX=https://download.pytorch.org/whl/cpu       CPU wheels, a much smaller image
#
# docs/container.md says the rest. It needs docker with BuildKit, podman or buildah.

FROM python:3.11-slim-bookworm AS builder

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
RUN python3 -m venv /opt/safelight
ENV PATH=/opt/safelight/bin:$PATH
WORKDIR /build

# Dependencies before source, so that a change of ours doesn't fetch gigabytes again. A mirror or a certificate of your
# own comes in as a build secret, pip.conf or ca.crt (/run/secrets/ca.crt), and stays in no layer.
COPY requirements/runtime.lock requirements/
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=ca.crt \
    pip install --no-deps --require-hashes -r requirements/runtime.lock
# Wheels of another index have other hashes: there only the versions are those of the lock.
COPY requirements/torch.lock requirements/
ARG TORCH_INDEX=
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf --mount=type=secret,id=ca.crt \
    if [ -z "$TORCH_INDEX" ]; then \
        pip install --no-deps --require-hashes -r requirements/torch.lock; \
    else \
        pip install --no-deps --index-url "$TORCH_INDEX" $(grep -Eo '^torch(vision)?==[0-9.]+' requirements/torch.lock); \
    fi

# Built beside the environment, not into it: the layer that the next stage copies stays the same when only we change.
COPY pyproject.toml README.md LICENSE ./
COPY service service
COPY training training
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .


FROM python:3.11-slim-bookworm

# A fixed number, so that whoever mounts a folder knows whom to let write.
RUN useradd --uid 10001 --home-dir /safelight --create-home safelight \
    && install --directory --owner=safelight --group=safelight /safelight/state
ENV PATH=/opt/safelight/bin:$PATH \
    SAFELIGHT_HOST=0.0.0.0 \
    SAFELIGHT_ARTIFACTS=/safelight/artifacts \
    SAFELIGHT_STATE=/safelight/state

COPY --from=builder /opt/safelight /opt/safelight
# Copied and not mounted: buildah and podman don't notice that what a RUN mounts has changed, and would keep old code.
COPY --from=builder /wheels /wheels
RUN pip install --no-cache-dir --no-deps --no-index /wheels/*.whl
COPY --chown=10001:10001 artifacts /safelight/artifacts

# By number: orchestrators that refuse root can't look a name up.
USER 10001:10001
# Training writes runs/ where it stands: here that is a volume, so that an interrupted run can go on.
WORKDIR /safelight/state
# Fails the build where a library is missing or a shipped model isn't whole.
RUN python -m service --check

VOLUME ["/safelight/artifacts", "/safelight/state"]
EXPOSE 8000
# http.client and not urllib, which would ask a configured proxy for 127.0.0.1.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD ["python", "-c", "import os, sys, http.client as http; c = http.HTTPConnection('127.0.0.1', int(os.environ.get('SAFELIGHT_PORT', 8000)), timeout=4); c.request('GET', '/health/ready'); sys.exit(c.getresponse().status != 200)"]
CMD ["python", "-m", "service"]
