"""A real Envoy in front of servers, which it checks and balances over gRPC."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.fathom_command import free_ports

ENVOY = Path(sys.executable).with_name("envoy")
# A server that answers NOT_SERVING gets no more calls after an interval and a check's time.
CHECK_SECONDS = 1
_TYPE = "type.googleapis.com/envoy.extensions"


def _address(port: int) -> dict[str, Any]:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def configuration(port: int, servers: Sequence[int]) -> dict[str, Any]:
    """Return what leads calls from ``port`` to those of the servers that are SERVING.

    There is no retry, so what a server fails the caller sees.
    """
    manager = {
        "@type": f"{_TYPE}.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "fathom",
        "codec_type": "HTTP2",
        "stream_idle_timeout": "0s",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "fathom",
                    "domains": ["*"],
                    "routes": [
                        {
                            "match": {"prefix": "/"},
                            # Clients' deadlines end calls.
                            "route": {"cluster": "fathom", "timeout": "0s"},
                        }
                    ],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{_TYPE}.filters.http.router.v3.Router"},
            }
        ],
    }
    cluster = {
        "name": "fathom",
        "type": "STATIC",
        "lb_policy": "LEAST_REQUEST",
        "connect_timeout": "1s",
        # No server that is not SERVING is called, even if none is.
        "common_lb_config": {"healthy_panic_threshold": {"value": 0}},
        "typed_extension_protocol_options": {
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": f"{_TYPE}.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}},
            }
        },
        "health_checks": [
            {
                "timeout": "5s",
                "interval": f"{CHECK_SECONDS}s",
                "no_traffic_interval": f"{CHECK_SECONDS}s",
                "unhealthy_threshold": 1,
                "healthy_threshold": 1,
                "grpc_health_check": {"service_name": "fathom.v1.Inference"},
            }
        ],
        "load_assignment": {
            "cluster_name": "fathom",
            "endpoints": [
                {
                    "lb_endpoints": [
                        {"endpoint": {"address": _address(server)}} for server in servers
                    ]
                }
            ],
        },
    }
    return {
        "static_resources": {
            "listeners": [
                {
                    "name": "grpc",
                    "address": _address(port),
                    "filter_chains": [
                        {
                            "filters": [
                                {
                                    "name": "envoy.filters.network.http_connection_manager",
                                    "typed_config": manager,
                                }
                            ]
                        }
                    ],
                }
            ],
            "clusters": [cluster],
        }
    }


@contextmanager
def running_envoy(directory: Path, servers: Sequence[int]) -> Iterator[str]:
    """Yield the address of an Envoy that balances over the servers' ports."""
    (port,) = free_ports(1)
    path = directory / "envoy.json"
    path.write_text(json.dumps(configuration(port, servers)))
    with (directory / "envoy.log").open("wb") as log:
        process = subprocess.Popen(
            [
                ENVOY,
                *("--config-path", path),
                "--use-dynamic-base-id",
                *("--concurrency", "1"),
                *("--log-level", "warning"),
            ],
            stdout=log,
            stderr=log,
        )
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()
