"""Entry point ``sglang.serve_backends: sere``: ``sglang serve --model-type sere``.

SGLang's language-model server with ``--moe-backend sere`` filled in. It exists because
``sglang serve --help`` returns before SGLang loads plugins: this name is listed there, and
``sglang serve --model-type sere --help`` prints every flag, ours included.
"""

from __future__ import annotations

from sglang.cli.serve_backends import SERVE_BACKEND_API_VERSION, ServeBackend, ServeRequest


def create() -> ServeBackend:
    return ServeBackend(api_version=SERVE_BACKEND_API_VERSION, run=_run)


def _run(request: ServeRequest) -> None:
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    load_plugins()
    argv = list(request.argv)
    if not any(arg.split("=", 1)[0] == "--moe-backend" for arg in argv):
        argv += ["--moe-backend", "sere"]
    run_server(prepare_server_args(argv))
