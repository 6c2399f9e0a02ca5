# An image that trains, talks and exports; nothing but this folder and the package registry is needed.
#   docker build -t preference .                                                                     CUDA: torch from PyPI
#   docker build -t preference-cpu --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu .   CPU
#   docker run --gpus all --shm-size 8g -v "$PWD/outputs:/app/outputs" -v "$PWD/my_pairs:/data:ro" \
#       -e train_file_dir=/data preference sh run_orpo.sh
# torch's wheels bring CUDA's libraries along, so the base needs the driver of the host alone (nvidia-container-toolkit).
FROM python:3.11-slim-bookworm

ARG TORCH_INDEX_URL=
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 PYTHON=/usr/local/bin/python3
WORKDIR /app

# a compiler for the kernels that torch.compile and triton make on a GPU
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

COPY requirements.txt ./
RUN pip install ${TORCH_INDEX_URL:+--extra-index-url "$TORCH_INDEX_URL"} -r requirements.txt

COPY . .
RUN useradd --create-home --uid 1000 user && mkdir -p models outputs cache && chown -R user /app
USER user
CMD ["sh", "run_orpo.sh", "--dry_run", "true"]
