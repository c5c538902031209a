"""Answers as they look, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

__all__ = [
    "EVENTS",
    "EXECUTED",
    "HEARD",
    "METRICS",
    "RECORDS",
    "SANDBOX",
    "SANDBOXES",
    "STATS",
    "TIER",
    "TIERS",
    "USER",
    "USERS",
    "USER_STATS",
]

USER: dict[str, Any] = {
    "saas_user_id": "auth0|123456",
    "linux_username": "pactown_a1b2c3d4",
    "linux_uid": 60001,
    "linux_gid": 60001,
    "home_dir": "/home/pactown_users/pactown_a1b2c3d4",
    "created_at": 1705410000.0,
}
TIER: dict[str, Any] = {"user_id": "auth0|123456", "tier": "pro", "blocked": False}
TIERS: dict[str, Any] = {
    "tiers": [
        {
            "name": "pro",
            "default_limits": None,
            "tenant_limits": {"memory_max": 4294967296, "cpu_max": 2.0, "pids_max": 1024},
            "tenant_disk_max": None,
            "tenant_inodes_max": None,
            "max_sandboxes": 20,
            "starts_per_hour": 500,
        }
    ],
    "count": 1,
}
USERS: dict[str, Any] = {"users": [USER], "count": 1}
USER_STATS: dict[str, Any] = {
    "user": {"saas_user_id": "auth0|123456", "linux_username": "pactown_a1b2c3d4"},
    "sandbox_count": 5,
    "total_size_mb": 234.5,
}
_NO_CAPABILITIES = dict.fromkeys(("inheritable", "permitted", "effective", "bounding", "ambient"), 0)
SANDBOX: dict[str, Any] = {
    "user_id": "auth0|123456",
    "service_id": "my-api",
    "kind": "service",
    "run_id": "6f1d3a0c9b2e4d57",
    "state": "running",
    "ready": True,
    "pid": 4711,
    "started_at": 1705410000.0,
    "restarts": 0,
    "command": ["python3", "main.py"],
    "restart": {
        "mode": "always",
        "backoff": 0.5,
        "backoff_max": 60.0,
        "jitter": 0.2,
        "healthy_after": 30.0,
        "max_restarts": 10,
    },
    "limits": {"memory_max": 268435456},
    "isolation": {
        "mode": "root",
        "uid": [60001, 60001, 60001],
        "gid": [60001, 60001, 60001],
        "groups": [],
        "capabilities": _NO_CAPABILITIES,
        "no_new_privs": True,
        "root_regainable": False,
        "cgroup": "/pactown.slice/pactown-a1b2c3d4.slice/my-api.scope",
        "placement": "born",
        "keyring": True,
        "namespaces": [],
        "limits": {"memory.max": "268435456"},
    },
    "outcome": None,
    "last_outcome": None,
}
SANDBOXES: dict[str, Any] = {"sandboxes": [SANDBOX], "count": 1, "next": None}
STATS: dict[str, Any] = {
    "memory_current": 8_392_704,
    "memory_peak": 9_175_040,
    "cpu_usage_usec": 52_310,
    "pids_current": 1,
    "io_rbytes": None,
    "memory_pressure": {"avg10": 0.0, "total_usec": 0, "full_avg10": 0.0, "full_total_usec": 0},
}
EXECUTED: dict[str, Any] = {
    "exit_code": 0,
    "signal": None,
    "timed_out": False,
    "stdout": "hello",
    "stderr": "",
    "stdout_b64": None,
    "stderr_b64": None,
    "dropped": 0,
}
HEARD = """\
event: started
data: {}

event: stdout
data: {"text": "hello"}

event: end
data: {"reason": "exited", "exit_code": 0, "signal": null, "timed_out": false}

"""
RECORDS = """\
id: 7
event: record
data: {"ts": 1705410000.5, "seq": 7, "stream": "stdout", "line": "ready", "partial": false, "dropped_lines": 0, \
"dropped_bytes": 0}

event: end
data: {"reason": "read"}

"""
EVENTS = """\
event: started
data: {"kind": "started", "ts": 1705410000.0, "user_id": "auth0|123456", "service_id": "my-api", "run_id": \
"6f1d3a0c9b2e4d57", "details": {"pid": 4711, "seconds": 0.0017}}

event: end
data: {"reason": "server-stopping"}

"""

METRICS = """\
# HELP pactown_sandboxes Sandboxes that are alive, by their state.
# TYPE pactown_sandboxes gauge
pactown_sandboxes{state="running"} 3.0
"""
