"""The server that ``bench`` and ``evaluate`` measure: started for them, or running already."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sere_sglang import config
from sere_sglang.cli.borrowed import settings_borrowed
from sere_sglang.errors import PATH_SHOWN, PREFIX, SereError, cut
from sere_sglang.files import one_writer
from sere_sglang.measure.routing import Routing, routing_of
from sere_sglang.measure.server import NotServing, Server, live_state, serve
from sere_sglang.names import AUTO
from sere_sglang.options import SereConfig
from sere_sglang.schedule.auto_rule import RuleChoice
from sere_sglang.schedule.settings import Limits, Settings

FORCING_FLAG = "--enable-custom-logit-processor"
_FLAGS = ("--chunked-prefill-size=16384", "--disable-radix-cache", FORCING_FLAG)
"""A batch is prefilled at once, as often as it is sent, and decodes in lockstep."""
_ADDRESS = (
    "--port", "--host", "--config",
    "--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs", "--ssl-keyfile-password",
)  # fmt: skip
"""Where the server would be, --config in a file; a command chooses that, and speaks HTTP."""


@dataclass(frozen=True)
class Asked:
    """Which server: of `model`, with SGLang's flags, or at `url`."""

    model: str | None
    url: str | None
    api_key: str | None = None
    device: str = "auto"
    server_args: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise `SereError`, naming the flag, for what no server can be made of."""
        if (self.model is None) == (self.url is None):
            raise SereError("give --model MODEL to start a server, or --url URL of one that runs")
        if self.device not in ("auto", "cpu", "cuda"):
            raise SereError(f"--device {self.device}: choose from auto, cpu, cuda")
        if self.url is not None and self.server_args:
            raise SereError(
                f"--url {self.url}: its server has its flags already; drop "
                f"'-- {' '.join(self.server_args)}', or give --model instead"
            )
        _refuse_address(self.server_args)
        if self.model is not None and not self._names_profile:
            _require_profile(self.model, self.server_args)

    @property
    def command(self) -> str:
        """What was typed, for the results; where the program lies is nobody's business."""
        program, *arguments = sys.argv
        return shlex.join([Path(program).name, *without_keys(arguments)])

    def log(self, folder: Path) -> str:
        """Where the server says what went wrong."""
        return str(folder / "sere.log") if self.url is None else f"the log of {self.url}"

    @property
    def _names_profile(self) -> bool:
        return any(flag.partition("=")[0] == "--sere-profile" for flag in self.server_args)


@dataclass
class Served:
    """The servers under way: ``{"sere": ...}``, and ``"plain"`` where that was asked for.

    base: the settings that the SERE server had; about: for the results, what was measured.
    """

    servers: dict[str, Server]
    base: dict[str, Any]
    state: dict[str, Any]
    info: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def sere(self) -> Server:
        return self.servers["sere"]

    @property
    def auto_rule(self) -> RuleChoice:
        """What ``auto`` is on this server."""
        return RuleChoice(**self.state["auto_rule"])

    @property
    def cannot_force(self) -> str | None:
        """Why text cannot be walked, which quality is measured by; None where it can."""
        if not self.info.get("enable_custom_logit_processor"):
            return f"the server at {self.sere.url} runs without {FORCING_FLAG}"
        if self.info.get("speculative_algorithm"):
            return "with speculative decoding a step's tokens are not the text's"
        return None

    def points(
        self, chosen: list[Routing] | None, usual: Sequence[str]
    ) -> tuple[list[Routing], dict[str, str]]:
        """Those to measure, with all their settings; and of the usual ones, where none was chosen,
        those that this server does not take, with the reason. Raises `SereError` for a chosen one
        that it does not take."""
        taken, left_out = [], {}
        for routing in chosen or map(routing_of, usual):
            try:
                own = routing.under(self.auto_rule)
                Settings.from_state(self.state).updated(
                    own.settings or {}, Limits.from_state(self.state)
                )
                taken.append(own.over(self.base))
            except SereError as error:
                if chosen is not None:
                    raise SereError(f"--points {routing.name}: {error}") from None
                left_out[routing.name] = str(error)
        return taken, left_out

    def tokenizer(self) -> Any:
        """The server's."""
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()  # a whole file is longer than a model's context
        path = self.info.get("tokenizer_path") or self.info["model_path"]
        try:
            return AutoTokenizer.from_pretrained(
                path,
                revision=self.info.get("revision"),
                trust_remote_code=bool(self.info.get("trust_remote_code")),
            )
        except (OSError, ValueError) as error:
            raise SereError(
                f"the server's tokenizer {cut(str(path), PATH_SHOWN)} cannot be read here "
                f"({str(error).splitlines()[0]}); run this command on the server's machine"
            ) from None


