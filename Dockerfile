# fastdpo on a machine with an NVIDIA GPU and its container toolkit:
#   docker build -t fastdpo .
#   docker run --gpus all --rm -v "$PWD:/work" fastdpo train --config run.yaml
#   docker run --gpus all --rm -v "$PWD/out:/out" --entrypoint bash fastdpo benchmarks/gpu_suite.sh /out
FROM python:3.12-slim

# Triton compiles its launchers with a C compiler
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev git && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/fastdpo
COPY . .
# torch's CUDA build brings CUDA's libraries and Triton; constraints.txt holds the versions that the tests pass with
RUN pip install --no-cache-dir --constraint constraints.txt ".[peft,plots,quant,data]" pytest pytest-xdist
ENTRYPOINT ["fastdpo"]
