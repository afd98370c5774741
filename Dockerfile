# Runs on the CPU by default (the wheels are torch's default ones). On a CUDA base: docker build --build-arg BASE=nvidia/cuda:13.0.1-cudnn-runtime-ubuntu24.04 -t rprune:cuda .
ARG BASE=python:3.12-slim

FROM ${BASE} AS build
RUN command -v python3 && python3 -c 'import venv, ensurepip' \
    || (apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*)
WORKDIR /src
COPY . .
RUN python3 -m venv /opt/rprune && /opt/rprune/bin/pip install --no-cache-dir .

FROM ${BASE}
RUN command -v python3 \
    || (apt-get update && apt-get install -y --no-install-recommends python3 && rm -rf /var/lib/apt/lists/*)
COPY --from=build /opt/rprune /opt/rprune
RUN useradd --create-home --uid 10001 rprune
USER rprune
WORKDIR /home/rprune
ENV PATH=/opt/rprune/bin:$PATH
ENTRYPOINT ["rprune"]
CMD ["--help"]
