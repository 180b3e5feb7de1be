"""Which address gloo and NCCL take, on this machine's interfaces."""

from __future__ import annotations

import socket

import pytest

from pause_megatron.distributed.interfaces import _named, interface_towards, interfaces, own_endpoint
from pause_megatron.errors import ConfigError

NAMES = ["lo", "docker0", "eth0", "eth1", "ib0"]


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        ("eth", ["eth0", "eth1"]),
        ("eth1,ib", ["eth1", "ib0"]),
        ("=eth", []),
        ("=eth0,ib0", ["eth0", "ib0"]),
        ("^docker,lo", ["eth0", "eth1", "ib0"]),
        ("^=eth0,lo", ["docker0", "eth1", "ib0"]),
    ],
)
def test_nccls_variable_is_a_list_of_prefixes_or_names_or_what_to_leave_out(given, chosen):
    assert _named(NAMES, given) == chosen


@pytest.mark.parametrize(("backend", "variable"), [("gloo", "GLOO_SOCKET_IFNAME"), ("nccl", "NCCL_SOCKET_IFNAME")])
def test_a_variable_decides_and_must_name_an_interface(backend, variable):
    endpoint = own_endpoint(backend, {variable: "lo"})
    assert (endpoint.address, endpoint.interface, endpoint.reason) == ("127.0.0.1", "lo", f"{variable}=lo")
    with pytest.raises(
        ConfigError, match=f"{variable}=nothing0: expected one of lo.* \\(the interfaces of .*, got 'nothing0'"
    ):
        own_endpoint(backend, {variable: "nothing0"})


def test_an_endpoint_is_one_of_the_interfaces():
    found = interfaces()
    assert found["lo"] == "127.0.0.1" and interface_towards("127.0.0.1") == "lo"
    for backend in ("gloo", "nccl"):
        endpoint = own_endpoint(backend, {})
        assert endpoint is None or endpoint.address == found[endpoint.interface]
        if endpoint is not None:
            with socket.create_server((endpoint.address, 0)):
                pass
