# The registry's server, workers and command line in one image: the command decides. Small (torch for the CPU), and without rights.
#
#   docker build --build-arg TORCH_INDEX_URL=… -t ckpt .
#
# TORCH_INDEX_URL is where PyTorch keeps its wheels for the CPU; its page "Start Locally" shows the address when you choose "CPU". Without it,
# pip takes the wheel with CUDA, some gigabytes larger, which works as well.
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/ckpt
ENV PATH=/opt/ckpt/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /src
COPY constraints.txt ./
ARG TORCH_INDEX_URL=
# Alone: what it needs comes from PyPI below, of the versions that are asked for; PyTorch's own place does not keep all of them.
RUN pip install -c constraints.txt --no-deps ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY migrations migrations
COPY registry registry
COPY cli cli
RUN pip install -c constraints.txt ".[team]"

FROM python:3.12-slim
RUN useradd --uid 10001 --create-home --home-dir /var/lib/ckpt --shell /usr/sbin/nologin ckpt
COPY --from=build /opt/ckpt /opt/ckpt
ENV PATH=/opt/ckpt/bin:$PATH PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 CKPT_HOME=/var/lib/ckpt
USER ckpt
WORKDIR /var/lib/ckpt
VOLUME /var/lib/ckpt
EXPOSE 8000
ENTRYPOINT ["ckpt"]
CMD ["--help"]
