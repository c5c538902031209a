# pactown-runner in a container: compose.yaml says what that needs, and docs/operations.md how to use it.

FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev
COPY . /src
# Without its launcher it would run nothing as root, so let the build fail instead.
RUN PACTOWN_REQUIRE_LAUNCHER=1 pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /src

FROM python:3.12-slim
# All that pip installs lies below /usr/local, where tenants can execute this Python and read nothing of theirs.
RUN --mount=from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(ls /wheels/*.whl)[all]" && \
    install -D -m 600 /usr/local/share/pactown-runner/pactown.toml /etc/pactown/pactown.toml
COPY --chmod=755 deploy/container-entrypoint /usr/local/sbin/
# It is root in there: each tenant gets a login, and the launcher takes root away from what tenants run.
ENTRYPOINT ["/usr/local/sbin/container-entrypoint"]
CMD ["pactown-runner", "serve"]
