"""deploy/ and the Dockerfiles, held to what reads them: no docker and no cluster needed."""

from __future__ import annotations

import argparse
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from sglang.srt.server_args import ServerArgs

import sere_sglang
from sere_sglang import config
from sere_sglang.config_check import checked
from sere_sglang.patches import TESTED_VERSIONS

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
PORT, UID = 30000, 10001
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())
KUSTOMIZATION: dict[str, Any] = yaml.safe_load(
    (DEPLOY / "kubernetes" / "kustomization.yaml").read_text()
)
MANIFESTS: list[dict[str, Any]] = [
    manifest
    for name in KUSTOMIZATION["resources"]
    for manifest in yaml.safe_load_all((DEPLOY / "kubernetes" / name).read_text())
]
DEPLOYMENTS = {m["metadata"]["name"]: m for m in MANIFESTS if m["kind"] == "Deployment"}
SERVICES = {m["metadata"]["name"]: m for m in MANIFESTS if m["kind"] == "Service"}
DOCKERFILES = {name: (ROOT / name).read_text() for name in ("Dockerfile", "Dockerfile.cpu")}


def _instructions(name: str) -> list[tuple[str, str]]:
    """(INSTRUCTION, rest) of a Dockerfile, lines joined."""
    lines = [x for x in DOCKERFILES[name].splitlines() if not x.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    found = re.findall(r"^([A-Z]+)\s+(.+)$", joined, re.MULTILINE)
    assert {word for word, _ in found} <= {
        "ARG", "FROM", "ENV", "RUN", "COPY", "WORKDIR", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK",
        "ENTRYPOINT", "CMD",
    }  # fmt: skip
    return found


def _served(arguments: list[str]) -> argparse.Namespace:
    """Parsed as SGLang with our flags parses them; unknown ones fail."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    ServerArgs.add_cli_args(parser)
    config.add_cli_args(parser)
    given = parser.parse_args(arguments)
    assert checked(config.from_namespace(given)).enabled
    return given


@pytest.mark.parametrize("name", DOCKERFILES)
def test_images(name: str) -> None:
    parts = _instructions(name)
    last = dict(parts)
    assert [word for word, _ in parts].index("FROM") <= 1, "build arguments, then the base"
    assert not re.search(r":latest|secret|password|--index-url", DOCKERFILES[name])
    # Not root when it serves, and whatever is asked for in a build runs before that or as it.
    assert last["USER"] == "${USER_ID}" and f"USER_ID={UID}" in DOCKERFILES[name]
    assert last["EXPOSE"] == str(PORT) and f"127.0.0.1:{PORT}/health" in last["HEALTHCHECK"]
    command = json.loads(last["ENTRYPOINT"])
    assert command[:2] == ["sglang", "serve"] and f"--port={PORT}" in command
    for word, rest in parts:
        if word == "COPY":
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                ignored = (ROOT / ".dockerignore").read_text().splitlines()
                assert source.rstrip("/") not in ignored


def test_the_image_has_the_tested_sglang() -> None:
    (tag,) = re.findall(
        r"ARG SGLANG_IMAGE=lmsysorg/sglang:v([\d.]+)$", DOCKERFILES["Dockerfile"], re.M
    )
    assert tag in TESTED_VERSIONS
    assert f"sglang=={tag}" in (ROOT / "requirements.lock").read_text()


def test_the_cluster_runs_this_version() -> None:
    (container,) = DEPLOYMENTS["server"]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"sere-sglang:{sere_sglang.__version__}"


def test_the_cpu_image_serves_the_demo_model() -> None:
    last = dict(_instructions("Dockerfile.cpu"))
    given = _served([*json.loads(last["ENTRYPOINT"])[2:], *json.loads(last["CMD"])])
    assert (ROOT / given.model_path / "sere_profile.safetensors").is_file()
    assert given.device == "cpu" and given.enable_metrics and given.max_total_tokens
    assert "SGLANG_USE_CPU_ENGINE=1" in DOCKERFILES["Dockerfile.cpu"]


def test_the_commands_in_the_comments_parse() -> None:
    text = DOCKERFILES["Dockerfile"]
    (example,) = re.findall(r"docker run .*?sere-sglang \\\n#\s+(.*)", text)
    assert _served(shlex.split(example)).model_path


def test_compose() -> None:
    services = COMPOSE["services"]
    assert services.keys() == {"server", "prometheus", "grafana"}
    for name, service in services.items():
        assert ("build" in service) != ("image" in service), name
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service.get("image", "a:1.0.0")), "pinned"
        for port in service["ports"]:
            assert re.fullmatch(r"127\.0\.0\.1:(\d+):\1", port), "of this machine only"
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (DEPLOY / source).exists(), source
    assert services["server"]["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]
    context = DEPLOY / services["server"]["build"]["context"]
    (default,) = re.findall(r":-(.*)}", services["server"]["build"]["dockerfile"])
    assert (context / default).is_file()


def test_prometheus_finds_the_server_and_grafana_finds_prometheus() -> None:
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (job,) = scraped["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"server:{PORT}"]}]
    provisioned = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioned / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    assert source["url"] == "http://prometheus:9090" and source["isDefault"]
    (provider,) = yaml.safe_load((provisioned / "dashboards" / "sere.yml").read_text())["providers"]
    folder = provider["options"]["path"]
    mounted = [v.split(":") for v in COMPOSE["services"]["grafana"]["volumes"]]
    assert [str(Path(inside).parent) for path, inside, *_ in mounted if path.endswith(".json")] == [
        folder
    ]
    pod = DEPLOYMENTS["grafana"]["spec"]["template"]["spec"]["containers"][0]
    assert folder in [mount["mountPath"] for mount in pod["volumeMounts"]]


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_deployments(name: str) -> None:
    spec = DEPLOYMENTS[name]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"] == labels
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert "memory" in container["resources"]["limits"]
    assert not container["image"].endswith(":latest") and ":" in container["image"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    generated = {each["name"] for each in KUSTOMIZATION["configMapGenerator"]}
    for volume in pod["volumes"]:
        if "configMap" in volume:
            assert volume["configMap"]["name"] in generated
    ports = {port["name"] for port in container["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if probe in container:
            assert container[probe]["httpGet"]["port"] in ports
    service = SERVICES[name]["spec"]
    assert service["selector"] == labels
    (port,) = service["ports"]
    assert port["targetPort"] in ports and port["port"] == container["ports"][0]["containerPort"]


def test_the_deployed_server() -> None:
    pod = DEPLOYMENTS["server"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    given = _served(container["args"])
    assert given.api_key and given.admin_api_key and given.enable_metrics
    names = {each["name"] for each in container["env"]}
    assert set(re.findall(r"\$\((\w+)\)", " ".join(container["args"]))) <= names
    assert all("secretKeyRef" in each["valueFrom"] for each in container["env"])
    assert container["ports"][0]["containerPort"] == PORT
    assert pod["securityContext"]["runAsUser"] == UID
    assert {"cache": "/cache"}.items() <= {
        mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]
    }.items()
    claims = {m["metadata"]["name"] for m in MANIFESTS if m["kind"] == "PersistentVolumeClaim"}
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] in claims


def test_kustomization_names_files_that_are_there() -> None:
    for generator in KUSTOMIZATION["configMapGenerator"]:
        for file in generator["files"]:
            assert (DEPLOY / "kubernetes" / file.split("=")[-1]).is_file(), file
    assert len({(m["kind"], m["metadata"]["name"]) for m in MANIFESTS}) == len(MANIFESTS)
    # Compose and Kubernetes run the same versions.
    for name in ("prometheus", "grafana"):
        pod = DEPLOYMENTS[name]["spec"]["template"]["spec"]
        assert pod["containers"][0]["image"] == COMPOSE["services"][name]["image"]


def test_the_dashboard_has_a_source_for_every_panel() -> None:
    board = json.loads((ROOT / "launch" / "grafana.json").read_text())
    variables = {each["name"] for each in board["templating"]["list"]}
    for panel in board["panels"]:
        assert panel["datasource"]["uid"].strip("${}") in variables
