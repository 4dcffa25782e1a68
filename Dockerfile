# One image for all: a flow (run), its simulated models (simulate), and every other command of chainwax.
#   docker build -t chainwax:0.1.0 .
#   docker build -t chainwax:0.1.0-local --build-arg EXTRAS=[redis,local,parquet] .
# Settings come from the environment (docs/deploying.md); no key and no file is in the image.

# With a C compiler, for router/learning/_kernel.c.
FROM python:3.12 AS build
ARG EXTRAS=[redis]
WORKDIR /src
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY router ./router
COPY operators ./operators
COPY connectors ./connectors
COPY flows ./flows
RUN python -m venv /opt/chainwax
RUN /opt/chainwax/bin/pip install --no-cache-dir --disable-pip-version-check -c constraints.txt ".${EXTRAS}"

FROM python:3.12-slim
RUN groupadd --gid 10001 chainwax \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data chainwax \
 && mkdir /data \
 && chown 10001:10001 /data
COPY --from=build /opt/chainwax /opt/chainwax
ENV PATH=/opt/chainwax/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PORT=8080 \
    CHAINWAX_SERVE__HOST=0.0.0.0 \
    CHAINWAX_RUN__RECORDING=/data/chainwax.db
WORKDIR /data
VOLUME /data
USER 10001:10001
EXPOSE 8080
# Alive, and not ready: who is to be sent traffic, or waited for, asks /readyz.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['PORT'] + '/healthz', timeout=4)"]
# The first signal lets the run drain, so give it time: docker stop --time 60.
STOPSIGNAL SIGTERM
ENTRYPOINT ["chainwax"]
CMD ["run"]
