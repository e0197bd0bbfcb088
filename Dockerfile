# distilpeft in a container, for NVIDIA GPUs and CPUs:
#   docker build -t distilpeft .
#   docker run --gpus all --shm-size 8g -v "$PWD/runs:/work/runs" distilpeft run quickstart   # without a GPU: no --gpus
# For CPUs only, smaller by gigabytes, with the address that pytorch.org shows under "Get started", "CPU":
#   docker build -t distilpeft:cpu --build-arg PIP_OPTIONS="--extra-index-url ADDRESS" .
FROM python:3.12-slim

ARG PIP_OPTIONS=""
ARG EXTRAS=quickstart,gguf

# Triton and torch.compile need a compiler.
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY . /src
RUN pip install --no-cache-dir ${PIP_OPTIONS} -c /src/constraints.txt "/src[${EXTRAS}]"

RUN useradd --create-home distilpeft && mkdir -p /work/runs && chown -R distilpeft /work
USER distilpeft
WORKDIR /work
ENTRYPOINT ["distilpeft"]
CMD ["--help"]
