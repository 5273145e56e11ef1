# mta on CPUs; how it is built and used stands in docs/how-to/serve.md.
FROM python:3.11-slim-trixie AS build
# PyTorch keeps its builds for CPUs on an index of its own: name it here, or gigabytes of CUDA come along.
ARG PIP_EXTRA_INDEX_URL=
WORKDIR /src
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
RUN python -m venv /opt/mta \
 && /opt/mta/bin/pip install --no-cache-dir --constraint constraints.txt ".[assets,lab,serve]"

FROM python:3.11-slim-trixie
# g++ compiles the kernels for the processor that is there, once (docs/decisions/008-compiled-kernels.md).
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --no-create-home --home-dir /data mta \
 && install --directory --owner mta --group mta /data
COPY --from=build /opt/mta /opt/mta
# Banks, stores, keys, demo/ and all caches lie in one volume; nothing else is written to but /tmp.
ENV PATH=/opt/mta/bin:$PATH HOME=/data MTA_CACHE=/data/cache HF_HOME=/data/cache/hub \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
USER 10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=10s --start-period=5m CMD ["python", "-c", "import http.client, sys; \
at = http.client.HTTPConnection('127.0.0.1', 8000, timeout=5); at.request('GET', '/healthz'); sys.exit(at.getresponse().status != 200)"]
ENTRYPOINT ["mta"]
CMD ["--help"]
