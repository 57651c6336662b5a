# rcmstr_fast with its CUDA sources compiled for A100 and H100/H200.
#   docker build -t rcmstr_fast .
#   docker run --gpus all --ipc host --user "$(id -u):$(id -g)" -v /data:/data:ro -v "$PWD/runs:/project/runs" \
#       rcmstr_fast pretrain --config cnn_rcmstr --data.roots /data/words --run runs/first
# --ipc host: the loader's threads and NCCL use shared memory, of which a container has 64 MB otherwise.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04 AS build
ENV DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev python3-venv g++ \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/rcmstr
WORKDIR /source
# Dependencies first: a change of the sources does not download PyTorch again.
COPY pyproject.toml constraints.txt ./
RUN /opt/rcmstr/bin/python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
e = p['optional-dependencies']; print('\n'.join(p['dependencies'] + e['synth'] + e['chinese'] + e['dali-cuda130']))" \
    > requirements.txt \
    && /opt/rcmstr/bin/python -m pip install -c constraints.txt -r requirements.txt
COPY setup.py CMakeLists.txt MANIFEST.in README.md LICENSE ./
COPY csrc csrc
COPY kernels kernels
COPY recipes recipes
COPY rcmstr_fast rcmstr_fast
RUN RCMSTR_FAST_CUDA=1 /opt/rcmstr/bin/python -m pip install --no-deps .

# Triton compiles its kernels on first use: it needs a C compiler, Python's headers and ptxas (which it brings itself).
FROM nvidia/cuda:13.0.1-base-ubuntu24.04
ENV DEBIAN_FRONTEND=noninteractive PATH=/opt/rcmstr/bin:$PATH HOME=/project
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-dev gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && mkdir -p /project && chmod 1777 /project
COPY --from=build /opt/rcmstr /opt/rcmstr
WORKDIR /project
ENTRYPOINT ["rcmstr"]
CMD ["doctor"]
