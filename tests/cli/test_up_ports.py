"""``splitserve up --admin-port``: where the admin listeners of all services are."""

from __future__ import annotations

import pytest

from splitserve.cli.up import Ports, may_use_sockets, plan
from tests.command_line import run_command


def admin_ports(base: str, *, is_fused: bool = False) -> dict[str, dict[str, str]]:
    """The settings of each service that are about them."""
    ports = Ports(http=1, grpc=2, preprocess=3, predict=4, jobs=5, admin=base)
    services = plan("models", "127.0.0.1", ports, is_fused, "jobs")
    return {each.name: {key: value for key, value in each.environment.items() if "ADMIN" in key} for each in services}


def test_a_base_moves_all() -> None:
    """With the distances of the usual ports."""
    found = admin_ports("9002")

    assert found.keys() == {"proxy", "preprocess", "predict", "jobs"}
    for settings in (*found.values(), *admin_ports("9002", is_fused=True).values()):
        assert settings == {
            "PROXY_ADMIN_PORT": "9002", "PREPROCESS_ADMIN_PORT": "9012", "PREDICT_ADMIN_PORT": "9022", "JOBS_ADMIN_PORT": "9032",
        }  # fmt: skip


@pytest.mark.parametrize("base", ["0", "off"])
def test_any_and_none_are_for_all(base: str) -> None:
    """No port is added to them."""
    assert {value for settings in admin_ports(base).values() for value in settings.values()} == {base}


def test_without_the_option_the_settings_decide() -> None:
    """`PROXY_ADMIN_PORT` and the others, from the environment."""
    assert set(map(len, admin_ports("").values())) == {0}


PORTS = Ports(http=1, grpc=2, preprocess=3, predict=4, jobs=5)


def test_each_hop_is_a_unix_socket_that_the_next_service_listens_on() -> None:
    """Besides its port."""
    predict, preprocess, proxy = (each.environment for each in plan("models", "127.0.0.1", PORTS, False, sockets_dir="/run/s"))

    assert f"unix:{predict['PREDICT_GRPC_SOCKET']}" == preprocess["PREPROCESS_PREDICT_TARGET"]
    assert f"unix:{preprocess['PREPROCESS_GRPC_SOCKET']}" == proxy["PROXY_PREPROCESS_TARGET"]
    assert (preprocess["PREPROCESS_GRPC_PORT"], predict["PREDICT_GRPC_PORT"]) == ("3", "4")


@pytest.mark.parametrize(
    "name",
    ["PREPROCESS_WORKERS", "PREDICT_TLS_CERT_FILE", "PROXY_NEXT_CA_FILE", "PREPROCESS_NEXT_CA_FILE", "PREDICT_GRPC_SOCKET"],
)
def test_several_workers_and_tls_keep_the_hops_on_tcp(name: str) -> None:
    assert may_use_sockets({"PROXY_WORKERS": "2", "PROXY_TLS_CERT_FILE": "/a", "PREDICT_GRACE_S": "1"})
    assert not may_use_sockets({name: "2"})


@pytest.mark.parametrize("base", ["none", "-1", "65530"])
def test_what_is_no_port_is_refused(base: str) -> None:
    """Nothing is started; the last one leaves no room for the others."""
    result = run_command("up", "--admin-port", base)

    assert result.exit_code == 2
    assert "--admin-port" in result.output
