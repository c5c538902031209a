from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cgroups import FormatError, format_bytes, parse_bytes, parse_cpu
from cgroups.formats import (
    parse_count,
    parse_cpus,
    parse_flat,
    parse_nested,
    parse_proc_cgroup,
    parse_swaps,
    parse_value,
    render_cpu_max,
    render_cpus,
)

MIB = 2**20


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("4096B", 4096),
        ("1K", 1024),
        ("256M", 256 * MIB),
        ("256m", 256 * MIB),
        ("256MB", 256 * MIB),
        ("256 MiB", 256 * MIB),
        (" 1.5G ", 1536 * MIB),
        ("2T", 2**41),
        ("0.3K", 307),
        (2**63 - 1, 2**63 - 1),
        ("max", "max"),
        ("MAX", "max"),
    ],
)
def test_sizes_are_powers_of_1024(text: int | str, number: int | str) -> None:
    assert parse_bytes(text) == number


@pytest.mark.parametrize(
    "value",
    ["", "M", "-1", -1, "1X", "1KM", "1iB", "1 2", "1e9", "1,5G", "٣M", 2**63, "9999999T", True, None, 1.5, b"1M"],
)
def test_what_is_no_size_is_refused_with_a_remedy(value: Any) -> None:
    with pytest.raises(FormatError) as caught:
        parse_bytes(value, what="log_cap")
    assert caught.value.message == f"log_cap cannot be {value!r}"
    assert caught.value.remedy is not None
    assert caught.value.value == str(value)


def test_digits_without_end_are_refused_in_no_time() -> None:
    with pytest.raises(FormatError):
        parse_bytes("9" * 1_000_000)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "50000 100000"),
        ("50%", "50000 100000"),
        ("1.5", "150000 100000"),
        (2, "200000 100000"),
        ("250 %", "250000 100000"),
        (0.01, "1000 100000"),
        ("max", "max 100000"),
        (" Max ", "max 100000"),
    ],
)
def test_cpu_is_cores_or_percent_of_one(value: float | str, text: str) -> None:
    assert render_cpu_max(parse_cpu(value)) == text


@pytest.mark.parametrize(
    "value",
    [
        0,
        0.0,
        -1,
        0.009,
        "0%",
        "half",
        "50 000",
        "1/2",
        float("nan"),
        float("inf"),
        "inf",
        1e300,
        10**400,
        "9" * 20,
        True,
        None,
    ],
)
def test_what_is_no_amount_of_cpu_is_refused(value: Any) -> None:
    with pytest.raises(FormatError, match="cpu_max cannot be"):
        parse_cpu(value, what="cpu_max")


@given(st.integers(1_000, 10**9))
def test_cores_read_back_as_the_same_quota(quota: int) -> None:
    cores = quota / 100_000
    assert parse_cpu(cores).quota == quota
    assert parse_cpu(parse_cpu(cores).cores).quota == quota


@pytest.mark.parametrize(("value", "number"), [(0, 0), (64, 64), ("64", 64), ("max", "max")])
def test_counts(value: int | str, number: int | str) -> None:
    assert parse_count(value) == number


@pytest.mark.parametrize("value", ["", "-1", -1, 1.0, "1.0", True, "64K", None])
def test_what_is_no_count_is_refused(value: Any) -> None:
    with pytest.raises(FormatError):
        parse_count(value)


@given(st.integers(0, 2**62))
def test_a_size_for_people_reads_back_within_five_percent(number: int) -> None:
    again = parse_bytes(format_bytes(number))
    assert again != "max"
    assert abs(again - number) <= number * 0.05


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (256 * MIB, "256 MiB"), (1536 * MIB, "1.5 GiB"), ("max", "max")],
)
def test_sizes_for_people(number: Any, text: str) -> None:
    assert format_bytes(number) == text


def test_single_values() -> None:
    assert parse_value("4096\n") == 4096
    assert parse_value("max\n") == "max"
    with pytest.raises(FormatError):
        parse_value("")


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,12}", fullmatch=True), st.integers(0, 2**64 - 1)))
def test_flat_keyed_text_reads_as_it_was_written(values: dict[str, int]) -> None:
    assert parse_flat("".join(f"{key} {number}\n" for key, number in values.items())) == values


@pytest.mark.parametrize("text", ["low", "low x", "low 1 2"])
def test_what_is_not_flat_keyed_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        parse_flat(text)


def test_nested_keyed_text() -> None:
    assert parse_nested("8:0 rbytes=1 wbytes=2\n8:16 rbytes=3\n") == {
        "8:0": {"rbytes": "1", "wbytes": "2"},
        "8:16": {"rbytes": "3"},
    }
    assert parse_nested("") == {}


@pytest.mark.parametrize("text", ["some avg10", "avg10=1 x=2", "\n", "some =1"])
def test_what_is_not_nested_keyed_is_refused(text: str) -> None:
    with pytest.raises(FormatError):
        parse_nested(text)


@pytest.mark.parametrize("parse", [parse_value, parse_flat, parse_nested, parse_proc_cgroup])
@given(text=st.text(max_size=40))
def test_parsers_answer_or_raise_a_format_error(parse: Any, text: str) -> None:
    with suppress(FormatError):
        parse(text)


def test_proc_cgroup_with_colons_in_a_path() -> None:
    text = "4:memory:/a\n2:cpu,cpuacct:/\n1:name=systemd:/x\n0::/odd:name.slice\n"
    assert parse_proc_cgroup(text) == ("/odd:name.slice", frozenset({"memory", "cpu", "cpuacct"}))
    assert parse_proc_cgroup("4:memory:/a\n") == (None, frozenset({"memory"}))


def test_swaps() -> None:
    heading = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
    assert not parse_swaps(heading)
    assert not parse_swaps("")
    assert parse_swaps(heading + "/dev/zram0   partition\t1024\t0\t100\n")


@pytest.mark.parametrize(
    ("text", "canonical"),
    [("", ""), ("0", "0"), ("3,1-2", "1-3"), (" 0-1, 3 ", "0-1,3"), ("5,5,4-6,8191", "4-6,8191"), ("0,2,4", "0,2,4")],
)
def test_lists_of_cpus_are_brought_to_the_kernels_form(text: str, canonical: str) -> None:
    assert render_cpus(parse_cpus(text)) == canonical


@given(st.frozensets(st.integers(0, 8191)))
def test_lists_of_cpus_survive(cpus: frozenset[int]) -> None:
    assert parse_cpus(render_cpus(cpus)) == cpus


@pytest.mark.parametrize("value", ["-1", "1-", "2-1", "0,,1", ",", "all", "8192", "99999999", "٣", None, 1, True])
def test_what_is_no_list_of_cpus_is_refused(value: Any) -> None:
    with pytest.raises(FormatError):
        parse_cpus(value)
