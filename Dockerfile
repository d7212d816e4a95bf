# The image for launch/gke.yaml, or for one machine:
#
#   docker build -t bef-jax .
#   docker run --gpus=all -v "$PWD/runs:/home/user/runs" bef-jax --config=quickstart
#
# It runs as user 1000, which must be able to write to the folder of the run.
FROM python:3.12-slim
# EXTRA is what JAX computes on: cuda or tpu.
ARG EXTRA=cuda
COPY pyproject.toml README.md LICENSE constraints.txt /source/
COPY bef_jax /source/bef_jax
COPY configs /source/configs
RUN pip install --no-cache-dir --constraint=/source/constraints.txt "/source[$EXTRA]" \
    && rm -r /source \
    && useradd --uid=1000 --create-home user
USER user
WORKDIR /home/user
ENTRYPOINT ["bef-jax"]
