# The command and the demo page on a CPU.
#
#   docker build -t dasheng-tokenizer .
#   docker run --rm -v "$PWD:/data" dasheng-tokenizer encode recordings/ -o tokens/
#   docker run --rm -p 7860:7860 dasheng-tokenizer demo --host 0.0.0.0
#
# torch comes from the index that pip is told of: with `--build-arg PIP_EXTRA_INDEX_URL=…` an index of CPU builds, which
# saves gigabytes of CUDA libraries; for a GPU leave it out and run with `--gpus all`.
FROM python:3.11-slim

ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_EXTRA_INDEX_URL=${PIP_EXTRA_INDEX_URL} PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

WORKDIR /app
# What changes seldom comes first, so that a change of the code does not fetch torch again.
COPY constraints.txt ./
RUN pip install -c constraints.txt torch transformers gradio
COPY pyproject.toml README.md LICENSE ./
COPY src ./src
RUN pip install -c constraints.txt ".[demo,enhance]"

# Nothing here needs to be root. Models fetched from the hub are kept in /home/listener.
RUN useradd --create-home listener
USER listener
WORKDIR /data
EXPOSE 7860
ENTRYPOINT ["dasheng-tokenizer"]
CMD ["--help"]