@contextlib.contextmanager
def served(asked: Asked, logs: Path, rows: int, *, plain: bool = False) -> Iterator[Served]:
    """Start the server, or find it, for batches of up to `rows`; leave a found one as it was.

    Raises `SereError` for what the user can fix.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(one_writer(logs))
        if asked.url is not None:
            servers = {"sere": Server(asked.url, api_key=asked.api_key)}
        else:
            servers = _started(stack, asked, logs, rows, plain)
        if asked.url is not None:
            stack.enter_context(settings_borrowed(servers["sere"], logs))
        state = live_state(servers["sere"])
        if state.get("failed"):
            raise SereError(
                f"{servers['sere'].url}: its re-routing has failed ({state['failed']}); start it "
                "again, by /set_internal_state or with the server"
            )
        info = servers["sere"].get("/server_info")
        _check_room(info, rows)
        base = dataclasses.asdict(Settings.from_state(state))
        about = {
            "model": info["model_path"],
            "sglang": info.get("version"),
            "server": asked.url or without_keys(asked.server_args),
            "profile": info["sere"]["profile"],
            "settings": base,
        }
        yield Served(servers, base, state, info, about)


def without_keys(arguments: Sequence[str]) -> list[str]:
    """A command line that may be kept: the values of ``--api-key`` and the like are not."""
    kept: list[str] = []
    for argument in arguments:
        name, given, _ = argument.partition("=")
        if given and name.endswith("-key"):
            kept.append(f"{name}=...")
        else:
            kept.append("..." if kept and kept[-1].endswith("-key") else argument)
    return kept


@contextlib.contextmanager
def one_line_errors(where: str) -> Iterator[None]:
    """A server that dies under a measurement is an error of one line, not a traceback."""
    import aiohttp

    try:
        yield
    except SereError:
        raise
    except (aiohttp.ClientError, OSError, RuntimeError) as error:
        said = cut((str(error).strip().splitlines() or [type(error).__name__])[0], 200)
        raise SereError(f"the server stopped answering ({said}); see {where}") from None


def _started(
    stack: contextlib.ExitStack, asked: Asked, logs: Path, rows: int, plain: bool
) -> dict[str, Server]:
    from sere_sglang.calibration.job import flag_value, prepare_device

    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # SGLang's imports warn in every process
    warnings.simplefilter("ignore")
    assert asked.model is not None
    device = prepare_device(asked.device)
    flags = list(_FLAGS)
    if device == "cpu":  # SGLang's CPU engine takes all memory for its cache otherwise
        flags.append(f"--max-total-tokens={16384 + 64 * rows}")
    key = flag_value(asked.server_args, "--api-key")
    servers = {}
    for name, own in (("plain", []), ("sere", _sere_args(asked.server_args)))[not plain :]:
        log = logs / f"{name}.log"
        arguments = _plain_args(asked.server_args) if name == "plain" else asked.server_args
        try:
            servers[name] = stack.enter_context(
                serve(asked.model, log, *flags, *own, *arguments, device=device, api_key=key)
            )
        except NotServing as error:
            raise SereError(_refusal(error, plain)) from None
    return servers


def _check_room(info: dict[str, Any], rows: int) -> None:
    """Raise `SereError` where so many rows do not decode at once."""
    state = info["internal_states"][0]
    most = state.get("effective_max_running_requests_per_dp")
    if most is not None and most * (info.get("dp_size") or 1) < rows:
        raise SereError(
            f"{rows} streams at once: the server decodes {most} at most; give it more memory or a "
            "larger --max-running-requests, or ask for fewer"
        )


def _sere_args(server_args: tuple[str, ...]) -> list[str]:
    """The rule that a CPU engine has by default, on a GPU too, whose server under `similarity` has
    no other to measure."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    config.add_cli_args(parser)
    try:
        given = config.from_namespace(parser.parse_known_args(server_args)[0])
    except argparse.ArgumentError:  # which SGLang is about to explain
        given = SereConfig()
    named = given.sere_rule is None and given.rule == AUTO
    return ["--moe-backend=sere", *(["--sere-rule=auto"] if named else [])]


def _plain_args(server_args: tuple[str, ...]) -> list[str]:
    """Without SERE's own."""
    kept: list[str] = []
    drop_value = False
    for flag in server_args:
        ours = flag.startswith(("--sere-", "--moe-backend"))
        if not ours and not (drop_value and not flag.startswith("--")):
            kept.append(flag)
        drop_value = ours and "=" not in flag
    return kept


def _refusal(error: NotServing, plain: bool) -> str:
    lines = [x.strip() for x in error.log.read_text(errors="replace").splitlines() if x.strip()]
    ours = [line.partition(PREFIX)[2] for line in lines if PREFIX in line]
    if ours:
        return ours[-1]
    errors = [line for line in lines if "Error" in line or "error:" in line]
    said = cut((errors or lines or ["no output"])[-1], 200)
    more = (
        "; --plain needs room for two servers: give each its share, for instance "
        "-- --mem-fraction-static 0.4, or drop it" if plain else ""
    )  # fmt: skip
    return f"the {error.what} ({said}); its log is {error.log}{more}"


def _refuse_address(server_args: tuple[str, ...]) -> None:
    """Of two ``--port`` SGLang takes the last, also cut short; the command waits at the first."""
    for argument in server_args:
        name = argument.partition("=")[0]
        if len(name) > len("--p") and any(flag.startswith(name) for flag in _ADDRESS):
            raise SereError(
                f"-- {name}: the command chooses the address of the server that it starts; drop "
                f"{name}, or measure a server that runs with --url"
            )


def _require_profile(model: str, server_args: tuple[str, ...]) -> None:
    from sere_sglang.calibration import existing_profile, revision_of

    revision = revision_of(server_args)
    if existing_profile(model, revision) is None:
        more = f" -- --revision {revision}" if revision else ""
        raise SereError(
            f"--model {model}: it has no profile yet; write one, once, with 'sere-sglang calibrate "
            f"--model {model}{more}', or name yours: -- --sere-profile FILE"
        )
