# An image for a CPU. For NVIDIA GPUs, build it with PyTorch's CUDA build and run it with --gpus all:
#
#   docker build -t gpt2 .
#   docker build -t gpt2 --build-arg TORCH_INDEX=https://pypi.org/simple .
#   docker run --init --rm -it -v gpt2-data:/gpt2/data -v gpt2-out:/gpt2/out gpt2 python prepare_data.py
#   docker run --init --rm -it -v gpt2-data:/gpt2/data -v gpt2-out:/gpt2/out gpt2 python train_gpt2.py
#
# --init: Python as process 1 would ignore the SIGTERM of `docker stop`, except while it trains.
# Not the -slim image: torch.compile needs a C++ compiler.
FROM python:3.12.11-bookworm
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /gpt2
COPY requirements.txt .
RUN pip install --no-cache-dir --extra-index-url $TORCH_INDEX -r requirements.txt
COPY . .
RUN useradd --create-home gpt2 && mkdir -p data out && chown gpt2 . data out
USER gpt2
VOLUME ["/gpt2/data", "/gpt2/out"]
CMD ["python", "train_gpt2.py", "--help"]
